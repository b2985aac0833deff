"""Hand-written phrasings of tool requests: read from ``data/tool_requests``, dealt out evenly.

A phrasing is a family: a held-out conversation is never made of one that a training conversation may
be made of.
"""

import json
import random
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

REQUESTS_DIR = Path(__file__).parent / "data" / "tool_requests"
# One family in this many is held out.
HELD_OUT_EVERY = 12
_PLACEHOLDER = re.compile(r"\{(text|width|indent|n|m|name|language|code|clauses)\}")
T = TypeVar("T")


@dataclass(frozen=True)
class Phrasing:
    """One line of a file of phrasings; which fields it has depends on the file.

    Attributes:
        request: What the user writes, with placeholders such as ``{text}``.
        form: What kind of request it is, in its file.
        register: Who might write so.
        rules: Rules that it asks for.
        template_type: Template that it asks for.
        fields: Values that it gives for fields of the template.
        answer: What the model answers where it calls no tool.
        then: The user's next message, and ``call`` the call that it leads to.
        after: Tool that was called before it, and ``change`` what the next call changes.
    """

    request: str
    form: str = ""
    register: str = ""
    rules: list[str] = field(default_factory=list)
    template_type: str = ""
    fields: dict[str, str] = field(default_factory=dict)
    answer: str = ""
    then: str = ""
    call: dict[str, Any] | None = None
    after: str = ""
    change: dict[str, Any] | None = None


def read_lines(name: str) -> list[dict[str, Any]]:
    """Read a file of ``data/tool_requests``, by its name without suffix."""
    path = REQUESTS_DIR / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def is_held_out(text: str) -> bool:
    """Tell whether a phrasing or a text belongs to the held-out families."""
    return zlib.crc32(text.encode()) % HELD_OUT_EVERY == 0


def read_phrasings(name: str, held_out: bool) -> list[Phrasing]:
    """Read the phrasings of a file that are for training, or those that are held out."""
    phrasings = [Phrasing(**line) for line in read_lines(name)]
    return [phrasing for phrasing in phrasings if is_held_out(phrasing.request) == held_out]


def fill(template: str, values: Mapping[str, str]) -> str:
    """Put values for placeholders in one pass: braces in a value stay text."""
    return _PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), template)


class Deck(Generic[T]):
    """Deals items in random order; none comes again before all were dealt.

    Raises:
        ValueError: There are no items.
    """

    def __init__(self, items: Sequence[T], rng: random.Random) -> None:
        if not items:
            raise ValueError("a deck needs at least one item")
        self._items, self._rng, self._left = list(items), rng, list[T]()

    def draw(self) -> T:
        """Deal the next item."""
        if not self._left:
            self._left = list(self._items)
            self._rng.shuffle(self._left)
        return self._left.pop()


_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _mistype(word: str, rng: random.Random) -> str:
    at = rng.randrange(len(word) - 1)
    return rng.choice(
        (
            word[:at] + word[at + 1] + word[at] + word[at + 2 :],  # swapped
            word[:at] + word[at + 1 :],  # left out
            word[: at + 1] + word[at:],  # doubled
            word[:at] + rng.choice(_LETTERS) + word[at + 1 :],
        )
    )


def type_carelessly(template: str, rng: random.Random) -> str:
    """Misspell a word or two, or drop capitals and the last full stop; placeholders stay."""
    if rng.random() < 0.5:
        parts = re.split(r"(\{\w+\})", template)
        parts = [part if part.startswith("{") else part.lower() for part in parts]
        return "".join(parts).rstrip(".!")
    words = [found.span() for found in re.finditer(r"(?<![{\w])[A-Za-z]{4,}(?![}\w])", template)]
    for start, end in sorted(
        rng.sample(words, min(len(words), rng.choice((1, 1, 2)))), reverse=True
    ):
        template = template[:start] + _mistype(template[start:end], rng) + template[end:]
    return template
