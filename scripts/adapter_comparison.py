"""Ask the base, the base with an instruction and an adapter the same requests, and compare them."""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts._cli import log
from scripts.adapter_answers import (
    Answers,
    Contender,
    HeldOut,
    ask,
    read_held_out,
    requests_path,
)
from scripts.adapter_scores import SPECIALITIES, Verdicts, judge, mcnemar_p
from scripts.ask_model import AskRunner, spread
from scripts.code_check import run_check
from scripts.tool_scores import Share

BASE, INSTRUCTED = "base", "base, instructed"
SHOWN = 3


@dataclass(frozen=True)
class Settings:
    """Whom to ask how many requests; ``seed`` chooses the answers that the report shows."""

    model: Path
    adapters: dict[str, Path]
    rows: int = 0
    seed: int = 1


def _ask_and_judge(
    settings: Settings, name: str, requests: Sequence[HeldOut], contender: Contender, run: AskRunner
) -> tuple[Answers, list[Verdicts]]:
    log(f"evaluate adapters: asking {contender.name} {len(requests)} requests of {name}")
    got = ask(settings.model, contender, requests, settings.seed, run)
    verdicts = [
        judge(name, request.row, answer.text, run_check)
        for request, answer in zip(requests, got.answers, strict=True)
    ]
    main = SPECIALITIES[name].main
    right = sum(bool(one[main]) for one in verdicts)
    log(f"evaluate adapters: {right} of {len(requests)} {main} in {got.seconds:.0f} s")
    return got, verdicts


def compare_adapter(settings: Settings, name: str, run: AskRunner) -> dict[str, Any]:
    """Ask the contenders of one speciality; give scores, comparisons and every answer.

    Raises:
        CommandError: The requests cannot be read, or somebody gave no answers.
    """
    speciality, every = SPECIALITIES[name], read_held_out(name)
    requests = spread(every, settings.rows)
    contenders = [
        Contender(BASE),
        Contender(INSTRUCTED, instruction=speciality.instruction),
        Contender(name, route=name, adapter_path=settings.adapters[name]),
    ]
    found = {one.name: _ask_and_judge(settings, name, requests, one, run) for one in contenders}
    hits = {who: [bool(one[speciality.main]) for one in found[who][1]] for who in found}

    def compare(before: str) -> dict[str, Any]:
        pairs = list(zip(hits[before], hits[name], strict=True))
        right, wrong = pairs.count((False, True)), pairs.count((True, False))
        counts = {"became_right": right, "became_wrong": wrong}
        return {"from": before, "to": name, **counts, "p_value": mcnemar_p(right, wrong)}

    # Drawn, so that nobody picks them.
    shown = random.Random(settings.seed).sample(range(len(requests)), min(SHOWN, len(requests)))
    return {
        "file": str(settings.adapters[name]),
        "requests": {
            "file": os.path.relpath(requests_path(name)),
            "asked": len(requests),
            "of": len(every),
        },
        "instruction": speciality.instruction,
        "measures": list(speciality.measures),
        "main": speciality.main,
        "contenders": {who: _scores(speciality.measures, *found[who]) for who in found},
        "comparisons": [compare(who) for who in (BASE, INSTRUCTED)],
        "better_base": INSTRUCTED if sum(hits[INSTRUCTED]) > sum(hits[BASE]) else BASE,
        "better_than_base": sum(hits[name]) > sum(hits[BASE]),
        "answers": [
            {
                "id": request.id,
                "prompt": request.prompt,
                "shown": at in shown,
                "contenders": {
                    who: {"text": got.answers[at].text, **verdicts[at]}
                    for who, (got, verdicts) in found.items()
                },
            }
            for at, request in enumerate(requests)
        ],
    }


def _scores(measures: Sequence[str], got: Answers, verdicts: Sequence[Verdicts]) -> dict[str, Any]:
    return {
        "scores": {key: Share.of(one[key] for one in verdicts).to_json() for key in measures},
        "mean_tokens": round(sum(one.tokens for one in got.answers) / len(got.answers), 1),
        "cut": sum(one.cut for one in got.answers),
    }
