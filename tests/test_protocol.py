"""The notation of calls: short prompt, exact round trip, honest failures."""

import pytest

from tools import TOOLS
from tools._schema import list_choices
from tools.protocol import (
    ToolCall,
    ToolDefinition,
    describe_tool,
    parse_tool_call,
    render_tool_call,
    render_tool_result,
    system_with_tools,
    tool_prompt,
)


def test_prompt_names_every_tool_argument_and_choice():
    prompt = tool_prompt(TOOLS)
    for word in [
        "text_formatter(text, width=80, indent=0)",
        "bug_report",
        "release_notes",
        "balanced_brackets|min_words:N|max_words:N|language:CODE)",
        "fields={}",
    ]:
        assert word in prompt
    assert len(prompt) < 900


def test_prompt_is_the_same_every_time_and_holds_no_pattern():
    prompt = tool_prompt(TOOLS)
    assert prompt == tool_prompt(TOOLS)
    assert "[1-9]" not in prompt
    assert "language:de" not in prompt


@pytest.mark.parametrize(
    ("schema", "choices"),
    [
        ({"enum": ["a", 1, None]}, ["a", "1", "None"]),
        ({"anyOf": [{"enum": ["a"]}, {"type": "null"}]}, ["a"]),
        ({"anyOf": [{"enum": ["a"]}, {"pattern": "^n:[0-9]$", "shown_as": "n:N"}]}, ["a", "n:N"]),
        ({"type": "array", "items": {"anyOf": [{"enum": ["a"]}, {"enum": ["b"]}]}}, ["a", "b"]),
        # Any integer will do as well: to name "auto" alone would be wrong.
        ({"anyOf": [{"enum": ["auto"]}, {"type": "integer"}]}, []),
        ({"type": "string", "pattern": "^a$"}, []),
        ({"anyOf": []}, []),
        ({"anyOf": 5, "items": [1], "enum": "a", "shown_as": {}}, []),
        (True, []),
        (None, []),
    ],
)
def test_choices_of_a_schema(schema, choices):
    assert list_choices(schema) == choices
    shown = describe_tool(ToolDefinition("t", "", {"properties": {"x": schema}}))
    assert shown == "- t(x" + (": " + "|".join(choices) if choices else "") + "?)"


def test_own_system_prompt_comes_first():
    assert system_with_tools("Be kind.", TOOLS).startswith(
        "Be kind.\n\nAnswer in plain text, or call"
    )
    assert system_with_tools(None, TOOLS) == tool_prompt(TOOLS)


def test_call_survives_the_round_trip():
    call = ToolCall("text_formatter", {"text": 'Größe "x"\n</tool_call> {1}', "width": 40})
    assert parse_tool_call(render_tool_call(call)) == call


@pytest.mark.parametrize("text", ["Hello.", "I would use <tool_call> here.", ""])
def test_plain_text_is_no_call(text):
    assert parse_tool_call(text) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('<tool_call>{"name": "a", "arg', "cut off"),
        ("<tool_call>{name: a}</tool_call>", "no JSON"),
        ('<tool_call>{"arguments": {}}</tool_call>', "no name"),
        ("<tool_call>[1]</tool_call>", "no name"),
        ('<tool_call>{"name": "a", "arguments": 3}</tool_call>', "no object"),
    ],
)
def test_broken_call_says_why(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_tool_call(text)


def test_result_is_marked():
    assert render_tool_result("x") == "<tool_response>\nx\n</tool_response>"
