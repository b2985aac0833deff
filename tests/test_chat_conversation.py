"""The chat's memory: dropping the oldest exchanges, and conversations on disk."""

import json
import os
import stat

import pytest

from integration import chat_files
from integration._cli import CONTEXT, CommandError
from integration.chat_conversation import Conversation
from integration.chat_files import load_conversation, save_conversation
from tests.chat_stubs import StubModel
from tools.protocol import ToolCall, render_tool_call, render_tool_result


def exchange(words: int) -> list[dict]:
    """`words` + 4 tokens of the stub."""
    return [{"role": "user", "content": "w " * (words - 1)}, {"role": "assistant", "content": "a"}]


def filled(count: int, words: int = 6) -> Conversation:
    conversation = Conversation("Be brief.")  # 4 tokens
    conversation.exchanges = [exchange(words) for _ in range(count)]
    return conversation


def test_nothing_is_dropped_while_the_answer_fits():
    conversation = filled(8)  # 4 + 8 x 10 + 3 + 10 = 97
    assert conversation.make_room(StubModel(n_ctx=97), "hello", (), 10) == 0
    assert len(conversation.prompt("hello")) == 18


def test_oldest_exchanges_are_dropped_in_whole_and_some_in_advance():
    conversation = filled(8)
    # One token too many for 96; three quarters of it, 72, hold 5 exchanges: 4 + 50 + 3 + 10.
    assert conversation.make_room(StubModel(n_ctx=96), "hello", (), 10) == 3
    assert [message["role"] for message in conversation.prompt("hello")[:2]] == ["system", "user"]
    assert len(conversation.prompt("hello")) == 12
    assert len(conversation.prompt(dropped=0)) == 17  # what /save writes
    assert conversation.make_room(StubModel(n_ctx=96), "hello", (), 10) == 0


def test_last_exchange_is_kept_when_it_fits_at_all():
    conversation = filled(1, words=60)  # with the message and the answer: 4 + 64 + 3 + 10
    conversation.exchanges.insert(0, exchange(30))
    assert conversation.make_room(StubModel(n_ctx=81), "hello", (), 10) == 1


def test_tools_reserve_room_for_a_call_and_its_result():
    conversation = filled(8)
    assert conversation.make_room(StubModel(n_ctx=100), "one two three", (), 10) == 0
    assert conversation.make_room(StubModel(n_ctx=100), "one two three", ["tool"], 10) > 0


def test_message_that_is_too_long_drops_nothing_and_names_the_numbers():
    conversation = filled(2)
    with pytest.raises(CommandError, match=r"has 95 tokens .* the context 100, .* needs 16") as got:
        conversation.make_room(StubModel(n_ctx=100), "w " * 89, (), 10)
    assert got.value.exit_code == CONTEXT
    assert conversation.dropped == 0
    assert conversation.make_room(StubModel(n_ctx=100), "w " * 78, (), 10) == 2  # 84 + 16


def test_unknown_context_drops_nothing():
    assert filled(8).make_room(StubModel(n_ctx=None), "hello", (), 10) == 0


def with_call(result: str = "r") -> Conversation:
    conversation = filled(1)
    call = render_tool_call(ToolCall("text_formatter", {"text": "x"}))
    conversation.exchanges.append(
        [
            {"role": "user", "content": "Wrap x \x1b[2J"},
            {"role": "assistant", "content": call},
            {"role": "user", "content": render_tool_result(result)},
            {"role": "assistant", "content": "Done."},
        ]
    )
    return conversation


def test_saved_conversation_comes_back_with_its_exchanges(tmp_path):
    path, conversation = tmp_path / "talk.json", with_call()
    save_conversation(path, conversation, model="m.gguf")
    assert load_conversation(path) == ("Be brief.", conversation.exchanges)
    assert json.loads(path.read_text())["model"] == "m.gguf"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["talk.json"]


def test_result_tag_that_the_user_typed_starts_an_exchange(tmp_path):
    path, conversation = tmp_path / "talk.json", filled(2)
    conversation.exchanges[1][0]["content"] = render_tool_result("typed")
    save_conversation(path, conversation)
    assert len(load_conversation(path)[1]) == 2


@pytest.mark.parametrize("has_links", [True, False])
def test_save_never_overwrites(tmp_path, monkeypatch, has_links):
    def no_links(*_: str) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr(chat_files.os, "link", no_links)
    path = tmp_path / "talk.json"
    save_conversation(path, filled(1))
    before = path.read_text()
    with pytest.raises(CommandError, match=r"talk\.json: File exists; choose another name"):
        save_conversation(path, filled(2))
    assert path.read_text() == before
    assert os.listdir(tmp_path) == ["talk.json"]


def test_save_into_a_missing_folder_is_one_line(tmp_path):
    with pytest.raises(CommandError, match="No such file or directory"):
        save_conversation(tmp_path / "no/talk.json", filled(1))


USER, ASSISTANT = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        ([], "no list of messages"),
        ({"messages": {}}, "no list of messages"),
        ({"messages": []}, "0 turns are not pairs"),
        ({"messages": [USER]}, "1 turns are not pairs"),
        ({"messages": [ASSISTANT, USER]}, "turn 1 is of 'assistant', not 'user'"),
        ({"messages": [USER, USER]}, "turn 2 is of 'user', not 'assistant'"),
        ({"messages": [USER, {"role": "system", "content": "s"}]}, "turn 2 is of 'system'"),
        ({"messages": ["hello", ASSISTANT]}, "message 1 is not a role with a text"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "message 2 is not"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": []}]}, "message 2 is not"),
        ({"messages": [USER, {"role": "assistant", "content": "\ud800"}]}, "message 2 is not"),
    ],
)
def test_anything_else_is_not_loaded(tmp_path, content, reason):
    path = tmp_path / "talk.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(CommandError, match=f"{reason}.*; expected a file that /save wrote"):
        load_conversation(path)


def test_devices_missing_and_huge_files_are_not_read(tmp_path, monkeypatch):
    for path in (tmp_path, tmp_path / "none", tmp_path / ("n" * 300)):
        with pytest.raises(CommandError, match="/load: "):
            load_conversation(path)
    path = tmp_path / "talk.json"
    save_conversation(path, filled(1))
    monkeypatch.setattr(chat_files, "_MAX_BYTES", 10)
    with pytest.raises(CommandError, match="more than 10 bytes"):
        load_conversation(path)
