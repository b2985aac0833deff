"""What the chat draws: text that cannot steer a terminal, tool calls, errors and the meter.

stdout carries answers, calls and what a command prints; stderr carries the rest.
"""

import json
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from integration.agent import CallRecord

# C0 but for tab and newline, DEL and C1; then what is invisible or turns the direction of writing.
# Joiners (U+200C, U+200D) stay: Persian and many emoji are written with them.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"
    "\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_WAITING = "..."
_METER_CELLS = 20


def visible(text: str) -> str:
    """Show control, bidirectional and invisible characters instead of sending them on."""
    return _UNSAFE.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def format_call(name: str, arguments: Mapping[str, Any]) -> str:
    """Write a call as ``name(key="value", …)``, on one line."""
    pairs = (f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in arguments.items())
    return visible(f"{name}({', '.join(pairs)})")


def context_share(used: int | None, n_ctx: int | None) -> str:
    """Give ``used/n_ctx percent``, or what of it is known."""
    if used is None or n_ctx is None:
        return "?" if used is None else str(used)
    return f"{used}/{n_ctx} {100 * used / n_ctx:.0f} %"


def meter(used: int | None, n_ctx: int | None) -> str:
    """Draw the used part of the context as a bar with its numbers."""
    if used is None or n_ctx is None:
        return context_share(used, n_ctx)
    full = min(_METER_CELLS, -(-used * _METER_CELLS // n_ctx))
    return f"[{'#' * full}{'.' * (_METER_CELLS - full)}] {context_share(used, n_ctx)}"


class Screen:
    """The two streams of a chat.

    Args:
        out: Standard output. Text goes through unchanged when it is no terminal.
        err: Standard error.
    """

    def __init__(self, out: TextIO, err: TextIO) -> None:
        self._out, self._err = out, err
        self.out_is_terminal, self.err_is_terminal = out.isatty(), err.isatty()
        self._is_waiting = False

    def piece(self, text: str) -> None:
        """Write a piece of an answer at once."""
        self._end_waiting()
        self._out.write(visible(text) if self.out_is_terminal else text)
        self._out.flush()

    def line(self, text: str = "") -> None:
        """Write a line of an answer, or of what a command prints."""
        self.piece(text + "\n")

    def call(self, record: "CallRecord") -> None:
        """Show a finished tool call with its result, made visible on every output."""
        if record.error is None:
            result = visible(record.result or "").expandtabs()
        else:
            result = self._styled(f"error: {visible(_reason(record.error))}", "31", self._out)
        # A call that was cut off has no name: there is only the error to show.
        call = f"[{format_call(record.name, record.arguments)}]"
        head = self._styled(call, "36", self._out) + "\n" if record.name else ""
        self._end_waiting()
        self._out.write(f"{head}{result}\n\n")
        self._out.flush()

    def error(self, message: object) -> None:
        """Say on stderr what went wrong, in one line."""
        self._say(f"error: {_reason(str(message))}", "31")

    def note(self, message: str) -> None:
        """Say something about the conversation on stderr, in one line."""
        self._say(message, "2")

    def status(self, message: str) -> None:
        """Draw the line below an answer: on a terminal only."""
        if self.err_is_terminal:
            self._say(f"[{message}]", "2")

    def wait(self) -> None:
        """Show that the model reads; gone as soon as something else is written."""
        if self.out_is_terminal:
            self._out.write(_WAITING)
            self._out.flush()
            self._is_waiting = True

    def confirm(self, question: str) -> bool:
        """Ask on the terminal; everything but ``y`` or ``yes`` is a no."""
        self._end_waiting()
        _forget_typed_keys()
        stream = self._out if self.out_is_terminal else self._err
        stream.write(f"{visible(question)} [y/N] ")
        stream.flush()
        try:
            return input().strip().lower() in {"y", "yes"}
        except EOFError:
            self.line()
            return False

    def _say(self, message: str, style: str) -> None:
        self._end_waiting()
        text = visible(message) if self.err_is_terminal else message
        self._err.write(self._styled(text, style, self._err) + "\n")
        self._err.flush()

    def _styled(self, text: str, style: str, stream: TextIO) -> str:
        is_terminal = self.out_is_terminal if stream is self._out else self.err_is_terminal
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        return text if plain or not is_terminal else f"\x1b[{style}m{text}\x1b[0m"

    def _end_waiting(self) -> None:
        if self._is_waiting:
            self._is_waiting = False
            back = "\b" * len(_WAITING)
            self._out.write(back + " " * len(_WAITING) + back)
            self._out.flush()


def _reason(message: str) -> str:
    return " ".join(message.split()).removeprefix("error: ")


def _forget_typed_keys() -> None:
    # A key pressed while the model was busy must not approve what nobody had seen yet.
    import sys
    import termios

    termios.tcflush(sys.stdin, termios.TCIFLUSH)
