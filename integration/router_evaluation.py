"""Measure a router on requests that it was not trained on: accuracy, confusion, latency."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from integration._cli import CommandError
from integration.ask_format import BASE

if TYPE_CHECKING:
    from integration.routing import Router

_CONFIDENT = 1.96  # standard errors on both sides of a 95 % interval


@dataclass(frozen=True)
class Case:
    """A row of an evaluation file: the user's texts, and the class expected after each of them."""

    line: int
    texts: tuple[str, ...]
    expected: tuple[str, ...]
    is_conversation: bool = False


def load_cases(path: Path, names: Sequence[str]) -> list[Case]:
    """Read rows ``{"prompt", "adapter"}`` or ``{"messages", "adapters"}``, one a line.

    Raises:
        CommandError: Exit 2; the file is missing or empty, or a row, named by its line, is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise CommandError(
            f"'{path}' does not exist; expected a JSONL file with rows "
            '{"prompt": "...", "adapter": "NAME"}'
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"'{path}' cannot be read ({error}); expected JSONL in UTF-8") from error
    known = {*names, BASE}
    cases = [
        _read_case(line, f"line {number} of '{path}'", number, known)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not cases:
        raise CommandError(
            f'\'{path}\' has no rows; expected {{"prompt": "...", "adapter": "NAME"}}'
        )
    return cases


def _read_case(line: str, place: str, number: int, known: set[str]) -> Case:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{place} is no JSON: {error}; write one object a line") from error
    if not isinstance(row, dict):
        raise CommandError(f"{place} is no object; expected prompt and adapter")
    if "prompt" in row and "adapter" in row:
        texts, expected = [row["prompt"]], [row["adapter"]]
    elif isinstance(row.get("messages"), list) and isinstance(row.get("adapters"), list):
        texts, expected = row["messages"], row["adapters"]
    else:
        raise CommandError(
            f"{place} has the keys {', '.join(row) or 'nothing'}; expected prompt and adapter, or "
            "messages and adapters (lists)"
        )
    if not texts or len(texts) != len(expected):
        raise CommandError(
            f"{place} has {len(texts)} messages and {len(expected)} adapters; expected one for each"
        )
    if not all(isinstance(text, str) for text in texts):
        raise CommandError(f"{place} has a message that is no text; expected texts of the user")
    wanted = tuple(BASE if one is None else one for one in expected)
    for one in wanted:
        if not isinstance(one, str) or one not in known:
            raise CommandError(
                f"{place} expects the adapter '{one}', which the router does not know; expected "
                f"{', '.join(sorted(known))}"
            )
    return Case(number, tuple(texts), wanted, "messages" in row)


def evaluate(router: "Router", cases: Sequence[Case]) -> dict[str, Any]:
    """Route every request, turn by turn in conversations, and count."""
    names = [*router.names, BASE]
    confusion = {name: dict.fromkeys(names, 0) for name in names}
    wrong: list[dict[str, Any]] = []
    milliseconds: list[float] = []
    abstained = conversations = whole = 0
    for case in cases:
        failures = len(wrong)
        for turn, expected in enumerate(case.expected, 1):
            started = time.perf_counter()
            route = router.route(case.texts[:turn], router.names)
            milliseconds.append((time.perf_counter() - started) * 1000)
            got = route.adapter or BASE
            confusion[expected][got] += 1
            likeliest = max(route.scores, key=route.scores.__getitem__)
            abstained += got == BASE != likeliest and any(route.scores.values())
            if got != expected:
                wrong.append(
                    {"line": case.line, "turn": turn, "text": case.texts[turn - 1],
                     "expected": expected, "got": got, "reason": route.reason}
                )  # fmt: skip
        if case.is_conversation:
            conversations += 1
            whole += len(wrong) == failures
    total = len(milliseconds)
    right = total - len(wrong)
    milliseconds.sort()
    return {
        "rows": len(cases),
        "requests": total,
        "right": right,
        "accuracy": round(right / total, 4),
        "interval": [round(end, 4) for end in wilson_interval(right, total)],
        "conversations": conversations,
        "conversations_right": whole,
        "abstained": abstained,
        "classes": {name: _class_figures(confusion, name) for name in names},
        "confusion": confusion,
        "latency_ms": {
            "median": round(milliseconds[total // 2], 2),
            "p95": round(milliseconds[min(total - 1, math.ceil(0.95 * total) - 1)], 2),
        },
        "wrong": wrong,
    }


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """Give the 95 % interval of a share (Wilson 1927), sound for few trials and at 0 and 1."""
    share, square = right / total, _CONFIDENT**2
    middle = (share + square / (2 * total)) / (1 + square / total)
    spread = share * (1 - share) / total + square / (4 * total**2)
    half = _CONFIDENT * math.sqrt(spread) / (1 + square / total)
    return max(0.0, middle - half), min(1.0, middle + half)


def _class_figures(confusion: dict[str, dict[str, int]], name: str) -> dict[str, Any]:
    """Give precision and recall of a class; None where there is nothing to divide by."""
    right = confusion[name][name]
    sent = sum(row[name] for row in confusion.values())
    meant = sum(confusion[name].values())
    return {
        "requests": meant,
        "precision": round(right / sent, 4) if sent else None,
        "recall": round(right / meant, 4) if meant else None,
    }
