"""What contenders came to: measurements in, ``evaluation.json`` out."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts import answer_style, ifeval, loss_statistics
from scripts.answer_style import Answer
from scripts.evaluation_hf import BASE, QUESTIONS, TUNED
from scripts.ifeval import Judged, Prompt
from scripts.machine import cpu_name, inspect_machine
from scripts.provenance import commit, read_provenance, versions
from scripts.recipe import TrainingRecipe

VERSION = 2
# What was measured of the held-out rows: ``rows``, and what the kind of contender adds.
Measured = dict[str, Any]
_FILE_KEYS = (
    "file",
    "type",
    "bytes",
    "sha256",
    "tokens_per_second",
    "prompt_tokens_per_second",
    "peak_memory_bytes",
    "load_seconds",
    "n_threads",
)


@dataclass
class Contender:
    """A model and what was measured of it.

    Attributes:
        name: ``base (HF)``, ``tuned (HF)``, or a file's type.
        kind: ``hf`` or ``gguf``.
        role: ``base`` or ``tuned``.
        measured: Of the held-out rows.
        answers: To the prompts, in their order; empty when it was not asked.
        seconds: That the answers took.
        verdicts: Of the answers.
    """

    name: str
    kind: str
    role: str
    measured: Measured
    answers: list[Answer]
    seconds: float
    verdicts: list[Judged] = field(default_factory=list)

    def to_json(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Give scores, and what is known of the file."""
        about = {key: self.measured[key] for key in _FILE_KEYS if key in self.measured}
        asked = bool(self.answers)
        return {
            "kind": self.kind,
            "role": self.role,
            **about,
            "loss": loss_statistics.summarize(self.measured["rows"]),
            "ifeval": ifeval.score(prompts, self.verdicts).to_json() if asked else None,
            "style": answer_style.summarize(self.answers) if asked else None,
            "seconds": round(self.measured["seconds"] + self.seconds, 1),
        }


def to_json(
    recipe: TrainingRecipe,
    adapter_sha256: str,
    held_out_path: Path,
    contenders: Sequence[Contender],
    prompts: Sequence[Prompt],
) -> dict[str, Any]:
    """Judge the answers and put everything together."""
    for one in contenders:
        one.verdicts = [
            ifeval.judge(prompt, answer.text)
            for prompt, answer in zip(prompts, one.answers, strict=bool(one.answers))
        ]
    scores = {one.name: one.to_json(prompts) for one in contenders}
    base, tuned = (
        next(one for one in contenders if one.kind == "hf" and one.role == role)
        for role in (BASE, TUNED)
    )
    provenance = read_provenance(recipe.run_dir).get("base_model", {})
    questions = zip(QUESTIONS, base.measured["questions"], tuned.measured["questions"], strict=True)
    return {
        "version": VERSION,
        "run": recipe.run_name,
        "adapter_sha256": adapter_sha256,
        "base_model": provenance.get("name", recipe.model_name_or_path),
        "held_out_file": str(held_out_path),
        "base": scores[base.name]["loss"],
        "tuned": scores[tuned.name]["loss"],
        "change": loss_statistics.change(base.measured["rows"], tuned.measured["rows"]),
        "answers": [
            {"question": question, "base": before, "tuned": now}
            for question, before, now in questions
        ],
        "contenders": scores,
        "comparisons": [
            {"from": base.name, "to": one.name}
            | ifeval.compare(base.verdicts, one.verdicts).to_json()
            for one in contenders
            if one is not base and base.verdicts and one.verdicts
        ],
        "prompts": _prompts(contenders, prompts),
        "tools": _tools(recipe.run_dir),
        "machine": _machine(),
        "commit": commit(),
        "versions": versions(),
        "seconds": round(sum(one["seconds"] for one in scores.values()), 1),
    }


def _prompts(contenders: Sequence[Contender], prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    asked = [one for one in contenders if one.answers]
    return [
        {
            "id": prompt.id,
            "prompt": prompt.prompt,
            "rules": prompt.rules,
            "answers": {one.name: vars(one.answers[at]) | vars(one.verdicts[at]) for one in asked},
        }
        for at, prompt in enumerate(prompts if asked else [])
    ]


def _tools(run_dir: Path) -> dict[str, Any] | None:
    """Give the figures of `scripts.evaluate_tools`, if it measured this adapter."""
    path = run_dir / "tools_evaluation.json"
    weights = run_dir / "adapter" / "adapter_model.safetensors"
    if not path.is_file() or path.stat().st_mtime < weights.stat().st_mtime:
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    measures = ("choice", "exact", "false_calls", "missed_calls")
    return {
        "file": path.name,
        "requests": found["requests"]["asked"],
        "contenders": {
            name: {measure: one["scores"][measure] for measure in measures}
            for name, one in found["contenders"].items()
        },
    }


def _machine() -> dict[str, Any]:
    machine = inspect_machine({})
    return {
        "cpu": cpu_name(),
        "cores": machine.cpu_threads,
        "gpu": machine.device_name if machine.device == "cuda" else None,
        "memory_bytes": machine.ram_total_bytes,
    }
