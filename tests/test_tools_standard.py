"""LangChain's standard tests for tools, and what all three promise: an answer or one line of error."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.tools import BaseTool, ToolException, tool
from langchain_tests.unit_tests import ToolsUnitTests

from tools import TOOLS
from tools.content_validator import content_validator
from tools.template_generator import template_generator
from tools.text_formatter import text_formatter

EXAMPLES: dict[str, dict[str, Any]] = {
    "text_formatter": {"text": "one two three", "width": 10, "indent": 2},
    "template_generator": {"template_type": "email", "fields": {"subject": "Lunch"}},
    "content_validator": {"text": "one two", "rules": ["not_empty", "max_words:5"]},
}


class _StandardTests(ToolsUnitTests):
    @property
    def tool_invoke_params_example(self) -> dict[str, Any]:
        return EXAMPLES[self.tool_constructor.name]

    def test_example_is_answered(self, tool: BaseTool) -> None:
        example = self.tool_invoke_params_example
        answer = tool.invoke(example)
        assert not answer.startswith("error: ")
        assert tool.func(**example) == answer


class TestTextFormatter(_StandardTests):
    @property
    def tool_constructor(self) -> BaseTool:
        return text_formatter


class TestTemplateGenerator(_StandardTests):
    @property
    def tool_constructor(self) -> BaseTool:
        return template_generator


class TestContentValidator(_StandardTests):
    @property
    def tool_constructor(self) -> BaseTool:
        return content_validator


def test_every_tool_has_an_example() -> None:
    assert list(EXAMPLES) == [tool.name for tool in TOOLS]


# What a model may write: the right names more often than not, values of any JSON type.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
VALUES = JSON | st.sampled_from(
    ["email", 10, 40, ["is_json"], ["language:en"], ["max_words:3"], {"subject": "x"}, "\ud800"]
)
NAMES = st.sampled_from(["text", "width", "indent", "template_type", "fields", "rules"])


def is_error_line(answer: Any) -> bool:
    return isinstance(answer, str) and answer.startswith("error: ") and "\n" not in answer


def answers_or_refuses(tool: BaseTool, args: dict[str, Any]) -> bool:
    """Whether `invoke` gives an answer to what the schema accepts, else one line of error."""
    try:
        checked = tool.args_schema(**args)
    except ValueError:
        return is_error_line(tool.invoke(args))
    try:
        expected = tool.func(**dict(checked))
    except ToolException as error:
        expected = f"error: {error}"
        return is_error_line(expected) and tool.invoke(args) == expected
    return tool.invoke(args) == expected


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(TOOLS), st.dictionaries(NAMES | st.text(max_size=5), VALUES, max_size=4))
def test_any_call_is_answered_or_refused_in_one_line(tool: BaseTool, args: dict[str, Any]) -> None:
    assert answers_or_refuses(tool, args)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(TOOLS), st.data())
def test_example_with_one_argument_changed_is_answered_or_refused(
    tool: BaseTool, data: st.DataObject
) -> None:
    args = dict(EXAMPLES[tool.name])
    args[data.draw(st.sampled_from(list(args)))] = data.draw(VALUES)
    assert answers_or_refuses(tool, args)


def test_twin_sees_a_tool_that_raises() -> None:
    @tool
    def bare(text: str) -> str:
        """Has no error handling."""
        return text[0]

    assert answers_or_refuses(bare, {"text": "a"})
    with pytest.raises(IndexError):
        answers_or_refuses(bare, {"text": ""})
    assert is_error_line("error: x")
    assert not is_error_line("error: two\nlines")
    assert not is_error_line("an answer")
