"""How every command of this folder ends: exit codes and one-line errors.

Each folder has its own copy, because folders do not import each other (see ARCHITECTURE.md).
"""

import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

OK, FAILED, USAGE, MODEL, CONTEXT, TOOL, TIMEOUT, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 130

_CHOOSE_FOLDER = "choose a folder that you may write to (--output-root, --checkpoint-dir)"
_FREE_SPACE = "free some space and run the same command again"
_DISK_ADVICE = {
    errno.EACCES: _CHOOSE_FOLDER,
    errno.EPERM: _CHOOSE_FOLDER,
    errno.EROFS: _CHOOSE_FOLDER,
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
}


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
    """Write one line to stderr: stdout carries results only.

    Of several processes that train together only the first one speaks.
    """
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


def run_command(main: Callable[[], int]) -> NoReturn:
    """Run ``main`` and leave the process with the contract's exit code.

    A closed pipe (``… | head -1``) is no error: the reader had enough. SIGTERM ends a command as
    Ctrl-C does, so that it cleans up.
    """

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        code = main()
        sys.stdout.flush()
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except KeyboardInterrupt:
        log("interrupted")
        code = INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more on exit; give it something that is open.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = OK
    except OSError as error:
        advice = _DISK_ADVICE.get(error.errno or 0)
        if advice is None:
            raise
        print(f"error: {error}; {advice}", file=sys.stderr, flush=True)
        code = FAILED
    sys.exit(code)
