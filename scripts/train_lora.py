"""Train the adapter: Unsloth 4-bit LoRA, TRL's SFTTrainer, loss on the answers only.

Reads ``data/train.jsonl`` and ``data/eval.jsonl`` of the run (made first if they are missing), writes
``adapter/``, ``metrics.jsonl``, ``loss.png``, ``provenance.json`` and checkpoints. The same command
after an interruption goes on from the last checkpoint.

    python -m scripts.train_lora --config scripts/recipes/smollm2-135m-cpu.yaml --learning-rate 1e-4
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scripts import prepare_data
from scripts._cli import FAILED, OK, CommandError, log, run_command
from scripts.metrics import plot_loss, restart_metrics, seen_tokens
from scripts.recipe import TrainingRecipe, parse_recipe, write_atomically
from scripts.render import IGNORED, EncodedConversation, encode_conversation

# Recipe keys that do not change what is trained.
_NEUTRAL_KEYS = ("run_name", "output_root", "logging_steps", "save_steps", "save_total_limit")


def training_hash(recipe: TrainingRecipe) -> str:
    """Hash what the adapter depends on: the recipe's keys and the prepared rows."""
    values = dataclasses.asdict(recipe)
    for key in _NEUTRAL_KEYS:
        values.pop(key)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    digest.update((recipe.run_dir / "data" / "train.jsonl").read_bytes())
    return digest.hexdigest()


def load_rows(path: Path) -> list[dict[str, Any]]:
    """Read prepared rows."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def encode_rows(
    tokenizer: Any, rows: Sequence[dict[str, Any]], max_length: int, what: str
) -> list[EncodedConversation]:
    """Tokenize rows and say what did not fit.

    Raises:
        CommandError: No row fits, or a row has no trained token.
    """
    encoded = [encode_conversation(tokenizer, row["messages"], max_length) for row in rows]
    kept = [row for row in encoded if row is not None]
    dropped, cut = len(encoded) - len(kept), sum(row.dropped_turns > 0 for row in kept)
    if dropped or cut:
        log(f"{what}: {dropped} rows longer than {max_length} tokens left out, {cut} cut at a turn")
    if not kept:
        raise CommandError(
            f"{what}: no conversation fits into max_length {max_length}; raise max_length"
        )
    if any(all(label == IGNORED for label in row.labels) for row in kept):
        raise CommandError(f"{what}: a row has no trained token; check the chat template")
    tokens = sum(len(row.input_ids) for row in kept)
    trained = sum(label != IGNORED for row in kept for label in row.labels)
    log(f"{what}: {len(kept)} rows, {tokens} tokens, {trained / tokens:.0%} of them trained")
    return kept


def _newest_checkpoint(folder: Path) -> Path | None:
    """Give the newest whole checkpoint; the trainer state is the file that is written last."""
    needed = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")
    found = [
        path
        for path in folder.glob("checkpoint-*")
        if path.name.rpartition("-")[2].isdigit()
        and all((path / name).is_file() for name in needed)
    ]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


@contextlib.contextmanager
def _stop_on_signal(control: dict[str, bool]) -> Iterator[None]:
    """Turn the first Ctrl-C or SIGTERM into a flag, so that a step ends and a checkpoint is kept."""

    def ask_to_stop(number: int, frame: Any) -> None:
        if control["stop"]:
            raise KeyboardInterrupt
        control["stop"] = True
        log("stopping after this step; the checkpoint is kept (again: stop at once)")

    old = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _make_callback(recipe: TrainingRecipe, metrics_path: Path, control: dict[str, bool]) -> Any:
    from transformers import TrainerCallback

    class RunMetrics(TrainerCallback):
        """Metrics as JSON lines, a progress line without a terminal, and the stop flag."""

        started = time.monotonic()
        first_step = 0

        def on_train_begin(self, args: Any, state: Any, control_: Any, **kwargs: Any) -> None:
            self.started, self.first_step = time.monotonic(), state.global_step

        def on_log(
            self, args: Any, state: Any, control_: Any, logs: dict[str, Any], **kwargs: Any
        ) -> None:
            kept = {key: value for key, value in logs.items() if isinstance(value, int | float)}
            kept |= {
                "step": state.global_step,
                "seconds": round(time.monotonic() - self.started, 1),
            }
            with metrics_path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(kept) + "\n")
            done = state.global_step - self.first_step
            if "loss" in logs and done and not sys.stderr.isatty() and state.global_step % 10 == 0:
                left = kept["seconds"] / done * (state.max_steps - state.global_step)
                log(
                    f"step {state.global_step}/{state.max_steps}  loss {float(logs['loss']):.3f}  "
                    f"{left:.0f} s left"
                )

        def on_step_end(self, args: Any, state: Any, control_: Any, **kwargs: Any) -> None:
            if control["stop"]:
                control_.should_save = control_.should_training_stop = True

    return RunMetrics()


def _make_trainer(
    recipe: TrainingRecipe,
    model: Any,
    tokenizer: Any,
    rows: Sequence[EncodedConversation],
    checkpoint_dir: Path,
    callback: Any,
) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from scripts.batching import LengthMixedSampler
    from scripts.model_loading import precision

    class LengthMixedTrainer(SFTTrainer):
        """SFTTrainer with rows of similar length in a micro-batch, micro-batches shuffled."""

        def _get_train_sampler(self, train_dataset: Any = None) -> LengthMixedSampler:
            lengths = [len(row.input_ids) for row in rows]
            return LengthMixedSampler(lengths, recipe.per_device_train_batch_size, recipe.seed)

    columns = [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]
    arguments = SFTConfig(
        output_dir=str(checkpoint_dir),
        per_device_train_batch_size=recipe.per_device_train_batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.lr_scheduler_type,
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        num_train_epochs=recipe.num_train_epochs,
        max_steps=recipe.max_steps,
        logging_steps=recipe.logging_steps,
        save_steps=recipe.save_steps,
        save_total_limit=recipe.save_total_limit,
        seed=recipe.seed,
        max_length=None,  # rows were cut at turns already
        packing=False,
        optim="adamw_torch",
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
        gradient_checkpointing=recipe.use_gradient_checkpointing,
        **precision(),
    )
    return LengthMixedTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(columns),
        args=arguments,
        callbacks=[callback],
    )


def _install_adapter(model: Any, tokenizer: Any, run_dir: Path, base_name: str) -> Path:
    adapter_dir, temporary = run_dir / "adapter", run_dir / ".adapter.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    for config in model.peft_config.values():
        config.base_model_name_or_path = base_name
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    if adapter_dir.exists():
        kept = run_dir / f"adapter-until-{time.strftime('%Y%m%d-%H%M%S')}"
        adapter_dir.replace(kept)
        log(f"train: the former adapter is kept as {kept}")
    temporary.replace(adapter_dir)
    return adapter_dir


def train(recipe: TrainingRecipe) -> Path:
    """Train and save the adapter; return its folder. A finished run is left as it is.

    Raises:
        CommandError: Data or model unusable, or the loss became NaN.
        KeyboardInterrupt: Stopped by the user; a checkpoint is kept.
    """
    from scripts.provenance import base_fingerprint, read_provenance, versions

    prepare_data.prepare(recipe)
    run_dir, wanted = recipe.run_dir, training_hash(recipe)
    former = read_provenance(run_dir).get("training", {})
    adapter_dir = run_dir / "adapter"
    if former.get("hash") == wanted and (adapter_dir / "adapter_model.safetensors").is_file():
        log(f"train: {adapter_dir} is up to date")
        return adapter_dir

    from scripts.model_loading import load_model, resolve_model

    model, tokenizer = load_model(recipe)
    rows = encode_rows(
        tokenizer, load_rows(run_dir / "data" / "train.jsonl"), recipe.max_length, "train"
    )
    from unsloth import FastLanguageModel

    model = FastLanguageModel.get_peft_model(
        model,
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=recipe.lora_target_modules,
        bias="none",
        use_gradient_checkpointing="unsloth" if recipe.use_gradient_checkpointing else False,
        random_state=recipe.seed,
    )
    write_atomically(run_dir / "recipe.yaml", recipe.to_yaml())
    checkpoint_dir = run_dir / "checkpoints" / wanted[:12]
    checkpoint = _newest_checkpoint(checkpoint_dir)
    step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    if checkpoint:
        log(f"train: going on from step {step} ({checkpoint})")
    metrics_path, control = run_dir / "metrics.jsonl", {"stop": False}
    restart_metrics(metrics_path, step)
    callback = _make_callback(recipe, metrics_path, control)
    trainer = _make_trainer(recipe, model, tokenizer, rows, checkpoint_dir, callback)
    started = time.monotonic()
    with _stop_on_signal(control):
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if control["stop"] and trainer.state.global_step < trainer.state.max_steps:
        log(
            f"train: stopped at step {trainer.state.global_step}; the same command goes on from there"
        )
        raise KeyboardInterrupt
    if math.isnan(result.training_loss):
        raise CommandError(
            "the training loss became NaN; lower learning_rate, or train with fp32 (load_in_4bit: "
            f"false); the last checkpoint is in {checkpoint_dir}",
            FAILED,
        )
    seconds = time.monotonic() - started
    base_name = resolve_model(recipe)
    adapter_dir = _install_adapter(model, tokenizer, run_dir, base_name)
    tokens = seen_tokens(metrics_path)
    provenance = {
        "versions": versions(),
        "base_model": {
            "name": base_name,
            "revision": recipe.model_revision,
            "fingerprint": base_fingerprint(Path(base_name)),
        },
        "dataset": json.loads((run_dir / "data" / "report.json").read_text(encoding="utf-8")),
        "training": {
            "hash": wanted,
            "steps": trainer.state.global_step,
            "loss": round(float(result.training_loss), 4),
            "seconds": round(seconds, 1),
            "rows": len(rows),
            "tokens": tokens,
            "seed": recipe.seed,
        },
    }
    plot_loss(metrics_path, run_dir / "loss.png")
    write_atomically(run_dir / "provenance.json", json.dumps(provenance, indent=2) + "\n")
    log(
        f"train: {trainer.state.global_step} steps in {seconds:.0f} s"
        + (f", {tokens / seconds:.0f} real tokens/s" if not step else "")
    )
    return adapter_dir


def main(argv: Sequence[str] | None = None) -> int:
    """Train a run's adapter and print its folder."""
    recipe, _ = parse_recipe("Train a run's adapter (Unsloth, 4-bit LoRA, TRL).", argv)
    # Unsloth and the trainer print banners; stdout carries the result only.
    with contextlib.redirect_stdout(sys.stderr):
        adapter_dir = train(recipe)
    print(adapter_dir)
    return OK


if __name__ == "__main__":
    run_command(main)
