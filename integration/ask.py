"""One-shot and batch questions for shell pipelines.

python -m integration.ask --model m.gguf "Explain recursion with an example."
cat prompts.jsonl | python -m integration.ask --model m.gguf --jsonl > answers.jsonl
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from integration._cli import FAILED, OK, TIMEOUT, TOOL, CommandError, log, run_command
from integration.options import Session, add_model_options, open_session

if TYPE_CHECKING:
    from integration.agent import Reply

ROLES = ("system", "user", "assistant")


@dataclass
class Request:
    """One question; ``prompt`` is what the answer object repeats."""

    messages: list[dict[str, str]]
    prompt: str
    id: Any = None
    adapter: str | None = None


def parse_request(line: str, system: str | None) -> Request:
    """Read one line of ``--jsonl``: an object, a JSON string, or plain text.

    Raises:
        CommandError: The line starts like JSON and is none, or has no prompt.
    """
    text = line.strip()
    if not text.startswith(("{", '"')):
        return _from_prompt(text, system)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise CommandError(f"the line is no JSON: {error.msg} (column {error.colno})") from error
    if isinstance(value, str):
        return _from_prompt(value, system)
    return _from_object(value, system)


def _from_prompt(prompt: str, system: str | None) -> Request:
    if not prompt.strip():
        raise CommandError("the prompt is empty; expected some text")
    messages = [{"role": "user", "content": prompt}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return Request(messages, prompt)


def _from_object(value: dict[str, Any], system: str | None) -> Request:
    from integration.system_prompts import load_system_prompt

    own_system = value.get("system")
    if own_system is not None:
        if not isinstance(own_system, str):
            raise CommandError("system: expected a string")
        # A request may come from anywhere: it can name a prompt, never a file.
        system = own_system if own_system.startswith("@") else load_system_prompt(own_system)
    if isinstance(value.get("prompt"), str):
        request = _from_prompt(value["prompt"], system)
    elif isinstance(value.get("messages"), list):
        request = _from_messages(value["messages"], system)
    else:
        raise CommandError("the request has no prompt; expected a string under prompt, or messages")
    adapter = value.get("adapter")
    if adapter is not None and not isinstance(adapter, str):
        raise CommandError("adapter: expected a name")
    request.id, request.adapter = value.get("id"), adapter
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


def answer_object(request: Request, session: Session, reply: "Reply") -> dict[str, Any]:
    """Build the contract's object."""
    from integration.adapters import BASE

    active = session.adapters.active
    routed = active != BASE
    return {
        "id": request.id,
        "prompt": request.prompt,
        "text": reply.text,
        "tool_calls": [call.to_json() for call in reply.tool_calls],
        "route": {
            "adapter": active if routed else None,
            "scores": {},
            "reason": "asked for" if routed else "no adapter asked for",
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


def _respond(session: Session, request: Request, route: str, stream: bool = False) -> "Reply":
    from integration.agent import respond

    session.adapters.use(request.adapter or route)
    # Every request starts from the same seed, so that a line answers alike alone and in a batch.
    session.model.set_seed(session.seed)

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    return respond(
        session.model,
        request.messages,
        session.settings,
        session.tools,
        on_text=show if stream else None,
    )


def _run_batch(session: Session, route: str) -> int:
    from integration.agent import Reply

    failed = 0
    for number, line in enumerate(sys.stdin, 1):
        if not line.strip():
            continue
        request = None
        try:
            request = parse_request(line, session.system)
            reply = _respond(session, request, route)
        except CommandError as error:
            reply = Reply(finish_reason="error", error=f"line {number}: {error}")
            if request is None:
                request = Request([], line.strip(), _id_of(line))
        if reply.finish_reason == "timeout":
            reply.error = f"line {number}: no whole answer within {session.settings.timeout_s:g} s"
        failed += reply.error is not None
        print(json.dumps(answer_object(request, session, reply), ensure_ascii=False), flush=True)
    if failed:
        log(f"error: {failed} requests failed; their objects say why")
    return FAILED if failed else OK


def _id_of(line: str) -> Any:
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return None
    return value.get("id") if isinstance(value, dict) else None


def _exit_code(reply: "Reply", timeout_s: float) -> int:
    if reply.finish_reason == "timeout":
        log(f"error: no whole answer within {timeout_s:g} s; raise --timeout or lower --max-tokens")
        return TIMEOUT
    if reply.error is not None:
        log(f"error: the model's tool call failed: {reply.error.removeprefix('error: ')}")
        return TOOL
    if reply.finish_reason == "length":
        log("note: the answer was cut at --max-tokens or at the end of the context")
    return OK


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m integration.ask", description="Ask a GGUF model, once or line by line."
    )
    parser.add_argument("prompt", nargs="?", help="the question; read from stdin when left out")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the answer as one JSON object")
    form.add_argument(
        "--jsonl", action="store_true", help="one request a line from stdin, one object a line out"
    )
    add_model_options(parser, tools_default=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Answer a prompt, or every line of stdin."""
    options = build_parser().parse_args(argv)
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    if options.jsonl:
        if options.prompt is not None:
            raise CommandError("--jsonl reads its prompts from stdin; leave the argument out")
        session = open_session(options)
        log(f"seed {session.seed}")
        return _run_batch(session, options.route)
    if options.prompt is None and sys.stdin.isatty():
        raise CommandError("no prompt; give one as the argument or on stdin")
    prompt = sys.stdin.read() if options.prompt is None else options.prompt
    if not prompt.strip():
        raise CommandError("the prompt is empty; expected some text")
    session = open_session(options)
    request = _from_prompt(prompt.strip(), session.system)
    reply = _respond(session, request, options.route, stream=not options.json)
    if options.json:
        log(f"seed {session.seed}")
        print(json.dumps(answer_object(request, session, reply), ensure_ascii=False, indent=2))
    else:
        print()
        for call in reply.tool_calls:
            log(f"tool: {call.name}({json.dumps(call.arguments, ensure_ascii=False)})")
    return _exit_code(reply, options.timeout)


if __name__ == "__main__":
    run_command(main)
