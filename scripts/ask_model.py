"""Ask a model many things through `integration.ask --jsonl`, in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from scripts._cli import FAILED, MODEL, OK, CommandError

T = TypeVar("T")
# Runs a command with a text as its stdin and gives its stdout.
AskRunner = Callable[[Sequence[str], str], str]
# An answer object of `integration.ask`.
Reply = dict[str, Any]


def spread(items: Sequence[T], count: int) -> list[T]:
    """Take so many items, spread evenly over all; 0 takes all."""
    count = min(count or len(items), len(items))
    return [items[at * len(items) // count] for at in range(count)]


def run_ask(command: Sequence[str], stdin: str) -> str:
    """Run a command; its progress goes to our stderr.

    Raises:
        CommandError: It ended with an exit code other than 0 or 1 (some requests failed).
    """
    done = subprocess.run(
        command, input=stdin, stdout=subprocess.PIPE, encoding="utf-8", check=False
    )
    if done.returncode not in (OK, FAILED):
        raise CommandError(
            f"`{' '.join(command[1:5])}` ended with exit code {done.returncode}; its message is above",
            done.returncode if done.returncode > 0 else FAILED,
        )
    return done.stdout


def ask(
    model: str,
    requests: Sequence[dict[str, Any]],
    options: Sequence[str],
    run: AskRunner = run_ask,
    needs: Sequence[str] = (),
    output: Path | None = None,
) -> list[Reply]:
    """Ask a model; a request that failed has its reason in ``error``.

    Args:
        model: What ``--model`` takes.
        requests: Requests with an ``id`` each.
        options: Further options of `integration.ask`.
        run: Runs the command.
        needs: Keys that an answer must have besides ``id``, ``text`` and ``error``.
        output: A file for the answers, which a run after an interruption goes on with.

    Returns:
        The answer objects, in the order of the requests.

    Raises:
        CommandError: The model cannot be asked, or a request got no answer.
    """
    command = [sys.executable, "-m", "integration.ask", "--model", model, "--jsonl", *options]
    if output is not None:
        command += ["--output", str(output), "--resume"]
    stdin = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in requests)
    written = run(command, stdin)
    if output is not None:
        written = output.read_text(encoding="utf-8")
    replies = dict(_read_reply(line, needs) for line in written.split("\n") if line)
    if missing := [one["id"] for one in requests if one["id"] not in replies]:
        raise CommandError(
            f"'{model}' gave no answer to {len(missing)} of {len(requests)} requests, the first is "
            f"{missing[0]}; expected one object a request from integration.ask --jsonl",
            MODEL,
        )
    return [replies[one["id"]] for one in requests]


def _read_reply(line: str, needs: Sequence[str]) -> tuple[Any, Reply]:
    try:
        value = json.loads(line)
        _ = value["text"], value["error"] or [value[key] for key in needs]
        if "usage" in needs and not value["error"]:
            _ = value["usage"]["completion_tokens"]
        return value["id"], value
    except (ValueError, KeyError, TypeError) as problem:
        raise CommandError(
            f"integration.ask wrote a line that is no answer object: {line[:200]}", MODEL
        ) from problem
