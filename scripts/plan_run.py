"""Preflight of one run: look at the machine, time a few rows, choose how many fit a time budget.

The judgement is in ``scripts.preflight``; this module gathers what it needs from the real thing.
"""

import json
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts._cli import FAILED, CommandError, log
from scripts.estimates import Workload, estimate_disk
from scripts.machine import Machine, hub_cache_dir, inspect_machine, is_cached
from scripts.model_shape import ModelShape, load_model_shape
from scripts.preflight_report import Report, make_report
from scripts.provenance import STRICT, version_problems, versions
from scripts.recipe import EMBEDDED_MODEL, TrainingRecipe, write_atomically
from scripts.render import EncodedConversation
from scripts.time_plan import PlanInputs, parse_duration, plan_time, rows_within_budget

# Below this a probe measures overhead rather than speed.
_PROBE_TOKENS = 400


def _quantizations() -> list[str]:
    """GGUF types that ``scripts/pipeline.sh`` will export, read as the export reads them."""
    text = os.environ.get("QUANTIZATION") or "F16,Q8_0,Q4_K_M"
    return list(dict.fromkeys(part.strip().upper() for part in text.split(",") if part.strip()))


class Preflight:
    """What is known about a run before it starts.

    Args:
        recipe: The run.
        base: Folder or hub name of its base model.
        checkpoint_dir: Where its checkpoints go.
    """

    def __init__(self, recipe: TrainingRecipe, base: str, checkpoint_dir: Path) -> None:
        self.recipe, self.started = recipe, time.monotonic()
        paths = {"run": recipe.run_dir, "checkpoints": checkpoint_dir, "downloads": hub_cache_dir()}
        self.machine: Machine = inspect_machine(paths)
        self.shape: ModelShape | None = load_model_shape(base, recipe.model_revision)
        if recipe.model_name_or_path == EMBEDDED_MODEL or Path(base).is_dir():
            self.cached = [recipe.model_name_or_path, base]
        else:
            self.cached = [base] if is_cached(base, hub_cache_dir()) else []
        self.budget = parse_duration(recipe.time_budget) if recipe.time_budget else None

    def refuse_early(self) -> None:
        """Refuse before a model is downloaded what no choice of rows can make fit.

        Raises:
            CommandError: Exit 1: versions, disk, or memory of the export.
        """
        problems = version_problems(versions())
        for name, problem in problems.items():
            if name not in STRICT:
                log(f"preflight: {problem}; it may work all the same")
        strict = [problem for name, problem in problems.items() if name in STRICT]
        if strict:
            raise CommandError(f"{'; '.join(strict)}; run scripts/setup.sh", FAILED)
        report = self._report(Workload([]), None)
        unmet = [
            check.line()
            for check in report.checks
            if check.verdict == "FAIL" and not check.name.startswith("memory")
        ]
        if unmet:
            raise CommandError(f"this run cannot finish: {' | '.join(unmet)}", FAILED)

    def report(
        self,
        rows: Sequence[EncodedConversation],
        held_out: Sequence[EncodedConversation],
        padded: bool,
        speed: tuple[float, float],
    ) -> Report:
        """Estimate and check everything.

        Args:
            rows: Training rows, in training order.
            held_out: Held-out rows.
            padded: Rows of a micro-batch are padded.
            speed: Seconds per token and seconds of loading, measured.
        """
        workload = Workload([len(row.input_ids) for row in rows], padded)
        return self._report(workload, self._inputs(workload, held_out, speed))

    def choose_rows(
        self,
        rows: list[EncodedConversation],
        held_out: Sequence[EncodedConversation],
        padded: bool,
        speed: tuple[float, float],
        memory: Path,
    ) -> list[EncodedConversation]:
        """Take as many rows as the time budget holds; a resumed run takes the same ones again.

        Args:
            rows: All training rows.
            held_out: Held-out rows.
            padded: Rows of a micro-batch are padded.
            speed: As of ``report``.
            memory: JSON file that keeps the choice.

        Raises:
            CommandError: Not even a few rows fit.
        """
        assert self.budget is not None
        # A random choice keeps the share of each kind; the file has them one after the other.
        order = random.Random(self.recipe.seed).sample(range(len(rows)), len(rows))
        if memory.is_file():
            chosen = json.loads(memory.read_text(encoding="utf-8"))["rows"]
        else:
            workload = Workload([len(rows[at].input_ids) for at in order], padded)
            inputs = self._inputs(workload, held_out, speed)
            if inputs is None:
                raise CommandError("time_budget: this architecture's size is not known; "
                                   "set max_rows instead")  # fmt: skip
            chosen = rows_within_budget(inputs, self.budget)
            write_atomically(memory, json.dumps({"rows": chosen}) + "\n")
        return [rows[at] for at in sorted(order[:chosen])]

    def _inputs(
        self,
        workload: Workload,
        held_out: Sequence[EncodedConversation],
        speed: tuple[float, float] | None,
    ) -> PlanInputs | None:
        if speed is None or self.shape is None:
            return None
        recipe, shape = self.recipe, self.shape
        disk = estimate_disk(shape, recipe, _quantizations(), self.cached)
        return PlanInputs(
            recipe=recipe,
            workload=workload,
            parameters=shape.parameters.total,
            adapter_parameters=shape.lora_parameters(recipe.lora_r, recipe.lora_target_modules),
            seconds_per_token=speed[0],
            load_seconds=speed[1],
            elapsed_seconds=time.monotonic() - self.started,
            eval_tokens=sum(len(row.input_ids) for row in held_out),
            eval_steps=recipe.save_steps,
            quantizations=_quantizations(),
            threads=self.machine.cpu_threads,
            on_cuda=self.machine.device == "cuda",
            download_bytes=sum(disk.downloads.values()),
        )

    def _report(self, workload: Workload, inputs: PlanInputs | None) -> Report:
        return make_report(
            self.recipe,
            self.shape,
            self.machine,
            workload,
            versions(),
            quantizations=_quantizations(),
            cached=self.cached,
            plan=plan_time(inputs) if inputs else None,
            budget_seconds=self.budget,
        )


def probe_speed(
    trainer: Any, rows: Sequence[EncodedConversation], batching: str, precision: str
) -> float:
    """Time forward and backward of one micro-batch of ordinary rows.

    Weights and random numbers are left as they were. What TRL packs is measured on padded rows of
    nearly one length: the same work for each token.

    Args:
        trainer: The run's trainer, before training.
        rows: Training rows.
        batching: From ``adapter_trainer.choose_batching``.
        precision: ``bf16``, ``fp16`` or ``fp32``.

    Returns:
        Seconds per token of a micro-batch.
    """
    import torch

    from scripts.adapter_trainer import is_out_of_memory
    from scripts.padding_free import lay_end_to_end, num_tokens, pad_right

    quarter = len(rows) // 4
    middle = sorted(rows, key=lambda row: len(row.input_ids))[quarter : len(rows) - quarter]
    batch: list[dict[str, list[int]]] = []
    for row in middle:
        batch.append({"input_ids": row.input_ids, "labels": row.labels})
        if (
            len(batch) >= trainer.args.per_device_train_batch_size
            and sum(len(row["input_ids"]) for row in batch) >= _PROBE_TOKENS
        ):
            break
    device = trainer.args.device
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    seconds_per_token = 0.0
    with torch.random.fork_rng(enabled=True):
        for part in (batch[:1], batch[:1], batch):  # the first one warms up
            inputs = lay_end_to_end(part) if batching == "end to end" else pad_right(part, 0)
            tokens = num_tokens(inputs)
            inputs = {name: value.to(device) for name, value in inputs.items()}
            started = time.monotonic()
            try:
                with torch.autocast(device.type, dtype, enabled=precision != "fp32"):
                    trainer.compute_loss(trainer.model, inputs, num_items_in_batch=100).backward()
            except (RuntimeError, MemoryError) as error:
                # Training takes smaller portions then; one row tells enough.
                if not is_out_of_memory(error) or len(part) == 1:
                    raise
                break
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds_per_token = (time.monotonic() - started) / tokens
    trainer.model.zero_grad(set_to_none=True)
    trainer.forget_metrics()
    return seconds_per_token
