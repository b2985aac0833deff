"""One row of somebody's data set to one checked conversation of system, user and assistant turns.

Which columns a row may have is a list, never a guess; what fits none of it is rejected with a reason.
Tool turns become the text notation of ``tools.protocol``, because every chat template can render it.
Nothing is read or written here.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]

TURN_COLUMNS = ("conversations", "messages", "conversation", "dialogue")
PAIR_COLUMNS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"))
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "call",
    "tool_call": "call",
    "tool": "result",
    "function": "result",
    "observation": "result",
    "ipython": "result",
}
_WRITTEN_AS = {"call": "assistant", "result": "user"}
MERGED = "merged two turns of one role"
NO_ANSWER = "left out a last turn without an answer"
EMPTY_SYSTEM = "left out an empty system turn"
TOOLS_AS_TEXT = "read tool turns as text"
_BAD_CALL = "tool call is no JSON object with a name and arguments"
_BAD_TOOLS = "tools column is no list of tools with a name"


class RowRejectedError(ValueError):
    """A row cannot be used; the message is the reason that the report counts."""


@dataclass(frozen=True)
class Conversation:
    """A checked conversation.

    Attributes:
        messages: ``role`` and ``content``: an optional system turn, then user and assistant in turn,
            the assistant last; ``weight: 0`` marks an assistant turn that is not trained.
        source: The row's ``source`` column as text.
        score: Its ``score`` column, whatever it holds.
        repairs: What was mended, each once.
    """

    messages: list[Message]
    source: str | None = None
    score: Any = None
    repairs: tuple[str, ...] = ()


@dataclass
class _Turn:
    """A turn as read.

    Attributes:
        role: One of the values of ``ROLES``; an assistant's text with calls stays ``assistant``.
        text: Stripped; calls are in our notation already, results are bare.
        weight: 0 when it is not trained.
        has_call: A result may follow.
        converted: Its calls came as data and were written as text here.
    """

    role: str
    text: str
    weight: int = 1
    has_call: bool = False
    converted: bool = False


@dataclass
class _Body:
    messages: list[Message] = field(default_factory=list)
    repairs: dict[str, None] = field(default_factory=dict)


def to_conversation(row: Any) -> Conversation:
    """Check a row and turn it into a conversation.

    Raises:
        RowRejectedError: With the reason.
    """
    if not isinstance(row, dict):
        raise RowRejectedError("row is no object")
    turns = _read_turns(row)
    system, turns, repairs = _take_system(turns)
    body = _join_turns(turns)
    _check_order(body)
    system = _with_tool_list(system, row.get("tools"))
    if system:
        body.messages.insert(0, {"role": "system", "content": system})
    for message in body.messages:
        _check_unicode(message["content"])
    source = row.get("source")
    if source is not None:
        # A label is no reason to lose a row: what no file can hold is replaced.
        source = str(source).encode("utf-8", "replace").decode()
    return Conversation(body.messages, source, row.get("score"), (*repairs, *body.repairs))


def _read_turns(row: dict[str, Any]) -> list[_Turn]:
    """Find the row's schema; a column that is there but null counts as absent, as in Parquet."""
    raw = next((row[name] for name in TURN_COLUMNS if row.get(name) is not None), None)
    if raw is None:
        turns = _read_columns(row)
    elif not isinstance(raw, list) or not raw:
        raise RowRejectedError("no list of turns")
    else:
        turns = [_read_turn(item) for item in raw]
    if row.get("system") is not None:
        column = _Turn("system", _text(row["system"]))
        turns = turns if turns[0].role == "system" else [column, *turns]
    return turns


def _read_columns(row: dict[str, Any]) -> list[_Turn]:
    if row.get("instruction") is not None and row.get("output") is not None:
        history = row.get("history") or []
        if not isinstance(history, list):
            raise RowRejectedError("history is no list of question and answer")
        turns = [turn for pair in history for turn in _read_pair(pair)]
        texts = [_text(row[name]) for name in ("instruction", "input") if row.get(name) is not None]
        request = "\n\n".join(filter(None, texts))
        return [*turns, _Turn("user", request), _Turn("assistant", _text(row["output"]))]
    for prompt, completion in PAIR_COLUMNS:
        question, answer = row.get(prompt), row.get(completion)
        if question is None or answer is None:
            continue
        if isinstance(question, list) and isinstance(answer, list) and question:
            return [_read_turn(item) for item in [*question, *answer]]
        return [_Turn("user", _text(question)), _Turn("assistant", _text(answer))]
    raise RowRejectedError("no list of turns")


def _read_pair(pair: Any) -> Iterator[_Turn]:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise RowRejectedError("history is no list of question and answer")
    yield _Turn("user", _text(pair[0]))
    yield _Turn("assistant", _text(pair[1]))


def _read_turn(raw: Any) -> _Turn:
    if not isinstance(raw, dict):
        raise RowRejectedError("turn is no object")
    if raw.get("from") is not None and "value" in raw:
        name, content = raw["from"], raw["value"]
    elif raw.get("role") is not None and ("content" in raw or raw.get("tool_calls")):
        name, content = raw["role"], raw.get("content")
    else:
        raise RowRejectedError("turn has neither from/value nor role/content")
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise RowRejectedError(f"unknown role {str(name)[:40]!r}")
    if role == "call":
        return _Turn(role, _render_calls(_parse(content)), _weight(raw), True, True)
    if role != "assistant":
        return _Turn(role, _text(content))
    calls = raw.get("tool_calls") or raw.get("function_call")
    if calls:
        said = "" if content is None else _text(content)
        text = "\n".join(filter(None, [said, _render_calls(calls)]))
        return _Turn(role, text, _weight(raw), True, True)
    from tools.protocol import CALL_START

    text = _text(content)
    # Some data sets already hold calls as text, in the same notation.
    return _Turn(role, text, _weight(raw), has_call=CALL_START in text)


def _text(content: Any) -> str:
    """Give the text of a content: a string, or a list of text parts."""
    if isinstance(content, str):
        return content.strip()
    if not isinstance(content, list):
        raise RowRejectedError("text is no string")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            name = str(kind)[:40].encode("ascii", "backslashreplace").decode()
            raise RowRejectedError(f"content is no text ({name})")
        texts.append(part["text"])
    return "\n".join(texts).strip()


def _weight(raw: dict[str, Any]) -> int:
    weight = raw.get("weight")
    if weight is None:
        return 1
    if weight not in (0, 1):
        raise RowRejectedError("weight is neither 0 nor 1")
    return int(weight)


def _parse(text: Any) -> Any:
    """Read JSON text; what is no text is taken as it is."""
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _render_calls(calls: Any) -> str:
    """Write one call, or a list of them, in our notation: one a line."""
    from tools.protocol import ToolCall, render_tool_call

    lines = []
    for call in calls if isinstance(calls, list) else [calls]:
        if isinstance(call, dict) and call.get("function") is not None:
            call = call["function"]  # noqa: PLW2901
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
            raise RowRejectedError(_BAD_CALL)
        arguments = call.get("arguments")
        arguments = {} if arguments in (None, "") else _parse(arguments)
        if not isinstance(arguments, dict):
            raise RowRejectedError(_BAD_CALL)
        lines.append(render_tool_call(ToolCall(call["name"], arguments)))
    if not lines:
        raise RowRejectedError(_BAD_CALL)
    return "\n".join(lines)


def _take_system(turns: list[_Turn]) -> tuple[str, list[_Turn], tuple[str, ...]]:
    if not turns or turns[0].role != "system":
        return "", turns, ()
    return turns[0].text, turns[1:], () if turns[0].text else (EMPTY_SYSTEM,)


def _join_turns(turns: list[_Turn]) -> _Body:
    """Write results as user turns, and join what one side says in a row."""
    from tools.protocol import RESPONSE_START, render_tool_result

    body = _Body()
    before: _Turn | None = None
    for turn in turns:
        role, text = turn.role, turn.text
        if role == "system":
            raise RowRejectedError("system turn after the first turn")
        if role == "result":
            if before is None or not (before.has_call or before.role == "result"):
                raise RowRejectedError("tool result without a call")
            # A tool may well answer nothing, so an empty result is no empty turn.
            text = text if text.startswith(RESPONSE_START) else render_tool_result(text)
            goes_on = before.role == "result"
        elif not text:
            raise RowRejectedError("empty turn")
        else:
            goes_on = role == "call"
        if turn.converted or role == "result":
            body.repairs[TOOLS_AS_TEXT] = None
        message: Message = {"role": _WRITTEN_AS.get(role, role), "content": text}
        _append(body, message | ({} if turn.weight else {"weight": 0}), goes_on)
        before = turn
    return body


def _append(body: _Body, message: Message, goes_on: bool) -> None:
    """Add a message; ``goes_on`` says that joining it to the one before is no repair."""
    last = body.messages[-1] if body.messages else None
    if last is None or last["role"] != message["role"]:
        body.messages.append(message)
        return
    if last.get("weight") != message.get("weight"):
        raise RowRejectedError("assistant turns of different weight follow each other")
    if not goes_on:
        body.repairs[MERGED] = None
    last["content"] += ("\n" if goes_on else "\n\n") + message["content"]


def _check_order(body: _Body) -> None:
    messages = body.messages
    if messages and messages[0]["role"] == "assistant":
        raise RowRejectedError("first turn is the assistant's")
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise RowRejectedError("no assistant turn")
    if all(message.get("weight") == 0 for message in answers):
        raise RowRejectedError("every assistant turn has weight 0")
    # A user turn without an answer trains nothing; what comes before it does.
    if messages[-1]["role"] == "user":
        messages.pop()
        body.repairs[NO_ANSWER] = None


def _with_tool_list(system: str, raw: Any) -> str:
    """Add the row's own tools, in the words in which the model will be told about tools later."""
    if raw is None or (isinstance(raw, str) and raw.strip() in {"", "null"}):
        return system
    from tools.protocol import ToolDefinition, system_with_tools

    column = _parse(raw)
    if not isinstance(column, list | dict):
        raise RowRejectedError(_BAD_TOOLS)
    definitions = []
    for item in column if isinstance(column, list) else [column]:
        tool = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(tool, dict) or not isinstance(tool.get("name"), str):
            raise RowRejectedError(_BAD_TOOLS)
        description, schema = tool.get("description"), tool.get("parameters")
        definitions.append(
            ToolDefinition(
                tool["name"],
                description if isinstance(description, str) else "",
                schema if isinstance(schema, dict) else {},
            )
        )
    return system_with_tools(system, definitions) if definitions else system


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RowRejectedError("text is no valid Unicode") from None
