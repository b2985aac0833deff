"""A run's base and adapter in Hugging Face's format: losses of rows, answers to prompts.

The base is the same model with the adapter switched off, so both see the same weights, tokens and
arithmetic.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from scripts._cli import log
from scripts.answer_style import Answer
from scripts.generation import decode_answer, generate_greedy
from scripts.held_out import RowLoss, row_losses
from scripts.ifeval import Prompt
from scripts.recipe import TrainingRecipe, write_atomically
from scripts.render import EncodedConversation, encode_prompt

BASE, TUNED = "base", "tuned"
QUESTIONS = ("Explain recursion with an example.",)
MAX_QUESTION_TOKENS = 120
BATCH_SIZE = 16


class HuggingFaceModels:
    """Base and adapter of a run; the weights are loaded when they are first needed."""

    def __init__(self, recipe: TrainingRecipe) -> None:
        self._recipe = recipe

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        import torch

        from scripts.model_loading import load_model

        # The GGUF is merged from 16-bit weights, so those are what is measured wherever they fit.
        # Plain transformers: Unsloth's generate takes no left padding.
        in_4bit = self._recipe.load_in_4bit and torch.cuda.is_available()
        recipe = dataclasses.replace(self._recipe, load_in_4bit=in_4bit, backend="peft")
        model, tokenizer = load_model(recipe)
        from peft import PeftModel

        return PeftModel.from_pretrained(model, str(recipe.run_dir / "adapter")).eval(), tokenizer

    @contextlib.contextmanager
    def _model(self, role: str) -> Iterator[Any]:
        model, _ = self._loaded
        with model.disable_adapter() if role == BASE else contextlib.nullcontext():
            yield model

    def losses(self, role: str, rows: Sequence[EncodedConversation]) -> list[RowLoss]:
        """Measure the rows; see `scripts.held_out.row_losses`."""
        with self._model(role) as model:
            return row_losses(model, rows)

    def answer_questions(self, role: str) -> list[str]:
        """Answer ``QUESTIONS`` as chat does: greedily, with a mild repeat penalty."""
        import torch

        _, tokenizer = self._loaded
        texts = []
        for question in QUESTIONS:
            prompt = encode_prompt(tokenizer, [{"role": "user", "content": question}])
            with self._model(role) as model, torch.no_grad():
                ids = torch.tensor([prompt], device=model.device)
                output = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=min(MAX_QUESTION_TOKENS, self._recipe.eval_answer_tokens),
                    do_sample=False,
                    repetition_penalty=1.1,
                    use_cache=True,
                    pad_token_id=tokenizer.pad_token_id,
                )
            texts.append(decode_answer(tokenizer, output[0, ids.shape[1] :]).strip())
        return texts

    def answer_prompts(
        self, role: str, prompts: Sequence[Prompt], room: int, path: Path
    ) -> tuple[list[Answer], float]:
        """Answer prompts greedily, without a repeat penalty; batches that ``path`` holds are done.

        Returns:
            The answers in the order of the prompts, and the seconds that all of them took.
        """
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        answers: dict[str, dict[str, Any]] = record.get("answers", {})
        seconds: float = record.get("seconds", 0.0)
        for batch in self._batches(prompts) if len(answers) < len(prompts) else []:
            if all(one.id in answers for one, _ in batch):
                continue
            started = time.monotonic()
            _, tokenizer = self._loaded
            with self._model(role) as model:
                done = generate_greedy(model, tokenizer, [ids for _, ids in batch], room)
            took = time.monotonic() - started
            seconds += took
            for (prompt, _), one in zip(batch, done, strict=True):
                text = decode_answer(tokenizer, one.ids).strip()
                answers[prompt.id] = {"text": text, "tokens": len(one.ids), "ended": one.ended}
            record = {"seconds": round(seconds, 1), "answers": answers}
            write_atomically(path, json.dumps(record, ensure_ascii=False, indent=1) + "\n")
            left = seconds / len(answers) * (len(prompts) - len(answers))
            log(
                f"evaluate: {role} (HF): {len(answers)} of {len(prompts)} prompts answered, "
                f"{sum(len(one.ids) for one in done) / took:.0f} tokens/s, {left:.0f} s left"
            )
        return [Answer(**answers[one.id]) for one in prompts], seconds

    def _batches(self, prompts: Sequence[Prompt]) -> list[list[tuple[Prompt, list[int]]]]:
        """Group prompts of similar length with their token ids.

        Always the same groups, whatever was answered before: neighbours change the last bits.
        """
        _, tokenizer = self._loaded
        encoded = [
            (one, encode_prompt(tokenizer, [{"role": "user", "content": one.prompt}]))
            for one in prompts
        ]
        encoded.sort(key=lambda pair: len(pair[1]))
        return [encoded[at : at + BATCH_SIZE] for at in range(0, len(encoded), BATCH_SIZE)]
