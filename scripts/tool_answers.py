"""Requests of which the right tool call is known, and what models answer to them.

A GGUF is asked through `integration.ask` in a process of its own; a base and its adapter are asked
with transformers. Both decode greedily, and no call is run.
"""

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scripts._cli import MODEL, CommandError, log
from scripts.ask_model import AskRunner, Reply, ask, run_ask
from scripts.generation import decode_answer, generate_greedy
from scripts.recipe import TrainingRecipe
from scripts.tool_outcomes import TOOL_NAMES, Call, ToolAnswer, ToolRequest

# A plain answer is known by its beginning: its tokens are cut here, a call's are not.
PLAIN_TOKENS = 48
# A call may have to copy the whole request; this is what stands around it.
CALL_TOKENS = 128
BATCH_SIZE = 8
_ROLES = ("system", "user", "assistant")


@dataclasses.dataclass(frozen=True)
class Answers:
    """A contender's answers, in the order of the requests, and how long all of them took."""

    answers: list[ToolAnswer]
    seconds: float


def read_requests(path: Path) -> list[ToolRequest]:
    """Read a file of requests: ``{"id", "group", "messages", "call": {"name", "arguments"} or null}``.

    Raises:
        CommandError: There is no such file, or a line is no request; it is named ``file:line``.
    """
    if not path.is_file():
        raise CommandError(
            f"--requests: '{path}' does not exist; expected a JSONL file of requests"
        )
    requests: list[ToolRequest] = []
    seen: dict[str, int] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise CommandError(f"--requests: '{path}' is no UTF-8 text: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            request = _parse_request(line)
            if request.id in seen:
                raise ValueError(f"id: '{request.id}' was line {seen[request.id]} already")
        except ValueError as error:
            raise CommandError(f"{path}:{number}: {error}; correct this line") from error
        seen[request.id] = number
        requests.append(request)
    if not requests:
        raise CommandError(f"--requests: '{path}' has no request; expected one a line")
    return requests


def _parse_request(line: str) -> ToolRequest:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error.msg} (column {error.colno})") from error
    if not isinstance(value, dict):
        raise ValueError("expected an object with id, group, messages and call")
    if missing := [key for key in ("id", "group", "messages", "call") if key not in value]:
        raise ValueError(f"got no {', '.join(missing)}, expected id, group, messages and call")
    for key in ("id", "group"):
        if not isinstance(value[key], str) or not value[key]:
            raise ValueError(f"{key}: got {value[key]!r}, expected a name")
    messages, call = value["messages"], value["call"]
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        roles = ", ".join(_ROLES)
        raise ValueError(f"messages: expected objects with role ({roles}) and a content string")
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("messages: expected the last one to be the user's")
    return ToolRequest(value["id"], value["group"], messages, _parse_call(call))


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.get("role") in _ROLES
        and isinstance(value.get("content"), str)
    )


def _parse_call(value: Any) -> Call | None:
    if value is None:
        return None
    name = value.get("name") if isinstance(value, dict) else None
    if name not in TOOL_NAMES:
        raise ValueError(f"call: expected null, or a name of {', '.join(TOOL_NAMES)}; got {name!r}")
    if not isinstance(value.get("arguments"), dict):
        raise ValueError("call: expected arguments, an object")
    return Call(name, value["arguments"])


def read_answer(text: str) -> ToolAnswer:
    """Read a freely decoded answer, as `integration` reads it."""
    from tools.protocol import parse_tool_call

    try:
        call = parse_tool_call(text)
    except ValueError as error:
        return ToolAnswer(text, malformed=str(error))
    return ToolAnswer(text, Call(call.name, call.arguments) if call else None)


# GGUF ------------------------------------------------------------------------------------------


def ask_gguf(
    model: Path, requests: Sequence[ToolRequest], free: bool, run: AskRunner = run_ask
) -> Answers:
    """Ask a GGUF file, with the grammar of calls or without it.

    Raises:
        CommandError: It cannot be asked, or a request got no answer.
    """
    options = ["--tools", "--dry-run", "--temperature", "0", "--seed", "1"]
    options += ["--max-tokens", str(PLAIN_TOKENS), *(["--free-calls"] if free else [])]
    rows = [{"id": request.id, "messages": request.messages} for request in requests]
    started = time.monotonic()
    replies = ask(str(model), rows, options, run, needs=["tool_calls"])
    seconds = time.monotonic() - started
    return Answers([_read_reply(reply) for reply in replies], seconds)


def _read_reply(reply: Reply) -> ToolAnswer:
    """Read an answer object; without running calls there is one call at most."""
    first = reply["tool_calls"][0] if reply["tool_calls"] else None
    if first is None and reply["error"]:
        # Neither a call nor plain text: a fault of the machine or of the request, not a choice.
        raise CommandError(f"request {reply['id']} was not answered: {reply['error']}", MODEL)
    if first is None:
        return ToolAnswer(reply["text"])
    if not first["name"]:
        return ToolAnswer(reply["text"], malformed=first.get("error") or "no call")
    return ToolAnswer(reply["text"], Call(first["name"], first["args"]))


# transformers ------------------------------------------------------------------------------------


def answer_with_transformers(
    recipe: TrainingRecipe, requests: Sequence[ToolRequest]
) -> dict[str, Answers]:
    """Ask the run's base and its adapter in 16 bits; ``base`` has the adapter switched off.

    Raises:
        CommandError: The model cannot be loaded.
    """
    from scripts.model_loading import load_model

    # Plain transformers and 16 bits, as a GGUF is made of; Unsloth's generate takes no left padding.
    model, tokenizer = load_model(dataclasses.replace(recipe, load_in_4bit=False, backend="peft"))
    from peft import PeftModel

    tuned = PeftModel.from_pretrained(model, str(recipe.run_dir / "adapter")).eval()
    with tuned.disable_adapter():
        base = generate_answers(tuned, tokenizer, requests, "base (HF)")
    return {"base": base, "tuned": generate_answers(tuned, tokenizer, requests, "tuned (HF)")}


def generate_answers(
    model: Any, tokenizer: Any, requests: Sequence[ToolRequest], what: str
) -> Answers:
    """Decode answers greedily, requests of similar length side by side."""
    from scripts.render import encode_prompt
    from tools import TOOLS
    from tools.protocol import CALL_START, with_tool_list

    def is_plain(ids: list[int]) -> bool:
        """Whether to end what is no call, as the GGUF's answers end."""
        if len(ids) != PLAIN_TOKENS:
            return False
        return not decode_answer(tokenizer, ids).lstrip().startswith(CALL_START)

    started = time.monotonic()
    prompts = [encode_prompt(tokenizer, with_tool_list(one.messages, TOOLS)) for one in requests]
    texts: dict[int, str] = {}
    for batch in _batches(prompts):
        rooms = [_request_tokens(tokenizer, requests[at]) + CALL_TOKENS for at in batch]
        rows = [prompts[at] for at in batch]
        written = generate_greedy(model, tokenizer, rows, max(rooms), is_plain)
        texts |= {
            at: decode_answer(tokenizer, one.ids) for at, one in zip(batch, written, strict=True)
        }
        log(f"evaluate tools: {what}: {len(texts)} of {len(requests)} requests")
    answers = [read_answer(texts[at]) for at in range(len(requests))]
    return Answers(answers, time.monotonic() - started)


def _batches(prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Group places of prompts of similar length."""
    order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))
    for start in range(0, len(order), BATCH_SIZE):
        yield order[start : start + BATCH_SIZE]


def _request_tokens(tokenizer: Any, request: ToolRequest) -> int:
    texts = [turn["content"] for turn in request.messages if turn["role"] == "user"]
    return len(tokenizer("\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"])
