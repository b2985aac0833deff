"""Rows of other people's data sets: every schema that is read, every repair, every rejection."""

import json
from pathlib import Path

import pytest

from scripts.conversations import RowRejectedError, to_conversation
from tools.protocol import ToolCall, parse_tool_call, render_tool_call, render_tool_result

SHARED = Path(__file__).parent.parent.parent / "shared/data"
SAMPLE = Path(__file__).parent.parent / "scripts/data/finetome_sample.jsonl"
ROLE_COLUMNS = [("conversations", "from", "value"), ("messages", "role", "content")]
PAIR = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def sharegpt(*turns: tuple, **columns) -> dict:
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **columns}


def openai(*turns: dict, **columns) -> dict:
    return {"messages": list(turns), **columns}


def said(row: dict) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in to_conversation(row).messages]


def test_finetome_row_becomes_messages():
    row = sharegpt(
        ("system", "Be brief."), ("human", " Hi "), ("gpt", "Hello."), source="s", score=4
    )
    conversation = to_conversation(row)
    assert said(row) == [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello.")]
    assert (conversation.source, conversation.score, conversation.repairs) == ("s", 4, ())


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        ("human", "user"),
        ("Human", "user"),
        ("prompter", "user"),
        ("GPT", "assistant"),
        ("chatgpt", "assistant"),
        ("bot", "assistant"),
        ("model", "assistant"),
    ],
)
def test_role_spellings(role, expected):
    turns = [(role, "x"), ("gpt", "y")] if expected == "user" else [("user", "x"), (role, "y")]
    assert (expected, "x" if expected == "user" else "y") in said(sharegpt(*turns))
    with pytest.raises(RowRejectedError, match=f"unknown role '{role}x'"):
        to_conversation(sharegpt((role + "x", "x"), ("gpt", "y")))


@pytest.mark.parametrize("column", ["conversations", "messages", "conversation", "dialogue"])
def test_role_and_content_in_every_column(column):
    assert said({column: PAIR}) == [("user", "q"), ("assistant", "a")]
    with pytest.raises(RowRejectedError, match="no list of turns"):
        to_conversation({column + "x": PAIR})


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, ["Add.\n\n1 2", "3"]),
        ({"instruction": "Add.", "input": "", "output": "3"}, ["Add.", "3"]),
        (
            {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]},
            ["s", "a", "b", "c", "d"],
        ),
        ({"prompt": "p", "completion": "c"}, ["p", "c"]),
        ({"prompt": "p", "response": "r"}, ["p", "r"]),
        ({"question": "q", "answer": "a", "messages": None}, ["q", "a"]),
        ({"prompt": PAIR[:1], "completion": PAIR[1:]}, ["q", "a"]),
    ],
)
def test_columns(row, expected):
    assert [text for _, text in said(row)] == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("text", "row is no object"),
        ({"text": "x"}, "no list of turns"),
        ({"conversations": []}, "no list of turns"),
        ({"conversations": "x"}, "no list of turns"),
        ({"prompt": "x"}, "no list of turns"),
        ({"conversations": ["x"]}, "turn is no object"),
        ({"conversations": [{"speaker": "x"}]}, "turn has neither from/value nor role/content"),
        (sharegpt(("robot", "b")), "unknown role 'robot'"),
        (sharegpt(("human", "a"), ("gpt", 3)), "text is no string"),
        (sharegpt(("human", "a"), ("gpt", None)), "text is no string"),
        (sharegpt(("human", "a"), ("gpt", "  ")), "empty turn"),
        (sharegpt(("human", "a"), ("gpt", "b"), ("human", ""), ("gpt", "c")), "empty turn"),
        (
            sharegpt(("human", "a"), ("system", "b"), ("gpt", "c")),
            "system turn after the first turn",
        ),
        (sharegpt(("gpt", "a"), ("human", "b"), ("gpt", "c")), "first turn is the assistant's"),
        (sharegpt(("human", "a"), ("gpt", "b"), ("tool", "c")), "tool result without a call"),
        (sharegpt(("human", "a")), "no assistant turn"),
        (sharegpt(("system", "a")), "no assistant turn"),
        (openai(PAIR[0], PAIR[1] | {"weight": 0}), "every assistant turn has weight 0"),
        (openai(PAIR[0], PAIR[1] | {"weight": 0.5}), "weight is neither 0 nor 1"),
        (
            openai({"role": "user", "content": [{"type": "image_url"}]}, PAIR[1]),
            r"content is no text \(image_url\)",
        ),
        (sharegpt(("human", "a"), ("function_call", "f(1)")), "tool call is no JSON object"),
        (sharegpt(("human", "a"), ("function_call", '{"x": 1}')), "tool call is no JSON object"),
        (
            sharegpt(("human", "a"), ("function_call", '{"name": "f", "arguments": 3}')),
            "tool call is no JSON object",
        ),
        (sharegpt(("human", "a"), ("gpt", "b\ud800")), "text is no valid Unicode"),
        (sharegpt(("human", "a"), ("gpt", "b"), tools="nope"), "tools column is no list"),
        (sharegpt(("human", "a"), ("gpt", "b"), tools=[{"x": 1}]), "tools column is no list"),
        (sharegpt(("human", "a"), ("gpt", "b"), tools="3"), "tools column is no list"),
        ({"instruction": "a", "output": "b", "history": [["q"]]}, "history is no list"),
        ({"instruction": "", "input": "", "output": "b"}, "empty turn"),
    ],
)
def test_bad_rows_are_rejected_with_the_reason(row, reason):
    with pytest.raises(RowRejectedError, match=reason):
        to_conversation(row)


@pytest.mark.parametrize("position", range(1, 9, 2))
def test_every_turn_is_checked(position):
    turns = [("human" if index % 2 == 0 else "gpt", f"text {index}") for index in range(10)]
    assert len(said(sharegpt(*turns))) == 10
    turns[position] = ("gpt", " ")
    with pytest.raises(RowRejectedError, match="empty turn"):
        to_conversation(sharegpt(*turns))


@pytest.mark.parametrize(
    ("turns", "expected", "repair"),
    [
        (
            [("human", "a"), ("human", "b"), ("gpt", "c")],
            ["a\n\nb", "c"],
            "merged two turns of one role",
        ),
        (
            [("human", "a"), ("gpt", "b"), ("human", "c")],
            ["a", "b"],
            "left out a last turn without an answer",
        ),
        (
            [("system", " "), ("human", "a"), ("gpt", "b")],
            ["a", "b"],
            "left out an empty system turn",
        ),
    ],
)
def test_repairs_are_named(turns, expected, repair):
    conversation = to_conversation(sharegpt(*turns))
    assert [message["content"] for message in conversation.messages] == expected
    assert conversation.repairs == (repair,)


def test_weight_is_kept_and_never_merged_away():
    turns = [*PAIR, *PAIR]
    turns[1] = turns[1] | {"weight": 0}
    weights = [message.get("weight") for message in to_conversation(openai(*turns)).messages]
    assert weights == [None, 0, None, None]
    turns[3] = turns[3] | {"weight": 1}
    assert "weight" not in to_conversation(openai(*turns)).messages[3]
    with pytest.raises(RowRejectedError, match="different weight follow each other"):
        to_conversation(openai(PAIR[0], PAIR[1] | {"weight": 0}, PAIR[1]))


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two "}]
    assert said(openai({"role": "user", "content": parts}, PAIR[1]))[0] == ("user", "one\ntwo")


CALL = render_tool_call(ToolCall("f", {"x": "ü"}))


@pytest.mark.parametrize("arguments", ['{"x": "ü"}', {"x": "ü"}])
def test_openai_calls_and_results_become_our_notation(arguments):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    row = openai(
        PAIR[0],
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "r1", "tool_call_id": "1"},
        {"role": "tool", "content": "", "tool_call_id": "2"},
        PAIR[1],
    )
    assert said(row) == [
        ("user", "q"),
        ("assistant", f"{CALL}\n{CALL}"),
        ("user", render_tool_result("r1") + "\n" + render_tool_result("")),
        ("assistant", "a"),
    ]
    assert to_conversation(row).repairs == ("read tool turns as text",)
    row["messages"][1]["content"] = "Let me see."
    assert said(row)[1] == ("assistant", f"Let me see.\n{CALL}\n{CALL}")


def test_sharegpt_calls_and_results_become_our_notation():
    call = '{"name": "f", "arguments": {"x": "ü"}}'
    row = sharegpt(
        ("human", "q"), ("function_call", call), ("observation", "r"), ("gpt", "a"), ("human", "z")
    )
    assert said(row) == [
        ("user", "q"),
        ("assistant", CALL),
        ("user", render_tool_result("r")),
        ("assistant", "a"),
    ]
    assert parse_tool_call(said(row)[1][1]) == ToolCall("f", {"x": "ü"})
    twice = sharegpt(("human", "q"), ("tool_call", call), ("tool_call", call), ("tool", "r"))
    assert said(twice) == [("user", "q"), ("assistant", f"{CALL}\n{CALL}")]


def test_calls_that_are_text_already_stay_and_results_are_wrapped_once():
    row = sharegpt(("human", "q"), ("gpt", CALL), ("tool", render_tool_result("r")), ("gpt", "a"))
    assert said(row)[2] == ("user", render_tool_result("r"))
    assert said(row)[1] == ("assistant", CALL)


@pytest.mark.parametrize("as_text", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_tool_list_follows_the_rows_own_system_text(as_text, wrapped):
    function = {
        "name": "search",
        "description": "Find pages. Slowly.",
        "parameters": {
            "type": "object",
            "properties": {
                "query": {"type": "string"},
                "limit": {"type": "integer", "default": 5},
                "filter": {"type": "object", "properties": {"lang": {"enum": ["de"]}}},
                "tags": {"type": "array", "items": {"enum": [1, "b"]}},
                "odd": True,
            },
            "required": ["query", "tags"],
        },
    }
    tools = [{"type": "function", "function": function} if wrapped else function, {"name": "now"}]
    row = sharegpt(("system", "Own."), ("human", "q"), ("gpt", "a"))
    row["tools"] = json.dumps(tools) if as_text else tools
    system = said(row)[0][1]
    assert system.startswith("Own.\n\nAnswer in plain text, or call a tool")
    assert system.endswith(
        "\n- search(query, limit=5, filter?, tags: 1|b, odd?): Find pages.\n- now()"
    )
    row["tools"] = "[]"
    assert said(row)[0][1] == "Own."


def test_source_that_no_file_can_hold_is_mended():
    assert to_conversation(sharegpt(("human", "q"), ("gpt", "a"), source="x\ud800")).source == "x?"
    assert to_conversation(sharegpt(("human", "q"), ("gpt", "a"))).source is None


def lost_texts(rows: list[dict]) -> list[str]:
    """Texts of plain turns that do not come back in the conversation."""
    lost = []
    for row in rows:
        whole = "\n".join(text for _, text in said(row))
        for turn in row["conversations"]:
            if turn["from"] != "function_call" and turn["value"].strip() not in whole:
                lost.append(turn["value"])
    return lost


def test_every_text_of_the_shipped_sample_survives():
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 240
    assert lost_texts(rows) == []
    assert lost_texts([sharegpt(("human", "a"), ("gpt", "b"), ("human", "gone"))]) == ["gone"]
    conversations = [to_conversation(row) for row in rows]
    assert all(conversation.repairs == () for conversation in conversations)
    assert sum(item.messages[0]["role"] == "system" for item in conversations) >= 20
    assert sum(len(item.messages) > 3 for item in conversations) >= 40


@pytest.mark.skipif(not SHARED.is_dir(), reason="the measurement data is not beside this clone")
def test_other_peoples_tool_rows_all_load_whole():
    lines = (SHARED / "toolcalls_300.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert lost_texts(rows) == []
    calls = 0
    for row in rows:
        conversation = to_conversation(row)
        wanted = [
            json.loads(turn["value"])["name"]
            for turn in row["conversations"]
            if turn["from"] == "function_call"
        ]
        parsed = [
            parse_tool_call(message["content"])
            for message in conversation.messages
            if message["role"] == "assistant"
        ]
        assert [call.name for call in parsed if call] == wanted
        has_tools = json.loads(row["tools"]) != []
        assert (conversation.messages[0]["role"] == "system") == has_tools
        calls += len(wanted)
    assert calls == 211
