"""Train the adapter: Unsloth 4-bit LoRA, TRL's SFTTrainer, loss on the answers only.

Reads ``data/train.jsonl`` and ``data/eval.jsonl`` of the run (made first if they are missing), writes
``adapter/``, ``metrics.jsonl``, ``loss.png``, ``provenance.json`` and checkpoints. The same command
after an interruption goes on from the last whole checkpoint.

    python -m scripts.train_lora --config scripts/recipes/smollm2-135m-cpu.yaml --learning-rate 1e-4
    … --dry-run           (what it would take, without training)
    … --preview 3         (rows with the trained tokens marked)
    torchrun --nproc_per_node 2 -m scripts.train_lora --config …     (several devices)
"""

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from scripts import prepare_data
from scripts._cli import FAILED, OK, CommandError, log, run_command
from scripts.checkpoints import adopt, is_finished, mark_finished, newest_whole, step_of
from scripts.metrics import plot_loss, read_metrics, restart_metrics, trained_tokens
from scripts.plan_run import Preflight, probe_speed
from scripts.preflight_report import Report
from scripts.prepare_data import load_rows
from scripts.recipe import TrainingRecipe, parse_recipe, write_atomically
from scripts.render import EncodedConversation, RowTotals, encode_rows

# Recipe keys that do not change what is trained.
NEUTRAL_KEYS = (
    "run_name",
    "output_root",
    "logging_steps",
    "save_total_limit",
    "checkpoint_dir",
    "report_to",
    "eval_prompts",
    "eval_answer_tokens",
)


def training_hash(recipe: TrainingRecipe) -> str:
    """Hash what the adapter depends on: the recipe's keys and the prepared rows."""
    values = dataclasses.asdict(recipe)
    for key in NEUTRAL_KEYS:
        values.pop(key)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name in ("train.jsonl", "eval.jsonl"):
        with (recipe.run_dir / "data" / name).open("rb") as rows:
            digest.update(hashlib.file_digest(rows, "sha256").digest())
    return digest.hexdigest()


def checkpoint_folder(recipe: TrainingRecipe, wanted: str) -> Path:
    """Give the folder of this very training; another recipe or other rows have another one."""
    root = Path(recipe.checkpoint_dir) / recipe.run_name if recipe.checkpoint_dir else None
    return (root or recipe.run_dir / "checkpoints") / wanted[:12]


def _explain_fresh_start(recipe: TrainingRecipe, folder: Path) -> None:
    """Say which keys changed since another training of this run whose checkpoints are kept."""
    for other in sorted(folder.parent.glob("*/recipe.yaml")):
        if other.parent == folder or not any(other.parent.glob("checkpoint-*")):
            continue
        former = yaml.safe_load(other.read_text(encoding="utf-8"))
        now = dataclasses.asdict(recipe)
        changed = [
            f"{key} {former.get(key)} -> {value}"
            for key, value in now.items()
            if key not in NEUTRAL_KEYS and former.get(key) != value
        ]
        log(
            f"train: starting anew; the checkpoints in {other.parent} are of another training "
            f"({', '.join(changed) or 'its rows were others'}) and are kept"
        )


@dataclasses.dataclass
class _Devices:
    """The processes that train together (``torchrun`` or ``accelerate launch``)."""

    rank: int = dataclasses.field(default_factory=lambda: int(os.environ.get("RANK", "0")))
    world: int = dataclasses.field(default_factory=lambda: int(os.environ.get("WORLD_SIZE", "1")))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Let every process reach this point."""
        if self.world > 1:
            import torch
            from accelerate import PartialState

            PartialState(cpu=not torch.cuda.is_available()).wait_for_everyone()


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


def _held_out_rows(recipe: TrainingRecipe) -> list[dict[str, Any]]:
    """Rows that pick the best checkpoint: conversations, and tool use where that is trained."""
    data_dir = recipe.run_dir / "data"
    rows = load_rows(data_dir / "eval.jsonl")
    if recipe.tool_rows:
        rows += load_rows(data_dir / "eval_tools.jsonl")
    return rows


def _check_devices(recipe: TrainingRecipe, devices: _Devices) -> None:
    passes = recipe.gradient_accumulation_steps
    if passes % devices.world:
        raise CommandError(
            f"gradient_accumulation_steps {passes} cannot be shared by {devices.world} devices; set "
            f"it to a multiple of {devices.world}: it counts the passes of all devices together"
        )


def _check_tracker(recipe: TrainingRecipe) -> None:
    name = recipe.report_to
    if name != "none" and importlib.util.find_spec(name) is None:
        raise CommandError(
            f"report_to: {name} is not installed; pip install {name}, or set report_to: none"
        )


def _prepare_on_main(recipe: TrainingRecipe, devices: _Devices) -> None:
    if devices.is_main:
        prepare_data.prepare(recipe)
    devices.wait()


@dataclasses.dataclass
class _Loaded:
    """Model, tokenizer and rows of a run, ready to train."""

    model: Any
    tokenizer: Any
    rows: list[EncodedConversation]
    held_out: list[EncodedConversation]
    totals: RowTotals
    batching: str
    load_seconds: float


def _encode(
    recipe: TrainingRecipe, tokenizer: Any
) -> tuple[list[EncodedConversation], list[EncodedConversation], RowTotals]:
    train_rows = load_rows(recipe.run_dir / "data" / "train.jsonl")
    rows, totals = encode_rows(tokenizer, train_rows, recipe.max_length, "train")
    held_out, _ = encode_rows(tokenizer, _held_out_rows(recipe), recipe.max_length, "held out")
    return rows, held_out, totals


def _load(recipe: TrainingRecipe) -> _Loaded:
    from scripts.model_loading import add_adapter, load_model

    started = time.monotonic()
    model, tokenizer = load_model(recipe)
    load_seconds = time.monotonic() - started
    rows, held_out, totals = _encode(recipe, tokenizer)
    model = add_adapter(model, recipe)
    # After the model: Unsloth patches TRL and must come first.
    from scripts.adapter_trainer import choose_batching

    batching = choose_batching(recipe, model, rows)
    return _Loaded(model, tokenizer, rows, held_out, totals, batching, load_seconds)


def _make_trainer(
    recipe: TrainingRecipe, loaded: _Loaded, folder: Path, progress: Any, devices: _Devices
) -> Any:
    from scripts.adapter_trainer import make_trainer
    from scripts.model_loading import precision

    return make_trainer(
        recipe, loaded.model, loaded.tokenizer, loaded.rows, loaded.held_out, folder, progress,
        loaded.batching, precision().training_arguments, devices.world,
    )  # fmt: skip


def _check_run(
    recipe: TrainingRecipe,
    loaded: _Loaded,
    preflight: Preflight,
    trainer: Any,
    folder: Path,
    devices: _Devices,
) -> Report:
    """Time a few rows, choose rows for the time budget, and judge the run."""
    from scripts.model_loading import precision

    padded = loaded.batching == "padded"
    seconds_per_token = probe_speed(trainer, loaded.rows, loaded.batching, precision().name)
    speed = (seconds_per_token, loaded.load_seconds)
    if preflight.budget is not None:
        available, memory = len(loaded.rows), folder / "budget.json"
        if devices.is_main:
            preflight.choose_rows(loaded.rows, loaded.held_out, padded, speed, memory)
        devices.wait()
        loaded.rows = preflight.choose_rows(loaded.rows, loaded.held_out, padded, speed, memory)
        log(f"train: {len(loaded.rows)} of {available} rows fit into {recipe.time_budget}")
    return preflight.report(loaded.rows, loaded.held_out, padded, speed)


def _finish(
    recipe: TrainingRecipe, trainer: Any, progress: Any, folder: Path, step: int
) -> dict[str, Any]:
    """Turn the end of training into an error, a message, and what provenance records."""
    from scripts.padding_free import token_shares

    state = trainer.state
    if progress.failure:
        raise CommandError(
            f"training stopped at step {state.global_step}: {progress.failure}; the last good "
            f"checkpoint is {newest_whole(folder) or 'none'}",
            FAILED,
        )
    if progress.interrupted and state.global_step < state.max_steps:
        log(f"train: stopped at step {state.global_step}; the same command goes on from there")
        raise KeyboardInterrupt
    if state.global_step > step and progress.watch.applied == 0:
        raise CommandError(
            "no optimizer step was applied: every gradient overflowed in fp16; lower learning_rate",
            FAILED,
        )
    if state.global_step < state.max_steps:
        log(
            "train: stopped early: held-out loss did not fall "
            f"{recipe.early_stopping_patience} times in a row"
        )
    best = Path(state.best_model_checkpoint) if state.best_model_checkpoint else None
    best_step = step_of(best) if best else state.global_step
    if state.best_metric is not None:
        log(
            f"train: the adapter is that of step {best_step}, held-out loss {state.best_metric:.4f}"
        )
    return {
        "steps": state.global_step,
        "resumed_from": step,
        "best_step": best_step,
        "held_out_loss": state.best_metric,
        **token_shares(trainer.real_tokens, trainer.computed_tokens),
        "rows_per_forward": -(-recipe.per_device_train_batch_size // trainer.pieces),
        "skipped_steps": progress.watch.skipped,
    }


def _train_loaded(
    recipe: TrainingRecipe,
    loaded: _Loaded,
    preflight: Preflight,
    folder: Path,
    devices: _Devices,
) -> dict[str, Any]:
    """Train from the newest whole checkpoint to the end; return what provenance records."""
    from scripts.loss_watch import LossWatch
    from scripts.model_loading import precision
    from scripts.progress import RunProgress, stop_on_signal

    checkpoint = newest_whole(folder)
    step = step_of(checkpoint) if checkpoint else 0
    metrics_path, image_path = recipe.run_dir / "metrics.jsonl", recipe.run_dir / "loss.png"
    watch = LossWatch(precision().training_arguments["fp16"])
    progress = RunProgress(metrics_path, image_path, recipe.logging_steps, watch, devices.is_main)
    trainer = _make_trainer(recipe, loaded, folder, progress, devices)
    if checkpoint is None or preflight.budget is not None:
        report = _check_run(recipe, loaded, preflight, trainer, folder, devices)
        log(report.to_text())
        report.require_ok()
        if preflight.budget is not None:
            trainer = _make_trainer(recipe, loaded, folder, progress, devices)
    if devices.is_main:
        if checkpoint:
            adopt(checkpoint)
            log(f"train: going on from step {step} ({checkpoint})")
        else:
            _explain_fresh_start(recipe, folder)
        write_atomically(folder / "recipe.yaml", recipe.to_yaml())
        restart_metrics(metrics_path, step)
        trainer.real_tokens_before = trained_tokens(read_metrics(metrics_path))
    devices.wait()
    started = time.monotonic()
    if checkpoint and is_finished(checkpoint):
        trainer.take_best(checkpoint)
    else:
        with stop_on_signal(progress):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.monotonic() - started
    figures = _finish(recipe, trainer, progress, folder, step)
    if devices.is_main:
        mark_finished(folder)
        plot_loss(metrics_path, image_path)
    log(
        f"train: {figures['steps'] - step} steps in {seconds:.0f} s, "
        f"{trainer.real_tokens * devices.world / seconds:.0f} real tokens/s"
    )
    logged = read_metrics(metrics_path)
    losses = [row["loss"] for row in logged if row.get("loss") is not None]
    return {
        "loss": round(sum(losses) / max(1, len(losses)), 4),
        "tokens": trained_tokens(logged),
        "seconds": round(seconds, 1),
        "batching": loaded.batching,
        "devices": devices.world,
        "rows": len(loaded.rows),
        "encoded": dataclasses.asdict(loaded.totals),
        **figures,
    }


def preview(recipe: TrainingRecipe, count: int) -> None:
    """Print rows as the model will see them; only the tokenizer is loaded."""
    from scripts.model_loading import load_tokenizer
    from scripts.preview import preview_rows

    prepare_data.prepare(recipe)
    tokenizer = load_tokenizer(recipe)
    rows, _, _ = _encode(recipe, tokenizer)
    preview_rows(tokenizer, rows, count, sys.stdout)


def dry_run(recipe: TrainingRecipe) -> Report:
    """Do everything but train: data, model, a timed probe, and the judgement."""
    from scripts.loss_watch import LossWatch
    from scripts.model_loading import import_backend, resolve_model

    import_backend(recipe)
    from scripts.progress import RunProgress

    prepare_data.prepare(recipe)
    folder = checkpoint_folder(recipe, training_hash(recipe))
    preflight = Preflight(recipe, resolve_model(recipe), folder)
    preflight.refuse_early()
    loaded = _load(recipe)
    nowhere = Path(os.devnull)
    progress = RunProgress(nowhere, nowhere, 1, LossWatch(), is_main=False)
    with tempfile.TemporaryDirectory() as temporary:
        trainer = _make_trainer(recipe, loaded, Path(temporary), progress, _Devices())
        return _check_run(recipe, loaded, preflight, trainer, Path(temporary), _Devices())


def train(recipe: TrainingRecipe) -> Path:
    """Train and save the adapter; return its folder. A finished run is left as it is.

    Raises:
        CommandError: Data or model unusable, the machine too small, or the loss went wrong.
        KeyboardInterrupt: Stopped by the user; a checkpoint is kept.
    """
    from scripts.model_loading import import_backend, resolve_model
    from scripts.provenance import base_fingerprint, read_provenance, versions

    devices = _Devices()
    _check_devices(recipe, devices)
    _check_tracker(recipe)
    _prepare_on_main(recipe, devices)
    run_dir, wanted = recipe.run_dir, training_hash(recipe)
    former = read_provenance(run_dir).get("training", {})
    adapter_dir = run_dir / "adapter"
    if former.get("hash") == wanted and (adapter_dir / "adapter_model.safetensors").is_file():
        log(f"train: {adapter_dir} is up to date")
        return adapter_dir
    import_backend(recipe)
    folder, base_name = checkpoint_folder(recipe, wanted), resolve_model(recipe)
    preflight = Preflight(recipe, base_name, folder)
    preflight.refuse_early()
    loaded = _load(recipe)
    if devices.is_main:
        write_atomically(run_dir / "recipe.yaml", recipe.to_yaml())
    figures = _train_loaded(recipe, loaded, preflight, folder, devices)
    if devices.is_main:
        _install_adapter(loaded.model, loaded.tokenizer, run_dir, base_name)
        provenance = {
            "versions": versions(),
            "base_model": {
                "name": base_name,
                "revision": recipe.model_revision,
                "fingerprint": base_fingerprint(Path(base_name)),
            },
            "dataset": json.loads((run_dir / "data" / "report.json").read_text(encoding="utf-8")),
            "training": {"hash": wanted, "seed": recipe.seed, **figures},
        }
        write_atomically(run_dir / "provenance.json", json.dumps(provenance, indent=2) + "\n")
    devices.wait()
    return adapter_dir


def main(argv: Sequence[str] | None = None) -> int:
    """Train a run's adapter and print its folder; or show what would be trained."""
    parser = argparse.ArgumentParser(
        description="Train a run's adapter (Unsloth, 4-bit LoRA, TRL)."
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--dry-run", action="store_true", help="check and plan, do not train")
    only.add_argument(
        "--preview", type=int, metavar="N", help="print N rows, trained tokens marked"
    )
    parser.add_argument("--json", action="store_true", help="with --dry-run: the plan as JSON")
    recipe, options = parse_recipe("", argv, parser)
    if options.preview is not None:
        preview(recipe, options.preview)
        return OK
    # Unsloth and the trainer print banners; stdout carries the result only.
    with contextlib.redirect_stdout(sys.stderr):
        if options.dry_run:
            report = dry_run(recipe)
        else:
            adapter_dir = train(recipe)
    if options.dry_run:
        print(json.dumps(report.to_json(), indent=2) if options.json else report.to_text())
        return OK if report.ok else FAILED
    if _Devices().is_main:
        print(adapter_dir)
    return OK


if __name__ == "__main__":
    run_command(main)
