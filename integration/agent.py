"""One request to one answer, with tools: the model chooses, the grammar keeps calls well-formed.

Choose (call or plain answer) → arguments under the tool's schema → pydantic → run → the result goes
back to the model. A call that fails is shown to the model once; a second failure is reported.
"""

import json
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


def choose(model: SafeLlamaCpp, prompt_ids: Sequence[int]) -> int:
    """Let the model choose, greedily, how its answer begins; give the first token."""
    model.prefill(prompt_ids)
    return int(np.argmax(model.next_logits()))


def begins_call(model: SafeLlamaCpp, token: int) -> bool:
    """Whether an answer that begins with this token is a tool call."""
    piece = model.piece(token)
    return bool(piece) and CALL_START.encode().startswith(piece)


def decode_call(
    model: SafeLlamaCpp, prompt_ids: Sequence[int], constraint: CallConstraint, limit: int
) -> tuple[str, Answer]:
    """Decode one call greedily under the constraint, after ``choose`` evaluated the prompt.

    Args:
        model: The model, its newest logits belonging to the prompt's last token.
        prompt_ids: The prompt, for its length.
        constraint: Which tokens are allowed.
        limit: Most tokens; a call that is longer is cut off and must not be run.

    Returns:
        The call's text and its record; ``finish_reason`` is ``length`` for a call that was cut.
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
        settings: How to decode the answer; calls are decoded greedily.
        tools: Tools that may be called; none for plain answers.
        on_text: Gets the answer's text as it is decoded.
        on_call: Gets each finished tool call.

    Raises:
        CommandError: Exit 4; the conversation does not fit into the context.
    """
    reply, turns = Reply(), list(messages)
    opening: list[int] = []
    if tools:
        turns = with_tool_list(turns, tools)
        request = _user_texts(messages)
        started = time.monotonic()
        for _ in range(MAX_CALLS):
            if settings.timeout_s and time.monotonic() - started > settings.timeout_s:
                reply.finish_reason = "timeout"
                return reply
            record = _one_call(model, turns, request, settings, tools, reply)
            if not isinstance(record, CallRecord):
                opening = [record]
                break
            repeated = any(
                (old.name, old.arguments) == (record.name, record.arguments)
                for old in reply.tool_calls
            )
            if repeated:
                break
            reply.tool_calls.append(record)
            if on_call:
                on_call(record)
            if reply.finish_reason == "length":
                reply.error = record.error
                return reply
            failures = sum(old.error is not None for old in reply.tool_calls)
            if failures > 1:
                reply.error = record.error
                return reply
            call = ToolCall(record.name, record.arguments)
            turns.append({"role": "assistant", "content": render_tool_call(call)})
            turns.append(
                {"role": "user", "content": render_tool_result(record.error or record.result or "")}
            )
        # Copying a result must be exact: no sampling, no penalty for repeating it.
        if reply.tool_calls:
            settings = replace(settings, temperature=0.0, repeat_penalty=1.0)
            if reply.tool_calls[-1].error is not None:
                reply.error = reply.tool_calls[-1].error
    for piece in model.stream_ids(model.encode_messages(turns), settings, opening):
        reply.text += piece
        if on_text:
            on_text(piece)
    if model.last_answer is not None:
        reply.count(model.last_answer)
    return reply


def _one_call(
    model: SafeLlamaCpp,
    turns: Sequence[Message],
    request: str,
    settings: Settings,
    tools: Sequence[BaseTool],
    reply: Reply,
) -> CallRecord | int:
    """Let the model make one call, or give the first token of the plain answer it prefers."""
    prompt_ids = model.encode_messages(turns)
    # A call may have to copy the whole request.
    wanted = max(settings.max_tokens, len(model.tokenize_plain(request)) + _CALL_OVERHEAD_TOKENS)
    limit = model.check_room(len(prompt_ids), wanted)
    started = time.monotonic()
    with model.lock:
        first = choose(model, prompt_ids)
        if not begins_call(model, first):
            # The plain answer that follows finds this prompt evaluated; the wait was here.
            reply.first_token_s = (reply.first_token_s or 0.0) + time.monotonic() - started
            return first
        prefill_s = time.monotonic() - started
        constraint = CallConstraint(model.client, call_grammar(tools, request))
        text, answer = decode_call(model, prompt_ids, constraint, limit)
    answer.first_token_s += prefill_s
    reply.count(answer)
    if answer.finish_reason == "length":
        return CallRecord(
            "", {}, error=f"error: the tool call was cut off after {limit} tokens and not run"
        )
    call = parse_tool_call(text)
    if call is None:
        raise AssertionError(f"the grammar let plain text pass as a call: {text!r}")
    return run_call(call, tools)
