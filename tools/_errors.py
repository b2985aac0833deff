"""What a tool answers when a call is wrong: one line that tells the model which argument to change.

The shape is `error: what: got ..., expected ...; call NAME again with ...`.
"""

import difflib
import reprlib
from collections.abc import Iterable
from functools import partial
from typing import Any

from langchain_core.tools import BaseTool, ToolException
from pydantic import BaseModel, ValidationError

from tools._schema import list_choices

# A model may put anything into an argument: what is echoed must stay short.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlist = _SHORT.maxdict = 3
_SHORT.maxlevel = 2


def answer_errors(tool: BaseTool, schema: type[BaseModel]) -> BaseTool:
    """Make a tool answer a wrong call with a message instead of an exception."""
    tool.handle_validation_error = partial(explain_validation_error, schema=schema, name=tool.name)
    tool.handle_tool_error = explain_tool_error
    return tool


def explain_validation_error(error: Exception, *, schema: type[BaseModel], name: str) -> str:
    """Turn a pydantic error into one message, the first problem of each argument.

    Args:
        error: The `ValidationError` of `schema` (the type is as wide as LangChain's handler).
        schema: The arguments of the tool, to say what is expected.
        name: The name of the tool, to say what to call again.
    """
    assert isinstance(error, ValidationError)
    properties: dict[str, Any] = schema.model_json_schema()["properties"]
    problems: dict[str, str] = {}
    fixes: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        argument = _clip(str(detail["loc"][0])) if detail["loc"] else "arguments"
        if argument not in problems:
            problems[argument], fixes[argument] = _explain(argument, detail, properties)
    return f"error: {'; '.join(problems.values())}; call {name} again with " + ", ".join(
        fixes.values()
    )


def explain_tool_error(error: ToolException) -> str:
    """Mark the message of a ToolException as an error."""
    return f"error: {error}"


def echo(value: object) -> str:
    """Show what a model gave, shortened and on one line."""
    return _SHORT.repr(value)


def unknown_name(argument: str, got: str, choices: Iterable[str]) -> str:
    """Say that a name is none of the choices, and which of them come nearest."""
    names = list(choices)
    nearest = difflib.get_close_matches(got[:60].casefold(), names)
    hint = f" (nearest: {', '.join(nearest)})" if nearest else ""
    return f"{argument}: got {echo(got)}, expected one of {', '.join(names)}{hint}"


def _explain(argument: str, detail: Any, properties: dict[str, Any]) -> tuple[str, str]:
    """One problem, and what to call the tool with instead."""
    kind, path, got = detail["type"], detail["loc"], detail["input"]
    corrected = f"corrected {argument}" if argument.endswith("s") else f"a corrected {argument}"
    if kind == "extra_forbidden":
        problem = f"{argument}: unknown argument, expected only {', '.join(properties)}"
        return problem, f"no {argument}"
    if kind == "value_error":  # our own validators name the argument and what they expected
        return str(detail["ctx"]["error"]), corrected
    if not path:
        return f"arguments: got {echo(got)}, expected {', '.join(properties)}", "an object"
    expected, where = properties[path[0]], argument
    for step in path[1:]:
        expected = expected["anyOf"][0] if "anyOf" in expected else expected
        expected = expected.get("items") or expected.get("additionalProperties") or {}
        where += f"[{step}]" if isinstance(step, int) else f".{_clip(str(step))}"
    if kind == "missing":
        return f"{where}: got nothing, expected {_phrase(expected)}", argument
    if "enum" in expected and isinstance(got, str):
        return unknown_name(where, got, expected["enum"]), corrected
    shown = echo(got)
    if kind == "string_too_long":
        shown = f"{len(got)} characters"
    elif kind in {"too_long", "too_short"}:
        shown = f"{len(got)} items"
    elif kind == "string_unicode":
        shown = "a lone surrogate, which is half a character"
    return f"{where}: got {shown}, expected {_phrase(expected)}", corrected


def _phrase(schema: dict[str, Any]) -> str:
    """Say in words what a property of a JSON schema accepts."""
    kind = schema.get("type")
    if kind != "array" and (choices := list_choices(schema)):
        return "one of " + ", ".join(choices)
    if "anyOf" in schema:
        return _phrase(schema["anyOf"][0])
    if kind == "integer":
        return f"an integer from {schema['minimum']} to {schema['maximum']}"
    if kind == "array":
        least, most = schema["minItems"], schema["maxItems"]
        return f"a list of {least} to {most} names, {_phrase(schema['items'])}"
    if kind == "object":
        return f"an object of at most {schema['maxProperties']} strings"
    most = schema.get("maxLength")
    return f"a string of at most {most} characters" if most else "a string"


def _clip(text: str) -> str:
    """Shorten a name that the model chose, and keep it on one line."""
    return text if text.isprintable() and len(text) <= 40 else echo(text)
