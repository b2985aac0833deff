"""Base against tuned on a run's held-out rows: loss, perplexity, and answers side by side.

Reads ``adapter/`` and ``data/eval.jsonl``, writes ``evaluation.json``. The base is the same model with
the adapter switched off, so both see the same weights, tokens and arithmetic.

    python -m scripts.evaluate_model --config scripts/recipes/smollm2-135m-cpu.yaml
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts._cli import FAILED, MODEL, OK, CommandError, log, run_command
from scripts.conversations import RowRejectedError, to_conversation
from scripts.held_out import held_out_loss
from scripts.prepare_data import load_rows
from scripts.read_rows import check_unreadable, open_rows
from scripts.recipe import TrainingRecipe, parse_recipe, write_atomically
from scripts.render import encode_prompt, encode_rows

QUESTIONS = ("Explain recursion with an example.",)
MAX_ANSWER_TOKENS = 120


def generate_answer(model: Any, tokenizer: Any, question: str) -> str:
    """Answer a question greedily."""
    import torch

    prompt = encode_prompt(tokenizer, [{"role": "user", "content": question}])
    ids = torch.tensor([prompt], device=model.device)
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=MAX_ANSWER_TOKENS,
            do_sample=False,
            repetition_penalty=1.1,
            pad_token_id=tokenizer.pad_token_id,
        )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


def _file_hash(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read_eval_rows(
    recipe: TrainingRecipe, eval_file: Path | None
) -> tuple[Path, list[dict[str, Any]]]:
    if eval_file is None:
        path = recipe.run_dir / "data" / "eval.jsonl"
        return path, load_rows(path)
    rows, unreadable, rejected = [], [], Counter[str]()
    for raw in open_rows(str(eval_file)):
        if raw.error is not None:
            unreadable.append(f"{raw.where}: {raw.error}")
            continue
        try:
            rows.append({"messages": to_conversation(raw.value).messages})
        except RowRejectedError as error:
            rejected[str(error)] += 1
    total = len(rows) + len(unreadable) + rejected.total()
    check_unreadable(str(eval_file), len(unreadable), total, *unreadable[:1] or [""])
    for reason, count in [("unreadable", len(unreadable)), *rejected.most_common()]:
        if count:
            log(f"evaluate: {count} rows of {eval_file} left out: {reason}")
    if not rows:
        raise CommandError(f"--eval-file '{eval_file}' has no usable conversation")
    log(f"evaluate: {len(rows)} of {total} rows of {eval_file} are usable")
    return eval_file, rows


def evaluate(recipe: TrainingRecipe, eval_file: Path | None = None) -> Path:
    """Compare base and tuned; return ``evaluation.json``.

    Raises:
        CommandError: There is no adapter yet, or the rows are unusable.
    """
    adapter_dir = recipe.run_dir / "adapter"
    weights = adapter_dir / "adapter_model.safetensors"
    if not weights.is_file():
        raise CommandError(
            f"'{adapter_dir}' has no adapter; train one: python -m scripts.train_lora --config …",
            MODEL,
        )
    eval_path, raw_rows = _read_eval_rows(recipe, eval_file)
    output = recipe.run_dir / "evaluation.json"
    inputs = _file_hash(weights, eval_path, Path(__file__))
    if output.is_file() and json.loads(output.read_text(encoding="utf-8")).get("inputs") == inputs:
        log(f"evaluate: {output} is up to date")
        return output

    import torch

    from scripts.model_loading import load_model

    # The GGUF is merged from 16-bit weights, so those are what is measured wherever they fit.
    in_4bit = recipe.load_in_4bit and torch.cuda.is_available()
    model, tokenizer = load_model(dataclasses.replace(recipe, load_in_4bit=in_4bit))
    from peft import PeftModel

    tuned = PeftModel.from_pretrained(model, str(adapter_dir))
    rows, _ = encode_rows(tokenizer, raw_rows, recipe.max_length, "held out")
    started = time.monotonic()
    result: dict[str, Any] = {"inputs": inputs, "held_out_file": str(eval_path)}
    with tuned.disable_adapter():
        result["base"] = held_out_loss(tuned, rows).to_json()
        before = [generate_answer(tuned, tokenizer, question) for question in QUESTIONS]
    result["tuned"] = held_out_loss(tuned, rows).to_json()
    after = [generate_answer(tuned, tokenizer, question) for question in QUESTIONS]
    result["answers"] = [
        {"question": question, "base": base, "tuned": answer}
        for question, base, answer in zip(QUESTIONS, before, after, strict=True)
    ]
    result["seconds"] = round(time.monotonic() - started, 1)
    write_atomically(output, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    base, now = result["base"]["loss"], result["tuned"]["loss"]
    log(f"evaluate: held-out loss {base:.4f} -> {now:.4f} ({now / base - 1:+.1%})")
    return output


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate a run; exit 1 when the held-out loss did not fall."""
    parser = argparse.ArgumentParser(description="Base against tuned: evaluation.json of a run.")
    parser.add_argument("--eval-file", type=Path, help="measure on these rows instead")
    recipe, options = parse_recipe("", argv, parser)
    with contextlib.redirect_stdout(sys.stderr):
        output = evaluate(recipe, options.eval_file)
    print(output)
    result = json.loads(output.read_text(encoding="utf-8"))
    return OK if result["tuned"]["loss"] < result["base"]["loss"] else FAILED


if __name__ == "__main__":
    run_command(main)
