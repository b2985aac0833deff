"""The chat in a pseudo-terminal: editing, Ctrl-C, escape sequences, approval."""

import os
import re
import sys

import pytest

from integration import chat_screen
from tests.chat_stubs import ESCAPES, Terminal

CHAT = [sys.executable, "-m", "tests.chat_stubs"]
PROMPT = r"(?s)\x1b\[\?2004h.*\x1b\[\?25h"  # takes pastes, and shows the cursor


@pytest.fixture
def terminal(tmp_path, request):
    terminal = Terminal([*CHAT, *getattr(request, "param", [])], tmp_path)
    terminal.read_until("/help lists the commands")
    terminal.read_until(PROMPT)
    yield terminal
    terminal.process.kill()
    terminal.process.wait()


def test_input_of_several_lines_is_one_message(terminal):
    terminal.send("one\x1b\rtwo\\\rthree\r")  # Alt-Enter, backslash Enter, Enter
    terminal.read_until(r"1 messages: 'one\\ntwo\\nthree'")
    terminal.read_until(PROMPT)
    terminal.send("\x1b[200~four\r\nfive\n\x1b[201~six\r")  # a paste
    terminal.read_until(r"3 messages: 'four\\nfive\\nsix'")
    terminal.read_until(PROMPT)
    terminal.send("one\rtwo\r")  # Enter alone sends
    terminal.read_until("5 messages: 'one'")
    terminal.read_until("7 messages: 'two'")
    terminal.read_until(r"\[ctx \d+/1000 \d %.{1,3}40 tok/s.{1,3}seed 7\]")
    terminal.read_until(PROMPT)
    terminal.send("\x1b[A\r")  # the history's last line
    terminal.read_until("9 messages: 'two'")
    terminal.read_until(PROMPT)
    terminal.send("/re\t")
    terminal.read_until("/retry")
    terminal.send("\x03")
    terminal.read_until(PROMPT)
    terminal.send("/adapter js")
    terminal.read_until("json")  # offered
    terminal.send("\t")
    terminal.read_until("json")  # chosen
    terminal.send("\r")
    terminal.read_until(r"\* json")
    terminal.read_until(PROMPT)
    assert terminal.finish() == 0


def test_ctrl_c_stops_the_answer_and_keeps_it(terminal):
    terminal.send("story\r")
    terminal.read_until("word5 ")
    terminal.send("\x03")
    seen = terminal.read_until(r"\[stopped\]\r\n")
    assert "word599" not in seen
    terminal.read_until(PROMPT)
    terminal.send("hello\r")
    terminal.read_until("3 messages: 'hello'")
    terminal.read_until(PROMPT)
    terminal.send("draft\x03")  # empties the message
    terminal.send("\x03")
    seen = terminal.read_until("Ctrl-D or /exit leaves")
    assert seen.count("leaves") == 1
    terminal.read_until(PROMPT)
    terminal.send("/exit\r")
    assert terminal.process.wait(timeout=20) == 0


def test_ctrl_c_ends_a_chat_with_a_pipe(tmp_path):
    reader, writer = os.pipe()
    terminal = Terminal(["sh", "-c", f"echo story | {' '.join(CHAT)}"], tmp_path, redirect=writer)
    os.close(writer)
    try:
        while b"word5" not in os.read(reader, 4096):
            pass
        terminal.send("\x03")
        terminal.read_until("interrupted")
    finally:
        os.close(reader)
        terminal.process.kill()
        terminal.process.wait()


def steers(text: str) -> bool:
    """Whether any of what the stub's escapes would do arrived."""
    return any(part in text for part in ("\x1b]0;", "\x1b[2J", "\x9b", "\u202e"))


def test_escape_sequences_are_made_visible(terminal, tmp_path):
    terminal.send("escape now\r")
    seen = terminal.read_until("ok\r\n")
    terminal.read_until(PROMPT)
    assert r"\x1b]0;owned\x07\x1b[2J\x9b1m\u202eok" in seen
    (tmp_path / "prompt").write_text(ESCAPES)
    terminal.send(f"/system @{tmp_path / 'prompt'}\r")
    seen += terminal.read_until(r"u202eok\r\n")
    terminal.send(f"/save {tmp_path / 'talk.json'}\r")
    terminal.read_until("saved")
    terminal.send(f"/load {tmp_path / 'talk.json'}\r")
    seen += terminal.read_until("last one:")
    seen += terminal.read_until(r"u202eok\r\n")
    terminal.read_until(PROMPT)
    assert seen.count(r"\u202eok") == 3
    assert not steers(seen)
    assert terminal.finish() == 0


def test_escape_sequences_would_be_seen(monkeypatch, tmp_path):
    """The twin: with the filter off, the check above finds them."""
    code = "from integration import chat_screen; chat_screen.visible = str; "
    code += "from tests.chat_stubs import main; main()"
    terminal = Terminal([sys.executable, "-c", code], tmp_path)
    terminal.read_until(PROMPT)
    terminal.send("escape now\r")
    assert steers(terminal.read_until("ok\r\n"))
    terminal.read_until(PROMPT)
    assert terminal.finish() == 0
    assert chat_screen.visible("\x1b") != "\x1b"


@pytest.mark.parametrize("terminal", [["--approve"]], indirect=True)
def test_call_is_run_only_when_approved(terminal):
    question = re.escape('run text_formatter(text="aa bb cc dd", width=10)? [y/N] ')
    for keys, outcome in [
        ("y\n", "\r\naa bb cc\r\ndd\r\n"),
        ("n\n", "error: the user refused this call"),
        ("\n", "error: the user refused this call"),
        ("\x04", "error: the user refused this call"),
    ]:
        terminal.send("wrap aa bb cc dd\r")
        terminal.read_until(question)
        terminal.send(keys)
        seen = terminal.read_until("Done.")
        assert outcome in seen
        assert ("aa bb cc\r\ndd" in seen) == (keys == "y\n")
        terminal.read_until(PROMPT)
    assert terminal.finish() == 0


def test_answers_go_into_a_file_while_the_message_is_typed(tmp_path):
    with (tmp_path / "answers").open("wb") as file:
        terminal = Terminal(CHAT, tmp_path, redirect=file.fileno())
        terminal.read_until(PROMPT)
        terminal.send("escape now\r")
        terminal.read_until("seed 7]")
        terminal.read_until(PROMPT)
        assert terminal.finish() == 0
    assert (tmp_path / "answers").read_text() == ESCAPES + "\n"
