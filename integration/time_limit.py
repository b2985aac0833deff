"""Ends Python code that does not end by itself."""

import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class TimeLimitError(Exception):
    """The code did not end in time."""


class _Stop(BaseException):
    """Thrown into the code; no ``except Exception`` in it can catch this."""


def call_limited(function: Callable[[], T], seconds: float) -> T:
    """Call a function in a thread of its own and stop it after some time.

    Python code only: a single call into C is waited for.

    Raises:
        TimeLimitError: It did not end in time; it has been stopped.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(function())
        except _Stop:
            pass
        except BaseException as error:  # raised again below, in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Stop)
        )
        thread.join(1.0)
    if errors:
        raise errors[0]
    if not results:
        raise TimeLimitError
    return results[0]
