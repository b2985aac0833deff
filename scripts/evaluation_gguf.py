"""A run's exported files: losses of rows, speed and memory, answers to prompts.

`export.measure_gguf` evaluates the rows, `integration.ask` answers, each in a process of its own.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scripts._cli import FAILED, MODEL, CommandError
from scripts.answer_style import Answer
from scripts.ask_model import AskRunner, Reply, ask, spread
from scripts.ifeval import Prompt
from scripts.machine import usable_threads
from scripts.render import EncodedConversation

_DECODE_TOKENS = 32
# Tokens times bytes of a file: about three minutes of two cores, for a model of any size.
_MOST_WORK = 10**13
# Runs a command and gives its stdout.
Runner = Callable[[Sequence[str]], str]


def run_measure(command: Sequence[str]) -> str:
    """Run `export.measure_gguf`; its messages go to our stderr.

    Raises:
        CommandError: It failed.
    """
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=False)
    if done.returncode:
        raise CommandError(
            f"`{' '.join(command[1:4])}` ended with exit code {done.returncode}; its message is above",
            done.returncode if done.returncode > 0 else MODEL,
        )
    return done.stdout


def affordable(path: Path, rows: Sequence[EncodedConversation]) -> Sequence[EncodedConversation]:
    """Take rows, spread evenly, of which a CPU measures the loss of a file in a few minutes."""
    tokens = sum(len(row.input_ids) for row in rows)
    share = _MOST_WORK / path.stat().st_size / max(1, tokens)
    return rows if share >= 1 else spread(rows, max(1, int(share * len(rows))))


def measure(
    path: Path, rows: Sequence[EncodedConversation], run: Runner = run_measure
) -> dict[str, Any]:
    """Measure a file; see `export.measure_gguf` for the keys.

    Raises:
        CommandError: llama.cpp cannot use it.
    """
    with tempfile.TemporaryDirectory() as folder:
        rows_path = Path(folder, "rows.jsonl")
        lines = [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]
        rows_path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        command = [sys.executable, "-m", "export.measure_gguf", str(path), "--rows", str(rows_path)]
        command += ["--threads", str(usable_threads()), "--decode-tokens", str(_DECODE_TOKENS)]
        try:
            measured: dict[str, Any] = json.loads(run(command))
        except json.JSONDecodeError as error:
            raise CommandError(f"export.measure_gguf wrote no JSON: {error}", FAILED) from error
    return measured


def answer_prompts(
    path: Path, prompts: Sequence[Prompt], room: int, output: Path, run: AskRunner
) -> tuple[list[Answer], float]:
    """Answer prompts greedily, without a repeat penalty; what ``output`` holds is done.

    Returns:
        The answers in the order of the prompts, and the seconds that this call took.

    Raises:
        CommandError: The file cannot be asked, or a prompt was not answered.
    """
    # One request at a time: side by side, an answer may depend on its neighbours in the last bits.
    options = ["--parallel", "1", "--no-tools", "--temperature", "0", "--seed", "1"]
    options += ["--repeat-penalty", "1", "--max-tokens", str(room)]
    requests = [{"id": one.id, "prompt": one.prompt} for one in prompts]
    output.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    needs = ["finish_reason", "usage"]
    replies = ask(str(path), requests, options, run, needs, output)
    return [_to_answer(reply, path) for reply in replies], time.monotonic() - started


def _to_answer(reply: Reply, path: Path) -> Answer:
    if reply["error"]:
        raise CommandError(
            f"'{path}' did not answer prompt {reply['id']}: {reply['error']}; leave the file out "
            "(--ask base,tuned), or take another --ifeval file",
            MODEL,
        )
    ended = reply["finish_reason"] != "length"
    return Answer(reply["text"].strip(), reply["usage"]["completion_tokens"], ended)
