"""Contenders of `scripts.benchmark train`: the same model, rows and steps, each in its own process.

``ours`` is what ``scripts.train_lora`` does. ``unsloth`` is what Unsloth's notebooks write: TRL's
SFTTrainer, rows padded, in random order. ``trl`` is TRL, PEFT and bitsandbytes without Unsloth. All
train 4-bit LoRA on 8 rows a step; a name that ends in ``-lean`` adds gradient checkpointing.

    python -m scripts.benchmark_train ours --data rows.jsonl --steps 6       (one measurement, as JSON)
"""

import argparse
import contextlib
import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts._cli import OK, CommandError, run_command
from scripts.conversations import RowRejectedError, to_conversation
from scripts.read_rows import open_rows
from scripts.recipe import EMBEDDED_MODEL, TrainingRecipe

ROWS_PER_STEP = 8
# Rows in a forward pass. The lean notebook takes 2, as Unsloth's do; what is measured without
# checkpointing takes 4, which is faster for every contender.
ROWS_PER_FORWARD = {
    "ours": 4,
    "unsloth": 4,
    "trl": 4,
    "ours-lean": 4,
    "unsloth-lean": 2,
}
_MAX_LENGTH = 512


def _recipe(contender: str, steps: int, model: str) -> TrainingRecipe:
    kind, _, lean = contender.partition("-")
    size = ROWS_PER_FORWARD[contender]
    return TrainingRecipe(
        run_name=contender,
        model_name_or_path=model,
        max_length=_MAX_LENGTH,
        backend="peft" if kind == "trl" else "unsloth",
        use_gradient_checkpointing=bool(lean),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=ROWS_PER_STEP // size,
        max_steps=steps,
        save_steps=steps + 1,
    )


def _read_rows(path: Path, count: int) -> list[list[dict[str, Any]]]:
    conversations = []
    for raw in open_rows(str(path)):
        with contextlib.suppress(RowRejectedError):
            conversations.append(to_conversation(raw.value).messages)
        if len(conversations) == count:
            break
    return conversations


def _make_clock(collated: list[tuple[int, int]]) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Time from the end of the first step, which warms up, to the end of the last."""

        first = last = 0.0
        batches_in_first = 0
        losses: list[float] = []  # noqa: RUF012  one run, one instance

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                self.first, self.batches_in_first = time.monotonic(), len(collated)
            self.last = time.monotonic()

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any
        ) -> None:
            if "loss" in logs:
                self.losses.append(float(logs["loss"]))

    return Clock()


def _counting(collate: Any, collated: list[tuple[int, int]]) -> Any:
    from scripts.padding_free import num_tokens

    def collate_and_count(rows: Any) -> Any:
        batch = collate(rows)
        collated.append((num_tokens(batch), batch["input_ids"].numel()))
        return batch

    return collate_and_count


def _our_trainer(recipe: TrainingRecipe, rows: Any, folder: Path, clock: Any) -> Any:
    from scripts.model_loading import add_adapter, load_model, precision

    model, tokenizer = load_model(recipe)
    from scripts.adapter_trainer import choose_batching, make_trainer
    from scripts.loss_watch import LossWatch
    from scripts.progress import RunProgress
    from scripts.render import encode_rows

    encoded, _ = encode_rows(tokenizer, rows, recipe.max_length, "rows")
    encoded = encoded[: recipe.max_steps * ROWS_PER_STEP]
    model = add_adapter(model, recipe)
    progress = RunProgress(folder / "m.jsonl", folder / "l.png", 1, LossWatch(), is_main=False)
    trainer = make_trainer(
        recipe, model, tokenizer, encoded, encoded[:2], folder, progress,
        choose_batching(recipe, model, encoded), precision().training_arguments,
    )  # fmt: skip
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    trainer.args.load_best_model_at_end = False
    trainer.remove_callback(RunProgress)
    trainer.add_callback(clock)
    return trainer


def _usual_trainer(recipe: TrainingRecipe, rows: Any, folder: Path, clock: Any) -> Any:
    """Build the trainer the way notebooks do, from the texts of the same rows."""
    from scripts.model_loading import add_adapter, load_model, precision

    model, tokenizer = load_model(recipe)
    model = add_adapter(model, recipe)
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback, Trainer
    from trl import SFTConfig, SFTTrainer

    from scripts.render import encode_rows

    on_gpu = torch.cuda.is_available()

    class PlainTrainer(SFTTrainer):
        """TRL asks for a Triton kernel in its loss, which a CPU has not: the model's own loss."""

        def compute_loss(
            self,
            model: Any,
            inputs: Any,
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    # The same rows as ours: those that fit, in the same number.
    encoded, _ = encode_rows(tokenizer, rows, recipe.max_length, "rows")
    ids = [row.input_ids for row in encoded[: recipe.max_steps * ROWS_PER_STEP]]
    is_plain = recipe.backend == "peft" and not on_gpu
    trainer = (PlainTrainer if is_plain else SFTTrainer)(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        args=SFTConfig(
            output_dir=str(folder),
            per_device_train_batch_size=recipe.per_device_train_batch_size,
            gradient_accumulation_steps=recipe.gradient_accumulation_steps,
            max_steps=recipe.max_steps,
            learning_rate=recipe.learning_rate,
            warmup_steps=5,
            logging_steps=1,
            max_length=recipe.max_length,
            optim="adamw_8bit" if on_gpu else "adamw_torch",
            lr_scheduler_type="linear",
            seed=recipe.seed,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=not on_gpu,
            gradient_checkpointing=recipe.use_gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            **precision().training_arguments,
        ),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def measure(contender: str, data: Path, steps: int, model: str) -> dict[str, float]:
    """Train a few steps and measure them.

    Returns:
        Real tokens per second, shares of padding and of starts computed once, peak memory in GB (of
        the process, or of the GPU), and the loss of the last step.
    """
    from scripts.model_loading import import_backend

    recipe = _recipe(contender, steps, model)
    import_backend(recipe)
    import torch

    from scripts.padding_free import token_shares

    # Some rows are longer than the limit; they are left out for every contender alike.
    rows = [{"messages": turns} for turns in _read_rows(data, 3 * steps * ROWS_PER_STEP)]
    collated: list[tuple[int, int]] = []
    clock = _make_clock(collated)
    build = _our_trainer if contender.startswith("ours") else _usual_trainer
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(recipe, rows, Path(folder), clock)
        if len(trainer.train_dataset) < steps * ROWS_PER_STEP:
            raise CommandError(
                f"'{data}' has {len(trainer.train_dataset)} rows of at most {_MAX_LENGTH} tokens, "
                f"expected {steps * ROWS_PER_STEP}; lower --steps"
            )
        trainer.data_collator = _counting(trainer.data_collator, collated)
        trainer.train()
    real = sum(batch[0] for batch in collated[clock.batches_in_first :])
    computed = sum(batch[1] for batch in collated)
    # KiB on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_reserved()
    return {
        "tokens_per_second": round(real / (clock.last - clock.first), 1),
        **token_shares(sum(batch[0] for batch in collated), computed),
        "peak_gb": round(peak / 1e9, 2),
        "loss": round(clock.losses[-1], 4),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure one contender and print the figures as JSON."""
    parser = argparse.ArgumentParser(description="One contender of scripts.benchmark train.")
    parser.add_argument("contender", choices=list(ROWS_PER_FORWARD))
    parser.add_argument("--data", type=Path, required=True, help="rows in any format we read")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of 8 rows")
    parser.add_argument("--model", default=EMBEDDED_MODEL, help="base model")
    options = parser.parse_args(argv)
    with contextlib.redirect_stdout(sys.stderr):
        figures = measure(options.contender, options.data, options.steps, options.model)
    print(json.dumps(figures))
    return OK


if __name__ == "__main__":
    run_command(main)
