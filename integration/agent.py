"""One request to one answer, with tools: the model chooses, the loop keeps it honest.

Choose (call or plain answer) → arguments → pydantic → run → the result goes back to the model. A call
that fails is shown to the model once; a second failure is reported. A call that was cut off, that the
user refused, or that was made before is never run.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from langchain_core.messages import ToolMessage
from langchain_core.tools import BaseTool

from integration.backend import AUTO, EXACT, NONE, RESULT_STOPS, ChatBackend, Steps, Turn
from integration.decoding import Answer, Settings
from integration.prompt import Message
from tools.protocol import (
    ToolCall,
    render_tool_call,
    render_tool_result,
)

MAX_CALLS = 5


@dataclass
class CallRecord:
    """A tool call with what became of it; ``arguments`` are what the model gave."""

    name: str
    arguments: dict[str, Any]
    result: str | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Give the object of the ``ask`` contract."""
        return {
            "name": self.name,
            "args": self.arguments,
            "result": self.result,
            "error": self.error,
        }


@dataclass
class Reply:
    """What a request came to; token counts are summed over all turns of the model.

    Attributes:
        turns: Messages that the reply adds to the conversation: calls, results, the answer.
    """

    text: str = ""
    tool_calls: list[CallRecord] = field(default_factory=list)
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = None
    tokens_per_second: float = 0.0
    seed: int | None = None
    error: str | None = None
    turns: list[Message] = field(default_factory=list)

    def count(self, answer: Answer) -> None:
        """Add one turn of the model."""
        if self.first_token_s is None:
            self.first_token_s = answer.first_token_s
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens
        self.finish_reason = answer.finish_reason
        self.seed = answer.seed or self.seed
        if answer.tokens_per_second:
            self.tokens_per_second = answer.tokens_per_second


def run_call(call: ToolCall, tools: Sequence[BaseTool]) -> CallRecord:
    """Validate a call's arguments with pydantic and run the tool; failures end in ``error``."""
    record = CallRecord(call.name, call.arguments)
    tool = next((tool for tool in tools if tool.name == call.name), None)
    if tool is None:
        names = ", ".join(tool.name for tool in tools)
        record.error = f"error: no tool '{call.name}'; expected one of {names}"
        return record
    message = tool.invoke(
        {"type": "tool_call", "id": "call", "name": call.name, "args": call.arguments}
    )
    content = message.content if isinstance(message, ToolMessage) else message
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    if isinstance(message, ToolMessage) and message.status == "error":
        record.error = text
    else:
        record.result = text
    return record


def respond(
    backend: ChatBackend,
    messages: Sequence[Message],
    settings: Settings,
    tools: Sequence[BaseTool] = (),
    on_text: Callable[[str], None] | None = None,
    on_call: Callable[[CallRecord], None] | None = None,
    approve: Callable[[ToolCall], bool] | None = None,
    dry_run: bool = False,
) -> Reply:
    """Answer a conversation, calling tools when the model decides to.

    Args:
        backend: The model.
        messages: Turns; the last one is the user's.
        settings: How to decode the answer; calls are decoded greedily. The time limit is that of the
            whole reply.
        tools: Tools that may be called; none for plain answers.
        on_text: Gets the answer's text as it is decoded.
        on_call: Gets each tool call when it has ended.
        approve: Asked before each call; without it every call is run.
        dry_run: Do not run a call; it ends the reply.

    Raises:
        CommandError: Exit 4; the conversation does not fit into the context.
    """
    stream = backend.stream(
        respond_steps(backend, messages, settings, tools, on_call, approve, dry_run)
    )
    try:
        while True:
            piece = next(stream)
            if on_text:
                on_text(piece)
    except StopIteration as end:
        reply: Reply = end.value
        return reply
    finally:
        stream.close()


def respond_steps(
    backend: ChatBackend,
    messages: Sequence[Message],
    settings: Settings,
    tools: Sequence[BaseTool] = (),
    on_call: Callable[[CallRecord], None] | None = None,
    approve: Callable[[ToolCall], bool] | None = None,
    dry_run: bool = False,
) -> Steps[Reply]:
    """Do what ``respond`` does, in steps that may be driven beside those of other requests."""
    reply, own = Reply(), settings
    deadline = settings.deadline()
    choice, calls_left = AUTO, MAX_CALLS if tools else 0
    while True:
        turns = [*messages, *reply.turns]
        turn = yield from backend.turn(turns, settings, tools, choice, deadline)
        reply.count(turn.answer)
        if turn.call is None and turn.error is None:
            reply.text = turn.text
            reply.turns.append({"role": "assistant", "content": turn.text})
            return reply
        record = _make_call(turn, tools, reply.tool_calls, approve, dry_run)
        if record is None:
            choice = NONE  # the same call again: the model has what it can get from it
            continue
        reply.tool_calls.append(record)
        if on_call:
            on_call(record)
        failures = sum(old.error is not None for old in reply.tool_calls)
        reply.error = record.error
        if dry_run or failures > 1 or reply.finish_reason != "stop":
            return reply
        reply.turns += call_turns(record, None if turn.call else turn.text)
        calls_left -= 1
        if calls_left == 0:
            choice = NONE
        settings = replace(own, **EXACT, stop=(*own.stop, *RESULT_STOPS))


def _make_call(
    turn: Turn,
    tools: Sequence[BaseTool],
    earlier: Sequence[CallRecord],
    approve: Callable[[ToolCall], bool] | None,
    dry_run: bool,
) -> CallRecord | None:
    """Run a call, or say why not; None for one that was made before."""
    call = turn.call
    if call is None:
        reason = f"error: the tool call is not run: {turn.error}"
        return CallRecord("", {}, error=reason)
    if dry_run:
        return CallRecord(call.name, call.arguments)
    if any((old.name, old.arguments) == (call.name, call.arguments) for old in earlier):
        return None
    if approve is not None and not approve(call):
        return CallRecord(call.name, call.arguments, error="error: the user refused this call")
    return run_call(call, tools)


def call_turns(record: CallRecord, written: str | None = None) -> list[Message]:
    """Give a call and what came of it as turns; ``written`` is how the model wrote one that is none."""
    call = written or render_tool_call(ToolCall(record.name, record.arguments))
    result = render_tool_result(record.error or record.result or "")
    return [{"role": "assistant", "content": call}, {"role": "user", "content": result}]
