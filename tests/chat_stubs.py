"""A chat without a model: stubs for its session, and a terminal to run it in.

`python -m tests.chat_stubs [--approve]` chats with the stub.
"""

import codecs
import fcntl
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from integration._cli import CommandError, run_command
from integration.agent import CallRecord, Reply, run_call
from integration.decoding import Settings
from tools.protocol import ToolCall, render_tool_call, render_tool_result

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b1m\u202eok"


@dataclass
class StubModel:
    """Counts a token a word and two for the frame of every message."""

    name: str = "stub.gguf"
    n_ctx: int | None = 1000
    remembered: bool = False
    engine: Any = field(default_factory=lambda: SimpleNamespace(n_threads=2))

    def warm_up(self) -> None:
        pass

    def remember(self) -> None:
        self.remembered = True

    def count_tokens(self, messages: Sequence[dict], tools: Sequence = ()) -> int | None:
        if self.n_ctx is None:
            return None
        return sum(2 + len(message["content"].split()) for message in messages) + len(tools)


@dataclass
class StubAdapters:
    names: list[str] = field(default_factory=lambda: ["base", "json"])
    active: str = "base"

    def use(self, name: str) -> None:
        if name not in self.names:
            raise CommandError(f"no adapter is called '{name}'")
        self.active = name

    def check(self, name: str) -> str:
        if name not in self.names:
            raise CommandError(f"no adapter is called '{name}'")
        return name

    def load(self, name: str, path: Any) -> SimpleNamespace:
        self.names.append(name)
        return SimpleNamespace(rank=8, num_bytes=2_500_000)

    def unload(self, name: str) -> None:
        self.names.remove(name)

    def memory(self) -> SimpleNamespace:
        sizes = {name: 9_800_000 for name in self.names if name != "base"}
        used = SimpleNamespace(tokens=321, num_bytes=7_400_000, is_parked=True)
        return SimpleNamespace(adapters=sizes, conversations=[("json", used)])


@dataclass
class StubRouter:
    """Sends texts that name an adapter there; ``asked`` are the conversations it saw."""

    names: list[str] = field(default_factory=lambda: ["json"])
    asked: list[list[str]] = field(default_factory=list)

    def route(self, texts: Sequence[str], available: Any) -> SimpleNamespace:
        self.asked.append(list(texts))
        adapter = "json" if "json" in texts[-1] and "json" in available else None
        scores = {"json": 0.9 if adapter else 0.1, "base": 0.1 if adapter else 0.9}
        return SimpleNamespace(adapter=adapter, scores=scores, reason=f"{len(texts)} texts")


def stub_session(**changes: Any) -> SimpleNamespace:
    values = {
        "model": StubModel(),
        "adapters": StubAdapters(),
        "settings": Settings(seed=7),
        "tools": (),
        "system": None,
        "seed": 7,
        "approve": False,
        "router": None,
        **changes,
    }
    session = SimpleNamespace(**values)
    session.settings_for = lambda adapter: session.settings
    return session


def stub_respond(model, messages, settings, tools=(), on_text=None, on_call=None, approve=None):
    """Echo the last message, or do what its first word says."""
    text = messages[-1]["content"]
    reply = Reply(
        prompt_tokens=model.count_tokens(messages, tools) or 0,
        first_token_s=0.25,
        tokens_per_second=40.0,
        seed=settings.seed,
    )
    word, _, rest = text.partition(" ")
    if word == "fail":
        raise CommandError("the server is gone", 3)
    if word == "wrap":
        call = ToolCall("text_formatter", {"text": rest, "width": 10})
        record = CallRecord(call.name, call.arguments, error="error: the user refused this call")
        if approve is None or approve(call):
            record = run_call(call, tools)
        reply.tool_calls.append(record)
        on_call(record)
        result = render_tool_result(record.error or record.result)
        reply.turns.append({"role": "assistant", "content": render_tool_call(call)})
        reply.turns.append({"role": "user", "content": result})
    elif word == "silence":
        raise KeyboardInterrupt
    pieces = {
        "story": (f"word{number} " for number in range(600)),
        "escape": [ESCAPES],
        "wrap": ["Done."],
    }.get(word, [f"seed {settings.seed}, {len(messages)} messages: {text!r}"])
    for piece in pieces:
        on_text(piece)
        reply.text += piece
        reply.completion_tokens += 1
        if word == "story":
            time.sleep(0.02)
    reply.turns.append({"role": "assistant", "content": reply.text})
    return reply


class Terminal:
    """A command in a pseudo-terminal.

    Args:
        command: What to run.
        state_dir: Where it keeps its history.
        redirect: File descriptor for its stdout, if that is not to be the terminal.
    """

    def __init__(self, command: Sequence[str], state_dir: Any, redirect: int | None = None) -> None:
        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (50, 200))
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave if redirect is None else redirect,
            stderr=slave,
            close_fds=True,
            start_new_session=True,
            # The terminal becomes the controlling one, so that typing Ctrl-C interrupts.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509
            env={
                **os.environ,
                "XDG_STATE_HOME": str(state_dir),
                "TERM": "xterm",
                "PROMPT_TOOLKIT_NO_CPR": "1",
            },
        )
        os.close(slave)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def send(self, text: str) -> None:
        os.write(self._master, text.encode())

    def read_until(self, pattern: str, seconds: float = 15) -> str:
        """Give what came up to the first match of a pattern."""
        seen, end = "", time.monotonic() + seconds
        while not re.search(pattern, seen):
            if not select.select([self._master], [], [], max(0.0, end - time.monotonic()))[0]:
                raise AssertionError(f"no {pattern!r} in {seen!r}")
            try:
                seen += self._decoder.decode(os.read(self._master, 1))
            except OSError as error:  # the command has ended
                raise AssertionError(f"no {pattern!r} before the end of {seen!r}") from error
        return seen

    def finish(self, keys: str = "\x04") -> int:
        """Leave with Ctrl-D, or with other keys, and give the exit code."""
        self.send(keys)
        end = time.monotonic() + 20
        while self.process.poll() is None and time.monotonic() < end:
            if select.select([self._master], [], [], 0.05)[0]:
                try:
                    os.read(self._master, 4096)
                except OSError:
                    break
        code = self.process.wait(timeout=20)
        os.close(self._master)
        return code


def main() -> int:
    from integration.chat import talk
    from tools import TOOLS

    return talk(stub_session(tools=TOOLS, approve="--approve" in sys.argv), stub_respond)


if __name__ == "__main__":
    run_command(main)
