"""What ``ask`` reads and writes: requests in, answer objects out."""

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from integration._cli import CommandError

if TYPE_CHECKING:
    from integration.agent import Reply

BASE, AUTO = "base", "auto"
ROLES = ("system", "user", "assistant")


@dataclass
class Request:
    """One question.

    Attributes:
        prompt: What the answer object repeats.
        adapter: Adapters that answer it: a name, a set such as ``json:0.5+coding:0.5``, ``base``, or
            ``auto`` until the router has chosen.
        scores: The router's, by name.
        reason: Why the router chose.
    """

    messages: list[dict[str, str]]
    prompt: str
    id: Any = None
    adapter: str | None = None
    scores: dict[str, float] = field(default_factory=dict)
    reason: str | None = None


def parse_request(line: str, system: str | None, adapter: str | None = None) -> Request:
    """Read one line of ``--jsonl``: an object, a JSON string, or plain text.

    Args:
        line: The line.
        system: System prompt of a request that has none.
        adapter: Adapter of a request that names none.

    Raises:
        CommandError: The line starts like JSON and is none, or has no prompt.
    """
    text = line.strip()
    if not text.startswith(("{", '"')):
        return from_prompt(text, system, adapter)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise CommandError(f"the line is no JSON: {error.msg} (column {error.colno})") from error
    if isinstance(value, str):
        return from_prompt(value, system, adapter)
    return _from_object(value, system, adapter)


def from_prompt(prompt: str, system: str | None, adapter: str | None = None) -> Request:
    """Make a request of a single question.

    Raises:
        CommandError: The question is empty.
    """
    if not prompt.strip():
        raise CommandError("the prompt is empty; expected some text")
    messages = [{"role": "user", "content": prompt}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return Request(messages, prompt, adapter=adapter)


def _from_object(value: dict[str, Any], system: str | None, adapter: str | None) -> Request:
    from integration.system_prompts import load_system_prompt

    own_system = value.get("system")
    if own_system is not None:
        if not isinstance(own_system, str):
            raise CommandError("system: expected a string")
        # A request may come from anywhere: it can name a prompt, never a file.
        system = own_system if own_system.startswith("@") else load_system_prompt(own_system)
    if isinstance(value.get("prompt"), str):
        request = from_prompt(value["prompt"], system)
    elif isinstance(value.get("messages"), list):
        request = _from_messages(value["messages"], system)
    else:
        raise CommandError("the request has no prompt; expected a string under prompt, or messages")
    named = value.get("adapter")
    if named is not None and not isinstance(named, str):
        raise CommandError("adapter: expected a name")
    request.id, request.adapter = value.get("id"), named or adapter
    return request


def _from_messages(raw: list[Any], system: str | None) -> Request:
    messages = []
    for item in raw:
        role = item.get("role") if isinstance(item, dict) else None
        content = item.get("content") if isinstance(item, dict) else None
        if role not in ROLES or not isinstance(content, str):
            raise CommandError(
                f"messages: expected objects with role ({', '.join(ROLES)}) and a content string"
            )
        messages.append({"role": role, "content": content})
    if not messages or messages[-1]["role"] != "user":
        raise CommandError("messages: expected the last one to be the user's")
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return Request(messages, messages[-1]["content"])


def id_of(line: str) -> Any:
    """Give the id of a line that is no request, if it has one."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return None
    return value.get("id") if isinstance(value, dict) else None


def answer_object(request: Request, reply: "Reply") -> dict[str, Any]:
    """Build the contract's object."""
    routed = request.adapter not in (None, BASE)
    return {
        "id": request.id,
        "prompt": request.prompt,
        "text": reply.text,
        "tool_calls": [call.to_json() for call in reply.tool_calls],
        "route": {
            "adapter": request.adapter if routed else None,
            "scores": request.scores,
            "reason": request.reason or ("asked for" if routed else "no adapter asked for"),
        },
        "finish_reason": reply.finish_reason,
        "usage": {
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
        },
        "timings": {
            "first_token_s": round(reply.first_token_s or 0.0, 4),
            "tokens_per_second": round(reply.tokens_per_second, 1),
        },
        "error": reply.error,
    }
