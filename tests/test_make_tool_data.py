"""Generated tool rows: reproducible, balanced, and calls that the tools accept."""

import json
from collections import Counter

import pytest

from scripts._cli import CommandError
from scripts.conversations import to_conversation
from scripts.make_tool_data import Corpus, generate_conversations, sample_conversations
from tools import TOOLS
from tools.protocol import parse_tool_call, tool_prompt

CORPUS = Corpus.of(sample_conversations())
ROWS = list(generate_conversations(400, 1, CORPUS))


def test_same_seed_same_rows():
    assert list(generate_conversations(20, 5, CORPUS)) == list(
        generate_conversations(20, 5, CORPUS)
    )
    assert list(generate_conversations(20, 5, CORPUS)) != list(
        generate_conversations(20, 6, CORPUS)
    )


def test_kinds_are_balanced():
    counts = Counter(row["kind"] for row in ROWS)
    assert set(counts) == {tool.name for tool in TOOLS} | {"plain"}
    assert min(counts.values()) > 0.15 * len(ROWS)


def test_rows_are_conversations_with_the_tool_list():
    for row in ROWS:
        assert to_conversation(row).messages == row["messages"]
        assert row["messages"][0]["content"] == tool_prompt(TOOLS)


def test_calls_are_what_their_kind_says_and_the_tools_accept_them():
    by_name = {tool.name: tool for tool in TOOLS}
    for row in ROWS:
        call = parse_tool_call(row["messages"][2]["content"])
        assert (call.name if call else "plain") == row["kind"]
        if call:
            result = by_name[call.name].invoke(call.arguments)
            assert not result.startswith("error: ")
            if "text" in call.arguments:
                assert call.arguments["text"] in row["messages"][1]["content"]


def test_results_in_the_rows_are_the_tools_own():
    answered = [row for row in ROWS if len(row["messages"]) > 3]
    assert len(answered) > 40
    for row in answered:
        call = parse_tool_call(row["messages"][2]["content"])
        tool = next(tool for tool in TOOLS if tool.name == call.name)
        assert tool.invoke(call.arguments) in row["messages"][3]["content"]


def test_no_text_comes_from_outside_the_corpus():
    """Held-out rows must not come back as texts of tool requests."""
    conversations = sample_conversations()
    held_out = Corpus.of(conversations[:40])
    made = json.dumps(list(generate_conversations(300, 2, Corpus.of(conversations[40:]))))
    leaked = [text for text in held_out.sentences if json.dumps(text)[1:-1] in made]
    assert leaked == []


def test_too_small_a_corpus_is_refused():
    with pytest.raises(CommandError, match="tool_rows: the data has 0 plain sentences"):
        list(generate_conversations(3, 1, Corpus([], [])))
