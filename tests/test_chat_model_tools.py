"""TomeforgeChat calls tools, gives structured output and drives agents; over a scripted backend."""

import json
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage

from integration.backend import Turn
from integration.chat_model_messages import to_openai_tools
from integration.chat_model_turns import close_objects
from integration.decoding import Answer
from tests.fake_backend import (
    CALL,
    CUT_OFF,
    GOOD_JSON,
    Joke,
    JokeDict,
    call_message,
    cut_off,
    joined,
    make,
)
from tools import TOOLS
from tools.protocol import ToolCall, ToolDefinition, describe_tool


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: One.
        b: Other.
    """
    return a + b


TITLED = {"title": "titled", "description": "T.", "type": "object", "properties": {"x": {}}}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        *[(choice, "auto") for choice in ("auto", None, False, {"type": "auto"})],
        *[(choice, "required") for choice in ("any", "required", True, {"type": "any"})],
        ("none", "none"),
        ("add", "add"),
        ({"type": "function", "function": {"name": "add"}}, "add"),
        ({"type": "tool", "name": "add"}, "add"),
    ],
)
def test_every_tool_choice_reaches_the_backend(choice, expected):
    """Traps 8, 9: the stock class refuses auto, any, required and none, and ignores a name."""
    model, backend = make("a")
    model.bind_tools([add, Joke], tool_choice=choice).invoke("Hi")
    assert backend.asked[0]["choice"] == expected
    assert [each.name for each in backend.asked[0]["tools"]] == ["add", "Joke"]


@pytest.mark.parametrize(
    "choice",
    ["ad", {"type": "function", "function": {"name": "x"}}, {"type": "function"}, 7, ["add"]],
)
def test_unknown_tool_choice_names_the_choices(choice):
    """Trap 9: an unknown name is ignored without a word."""
    model, _ = make("a")
    with pytest.raises(ValueError, match="expected one of auto, none, any, required, add"):
        model.bind_tools([add], tool_choice=choice)


def test_call_cannot_be_required_without_tools():
    model, _ = make("a")
    with pytest.raises(ValueError, match="expected one of"):
        model.bind_tools([], tool_choice="any")


def test_every_kind_of_tool_becomes_a_definition():
    model, backend = make("a")
    model.bind_tools([add, Joke, TITLED, TOOLS[0]]).invoke("Hi")
    first, second, third, fourth = backend.asked[0]["tools"]
    assert describe_tool(first) == "- add(a, b): Add two numbers."
    assert describe_tool(second) == "- Joke(setup, punchline): A joke."
    assert describe_tool(third) == "- titled(x?): T."
    assert isinstance(fourth, ToolDefinition)


def test_own_tools_are_told_as_in_training_and_keep_their_marks():
    """LangChain's conversion drops `verbatim`, without which a call may misquote the user."""
    model, backend = make("a")
    model.bind_tools(TOOLS).invoke("Hi")
    definitions = backend.asked[0]["tools"]
    assert [describe_tool(each) for each in definitions] == [describe_tool(each) for each in TOOLS]
    assert definitions[0].schema["properties"]["text"]["verbatim"] is True


@pytest.mark.parametrize(
    ("tools", "match"),
    [
        ([{"type": "web_search"}], "web_search"),
        ([add, {"title": "add", "description": "", "type": "object"}], "two are named 'add'"),
        ([{"type": "function", "function": {"name": "none"}}], "rename"),
    ],
)
def test_tool_that_cannot_be_one_is_refused(tools, match):
    with pytest.raises(ValueError, match=match):
        to_openai_tools(tools)


def test_plain_bind_makes_real_calls():
    """Trap 10: without a tool choice the stock class never gives a call."""
    model, _ = make(CALL, CALL)
    bound = model.bind_tools(TOOLS)
    first, second = bound.invoke("Wrap it."), bound.invoke("Wrap it.")
    (call,) = first.tool_calls
    assert (call["name"], call["args"]) == (CALL.name, CALL.arguments)
    assert call["id"] != second.tool_calls[0]["id"]
    assert first.content == ""
    assert first.response_metadata["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("fields", [{}, {"streaming": True}])
def test_streamed_call_is_one_chunk(fields):
    """Trap 11: the name is repeated a chunk, so that "A" arrives as "AAAAAAAAAA"."""
    model, _ = make(CALL, CALL, **fields)
    bound = model.bind_tools(TOOLS, tool_choice=CALL.name)
    (chunk,) = bound.stream("Wrap it.")
    (part,) = chunk.tool_call_chunks
    assert (part["name"], json.loads(part["args"])) == (CALL.name, CALL.arguments)
    assert part["id"]
    whole, message = joined([chunk]), bound.invoke("Wrap it.")
    for made in (whole, message):
        assert [(call["name"], call["args"]) for call in made.tool_calls] == [
            (CALL.name, CALL.arguments)
        ]
    assert type(message) is AIMessage


@pytest.mark.parametrize("written", [CUT_OFF, CUT_OFF.removeprefix("<tool_call>"), "", '{"a": 1}'])
@pytest.mark.parametrize("reason", ["length", "timeout", "stop"])
def test_call_that_was_cut_off_is_never_a_valid_one(written, reason):
    """Trap 12: streamed, it looks valid; LangChain mends half a JSON text."""
    ending = cut_off(reason)
    ending.text = written
    model, _ = make(ending, ending)
    bound = model.bind_tools(TOOLS)
    merged = joined([AIMessageChunk(content=""), *bound.stream("Hi")])
    for message in (bound.invoke("Hi"), merged):
        assert message.tool_calls == []
        (call,) = message.invalid_tool_calls
        assert written in call["args"]
        assert message.content == ""
        assert message.response_metadata["finish_reason"] == reason
        assert message.response_metadata["tool_call_error"] == "cut off after 9 tokens"


@pytest.mark.parametrize(
    ("fields", "options", "expected"),
    [
        ({}, {}, (0.0, 1.0)),
        ({"temperature": 0.7}, {}, (0.7, 1.0)),
        ({}, {"repeat_penalty": 1.3}, (0.0, 1.3)),
    ],
)
def test_answer_behind_a_result_copies_it(fields, options, expected):
    """A repeat penalty would change words of the result that the answer repeats."""
    model, backend = make("Hi.", "Done.", **fields)
    history = [HumanMessage("Wrap it."), call_message((CALL.name, CALL.arguments, "k"))]
    model.invoke(history[:1], stop=["X"], **options)
    model.invoke([*history, ToolMessage("one two", tool_call_id="k")], stop=["X"], **options)
    before, behind = (asked["settings"] for asked in backend.asked)
    assert (behind.temperature, behind.repeat_penalty) == expected
    assert behind.stop == ["X", "\n</tool_response>", "</tool_response>"]
    assert (before.temperature, before.repeat_penalty) != expected
    assert before.stop == ["X"]


# Structured output


SCHEMAS = [Joke, JokeDict, Joke.model_json_schema()]


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_structured_output(schema, method):
    entry: Any = GOOD_JSON
    if method == "function_calling":
        entry = ToolCall("Joke" if schema is not JokeDict else "JokeDict", json.loads(GOOD_JSON))
    model, backend = make(entry, entry)
    structured = model.with_structured_output(schema, method=method)
    for value in (structured.invoke("Joke!"), *structured.stream("Joke!")):
        assert isinstance(value, Joke if schema is Joke else dict)
        assert dict(value) == json.loads(GOOD_JSON)
    if method == "function_calling":
        assert backend.asked[0]["choice"] == entry.name
    else:
        assert set(backend.asked[0]["schema"]["required"]) == {"setup", "punchline"}


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ('{"setup": "Why?"}', "punchline"),
        ("[]", "schema"),
        (Turn(GOOD_JSON, answer=Answer("", "length")), "not whole .length"),
        (Turn('{"setup": "Wh', None, "cut off", Answer("", "timeout")), "not whole .timeout"),
    ],
)
def test_value_that_misses_its_schema_is_an_error(schema, entry, match):
    """Trap 13: a schema is dropped or its bounds ignored, and half a JSON text is mended."""
    model, _ = make(entry, entry)
    with pytest.raises(OutputParserException, match=match):
        model.with_structured_output(schema).invoke("Joke!")
    tried = model.with_structured_output(schema, include_raw=True).invoke("Joke!")
    assert tried["parsed"] is None
    assert isinstance(tried["parsing_error"], OutputParserException)
    assert isinstance(tried["raw"], AIMessage)


def test_objects_have_no_members_but_those_of_the_schema():
    """Trap 13: wrong keys came back."""
    open_object = {"type": "object", "properties": {"properties": {}}, "additionalProperties": {}}
    schema = {
        "title": "nested",
        "properties": {"properties": {"$ref": "#/$defs/A"}, "b": open_object},
        "$defs": {"A": {"properties": {"x": {"items": {"properties": {}}}}}},
        "anyOf": [{"properties": {}}, True],
    }
    closed = close_objects(schema)
    assert closed["$defs"]["A"] == {
        "properties": {"x": {"items": {"properties": {}, "additionalProperties": False}}},
        "additionalProperties": False,
    }
    assert closed["anyOf"][0] == {"properties": {}, "additionalProperties": False}
    assert set(closed["properties"]) == {"properties", "b"}
    assert closed["properties"]["b"] == open_object
    assert "additionalProperties" not in closed  # the branches of anyOf name members too
    model, backend = make(GOOD_JSON)
    model.with_structured_output(Joke).invoke("Joke!")
    assert backend.asked[0]["schema"]["additionalProperties"] is False


def test_bounds_are_checked_after_decoding():
    """Trap 13: grammars ignore bounds."""
    model, _ = make('{"setup": "Why?", "punchline": "B"}')
    with pytest.raises(OutputParserException, match="at least 2 characters"):
        model.with_structured_output(Joke).invoke("Joke!")


def test_cut_off_call_is_no_structured_value():
    """Trap 11, 12: not None, as LangChain's own parsers give, but an error."""
    model, _ = make(cut_off())
    with pytest.raises(OutputParserException, match="cut off after 9 tokens"):
        model.with_structured_output(Joke, method="function_calling").invoke("Joke!")


def test_good_value_with_include_raw():
    model, _ = make(GOOD_JSON)
    result = model.with_structured_output(Joke, include_raw=True).invoke("Joke!")
    assert result["parsed"] == Joke.model_validate_json(GOOD_JSON)
    assert result["parsing_error"] is None


def test_unknown_method_and_response_format_are_refused():
    model, _ = make("a")
    with pytest.raises(ValueError, match="json_schema, function_calling"):
        model.with_structured_output(Joke, method="xml")
    with pytest.raises(ValueError, match="response_format"):
        model.invoke("Hi", response_format={"type": "grammar"})


# Agents


def test_agent_calls_a_plain_tool_and_answers():
    """Trap 15: with the stock class neither plain tools nor ToolStrategy work."""
    model, backend = make(CALL, "Wrapped.")
    agent = create_agent(model, TOOLS, system_prompt="Be brief.")
    state = agent.invoke({"messages": [HumanMessage("Wrap: one two")]})
    _, call, result, answer = state["messages"]
    assert call.tool_calls[0]["name"] == "text_formatter"
    assert (result.content, answer.content) == ("one two", "Wrapped.")
    assert [asked["choice"] for asked in backend.asked] == ["auto", "auto"]
    assert [turn["role"] for turn in backend.asked[1]["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
    ]


def test_agent_streams_and_does_not_run_a_call_that_was_cut_off():
    model, _ = make(cut_off())
    (update,) = create_agent(model, TOOLS).stream({"messages": "Wrap: one"}, stream_mode="updates")
    (message,) = update["model"]["messages"]
    assert message.tool_calls == []
    assert message.invalid_tool_calls[0]["error"]


def test_agent_with_tool_strategy():
    """Trap 15: it binds with "any", which the stock class refuses."""
    model, backend = make(ToolCall("Joke", {"setup": "S"}), ToolCall("Joke", json.loads(GOOD_JSON)))
    agent = create_agent(model, TOOLS, response_format=ToolStrategy(Joke))
    state = agent.invoke({"messages": "Joke!"})
    assert state["structured_response"] == Joke.model_validate_json(GOOD_JSON)
    assert [asked["choice"] for asked in backend.asked] == ["required", "required"]


@pytest.mark.parametrize("response_format", [ProviderStrategy(Joke), Joke])
def test_agent_with_provider_strategy_calls_tools_before_it_answers_in_json(response_format):
    model, backend = make(CALL, "I wi|ll not", GOOD_JSON)
    agent = create_agent(model, TOOLS, response_format=response_format)
    state = agent.invoke({"messages": "Wrap, then joke!"})
    assert state["structured_response"] == Joke.model_validate_json(GOOD_JSON)
    kinds = [asked["kind"] for asked in backend.asked]
    assert kinds == ["turn", "turn", "json"]
    assert len(state["messages"]) == 4


def test_time_limit_is_that_of_the_choice_and_the_json_together():
    model, backend = make("I wi|ll not", GOOD_JSON, timeout=100)
    model.with_structured_output(Joke, tools=TOOLS).invoke("Joke!")
    assert 0 < backend.asked[1]["settings"].timeout_s < 100


def test_agent_with_provider_strategy_and_no_tools():
    model, _ = make(GOOD_JSON)
    state = create_agent(model, response_format=ProviderStrategy(Joke)).invoke(
        {"messages": "Joke!"}
    )
    assert state["structured_response"].setup == "Why?"
