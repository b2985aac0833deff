"""What the chat draws: nothing that steers a terminal, the meter, calls and their errors."""

import io

import pytest

from integration.agent import CallRecord
from integration.chat_screen import Screen, context_share, format_call, meter, visible


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]0;x\x07", r"\x1b[2J\x1b]0;x\x07"),
        ("a\rb\x08\x7f", r"a\x0db\x08\x7f"),
        ("\x9b1m", r"\x9b1m"),
        ("\u202ecod\u2066\u2069", r"\u202ecod\u2066\u2069"),
        ("a\u200e\u200f\u200b\ufeff", r"a\u200e\u200f\u200b\ufeff"),
        ("\U000e0041\ud800", r"\U000e0041\ud800"),
    ],
)
def test_escape_sequences_are_made_visible(text, shown):
    """Case 13: hidden text, a screen rewritten."""
    assert visible(text) == shown


def test_ordinary_text_is_left_alone():
    text = "Größe\n\t漢 😀 👩\u200d💻 می\u200cخواهم ❤\ufe0f"
    assert visible(text) == text


def test_answer_is_raw_in_a_pipe_and_visible_on_a_terminal():
    pipe, terminal = io.StringIO(), FakeTerminal()
    for stream in (pipe, terminal):
        Screen(stream, io.StringIO()).piece("\x1b[2J")
    assert pipe.getvalue() == "\x1b[2J"
    assert terminal.getvalue() == r"\x1b[2J"


def test_tool_result_is_visible_on_every_output():
    pipe = io.StringIO()
    Screen(pipe, io.StringIO()).call(CallRecord("t", {"a": "\x9b\u202e"}, result="x\x1b[2J\ty"))
    assert pipe.getvalue() == '[t(a="\\x9b\\u202e")]\nx\\x1b[2J        y\n\n'


def test_tool_error_is_shown_as_an_error():
    out = io.StringIO()
    screen = Screen(out, io.StringIO())
    screen.call(CallRecord("t", {"a": 1}, error="error: a is\ntoo small"))
    assert out.getvalue() == "[t(a=1)]\nerror: a is too small\n\n"
    out.truncate(out.seek(0))
    screen.call(CallRecord("", {}, error="the call was cut off"))
    assert out.getvalue() == "error: the call was cut off\n\n"


def test_status_is_drawn_on_a_terminal_only():
    pipe, terminal = io.StringIO(), FakeTerminal()
    Screen(io.StringIO(), pipe).status("ctx 1/2")
    Screen(io.StringIO(), terminal).status("ctx 1/2")
    assert pipe.getvalue() == ""
    assert terminal.getvalue() == "\x1b[2m[ctx 1/2]\x1b[0m\n"


def test_no_colour_when_asked_for_none(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = FakeTerminal()
    Screen(io.StringIO(), terminal).error("x\x1b[2J")
    assert terminal.getvalue() == "error: x\\x1b[2J\n"


def test_waiting_mark_is_taken_back():
    terminal = FakeTerminal()
    screen = Screen(terminal, io.StringIO())
    screen.wait()
    screen.line("a")
    screen.line("b")
    assert terminal.getvalue() == "...\b\b\b   \b\b\ba\nb\n"


@pytest.mark.parametrize(
    ("used", "n_ctx", "share", "drawn"),
    [
        (0, 100, "0/100 0 %", "[....................] 0/100 0 %"),
        (1, 100, "1/100 1 %", "[#...................] 1/100 1 %"),
        (50, 100, "50/100 50 %", "[##########..........] 50/100 50 %"),
        (100, 100, "100/100 100 %", "[####################] 100/100 100 %"),
        (7, None, "7", "7"),
        (None, 100, "?", "?"),
    ],
)
def test_meter(used, n_ctx, share, drawn):
    assert context_share(used, n_ctx) == share
    assert meter(used, n_ctx) == drawn


def test_call_is_written_on_one_line():
    call = format_call("text_formatter", {"text": 'a\n"ü"', "width": 40})
    assert call == 'text_formatter(text="a\\n\\"ü\\"", width=40)'
