"""Requests out of data sets: what ``examples_from`` of an adapters.yaml names.

An adapter's own training rows are the best picture of what it is for. Rows are JSON objects, one a
line, with ``prompt``, ``messages`` (role, content) or ``conversations`` (from, value); the first turn
of the user is the request.
"""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from integration._cli import CommandError

# More teach the router nothing new, and a request is compared with each.
MAX_REQUESTS = 400
_MAX_CHARACTERS = 2000
_USER = ("user", "human")


def read_requests(path: Path, sources: Collection[str], place: str) -> list[str]:
    """Read the requests of a data set, spread evenly if there are many.

    Args:
        path: A ``.jsonl`` file.
        sources: Only rows whose ``source`` is one of these; none for all.
        place: What errors begin with.

    Raises:
        CommandError: Exit 2; the file is missing, or a line holds no request.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise CommandError(
            f"{place}: examples_from '{path}' cannot be read ({reason}); expected a .jsonl file"
        ) from error
    found = list(_requests(lines, sources, f"{place}: examples_from '{path}'"))
    if not found:
        raise CommandError(
            f"{place}: examples_from '{path}' holds no requests"
            + (f" of the sources {', '.join(sources)}" if sources else "")
            + "; expected rows with prompt, messages or conversations"
        )
    step = max(1, -(-len(found) // MAX_REQUESTS))
    return found[::step]


def _requests(lines: list[str], sources: Collection[str], place: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CommandError(f"{place}: line {number} is no JSON ({error}); mend it") from error
        request = _request(row) if isinstance(row, dict) else None
        if request is None or not request.strip():
            raise CommandError(
                f"{place}: line {number} holds no request; expected prompt, messages or conversations"
            )
        if not sources or row.get("source") in sources:
            yield request[:_MAX_CHARACTERS]


def _request(row: dict[str, Any]) -> str | None:
    if isinstance(row.get("prompt"), str):
        return str(row["prompt"])
    for key, role, text in (("messages", "role", "content"), ("conversations", "from", "value")):
        turns = row.get(key)
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, dict) and turn.get(role) in _USER:
                return turn.get(text) if isinstance(turn.get(text), str) else None
    return None
