"""Child processes that answer questions: their death, or their slowness, is a finding, not ours.

A damaged GGUF makes llama.cpp abort its whole process, and a large reference may be killed for lack
of memory. The parent writes one JSON request a line; the child answers with lines
`{"phase": …}` (what it is at) and one `{"reply": …}` or `{"error": …, "exit_code": …}`.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from export._cli import FAILED, OK, TIMEOUT, CommandError
from export._process import child_environment, how_it_ended, last_words

Handler = Callable[..., Any]
_replies: list[Any] = []


class Child:
    """A running child; a context manager that ends it.

    Args:
        module: What `python -m` runs; it calls `serve`.
        dies: Makes the error of a death out of "failed while … (killed by …): last words".
        environment: More variables, where the user has not set them.
    """

    def __init__(
        self,
        module: str,
        dies: Callable[[str], CommandError],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._dies = dies
        self._timed_out = False
        self._phase = "starting"
        # Closed in __exit__, with the process that writes to it.
        self._errors = tempfile.TemporaryFile(  # noqa: SIM115
            "w+", encoding="utf-8", errors="replace"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            cwd=Path(__file__).parents[1],
            env=child_environment(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
        )

    def ask(self, request: Mapping[str, Any], deadline: float) -> Any:
        """Send a request and wait for its reply.

        Args:
            request: `do` names the child's handler; the rest are its arguments.
            deadline: Of `time.monotonic()`; the child is killed then.

        Raises:
            CommandError: Exit 6: out of time. Else what `dies` makes, or the child's own.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(time_left(deadline), self._kill_late)
        timer.start()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            for line in self._process.stdout:
                message = json.loads(line)
                if "reply" in message:
                    return message["reply"]
                if "error" in message:
                    raise CommandError(message["error"], message["exit_code"])
                self._phase = message["phase"]
        except (BrokenPipeError, ValueError):
            pass  # It died: while it was asked, or within a line.
        finally:
            timer.cancel()
        raise self._death()

    def _kill_late(self) -> None:
        self._timed_out = True
        self._process.kill()

    def _death(self) -> CommandError:
        code = self._process.wait()
        if self._timed_out:
            return CommandError(
                f"out of time while {self._phase}; give it more: --timeout SECONDS", TIMEOUT
            )
        self._errors.seek(0)
        tail = last_words(self._errors.read(), 5)
        return self._dies(f"failed while {self._phase} ({how_it_ended(code)}): {tail}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Nothing it holds needs tidying up, so it need not be asked.
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def time_left(deadline: float) -> float:
    """Give the seconds until a deadline.

    Raises:
        CommandError: Exit 6: there are none.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise CommandError("out of time; give it more: --timeout SECONDS", TIMEOUT)
    return left


def serve(handlers: Mapping[str, Handler]) -> int:
    """Answer requests from stdin until it closes; what libraries print goes to stderr."""
    _replies[:] = [os.fdopen(os.dup(1), "w", encoding="utf-8")]
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            _send({"reply": handlers[request.pop("do")](**request)})
        except CommandError as error:
            _send({"error": str(error), "exit_code": error.exit_code})
        except (MemoryError, RuntimeError) as error:
            # torch's allocator raises a RuntimeError that says so.
            if not isinstance(error, MemoryError) and "memory" not in str(error):
                raise
            told = f"out of memory ({str(error)[:200]}); close other programs, or take fewer "
            _send({"error": f"{told}positions: --max-tokens N", "exit_code": FAILED})
    return OK


def tell(phase: str) -> None:
    """Let the parent know what a child is at: "failed while …", "out of time while …"."""
    if _replies:
        _send({"phase": phase})


def _send(message: Mapping[str, Any]) -> None:
    _replies[0].write(json.dumps(message) + "\n")
    _replies[0].flush()
