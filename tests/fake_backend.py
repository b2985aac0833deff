"""A chat backend that says what a test tells it to, and what the tests of the chat model share."""

import queue
import threading
import time
from collections.abc import Sequence
from typing import Any, TypedDict

from langchain_core.messages import AIMessage, AIMessageChunk
from pydantic import BaseModel, Field

from integration._cli import CommandError
from integration.backend import Feed, Turn
from integration.chat_model import TomeforgeChat
from integration.decoding import Answer
from tools.protocol import ToolCall

CALL = ToolCall("text_formatter", {"text": "one two", "width": 10})
CUT_OFF = '<tool_call>{"name": "text_formatter", "arguments": {"text": "one'


class FakeBackend:
    """Gives scripted turns and fails when two are driven at once; it takes no lock itself."""

    name = "fake.gguf"
    n_ctx: int | None = 2048

    def __init__(self, *script: Any) -> None:
        self.script = list(script)
        self.asked: list[dict[str, Any]] = []
        self.lock = threading.RLock()
        self.busy = False
        self.gate: queue.Queue[None] | None = None
        self.fed = 0

    def count_tokens(self, messages: Sequence[Any], tools: Sequence[Any] = ()) -> int | None:
        if any(turn["role"] == "assistant" for turn in messages[:1]):
            raise CommandError("the template refuses these messages")
        return sum(5 + len(turn["content"].split()) for turn in messages) + 10 * len(tools)

    def turn(self, messages, settings, tools=(), tool_choice="auto", deadline=float("inf")):
        self.asked.append(
            {
                "kind": "turn",
                "messages": messages,
                "settings": settings,
                "tools": tools,
                "choice": tool_choice,
                "deadline": deadline,
            }
        )
        return self._next()

    def json_turn(self, messages, settings, schema):
        self.asked.append(
            {"kind": "json", "messages": messages, "settings": settings, "schema": schema}
        )
        return self._next(is_json=True)

    def _next(self, is_json: bool = False):
        yield Feed((1,), is_prompt=True)
        entry = self.script.pop(0)
        answer = Answer("", "stop", 7, 3, 0.25, 0.5, 42)
        if isinstance(entry, Exception):
            raise entry
        if isinstance(entry, Turn):
            return entry
        if isinstance(entry, ToolCall):
            return Turn("", entry, None, answer)
        if not is_json:
            for piece in entry.split("|"):
                yield piece
                yield Feed((2,))
        return Turn(entry.replace("|", ""), answer=answer)

    def stream(self, steps):
        assert not self.busy, "two turns at once"
        self.busy = True
        reply = None
        try:
            while True:
                event = steps.send(reply)
                reply = None
                if isinstance(event, str):
                    yield event
                else:
                    self.fed += 1
                    time.sleep(0.0005)  # so that other threads get their chance
                    if self.gate:
                        self.gate.get(timeout=10)
                    reply = 0
        except StopIteration as end:
            return end.value
        finally:
            steps.close()
            self.busy = False

    def is_free(self) -> bool:
        """Whether another thread can have the lock."""
        taken = []

        def take() -> None:
            if self.lock.acquire(timeout=5):
                self.lock.release()
                taken.append(not self.busy)

        thread = threading.Thread(target=take)
        thread.start()
        thread.join()
        return bool(taken and taken[0])


def cut_off(reason: str = "length") -> Turn:
    return Turn(CUT_OFF, None, "cut off after 9 tokens", Answer("", reason, 7, 9))


def make(*script: Any, **fields: Any) -> tuple[TomeforgeChat, FakeBackend]:
    backend = FakeBackend(*script)
    return TomeforgeChat(backend=backend, **fields), backend


def joined(chunks: Any) -> AIMessageChunk:
    whole = None
    for chunk in chunks:
        whole = chunk if whole is None else whole + chunk
    assert whole is not None
    return whole


def call_message(*calls: tuple[str, dict[str, Any], str], text: str = "") -> AIMessage:
    return AIMessage(
        text, tool_calls=[{"name": name, "args": args, "id": key} for name, args, key in calls]
    )


class Joke(BaseModel):
    """A joke."""

    setup: str
    punchline: str = Field(min_length=2)


class JokeDict(TypedDict):
    """A joke."""

    setup: str
    punchline: str


GOOD_JSON = '{"setup": "Why?", "punchline": "Because."}'
