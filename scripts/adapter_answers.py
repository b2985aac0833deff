"""The adapters' held-out requests, and what a base or an adapter answers to them.

Models are asked by `integration.ask --jsonl` in a process of its own, greedily and without tools.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts._cli import MODEL, CommandError
from scripts.adapter_scores import parses_as_python
from scripts.ask_model import AskRunner, Reply
from scripts.ask_model import ask as ask_model

DATA_DIR = Path(__file__).parent / "data" / "adapters"
MAX_TOKENS = 256
BASE_ROUTE = "base"


@dataclass(frozen=True)
class HeldOut:
    """A request of a file; ``row`` is its whole line."""

    id: str
    prompt: str
    row: dict[str, Any]


@dataclass(frozen=True)
class Contender:
    """Somebody to ask: the base, the base with an instruction, or an adapter."""

    name: str
    route: str = BASE_ROUTE
    adapter_path: Path | None = None
    instruction: str | None = None


@dataclass(frozen=True)
class Answer:
    """What was answered; ``cut`` where the longest answer was reached."""

    text: str
    tokens: int
    cut: bool


@dataclass(frozen=True)
class Answers:
    """A contender's answers, in the order of the requests, and how long all of them took."""

    answers: list[Answer]
    seconds: float


def requests_path(name: str) -> Path:
    """Give the file with the held-out requests of an adapter."""
    return DATA_DIR / f"{name}_eval.jsonl"


def read_held_out(name: str) -> list[HeldOut]:
    """Read the requests of an adapter: ``prompt``, and ``keys`` (json) or ``check`` (coding).

    Raises:
        CommandError: There is no such file, or a line is no request; it is named ``file:line``.
    """
    path = requests_path(name)
    if not path.is_file():
        raise CommandError(f"'{path}' does not exist; expected the held-out requests of '{name}'")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise CommandError(f"'{path}' is no UTF-8 text: {error}; save it as UTF-8") from error
    requests = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = _parse_row(name, line)
            except ValueError as error:
                raise CommandError(f"{path}:{number}: {error}; correct this line") from error
            requests.append(HeldOut(f"{name}-{number}", row["prompt"], row))
    if not requests:
        raise CommandError(f"'{path}' has no request; expected one a line")
    return requests


def _parse_row(name: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error.msg} (column {error.colno})") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ValueError("expected an object with prompt, a text")
    if not row["prompt"].strip():
        raise ValueError("prompt: expected some text, got none")
    if name == "json":
        keys = row.get("keys")
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise ValueError(f"keys: got {keys!r}, expected a list of names, empty where none is")
    if name == "coding":
        check = row.get("check")
        if not isinstance(check, str) or (check and not parses_as_python(check)):
            raise ValueError(f"check: got {check!r}, expected Python asserts, or '' for none")
    return row


def ask(
    model: Path, contender: Contender, requests: Sequence[HeldOut], seed: int, run: AskRunner
) -> Answers:
    """Ask a contender.

    Raises:
        CommandError: It cannot be asked, or a request got no answer.
    """
    # One request at a time: side by side, an answer may depend on its neighbours in the last bits.
    options = ["--parallel", "1", "--no-tools", "--temperature", "0", "--seed", str(seed)]
    options += ["--max-tokens", str(MAX_TOKENS), "--route", contender.route]
    if contender.adapter_path is not None:
        options += ["--adapter", f"{contender.route}={contender.adapter_path}"]
    if contender.instruction is not None:
        options += ["--system", contender.instruction]
    rows = [{"id": one.id, "prompt": one.prompt} for one in requests]
    started = time.monotonic()
    replies = ask_model(str(model), rows, options, run, needs=["finish_reason", "usage"])
    seconds = time.monotonic() - started
    return Answers([_read_reply(reply) for reply in replies], seconds)


def _read_reply(reply: Reply) -> Answer:
    """Read an answer object; a fault of the machine or of the request is no wrong answer."""
    if reply["error"]:
        raise CommandError(f"request {reply['id']} was not answered: {reply['error']}", MODEL)
    cut = reply["finish_reason"] == "length"
    return Answer(reply["text"], reply["usage"]["completion_tokens"], cut)
