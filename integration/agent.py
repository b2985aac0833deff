"""One request to one answer, with tools: the model chooses, the grammar keeps calls well-formed.

Choose (call or plain answer) → arguments under the tool's schema → pydantic → run → the result goes
back to the model. A call that fails is shown to the model once; a second failure is reported.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from langchain_core.messages import ToolMessage
from langchain_core.tools import BaseTool

from integration.constraint import CallConstraint, call_grammar
from integration.decoding import Answer, Settings
from integration.llm import SafeLlamaCpp
from integration.prompt import Message
from tools.protocol import (
    CALL_START,
    RESPONSE_END,
    RESPONSE_START,
    ToolCall,
    parse_tool_call,
    render_tool_call,
    render_tool_result,
    system_with_tools,
)

MAX_CALLS = 5
_CALL_OVERHEAD_TOKENS = 256


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
    """What a request came to; token counts are summed over all turns of the model."""

    text: str = ""
    tool_calls: list[CallRecord] = field(default_factory=list)
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = None
    tokens_per_second: float = 0.0
    error: str | None = None

    def count(self, answer: Answer) -> None:
        """Add one turn of the model."""
        if not self.completion_tokens:
            self.first_token_s = (self.first_token_s or 0.0) + answer.first_token_s
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens
        self.finish_reason = answer.finish_reason
        if answer.tokens_per_second:
            self.tokens_per_second = answer.tokens_per_second


def with_tool_list(messages: Sequence[Message], tools: Sequence[BaseTool]) -> list[Message]:
    """Put the list of tools into the system turn."""
    system = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
    body = messages[1:] if system is not None else messages
    return [{"role": "system", "content": system_with_tools(system, tools)}, *body]


def choose(model: SafeLlamaCpp, prompt_ids: Sequence[int], may_call: bool = True) -> int:
    """Let the model choose, greedily, how its answer begins; give the first token."""
    model.prefill(prompt_ids)
    logits = model.next_logits().copy()
    token = int(np.argmax(logits))
    while not may_call and begins_call(model, token):
        logits[token] = -np.inf
        token = int(np.argmax(logits))
    return token


def begins_call(model: SafeLlamaCpp, token: int) -> bool:
    """Whether an answer that begins with this token is a tool call."""
    piece = model.piece(token)
    return bool(piece) and CALL_START.encode().startswith(piece)


def decode_call(
    model: SafeLlamaCpp,
    prompt_ids: Sequence[int],
    constraint: CallConstraint,
    limit: int,
    deadline: float = math.inf,
) -> tuple[str, Answer]:
    """Decode one call greedily under the constraint, after ``choose`` evaluated the prompt.

    Args:
        model: The model, its newest logits belonging to the prompt's last token.
        prompt_ids: The prompt, for its length.
        constraint: Which tokens are allowed.
        limit: Most tokens; a call that is longer is cut off and must not be run.
        deadline: ``time.monotonic()`` at which to stop.

    Returns:
        The call's text and its record; ``finish_reason`` is ``length`` or ``timeout`` for a call that
        was cut off.
    """
    answer = Answer(prompt_tokens=len(prompt_ids), finish_reason="length")
    started, data = time.monotonic(), b""
    for _ in range(limit):
        logits = model.next_logits()
        allowed = constraint.allowed(len(logits))
        token = int(np.argmax(np.where(allowed, logits, -np.inf)))
        if not answer.completion_tokens:
            answer.first_token_s = time.monotonic() - started
        answer.completion_tokens += 1
        data += model.piece(token)
        constraint.advance(token)
        if constraint.finished:
            answer.finish_reason = "stop"
            break
        if time.monotonic() > deadline:
            answer.finish_reason = "timeout"
            break
        model.client.eval([token])
    answer.decode_s = time.monotonic() - started - answer.first_token_s
    answer.text = data.decode("utf-8", errors="replace")
    return answer.text, answer


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


def _user_texts(messages: Sequence[Message]) -> str:
    return "\n".join(
        message["content"]
        for message in messages
        if message["role"] == "user" and not message["content"].startswith(RESPONSE_START)
    )


def respond(
    model: SafeLlamaCpp,
    messages: Sequence[Message],
    settings: Settings,
    tools: Sequence[BaseTool] = (),
    on_text: Callable[[str], None] | None = None,
    on_call: Callable[[CallRecord], None] | None = None,
) -> Reply:
    """Answer a conversation, calling tools when the model decides to.

    Args:
        model: The loaded model.
        messages: Turns; the last one is the user's.
        settings: How to decode the answer; calls are decoded greedily. The time limit is that of the
            whole reply.
        tools: Tools that may be called; none for plain answers.
        on_text: Gets the answer's text as it is decoded.
        on_call: Gets each finished tool call.

    Raises:
        CommandError: Exit 4; the conversation does not fit into the context.
    """
    deadline = time.monotonic() + settings.timeout_s if settings.timeout_s else math.inf
    with model.lock:
        rounds = _Rounds(model, messages, settings, tools, deadline)
        opening = rounds.call_tools(on_call) if tools else []
        reply = rounds.reply
        if opening is None:
            return reply
        # Copying a result must be exact: no sampling, no penalty, and not the tag behind it.
        if reply.tool_calls:
            stop = [*settings.stop, f"\n{RESPONSE_END}", RESPONSE_END]
            settings = replace(settings, temperature=0.0, repeat_penalty=1.0, stop=stop)
        if settings.timeout_s:
            settings = replace(settings, timeout_s=max(1e-6, deadline - time.monotonic()))
        for piece in model.stream_ids(model.encode_messages(rounds.turns), settings, opening):
            reply.text += piece
            if on_text:
                on_text(piece)
        if model.last_answer is not None:
            reply.count(model.last_answer)
    return reply


class _Rounds:
    """The rounds of one request in which the model calls tools, before it answers."""

    def __init__(
        self,
        model: SafeLlamaCpp,
        messages: Sequence[Message],
        settings: Settings,
        tools: Sequence[BaseTool],
        deadline: float,
    ) -> None:
        self.model, self.settings, self.tools, self.deadline = model, settings, tools, deadline
        self.turns = with_tool_list(messages, tools) if tools else list(messages)
        self.request = _user_texts(messages)
        self.reply = Reply()

    def call_tools(self, on_call: Callable[[CallRecord], None] | None) -> list[int] | None:
        """Make calls until the model prefers to answer.

        Returns:
            First token of that answer, or None when the reply ends here (the reason is in it).
        """
        calls = self.reply.tool_calls
        for _ in range(MAX_CALLS):
            started = time.monotonic()
            prompt_ids = self.model.encode_messages(self.turns)
            first = choose(self.model, prompt_ids)
            prefill_s = time.monotonic() - started
            if not begins_call(self.model, first):
                # The answer that follows finds this prompt evaluated; the wait was here.
                self.reply.first_token_s = (self.reply.first_token_s or 0.0) + prefill_s
                return [first]
            record = self._make_call(prompt_ids, prefill_s)
            if any((old.name, old.arguments) == (record.name, record.arguments) for old in calls):
                break
            calls.append(record)
            if on_call:
                on_call(record)
            failures = sum(old.error is not None for old in calls)
            self.reply.error = record.error
            if failures > 1 or self.reply.finish_reason != "stop":
                return None
            self._add_turns(record)
        return [choose(self.model, self.model.encode_messages(self.turns), may_call=False)]

    def _make_call(self, prompt_ids: Sequence[int], prefill_s: float) -> CallRecord:
        # A call may have to copy the whole request.
        request_tokens = len(self.model.tokenize_plain(self.request))
        wanted = max(self.settings.max_tokens, request_tokens + _CALL_OVERHEAD_TOKENS)
        limit = self.model.check_room(len(prompt_ids), wanted)
        constraint = CallConstraint(self.model.client, call_grammar(self.tools, self.request))
        text, answer = decode_call(self.model, prompt_ids, constraint, limit, self.deadline)
        answer.first_token_s += prefill_s
        self.reply.count(answer)
        if answer.finish_reason != "stop":
            return CallRecord(
                "",
                {},
                error=f"error: the tool call was cut off after {answer.completion_tokens} tokens "
                "and not run",
            )
        call = parse_tool_call(text)
        if call is None:
            raise AssertionError(f"the grammar let plain text pass as a call: {text!r}")
        return run_call(call, self.tools)

    def _add_turns(self, record: CallRecord) -> None:
        call = render_tool_call(ToolCall(record.name, record.arguments))
        result = render_tool_result(record.error or record.result or "")
        self.turns.append({"role": "assistant", "content": call})
        self.turns.append({"role": "user", "content": result})
