"""Adapters that are active together, each with a weight: ``json``, ``json:0.5+coding:0.5``, ``base``."""

import difflib
import math
import re
from collections.abc import Collection
from dataclasses import dataclass

from integration._cli import CommandError
from integration.ask_format import BASE

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_MAX_WEIGHT = 8.0


@dataclass(frozen=True)
class AdapterSet:
    """Names with weights; no parts mean the plain base.

    The same adapters with the same weights are the same set, in whatever order they are named.
    """

    parts: tuple[tuple[str, float], ...] = ()

    @property
    def label(self) -> str:
        """How the set is written: ``json:0.5+coding``; a weight of 1 is left out."""
        return "+".join(f"{n}:{w:g}" if w != 1 else n for n, w in self.parts) or BASE

    @property
    def oddity(self) -> str | None:
        """What is unusual about the weights, for the user to know."""
        total = sum(weight for _, weight in self.parts)
        if len(self.parts) > 1 and not 0.5 <= total <= 1.5:
            return (
                f"the weights of '{self.label}' sum to {total:g}; stacked adapters usually answer "
                "best when they sum to about 1"
            )
        if any(weight < 0 for _, weight in self.parts):
            return f"'{self.label}' takes away what an adapter of negative weight has learnt"
        return None


def check_name(name: str) -> str:
    """Make sure that a name can be written in a set.

    Raises:
        CommandError: Exit 2.
    """
    if not _NAME.fullmatch(name) or name == BASE:
        taken = "which means no adapter" if name == BASE else "expected letters, digits, . _ -"
        raise CommandError(f"the name '{name}' cannot be an adapter's: {taken}")
    return name


def parse_set(text: str, names: Collection[str]) -> AdapterSet:
    """Read ``NAME[:WEIGHT][+NAME[:WEIGHT]…]`` or ``base``.

    Args:
        text: What the user wrote.
        names: Adapters that are loaded.

    Raises:
        CommandError: Exit 2; an unknown name (the nearest is told), a name twice, or a weight that is
            no number.
    """
    if text == BASE:
        return AdapterSet()
    parts: dict[str, float] = {}
    for part in text.split("+"):
        name, sign, number = part.strip().partition(":")
        if name not in names:
            known = [BASE, *names]
            near = difflib.get_close_matches(name, known, n=1)
            hint = f", did you mean '{near[0]}'?" if near else f"; expected {', '.join(known)}"
            raise CommandError(f"no adapter is called '{name}'{hint}")
        if name in parts:
            raise CommandError(f"'{text}' names the adapter '{name}' twice; give one weight")
        parts[name] = _weight(text, number) if sign else 1.0
    return AdapterSet(tuple(sorted(parts.items())))


def _weight(text: str, number: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not 0 < abs(weight) <= _MAX_WEIGHT:
        raise CommandError(
            f"'{text}': '{number}' is no weight; expected a number other than 0, at most "
            f"{_MAX_WEIGHT:g}, such as 0.5"
        )
    return weight
