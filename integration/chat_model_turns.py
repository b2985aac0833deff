"""One call of the chat model: its options, what it asks of the backend, and the thread it runs in."""

import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from langchain_core.exceptions import ContextOverflowError
from pydantic import BaseModel, Field, field_validator

from integration._cli import CONTEXT, CommandError
from integration.backend import NONE, ChatBackend, Steps, Turn
from integration.decoding import Settings
from integration.prompt import Message
from tools.protocol import ToolDefinition

_DEFAULTS = Settings()
_SCHEMA_MAPS = ("properties", "$defs", "definitions")
_SCHEMA_LISTS = ("anyOf", "oneOf", "prefixItems")
# What adds members to an object, so that it cannot be closed by itself.
_OPEN = ("additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref")


class Decoding(BaseModel):
    """How to decode, for a model or for one call; ``timeout`` counts from the turn's start."""

    temperature: float = Field(default=_DEFAULTS.temperature, ge=0)
    top_p: float = Field(default=_DEFAULTS.top_p, gt=0, le=1)
    top_k: int = Field(default=_DEFAULTS.top_k, ge=0)
    min_p: float = Field(default=_DEFAULTS.min_p, ge=0, le=1)
    repeat_penalty: float = Field(default=_DEFAULTS.repeat_penalty, gt=0)
    max_tokens: int = Field(default=_DEFAULTS.max_tokens, ge=1)
    seed: int | None = None
    stop: list[str] | None = None
    timeout: float | None = Field(default=None, ge=0)

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def settings(self) -> Settings:
        """Give them as the backend reads them."""
        values = {name: getattr(self, name) for name in Decoding.model_fields}
        seconds = values.pop("timeout") or 0.0
        return Settings(**{**values, "stop": self.stop or (), "timeout_s": seconds})


def wanted_schema(response_format: Any) -> Any:
    """Read OpenAI's ``response_format``, which agents pass on; None for plain text.

    Raises:
        ValueError: It is of another form.
    """
    kind = response_format.get("type") if isinstance(response_format, dict) else response_format
    if kind in (None, "text"):
        return None
    if kind == "json_object":
        return {"type": "object"}
    wanted = response_format.get("json_schema") if kind == "json_schema" else None
    if not isinstance(wanted, dict) or not isinstance(wanted.get("schema"), dict):
        raise ValueError(
            f"response_format {response_format!r}: expected "
            '{"type": "json_schema", "json_schema": {"schema": …}}'
        )
    return close_objects(wanted["schema"])


def close_objects(schema: Any) -> Any:
    """Forbid members that a schema does not name: a small model adds them until it runs out of tokens."""
    if not isinstance(schema, dict):
        return schema
    closed = dict(schema)
    for key in _SCHEMA_MAPS:
        if key in closed:
            closed[key] = {name: close_objects(value) for name, value in closed[key].items()}
    for key in _SCHEMA_LISTS:
        if key in closed:
            closed[key] = [close_objects(part) for part in closed[key]]
    if "items" in closed:
        closed["items"] = close_objects(closed["items"])
    if "properties" in closed and not any(key in closed for key in _OPEN):
        closed["additionalProperties"] = False
    return closed


def take_turn(
    backend: ChatBackend,
    messages: Sequence[Message],
    settings: Settings,
    tools: Sequence[ToolDefinition],
    tool_choice: str,
    schema: Any,
) -> Steps[Turn]:
    """Answer or call a tool; with a schema, every answer is JSON of it.

    With tools and a schema the model first chooses: a turn that becomes plain text is left and taken
    again in JSON. The time limit is that of both.
    """
    deadline = settings.deadline()
    if schema is None:
        return (yield from backend.turn(messages, settings, tools, tool_choice, deadline))
    if tools and tool_choice != NONE:
        turn = yield from _until_text(
            backend.turn(messages, settings, tools, tool_choice, deadline)
        )
        if turn is not None and (turn.call is not None or turn.error is not None):
            return turn
    if settings.timeout_s:
        settings = replace(settings, timeout_s=max(1e-6, deadline - time.monotonic()))
    # Half a JSON text is an answer that was cut off, not a call; its finish reason says so.
    return replace((yield from backend.json_turn(messages, settings, schema)), error=None)


def _until_text(steps: Steps[Turn]) -> Steps[Turn | None]:
    with contextlib.closing(steps):
        try:
            event = next(steps)
            while not isinstance(event, str):
                event = steps.send((yield event))
        except StopIteration as end:
            turn: Turn = end.value
            return turn
    return None


def run_ahead(backend: ChatBackend, steps: Steps[Turn]) -> Iterator[str | Turn]:
    """Drive a turn in a thread of its own; yields its text and at last the turn.

    The lock belongs to that thread from the turn's first token to its last. Held by this generator it
    would belong to whoever asks for the next piece: LangChain asks from a new thread each time, and a
    reader who stops halfway would keep it. Closing the generator ends the turn at the next token.
    """
    pieces: queue.SimpleQueue[str | Turn | BaseException] = queue.SimpleQueue()
    closed = threading.Event()

    def work() -> None:
        try:
            with backend.lock:
                stream = backend.stream(_while_open(steps, closed))
                while True:
                    pieces.put(next(stream))
        except StopIteration as end:
            pieces.put(end.value)
        except BaseException as error:
            pieces.put(error)

    threading.Thread(target=work, name=f"turn of {backend.name}").start()
    try:
        piece = pieces.get()
        while isinstance(piece, str):
            yield piece
            piece = pieces.get()
        if isinstance(piece, BaseException):
            raise piece
        yield piece
    finally:
        closed.set()


def _while_open(steps: Steps[Turn], closed: threading.Event) -> Steps[Turn]:
    with contextlib.closing(steps):
        try:
            reply = None
            # A process that ends waits for this thread, and nobody reads any more.
            while not closed.is_set() and threading.main_thread().is_alive():
                reply = yield steps.send(reply)
        except StopIteration as end:
            turn: Turn = end.value
            return turn
    return Turn()


@contextlib.contextmanager
def langchain_errors() -> Iterator[None]:
    """Raise LangChain's own error where it has one: middleware that shortens a history waits for it."""
    try:
        yield
    except CommandError as error:
        if error.exit_code == CONTEXT:
            raise ContextOverflowError(str(error)) from error
        raise
