"""The preflight's answer: everything that was found out, as a table and as JSON."""

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scripts._cli import FAILED, CommandError
from scripts.estimates import (
    DiskEstimate,
    MemoryEstimate,
    Workload,
    estimate_disk,
    estimate_memory,
)
from scripts.machine import Machine, Precision, choose_precision
from scripts.model_shape import ModelShape
from scripts.preflight import Check, gigabytes, run_checks
from scripts.recipe import TrainingRecipe
from scripts.time_plan import RESERVE, TimePlan, format_duration


@dataclass(frozen=True)
class Report:
    """Everything that the preflight found out."""

    versions: Mapping[str, str]
    machine: Machine
    precision: Precision
    checks: Sequence[Check]
    memory: MemoryEstimate | None = None
    disk: DiskEstimate | None = None
    plan: TimePlan | None = None
    budget_seconds: float | None = None
    available_rows: int = 0
    now: datetime.datetime = field(default_factory=datetime.datetime.now)

    @property
    def ok(self) -> bool:
        """Whether nothing that blocks was found."""
        return all(check.ok or not check.blocking for check in self.checks)

    def require_ok(self) -> None:
        """Refuse a run that cannot finish.

        Raises:
            CommandError: Exit 1, with every unmet check in one line.
        """
        if not self.ok:
            failed = [check.line() for check in self.checks if check.verdict == "FAIL"]
            raise CommandError(f"this run cannot finish: {' | '.join(failed)}", FAILED)

    def to_text(self) -> str:
        """Lay the report out as a table for stderr."""
        rows = [("versions", ", ".join(f"{key} {value}" for key, value in self.versions.items()))]
        rows += [("device", _device(self.machine))]
        rows += [("precision", f"{self.precision.name} ({self.precision.reason})")]
        if self.memory:
            rows.append(("memory is", _parts(dataclasses.asdict(self.memory))))
        if self.disk:
            rows.append(("disk is", _parts(_disk_parts(self.disk))))
        if self.plan:
            rows += self._time_rows(self.plan)
        rows += [(check.verdict, check.line()) for check in self.checks]
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {text}" for label, text in rows)

    def _time_rows(self, plan: TimePlan) -> list[tuple[str, str]]:
        of_all = f" of {self.available_rows}" if self.available_rows > plan.rows else ""
        finish = plan.finish(self.now)
        days = (finish.date() - self.now.date()).days
        when = f"{finish:%H:%M}" + (f" in {days} days" if days > 1 else " tomorrow" * days)
        total = f"{format_duration(plan.total)}, done at about {when}"
        if self.budget_seconds:
            budget = format_duration(self.budget_seconds)
            total += f" (budget {budget}, {RESERVE:.0%} of it in reserve)"
        stages = [f"{name} {format_duration(s)}" for name, s in plan.seconds.items() if s >= 0.5]
        return [
            ("rows", f"{plan.rows}{of_all}"),
            ("steps", str(plan.steps)),
            ("real tokens", f"{plan.real_tokens} ({_share(plan)} of those computed)"),
            ("time", total),
            ("time is", ", ".join(stages)),
        ]

    def to_json(self) -> dict[str, Any]:
        """Give the report as plain values; sizes in bytes, times in seconds."""
        content: dict[str, Any] = {
            "ok": self.ok,
            "versions": dict(self.versions),
            "machine": self.machine.to_json(),
            "precision": dataclasses.asdict(self.precision),
            "checks": [
                dataclasses.asdict(check) | {"verdict": check.verdict} for check in self.checks
            ],
            "memory": None,
            "disk": None,
            "plan": None,
            "budget_seconds": self.budget_seconds,
            "available_rows": self.available_rows,
        }
        if self.memory:
            content["memory"] = dataclasses.asdict(self.memory) | {"total": self.memory.total}
        if self.disk:
            content["disk"] = dataclasses.asdict(self.disk) | {
                "export_peak": self.disk.export_peak,
                "verification_peak": self.disk.verification_peak,
            }
        if self.plan:
            finish = self.plan.finish(self.now).isoformat(timespec="seconds")
            content["plan"] = dataclasses.asdict(self.plan) | {"finish": finish}
            content["plan"]["total_seconds"] = round(self.plan.total, 1)
        return content


def make_report(
    recipe: TrainingRecipe,
    shape: ModelShape | None,
    machine: Machine,
    workload: Workload,
    versions: Mapping[str, str],
    *,
    quantizations: Sequence[str] = ("F16", "Q8_0", "Q4_K_M"),
    cached: Sequence[str] = (),
    plan: TimePlan | None = None,
    budget_seconds: float | None = None,
) -> Report:
    """Estimate, check, and put everything together; see `run_checks` for the arguments."""
    precision = choose_precision(machine.capability, machine.cpu_bf16)
    checks = run_checks(recipe, shape, machine, workload, quantizations, cached)
    memory = disk = None
    if shape is not None:
        memory = estimate_memory(shape, recipe, machine, workload.biggest(recipe))
        disk = estimate_disk(shape, recipe, quantizations, cached)
    return Report(
        versions=versions,
        machine=machine,
        precision=precision,
        checks=checks,
        memory=memory,
        disk=disk,
        plan=plan,
        budget_seconds=budget_seconds,
        available_rows=len(workload.lengths),
    )


def _device(machine: Machine) -> str:
    ram = f"{gigabytes(machine.ram_total_bytes)} RAM, {machine.cpu_threads} threads"
    colab = ", Colab" if machine.colab else ""
    if machine.capability is None:
        return f"{machine.device_name}, {ram}{colab}"
    major, minor = machine.capability
    gpu = f"{machine.device_name} ({major}.{minor}), {gigabytes(machine.gpu_total_bytes)}"
    return f"{gpu}; {ram}{colab}"


def _disk_parts(disk: DiskEstimate) -> dict[str, int]:
    parts = {"checkpoints": disk.checkpoints, "adapter": disk.adapter, **disk.quantized}
    return parts | {"verification": disk.verification} | disk.downloads


def _parts(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items() if size)


def _share(plan: TimePlan) -> str:
    return f"{plan.real_tokens / max(1, plan.computed_tokens):.0%}"
