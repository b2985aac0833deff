"""Between LangChain's messages and tools and those of a chat backend, in both directions.

A call is an assistant turn and its result a user turn, in the notation of ``tools.protocol``: chat
templates of small models know no other roles.
"""

import json
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from langchain_core.exceptions import OutputParserException
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.tool import invalid_tool_call, tool_call_chunk
from langchain_core.output_parsers import BaseGenerationOutputParser
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass

from integration.backend import AUTO, NONE, REQUIRED, Turn
from integration.prompt import Message
from tools.protocol import (
    CALL_START,
    ToolCall,
    ToolDefinition,
    describe_tool,
    render_tool_call,
    render_tool_result,
)

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_CHOICES = {"auto": AUTO, "none": NONE, "any": REQUIRED, "required": REQUIRED}
# Blocks of an AI message that say again what is in `tool_calls`, or what models are not shown again.
_REPEATED = "tool_use tool_call tool_call_chunk invalid_tool_call function_call input_json_delta"
_THOUGHTS = "reasoning thinking redacted_thinking"
_SKIPPED_BLOCKS = frozenset(f"{_REPEATED} {_THOUGHTS}".split())


def check_history(messages: Sequence[BaseMessage]) -> None:
    """Refuse a conversation that cannot be answered.

    Raises:
        ValueError: It is empty, ends with the model's own message, or calls and results do not pair.
    """
    if not messages:
        raise ValueError("messages: got none, expected at least one")
    if isinstance(messages[-1], AIMessage):
        raise ValueError(
            "messages: the last one is the model's own (AIMessage); end with a HumanMessage or a "
            "ToolMessage"
        )
    open_calls: dict[str | None, str] = {}
    known: set[str | None] = set()
    for message in [*messages, HumanMessage("")]:
        if isinstance(message, ToolMessage):
            if message.tool_call_id not in known:
                raise ValueError(
                    f"messages: the result '{message.tool_call_id}' has no call in the AIMessage "
                    "before it; keep both or neither"
                )
            open_calls.pop(message.tool_call_id, None)
            continue
        if open_calls:
            raise ValueError(
                f"messages: no ToolMessage answers the call {next(iter(open_calls.values()))}; "
                "put the result right behind the AIMessage"
            )
        known = set()
        if isinstance(message, AIMessage):
            open_calls = {
                call["id"]: f"'{call['id']}' of {call['name']}" for call in message.tool_calls
            }
            known = {*open_calls, *(call["id"] for call in message.invalid_tool_calls)}


def to_turns(messages: Sequence[BaseMessage]) -> list[Message]:
    """Write a conversation as turns: one role after the other, each call before its result.

    Raises:
        ValueError: A message holds something else than text, or has an unknown role.
    """
    turns: list[Message] = []
    shown: set[int] = set()
    for at, message in enumerate(messages):
        if isinstance(message, AIMessage):
            for role, text in _ai_turns(message, _results_behind(messages, at), shown):
                _add(turns, role, text)
        elif not isinstance(message, ToolMessage):
            _add(turns, _role_of(message), _text_of(message))
        elif id(message) not in shown:
            _add(turns, "user", render_tool_result(_text_of(message)))
    return turns


def _results_behind(messages: Sequence[BaseMessage], at: int) -> dict[str, ToolMessage]:
    # Only the nearest ones: some models give every round's first call the same id.
    results: dict[str, ToolMessage] = {}
    for message in messages[at + 1 :]:
        if not isinstance(message, ToolMessage):
            break
        results.setdefault(message.tool_call_id, message)
    return results


def _ai_turns(
    message: AIMessage, results: dict[str, ToolMessage], shown: set[int]
) -> Iterator[tuple[str, str]]:
    if text := _text_of(message):
        yield "assistant", text
    written = [
        (call["id"], render_tool_call(ToolCall(call["name"], call["args"])))
        for call in message.tool_calls
    ]
    written += [(call["id"], call["args"] or "") for call in message.invalid_tool_calls]
    for call_id, call in written:
        yield "assistant", call
        if (result := results.get(call_id or "")) is not None:
            shown.add(id(result))
            yield "user", render_tool_result(_text_of(result))


def _add(turns: list[Message], role: str, text: str) -> None:
    if turns and turns[-1]["role"] == role:
        # Two turns of one role are an error in many templates.
        turns[-1]["content"] = "\n\n".join(filter(None, [turns[-1]["content"], text]))
    else:
        turns.append({"role": role, "content": text})


def _role_of(message: BaseMessage) -> str:
    if isinstance(message, HumanMessage):
        return "user"
    if isinstance(message, SystemMessage):
        return "system"
    if isinstance(message, ChatMessage) and message.role in _ROLES:
        return _ROLES[message.role]
    raise ValueError(
        f"messages: got a {type(message).__name__}, expected SystemMessage, HumanMessage, AIMessage "
        "or ToolMessage"
    )


def _text_of(message: BaseMessage) -> str:
    content: Any = message.content
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for block in content:
        kind = "text" if isinstance(block, str) else block.get("type")
        if kind == "text":
            texts.append(block if isinstance(block, str) else str(block.get("text", "")))
        elif not (isinstance(message, AIMessage) and kind in _SKIPPED_BLOCKS):
            raise ValueError(
                f"messages: a {type(message).__name__} holds a block of type '{kind}', but this "
                "model reads text only; leave the block out or describe it in words"
            )
    return "".join(texts)


def to_openai_tools(tools: Sequence[Any]) -> list[dict[str, Any]]:
    """Write tools of any kind that LangChain knows in OpenAI's format, which tracing reads.

    Raises:
        ValueError: A tool has no schema here (a provider runs it), or two differ and share a name.
    """
    converted: dict[str, dict[str, Any]] = {}
    for tool in tools:
        written = convert_to_openai_tool(tool)
        function = written.get("function")
        if not isinstance(function, dict) or not function.get("name"):
            raise ValueError(
                f"tools: {written} is no function with a name; a local model runs none"
            )
        name = function["name"]
        if name in _CHOICES:
            raise ValueError(f"tools: '{name}' has a meaning in tool_choice; rename the tool")
        if isinstance(tool, BaseTool):
            _restore_marks(tool, function)
        # A class and its schema are one tool: a prompt cannot tell them apart.
        first, second = to_definitions([converted.setdefault(name, written), written])
        if describe_tool(first) != describe_tool(second):
            raise ValueError(f"tools: two are named '{name}' and differ; rename one")
    return list(converted.values())


def _restore_marks(tool: BaseTool, function: dict[str, Any]) -> None:
    # LangChain's conversion drops extra keywords, and with them `verbatim` (see tools.protocol).
    properties = function.get("parameters", {}).get("properties", {})
    for name, field in getattr(tool.args_schema, "model_fields", {}).items():
        if name in properties and isinstance(getattr(field, "json_schema_extra", None), dict):
            properties[name].update(field.json_schema_extra)


def to_definitions(openai_tools: Sequence[dict[str, Any]]) -> list[ToolDefinition]:
    """Give what a prompt says about tools in OpenAI's format."""
    functions = [tool["function"] for tool in openai_tools]
    return [
        ToolDefinition(
            function["name"], function.get("description") or "", function.get("parameters") or {}
        )
        for function in functions
    ]


def to_tool_choice(choice: Any, names: Sequence[str]) -> str:
    """Read every spelling of a tool choice; None and False leave it to the model.

    Raises:
        ValueError: It names no tool; the message lists the choices.
    """
    wanted = choice
    if isinstance(choice, dict):
        function = choice.get("function")
        named = function.get("name") if isinstance(function, dict) else choice.get("name")
        wanted = named or choice.get("type")
    elif choice is None or isinstance(choice, bool):
        wanted = "any" if choice else "auto"
    if isinstance(wanted, str) and wanted in names:
        return wanted
    known = _CHOICES.get(wanted) if isinstance(wanted, str) else None
    if known is None or (known == REQUIRED and not names):
        raise ValueError(
            f"tool_choice {choice!r}: expected one of {', '.join([*_CHOICES, *names])}"
        )
    return known


def to_schema(schema: Any) -> dict[str, Any]:
    """Give the JSON schema of a pydantic class, a TypedDict, a tool or a schema itself.

    Raises:
        ValueError: It is none of these.
    """
    if isinstance(schema, dict) and ("properties" in schema or "$ref" in schema):
        return schema
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        pydantic: Any = schema  # of version 1 or 2
        is_v2 = hasattr(pydantic, "model_json_schema")
        return dict(pydantic.model_json_schema() if is_v2 else pydantic.schema())
    return convert_to_json_schema(schema)


def to_message(turn: Turn, metadata: dict[str, Any], shown: int = 0) -> AIMessageChunk:
    """Write a turn as the last chunk of a message, or as all of it.

    Args:
        turn: What the model did.
        metadata: For ``response_metadata``.
        shown: Characters of the answer that were streamed already.
    """
    answer = turn.answer
    content, chunk = "", dict[str, Any]()
    metadata = {**metadata, "finish_reason": answer.finish_reason}
    call_id = f"call_{uuid.uuid4().hex}"
    if turn.error is not None:
        # The tag keeps LangChain from mending the text into a call with half its arguments.
        text = turn.text if turn.text.startswith(CALL_START) else CALL_START + turn.text
        chunk["invalid_tool_calls"] = [
            invalid_tool_call(name=None, args=text, id=call_id, error=turn.error)
        ]
        # Merging chunks forgets the error of a call.
        metadata["tool_call_error"] = turn.error
    elif turn.call is not None:
        arguments = json.dumps(turn.call.arguments, ensure_ascii=False)
        chunk["tool_call_chunks"] = [
            tool_call_chunk(name=turn.call.name, args=arguments, id=call_id, index=0)
        ]
        metadata["finish_reason"] = "tool_calls"
    else:
        content = turn.text[shown:]
    return AIMessageChunk(
        content=content,
        chunk_position="last",
        response_metadata=metadata,
        usage_metadata={
            "input_tokens": answer.prompt_tokens,
            "output_tokens": answer.completion_tokens,
            "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        },
        **chunk,
    )


class StructuredParser(BaseGenerationOutputParser[Any]):
    """Read an answer, or the arguments of a call, as a value of a schema; never a part of one.

    Attributes:
        target: A pydantic class, or None for a dict.
        required: Keys that a dict must have.
    """

    target: Any = None
    required: Sequence[str] = ()

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        """Validate the value.

        Raises:
            OutputParserException: It was cut off, or does not fit the schema.
        """
        (generation,) = result
        message = generation.message if isinstance(generation, ChatGeneration) else None
        text, reason = generation.text, "stop"
        if isinstance(message, AIMessage):
            reason = message.response_metadata.get("finish_reason", reason)
            if message.invalid_tool_calls:
                reason = message.response_metadata.get("tool_call_error") or "the call is no JSON"
            elif message.tool_calls:
                text, reason = json.dumps(message.tool_calls[0]["args"]), "stop"
        if reason != "stop":
            raise OutputParserException(f"the answer is not whole ({reason})", llm_output=text)
        try:
            return self._read(text)
        except ValueError as error:
            raise OutputParserException(
                f"the answer does not fit its schema: {error}", llm_output=text
            ) from error

    def _read(self, text: str) -> Any:
        if self.target is not None:
            read = getattr(self.target, "model_validate_json", None) or self.target.parse_raw
            return read(text)
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError(f"got {type(value).__name__}, expected an object")
        if missing := [key for key in self.required if key not in value]:
            raise ValueError(f"missing {', '.join(missing)}")
        return value
