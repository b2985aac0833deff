"""Child processes: quiet threads, and errors that carry what the child said last."""

import os
import shlex
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

from export._cli import FAILED, CommandError

# Threads that wait for each other sleep instead of spinning: several times faster where the cores
# are shared (Colab, a busy laptop). Read by OpenMP when torch or llama.cpp are loaded.
QUIET_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
_NUM_ERROR_LINES = 20


def run_checked(command: list[str], what: str, cwd: Path | None = None) -> str:
    """Run a subprocess and give its stderr.

    Raises:
        CommandError: Exit 1, with the command, its exit code and its last stderr lines.
    """
    done = subprocess.run(
        command,
        cwd=cwd,
        env=child_environment(),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        raise CommandError(
            f"{what} failed with exit code {done.returncode}: {shlex.join(command)} — "
            + last_words(done.stderr or done.stdout),
            FAILED,
        )
    return done.stderr


def child_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Give a child our environment; quiet threads and `more` where the user chose nothing else."""
    return {**QUIET_THREADS, **(more or {}), **os.environ}


def last_words(text: str, count: int = _NUM_ERROR_LINES) -> str:
    """Put the last lines of a child's output into one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-count:])


def how_it_ended(code: int) -> str:
    """Put a child's exit code into words, or the signal that ended it."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
