"""Will this run finish? Memory, disk and time against what is there, before anything is spent.

In: a recipe, the model's shape, the machine, the rows' lengths. Out: one `Check` for each need. What
cannot finish is refused with the recipe key that makes it fit; that key was tried out on the same
estimate. `scripts.preflight_report` lays the checks out for reading.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.estimates import (
    MemoryEstimate,
    Workload,
    estimate_disk,
    estimate_memory,
    estimate_ram,
)
from scripts.machine import Disk, Machine
from scripts.model_shape import ModelShape
from scripts.recipe import TrainingRecipe

# The first two do the same training in less memory; the others change what is trained.
_NEUTRAL_KNOBS = ("use_gradient_checkpointing", "per_device_train_batch_size")
_OTHER_KNOBS = ("load_in_4bit", "max_length", "lora_r")
_LOWEST = {"per_device_train_batch_size": 1, "max_length": 256, "lora_r": 8}
# What moves the files of each purpose to another disk.
_MOVED_BY = {"run": "output_root", "checkpoints": "checkpoint_dir", "downloads": "HF_HOME"}


@dataclass(frozen=True)
class Check:
    """One question with its answer; a check that does not block is a warning."""

    name: str
    ok: bool
    need: str
    got: str
    advice: str = ""
    blocking: bool = True

    @property
    def verdict(self) -> str:
        """Give PASS, WARN or FAIL."""
        return "PASS" if self.ok else "FAIL" if self.blocking else "WARN"

    def line(self) -> str:
        """Say it in one line: what, needed, got, and which knob."""
        text = f"{self.name}: {self.need}, {self.got}"
        return text if self.ok or not self.advice else f"{text}; {self.advice}"


@dataclass(frozen=True)
class Knobs:
    """Recipe changes after which training fits, and what it then needs."""

    changes: dict[str, Any]
    estimate: MemoryEstimate

    def __str__(self) -> str:
        words = [f"{key}: {str(value).lower()}" for key, value in self.changes.items()]
        return f"set {', '.join(words)} (about {gigabytes(self.estimate.total)})"


def gigabytes(size: float) -> str:
    """Write bytes in GB (10^9)."""
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e6:.0f} MB"


def find_knobs(
    shape: ModelShape, recipe: TrainingRecipe, machine: Machine, workload: Workload
) -> Knobs | None:
    """Find the first, smallest set of recipe changes that makes training fit.

    Changes that train the same come before those that do not; fewer keys before more; a mild
    change of a key before a strong one.
    """
    biggest: dict[tuple[int, int], int] = {}
    for changes in _knob_sets(recipe):
        changed = dataclasses.replace(recipe, **changes)
        key = changed.per_device_train_batch_size, changed.max_length
        if key not in biggest:
            biggest[key] = workload.biggest(changed)
        estimate = estimate_memory(shape, changed, machine, biggest[key])
        if estimate.total <= machine.training_bytes:
            return Knobs(changes, estimate)
    return None


def _knob_sets(recipe: TrainingRecipe) -> Iterator[dict[str, Any]]:
    for num_other in range(len(_OTHER_KNOBS) + 1):
        for other in itertools.combinations(_OTHER_KNOBS, num_other):
            for num_neutral in range(len(_NEUTRAL_KNOBS) + 1):
                for neutral in itertools.combinations(_NEUTRAL_KNOBS, num_neutral):
                    levels = [list(_levels(recipe, key)) for key in (*neutral, *other)]
                    for chosen in itertools.product(*levels):
                        merged: dict[str, Any] = {}
                        for changes in chosen:
                            merged |= changes
                        if merged:
                            yield merged


def _levels(recipe: TrainingRecipe, key: str) -> Iterator[dict[str, Any]]:
    """Give the changes of one knob, the mildest first; none when it is at its end already."""
    value = getattr(recipe, key)
    if isinstance(value, bool):
        if not value:
            yield {key: True}
        return
    steps = recipe.gradient_accumulation_steps
    while value // 2 >= _LOWEST[key]:
        rest = value % 2
        value //= 2
        if key != "per_device_train_batch_size":
            yield {key: value}
        elif not rest:  # an odd batch cannot be halved into the same optimizer step
            steps *= 2
            yield {key: value, "gradient_accumulation_steps": steps}
        else:
            return


def run_checks(
    recipe: TrainingRecipe,
    shape: ModelShape | None,
    machine: Machine,
    workload: Workload,
    quantizations: Sequence[str] = ("F16", "Q8_0", "Q4_K_M"),
    cached: Sequence[str] = (),
) -> list[Check]:
    """Compare what training and export need with what is there.

    Args:
        recipe: The run.
        shape: Of the base model; None = an architecture whose needs are not estimated.
        machine: From `inspect_machine`, with the disks ``run``, ``checkpoints``, ``downloads``.
        workload: The rows' lengths in training order; empty = not known, full batches are assumed.
        quantizations: GGUF types of the export; none = no export is planned.
        cached: Hub names that are downloaded already.
    """
    if shape is None:
        note = "the parameters of this architecture are not known exactly"
        return [Check("memory and disk", False, "not estimated", note, blocking=False)]
    tokens = workload.biggest(recipe)
    checks = [_check_memory(shape, recipe, machine, workload)]
    for stage, need in estimate_ram(shape, recipe, machine, tokens, quantizations).items():
        checks.append(_check_ram(stage, need, machine))
    checks += _check_disks(recipe, shape, machine, quantizations, cached)
    return checks


def _check_memory(
    shape: ModelShape, recipe: TrainingRecipe, machine: Machine, workload: Workload
) -> Check:
    need = estimate_memory(shape, recipe, machine, workload.biggest(recipe)).total
    have, place = machine.training_bytes, "GPU" if machine.device == "cuda" else "RAM"
    advice = ""
    if need > have:
        knobs = find_knobs(shape, recipe, machine, workload)
        advice = str(knobs) if knobs else "no recipe key makes it fit: take a smaller model"
    return Check(
        "memory",
        need <= have,
        f"about {gigabytes(need)} needed",
        f"{gigabytes(have)} {place} free",
        advice,
    )


def _check_ram(stage: str, need: int, machine: Machine) -> Check:
    """Check a stage's RAM; only what would leave the user without GGUF files blocks."""
    advice = {
        "training": "close other programs, or use a machine with more RAM",
        "evaluation": "leave it out (pipeline.sh --from export), or lower "
        "per_device_train_batch_size or max_length",
        "export": "close other programs, or give it fewer cores: each takes 13 MB",
        "verification": "verify on a machine with more RAM; the GGUF files are made all the same",
    }[stage]
    have = machine.ram_available_bytes
    return Check(
        f"RAM for {stage}",
        need <= have,
        f"about {gigabytes(need)} needed",
        f"{gigabytes(have)} free",
        "" if need <= have else advice,
        blocking=stage in ("training", "export"),
    )


def _check_disks(
    recipe: TrainingRecipe,
    shape: ModelShape,
    machine: Machine,
    quantizations: Sequence[str],
    cached: Sequence[str],
) -> list[Check]:
    """Check each disk against all that goes there: folders may share one, or not."""

    def needs_of(some: TrainingRecipe) -> dict[str, int]:
        return estimate_disk(shape, some, quantizations, cached).by_purpose()

    needs, fewer = needs_of(recipe), needs_of(dataclasses.replace(recipe, save_total_limit=1))
    by_disk: dict[int, list[str]] = {}
    for purpose, need in needs.items():
        if need and purpose in machine.disks:
            by_disk.setdefault(machine.disks[purpose].filesystem, []).append(purpose)
    checks = []
    for purposes in by_disk.values():
        need, disk = sum(needs[name] for name in purposes), machine.disks[purposes[0]]
        least = sum(fewer[name] for name in purposes)
        fits = need <= disk.free_bytes
        advice = "" if fits else _disk_advice(purposes, need, disk, least)
        checks.append(
            Check(
                f"disk for {' + '.join(purposes)}",
                fits,
                f"about {gigabytes(need)} needed",
                f"{gigabytes(disk.free_bytes)} free at {disk.path}",
                advice,
            )
        )
    return checks


def _disk_advice(purposes: Sequence[str], need: int, disk: Disk, least: int) -> str:
    if least <= disk.free_bytes:
        return f"set save_total_limit: 1 (about {gigabytes(least)})"
    places = " or ".join(dict.fromkeys(_MOVED_BY[purpose] for purpose in purposes))
    return f"free {gigabytes(need - disk.free_bytes)}, or set {places} to another disk"
