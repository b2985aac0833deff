"""How well tools were called: outcomes of requests in, shares, tables and comparisons out. No torch.

What is right and what is exact, ``scripts.tool_outcomes`` says.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.tool_outcomes import ARGUMENT_ERRORS, MALFORMED, NONE, TOOL_NAMES, Outcome

SMALL_TALK = "none_small_talk"
_Z95 = 1.959964


@dataclass(frozen=True)
class Share:
    """A share of requests, with its Wilson 95 % interval; ``value`` is None of no requests."""

    hits: int
    total: int

    @classmethod
    def of(cls, verdicts: Iterable[bool | None]) -> "Share":
        """Count verdicts; None counts as no request."""
        counted = [bool(verdict) for verdict in verdicts if verdict is not None]
        return cls(sum(counted), len(counted))

    @property
    def value(self) -> float | None:
        """The share itself."""
        return self.hits / self.total if self.total else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where the true share may lie (Wilson's score interval, 95 %)."""
        if not self.total:
            return None
        share, spread = self.hits / self.total, _Z95**2 / self.total
        middle = share + spread / 2
        half = _Z95 * math.sqrt(share * (1 - share) / self.total + spread / self.total / 4)
        low, high = ((middle + sign * half) / (1 + spread) for sign in (-1, 1))
        return max(0.0, low), min(1.0, high)

    def to_json(self) -> dict[str, Any]:
        """Give the counts, the share and the interval."""
        value, interval = self.value, self.interval
        return {
            "hits": self.hits,
            "total": self.total,
            "share": None if value is None else round(value, 6),
            "interval_95": None if interval is None else [round(end, 6) for end in interval],
        }


@dataclass(frozen=True)
class Scores:
    """What some requests came to.

    Attributes:
        choice: Right tool, or rightly none, of all requests.
        exact: Right tool with equal arguments, of the requests that expect a call.
        false_calls: Any call, malformed ones too, of the requests that expect none.
        false_calls_small_talk: The same of the group of small talk alone.
        missed_calls: No call at all, of the requests that expect one.
        malformed: Malformed calls, in number.
        confusion: Expected tool or ``none``, by called tool, ``none`` or ``malformed``.
        argument_errors: Calls of the right tool with each kind of error; a call may have several.
    """

    choice: Share
    exact: Share
    false_calls: Share
    false_calls_small_talk: Share
    missed_calls: Share
    malformed: int
    confusion: dict[str, dict[str, int]]
    argument_errors: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Give all numbers."""
        return {
            name: value.to_json() if isinstance(value, Share) else value
            for name, value in vars(self).items()
        }


def score(outcomes: Sequence[Outcome]) -> Scores:
    """Count outcomes."""
    tools = [one for one in outcomes if one.expected is not None]
    plain = [one for one in outcomes if one.expected is None]
    pairs = Counter((one.expected_name, one.called) for one in outcomes)
    kinds = Counter(kind for one in outcomes for kind in one.errors if one.right)
    return Scores(
        choice=Share.of(one.right for one in outcomes),
        exact=Share.of(one.exact for one in outcomes),
        false_calls=Share.of(one.called != NONE for one in plain),
        false_calls_small_talk=Share.of(
            one.called != NONE for one in plain if one.group == SMALL_TALK
        ),
        missed_calls=Share.of(one.called == NONE for one in tools),
        malformed=sum(one.called == MALFORMED for one in outcomes),
        confusion={
            row: {column: pairs[row, column] for column in (*TOOL_NAMES, NONE, MALFORMED)}
            for row in (*TOOL_NAMES, NONE)
        },
        argument_errors={kind: kinds[kind] for kind in ARGUMENT_ERRORS if kinds[kind]},
    )


def score_parts(
    outcomes: Sequence[Outcome], part_of: Callable[[Outcome], str]
) -> dict[str, Scores]:
    """Count the outcomes of each part, such as each group, in the order in which parts appear."""
    parts: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        parts.setdefault(part_of(outcome), []).append(outcome)
    return {name: score(some) for name, some in parts.items()}


@dataclass(frozen=True)
class Change:
    """What a measure does from one contender to another over the same requests.

    Attributes:
        points: Difference of the shares, in percentage points; below 0 is worse.
        became_wrong: Requests that were right only before.
        became_right: Requests that are right only now.
    """

    points: float
    became_wrong: list[str]
    became_right: list[str]

    def to_json(self) -> dict[str, Any]:
        """Give the numbers and which requests they are."""
        return {
            "points": round(self.points, 2),
            "became_wrong": len(self.became_wrong),
            "became_right": len(self.became_right),
            "became_wrong_ids": self.became_wrong,
            "became_right_ids": self.became_right,
        }


def compare(before: Sequence[Outcome], now: Sequence[Outcome]) -> dict[str, Change]:
    """Compare two contenders: ``choice`` over all requests, ``exact`` over those that expect a call.

    Raises:
        ValueError: They were not asked the same requests.
    """
    if [one.id for one in before] != [one.id for one in now]:
        raise ValueError("the two contenders were not asked the same requests in the same order")
    pairs = list(zip(before, now, strict=True))
    verdicts = {
        "choice": [(old.id, old.right, new.right) for old, new in pairs],
        "exact": [(old.id, bool(old.exact), bool(new.exact)) for old, new in pairs if old.expected],
    }
    changes = {}
    for measure, rows in verdicts.items():
        wrong = [one for one, was, is_now in rows if was and not is_now]
        right = [one for one, was, is_now in rows if is_now and not was]
        points = 100 * (len(right) - len(wrong)) / len(rows) if rows else 0.0
        changes[measure] = Change(points, wrong, right)
    return changes
