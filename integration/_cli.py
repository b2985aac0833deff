"""How every command of this folder ends: exit codes and one-line errors.

Each folder has its own copy, because folders do not import each other (see ARCHITECTURE.md).
"""

import codecs
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

OK, FAILED, USAGE, MODEL, CONTEXT, TOOL, TIMEOUT, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 130


class CommandError(Exception):
    """An expected failure: one line for the user and the exit code of the contract.

    Args:
        message: What was wrong, what was got, what was expected, what to do next.
        exit_code: One of the constants of this module.
    """

    def __init__(self, message: str, exit_code: int = USAGE) -> None:
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code


def log(message: str) -> None:
    """Write one line to stderr: stdout carries results only."""
    print(message, file=sys.stderr, flush=True)


def _replace_and_note(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    if not _noted:
        _noted.append(True)
        log("note: the input is not all UTF-8; what is not was replaced by U+FFFD")
    return "\ufffd", error.end


_noted: list[bool] = []


def read_utf8(stream: Any) -> None:
    """Read a text stream as UTF-8 from here on; bytes that are none are replaced, and that is said."""
    codecs.register_error("replace_and_note", _replace_and_note)
    stream.reconfigure(encoding="utf-8", errors="replace_and_note")


def run_command(main: Callable[[], int]) -> NoReturn:
    """Run ``main`` and leave the process with the contract's exit code.

    A closed pipe (``… | head -1``) is no error: the reader had enough.
    """
    try:
        code = main()
        sys.stdout.flush()
    except CommandError as error:
        log(f"error: {error}")
        code = error.exit_code
    except KeyboardInterrupt:
        log("interrupted")
        code = INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more on exit; give it something that is open.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = OK
    sys.exit(code)
