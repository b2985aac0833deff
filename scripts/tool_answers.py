"""Requests of which the right tool call is known, and what models answer to them.

A GGUF is asked through `integration.ask` in a process of its own; a base and its adapter are asked
with transformers. Both decode greedily, and no call is run.
"""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from scripts._cli import FAILED, MODEL, OK, CommandError, log
from scripts.recipe import TrainingRecipe
from scripts.tool_outcomes import NONE, TOOL_NAMES, Call, ToolAnswer, ToolRequest

# A plain answer is known by its beginning: its tokens are cut here, a call's are not.
PLAIN_TOKENS = 48
# A call may have to copy the whole request; this is what stands around it.
CALL_TOKENS = 128
BATCH_SIZE = 8
_ROLES = ("system", "user", "assistant")
T = TypeVar("T")
# Runs a command with a text as its stdin and gives its stdout.
AskRunner = Callable[[Sequence[str], str], str]


@dataclasses.dataclass(frozen=True)
class Answers:
    """A contender's answers, in the order of the requests, and how long all of them took."""

    answers: list[ToolAnswer]
    seconds: float


def spread(items: Sequence[T], count: int) -> list[T]:
    """Take so many items, spread evenly over all; 0 takes all."""
    count = min(count or len(items), len(items))
    return [items[at * len(items) // count] for at in range(count)]


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


def run_ask(command: Sequence[str], stdin: str) -> str:
    """Run a command; its progress goes to our stderr.

    Raises:
        CommandError: It ended with an exit code other than 0 or 1 (some requests failed).
    """
    done = subprocess.run(
        command, input=stdin, stdout=subprocess.PIPE, encoding="utf-8", check=False
    )
    if done.returncode not in (OK, FAILED):
        raise CommandError(
            f"`{' '.join(command[1:5])}` ended with exit code {done.returncode}; its message is above",
            done.returncode if done.returncode > 0 else FAILED,
        )
    return done.stdout


def ask_gguf(
    model: Path, requests: Sequence[ToolRequest], free: bool, run: AskRunner = run_ask
) -> Answers:
    """Ask a GGUF file, with the grammar of calls or without it.

    Raises:
        CommandError: It cannot be asked, or a request got no answer.
    """
    command = [sys.executable, "-m", "integration.ask", "--model", str(model), "--tools", "--jsonl"]
    command += ["--dry-run", "--temperature", "0", "--seed", "1", "--max-tokens", str(PLAIN_TOKENS)]
    if free:
        command.append("--free-calls")
    lines = [{"id": request.id, "messages": request.messages} for request in requests]
    stdin = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    started = time.monotonic()
    output = run(command, stdin)
    seconds = time.monotonic() - started
    answers = dict(_read_object(line) for line in output.split("\n") if line)
    if missing := [request.id for request in requests if request.id not in answers]:
        raise CommandError(
            f"'{model}' gave no answer to {len(missing)} of {len(requests)} requests, the first is "
            f"{missing[0]}; expected one object a request from integration.ask --jsonl",
            MODEL,
        )
    return Answers([answers[request.id] for request in requests], seconds)


def _read_object(line: str) -> tuple[str, ToolAnswer]:
    """Read an answer object of `integration.ask`."""
    try:
        value = json.loads(line)
        request_id, text, calls, error = (
            value[key] for key in ("id", "text", "tool_calls", "error")
        )
        # Without running calls there is one at most.
        first = calls[0] if calls else None
        name, arguments = (first["name"], first["args"]) if first else (NONE, {})
    except (ValueError, KeyError, TypeError) as problem:
        raise CommandError(
            f"integration.ask wrote a line that is no answer object: {line[:200]}"
        ) from problem
    if first is None and error:
        # Neither a call nor plain text: a fault of the machine or of the request, not a choice.
        raise CommandError(f"request {request_id} was not answered: {error}", MODEL)
    if first is None:
        return request_id, ToolAnswer(text)
    if not name:
        return request_id, ToolAnswer(text, malformed=first.get("error") or "no call")
    return request_id, ToolAnswer(text, Call(name, arguments))


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
    from tools.protocol import with_tool_list

    started = time.monotonic()
    prompts = [encode_prompt(tokenizer, with_tool_list(one.messages, TOOLS)) for one in requests]
    texts: dict[int, str] = {}
    for batch in _batches(prompts):
        rooms = [_request_tokens(tokenizer, requests[at]) + CALL_TOKENS for at in batch]
        written = _generate(model, tokenizer, [prompts[at] for at in batch], max(rooms))
        texts.update(zip(batch, written, strict=True))
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


def _generate(model: Any, tokenizer: Any, prompts: Sequence[list[int]], room: int) -> list[str]:
    """Continue prompts of a batch, each up to its end of turn.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: Token ids.
        room: Most new tokens.
    """
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    from tools.protocol import CALL_START

    width = max(map(len, prompts))

    class PlainAnswersEnd(StoppingCriteria):
        """Ends what is no call after ``PLAIN_TOKENS``, as the GGUF's answers end."""

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
            if input_ids.shape[1] - width == PLAIN_TOKENS:
                for row, ids in enumerate(input_ids[:, width:]):
                    text = tokenizer.decode(ids, skip_special_tokens=True)
                    done[row] = not text.lstrip().startswith(CALL_START)
            return done

    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    ends = _end_tokens(model, tokenizer)
    with torch.no_grad():
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=room,
            do_sample=False,
            repetition_penalty=1.0,
            use_cache=True,
            eos_token_id=ends,
            pad_token_id=pad,
            stopping_criteria=StoppingCriteriaList([PlainAnswersEnd()]),
        )
    return [_decode(tokenizer, row, ends) for row in output[:, width:].tolist()]


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    own = model.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    return sorted({token for token in [tokenizer.eos_token_id, *listed] if token is not None})


def _decode(tokenizer: Any, ids: Sequence[int], ends: Sequence[int]) -> str:
    end = next((at for at, token in enumerate(ids) if token in ends), len(ids))
    # Without the clean-up of spaces, which would change copied texts.
    text: str = tokenizer.decode(
        ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text
