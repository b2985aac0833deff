"""How a model is told about tools and how it calls them: one definition for training and for chat.

A call is the whole answer, `<tool_call>{"name": …, "arguments": {…}}</tool_call>`; its result goes back
in a user turn as `<tool_response>…</tool_response>`, which every chat template can render. Both are
the notation of the Hermes and Qwen families.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from langchain_core.tools import BaseTool

from tools._schema import list_choices

CALL_START, CALL_END = "<tool_call>", "</tool_call>"
RESPONSE_START, RESPONSE_END = "<tool_response>", "</tool_response>"


@dataclass(frozen=True)
class ToolCall:
    """A tool call as the model wrote it: defaults that it left out stay left out."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ToolDefinition:
    """What a prompt says about a tool, wherever the tool lives: its `schema` is a JSON schema."""

    name: str
    description: str = ""
    schema: dict[str, Any] = field(default_factory=dict)


def tool_schema(tool: BaseTool) -> dict[str, Any]:
    """Give a tool's JSON schema (pydantic v2)."""
    return tool.get_input_jsonschema()


def _argument(name: str, schema: Any, required: bool) -> str:
    schema = schema if isinstance(schema, dict) else {}
    text = name
    if choices := list_choices(schema):
        text += ": " + "|".join(choices)
    if not required:
        default = schema.get("default")
        # A foreign schema often says that an argument may be left out, but not what it is then.
        text += f"={json.dumps({} if default is None else default)}" if "default" in schema else "?"
    return text


def describe_tool(tool: BaseTool | ToolDefinition) -> str:
    """Give one line for the system prompt: `- name(argument, …): first sentence`.

    Every JSON schema will do, also one without `properties` or `required`.
    """
    if not isinstance(tool, ToolDefinition):
        tool = ToolDefinition(tool.name, tool.description, tool_schema(tool))
    properties, required = tool.schema.get("properties"), tool.schema.get("required")
    known = properties if isinstance(properties, dict) else {}
    needed = required if isinstance(required, list) else []
    arguments = ", ".join(_argument(name, value, name in needed) for name, value in known.items())
    purpose = " ".join(tool.description.split()).split(". ")[0].rstrip(".")
    return f"- {tool.name}({arguments})" + (f": {purpose}." if purpose else "")


def tool_prompt(tools: Sequence[BaseTool | ToolDefinition]) -> str:
    """Give the part of the system prompt that lists the tools: short, and the same every time."""
    call = render_tool_call(ToolCall("NAME", {}))
    lines = "\n".join(describe_tool(tool) for tool in tools)
    return f"Answer in plain text, or call a tool: answer only with {call}. Tools:\n{lines}"


def system_with_tools(system: str | None, tools: Sequence[BaseTool | ToolDefinition]) -> str:
    """Put the user's own system prompt, if any, before the list of tools."""
    return "\n\n".join(filter(None, [system, tool_prompt(tools)]))


def with_tool_list(
    messages: Sequence[dict[str, str]], tools: Sequence[BaseTool | ToolDefinition]
) -> list[dict[str, str]]:
    """Put the list of tools, if any, into the system turn of a conversation."""
    if not tools:
        return list(messages)
    system = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
    body = messages[1:] if system is not None else messages
    return [{"role": "system", "content": system_with_tools(system, tools)}, *body]


def render_tool_call(call: ToolCall) -> str:
    """Write a call the way the model is to write it."""
    body = {"name": call.name, "arguments": call.arguments}
    return f"{CALL_START}{json.dumps(body, ensure_ascii=False)}{CALL_END}"


def render_tool_result(result: str) -> str:
    """Wrap a tool's result for the user turn that carries it back."""
    return f"{RESPONSE_START}\n{result}\n{RESPONSE_END}"


def parse_tool_call(text: str) -> ToolCall | None:
    """Read a call from an answer; None when the answer is plain text.

    Raises:
        ValueError: The answer starts like a call and is none (cut off, no JSON, no name).
    """
    body = text.strip()
    if not body.startswith(CALL_START):
        return None
    body = body.removeprefix(CALL_START)
    if not body.endswith(CALL_END):
        raise ValueError("the call has no end: it was cut off")
    try:
        call = json.loads(body.removesuffix(CALL_END))
    except json.JSONDecodeError as error:
        raise ValueError(f"the call is no JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("the call is nested too deeply") from error
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise ValueError("the call has no name")
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        raise ValueError("the call's arguments are no object")
    return ToolCall(call["name"], arguments)
