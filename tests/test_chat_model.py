"""TomeforgeChat: endings, settings, messages, counts; over a scripted backend."""

import asyncio
import json
import subprocess
import sys

import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import (
    AIMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    trim_messages,
)

from integration._cli import CONTEXT, USAGE, CommandError
from integration.chat_model import TomeforgeChat
from integration.chat_model_messages import to_turns
from tests.fake_backend import CALL, CUT_OFF, FakeBackend, Joke, call_message, cut_off, joined, make
from tools import TOOLS


def test_invoke_tells_how_the_answer_ended():
    """Trap 6: stock LlamaCpp loses the finish reason and the token counts."""
    model, _ = make("Hel|lo.")
    message = model.invoke("Hi")
    assert message.text == "Hello."
    assert message.usage_metadata == {"input_tokens": 7, "output_tokens": 3, "total_tokens": 10}
    assert message.response_metadata == {
        "model_name": "fake.gguf",
        "finish_reason": "stop",
        "seed": 42,
        "first_token_s": 0.25,
        "tokens_per_second": 4.0,
    }


def test_stream_tells_the_same_as_invoke_once_in_its_last_chunk():
    """Trap 6: stock streaming has no usage."""
    model, _ = make("Hel|lo.", "Hel|lo.")
    *pieces, last = chunks = list(model.stream("Hi"))
    assert [piece.content for piece in pieces] == ["Hel", "lo."]
    assert not any(piece.usage_metadata or piece.response_metadata for piece in pieces)
    assert last.chunk_position == "last"
    whole, message = joined(chunks), model.invoke("Hi")
    assert whole.response_metadata == message.response_metadata
    assert (whole.content, whole.usage_metadata) == (message.content, message.usage_metadata)


@pytest.mark.parametrize("way", ["field", "invoke", "bind", "stream", "ainvoke", "streaming"])
def test_stop_reaches_the_backend(way):
    """Trap 7: the stock class drops it on the default path and refuses it twice."""
    model, backend = make("a", stop=["own"], **({"streaming": True} if way == "streaming" else {}))
    match way:
        case "field":
            model.invoke("Hi")
        case "bind":
            model.bind(stop=["X"]).invoke("Hi")
        case "stream":
            list(model.stream("Hi", stop=["X"]))
        case "ainvoke":
            asyncio.run(model.ainvoke("Hi", stop=["X"]))
        case _:
            model.invoke("Hi", stop=["X"])
    assert backend.asked[0]["settings"].stop == (["own"] if way == "field" else ["X"])


def test_one_stop_string_is_not_taken_for_its_letters():
    model, backend = make("a", stop="END")
    model.invoke("Hi")
    assert backend.asked[0]["settings"].stop == ["END"]


def test_options_of_a_call_replace_those_of_the_model():
    model, backend = make("a", "b", temperature=0.7, top_k=5, timeout=9)
    model.invoke("Hi", temperature=0, seed=3, max_tokens=4, min_p=0.5, timeout=0)
    model.invoke("Hi")
    first, second = (asked["settings"] for asked in backend.asked)
    assert (first.temperature, first.seed, first.max_tokens, first.min_p) == (0, 3, 4, 0.5)
    assert (first.top_k, second.temperature, second.seed) == (5, 0.7, None)
    assert (first.timeout_s, second.timeout_s) == (0, 9)
    assert backend.asked[0]["deadline"] == float("inf") > backend.asked[1]["deadline"]


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"temprature": 0}, "temprature.*temperature"),
        ({"top_p": 3}, "top_p"),
        ({"model": "b"}, "model"),
    ],
)
def test_unknown_or_impossible_option_is_refused(option, match):
    model, _ = make("a")
    with pytest.raises(ValueError, match=match):
        model.invoke("Hi", **option)
    with pytest.raises(ValueError, match=next(iter(option))):
        make("a", **option)


def test_constructor_wants_a_backend():
    with pytest.raises(ValueError, match="from_file"):
        TomeforgeChat(backend="model.gguf")


def test_prompt_that_is_too_long_is_langchains_own_error():
    """Trap 5: a bare ValueError; middleware that shortens the history waits for this one."""
    model, _ = make(CommandError("too long", CONTEXT), CommandError("other", USAGE))
    with pytest.raises(ContextOverflowError, match="too long"):
        model.invoke("Hi")
    with pytest.raises(CommandError, match="other"):
        list(model.stream("Hi"))


# Messages


def test_history_with_a_call_is_text_in_alternating_turns():
    """Trap 14: content becomes None and the template fails; small templates have no tool role."""
    model, backend = make("Done.")
    empty = AIMessage("", id="1")
    empty.content = None  # as other programs store it
    model.invoke(
        [
            SystemMessage("Be brief."),
            SystemMessage("Be kind."),
            HumanMessage("Wrap it."),
            empty,
            HumanMessage([{"type": "text", "text": "Now"}, " please."]),
            call_message((CALL.name, CALL.arguments, "k1")),
            ToolMessage("one\ntwo", tool_call_id="k1"),
        ]
    )
    assert backend.asked[0]["messages"] == [
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        {"role": "user", "content": "Wrap it.\n\nNow please."},
        {
            "role": "assistant",
            "content": '<tool_call>{"name": "text_formatter", "arguments": '
            '{"text": "one two", "width": 10}}</tool_call>',
        },
        {"role": "user", "content": "<tool_response>\none\ntwo\n</tool_response>"},
    ]


def test_parallel_calls_are_told_one_after_another_each_before_its_result():
    turns = to_turns(
        [
            HumanMessage("Both."),
            call_message(("a", {"x": 1}, "k1"), ("b", {}, "k2"), text="Well:"),
            ToolMessage("of b", tool_call_id="k2"),
            ToolMessage("of a", tool_call_id="k1"),
            call_message(("a", {"x": 2}, "k1")),
            ToolMessage("again", tool_call_id="k1"),
        ]
    )
    assert [turn["content"] for turn in turns[1:]] == [
        'Well:\n\n<tool_call>{"name": "a", "arguments": {"x": 1}}</tool_call>',
        "<tool_response>\nof a\n</tool_response>",
        '<tool_call>{"name": "b", "arguments": {}}</tool_call>',
        "<tool_response>\nof b\n</tool_response>",
        '<tool_call>{"name": "a", "arguments": {"x": 2}}</tool_call>',
        "<tool_response>\nagain\n</tool_response>",
    ]
    assert [turn["role"] for turn in turns] == ["user"] + ["assistant", "user"] * 3


def test_result_belongs_to_the_nearest_call_of_its_id():
    """Part of a conversation, as trimming counts it; a whole one with an open call is refused."""
    result = ToolMessage("r", tool_call_id="k")
    turns = to_turns([call_message(("a", {}, "k")), call_message(("b", {}, "k")), result])
    assert [turn["role"] for turn in turns] == ["assistant", "user"]
    orphan = to_turns([result, HumanMessage("Hi")])
    assert orphan == [{"role": "user", "content": "<tool_response>\nr\n</tool_response>\n\nHi"}]


def test_call_that_was_none_is_told_as_it_was_written():
    model, backend = make(cut_off(), "Sorry.")
    bad = model.invoke("Wrap it.", tools=TOOLS)
    (call,) = bad.invalid_tool_calls
    model.invoke([HumanMessage("Wrap it."), bad, ToolMessage("cut off", tool_call_id=call["id"])])
    assert [turn["content"] for turn in backend.asked[1]["messages"][1:]] == [
        CUT_OFF,
        "<tool_response>\ncut off\n</tool_response>",
    ]


def test_blocks_that_repeat_the_calls_are_skipped():
    message = AIMessage(
        [
            {"type": "text", "text": "Hm."},
            {"type": "tool_use", "id": "k", "name": "a", "input": {}},
        ],
        tool_calls=[{"name": "a", "args": {}, "id": "k"}],
    )
    (turn,) = to_turns([message])
    assert turn["content"] == 'Hm.\n\n<tool_call>{"name": "a", "arguments": {}}</tool_call>'


def test_role_of_a_chat_message_is_read():
    assert to_turns([ChatMessage("Hi", role="user")]) == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "got none"),
        ([HumanMessage("a"), AIMessage("b")], "the model's own"),
        ([HumanMessage([{"type": "image_url", "image_url": "x"}])], "image_url.*text only"),
        ([HumanMessage("a"), ToolMessage("r", tool_call_id="k")], "'k' has no call"),
        ([call_message(("a", {}, "k")), HumanMessage("b")], "'k' of a"),
        (
            [call_message(("a", {}, "k"), ("b", {}, "l")), ToolMessage("r", tool_call_id="k")],
            "'l' of b",
        ),
        (
            [
                call_message(("a", {}, "k")),
                ToolMessage("r", tool_call_id="k"),
                HumanMessage("b"),
                ToolMessage("r", tool_call_id="k"),
            ],
            "'k' has no call",
        ),
        ([FunctionMessage("r", name="f")], "FunctionMessage"),
        ([ChatMessage("Hi", role="judge")], "ChatMessage"),
    ],
)
def test_conversation_that_cannot_be_answered_is_refused(messages, match):
    model, backend = make("a")
    with pytest.raises(ValueError, match=match):
        model.invoke(messages)
    assert backend.asked == []


# Counting and describing


def test_tokens_are_counted_by_the_backend_with_template_and_tools():
    model, _ = make()
    assert model.get_num_tokens("one two three") == 3
    messages = [SystemMessage("Be brief."), HumanMessage("Hi")]
    assert model.get_num_tokens_from_messages(messages) == 13
    assert model.get_num_tokens_from_messages(messages, tools=[Joke]) == 23


def test_tokens_are_estimated_where_the_backend_cannot_count(monkeypatch):
    model, _ = make()
    monkeypatch.setattr(FakeBackend, "count_tokens", lambda *args: None)
    assert 1 <= model.get_num_tokens("one two three") <= 8
    assert model.get_num_tokens_from_messages([HumanMessage("Hi")]) > 0


def test_history_can_be_trimmed_with_the_model_as_counter():
    model, _ = make()
    history = [HumanMessage("one " * 50), AIMessage("two"), HumanMessage("three")]
    kept = trim_messages(history, max_tokens=30, token_counter=model, start_on="human")
    assert [message.content for message in kept] == ["three"]


def test_model_describes_itself():
    model, _ = make(temperature=0.5, max_tokens=9, stop=["X"])
    assert model._llm_type == "tomeforge"
    assert model._identifying_params["model_name"] == "fake.gguf"
    assert model._identifying_params["temperature"] == 0.5
    assert model._get_ls_params() == {
        "ls_provider": "tomeforge",
        "ls_model_type": "chat",
        "ls_model_name": "fake.gguf",
        "ls_temperature": 0.5,
        "ls_max_tokens": 9,
        "ls_stop": ["X"],
    }
    assert model.profile is not None
    assert model.profile["max_input_tokens"] == 2048
    assert "FakeBackend" not in repr(model)


def test_import_needs_langchain_core_alone():
    """The package with the stock class is archived; nothing here may depend on it."""
    code = "import json, sys, integration.chat_model; print(json.dumps(list(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    packages = {name.split(".")[0] for name in json.loads(run.stdout)}
    assert "langchain_core" in packages
    assert not packages & {
        "langchain_community",
        "langchain_classic",
        "langchain",
        "llama_cpp",
        "torch",
    }
