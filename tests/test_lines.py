"""``ask --jsonl`` without a model: what is read, skipped, written and resumed."""

import io
import json
import os
import threading
from pathlib import Path

import pytest

from integration._cli import CommandError
from integration.backend import Turn
from integration.decoding import Answer, Settings
from integration.lines import _Source, answer_lines, open_output
from integration.options import Session


class Echo:
    """A backend that repeats the question; "fail" fails."""

    name, n_ctx = "echo", None

    def turn(self, messages, settings, tools=(), tool_choice="auto", deadline=0.0):
        text = messages[-1]["content"]
        if text == "fail":
            raise CommandError("the prompt is too long", 4)
        yield text
        return Turn(text, answer=Answer(text, "timeout" if text == "slow" else "stop", 1, 1))

    def stream(self, steps):
        return (yield from steps)


def answer(text: str, path: Path, resume: bool = False) -> tuple[int, list[dict]]:
    session = Session(Echo(), None, Settings(timeout_s=3), (), None, 1)
    with open_output(path, resume) as output:
        code = answer_lines(session, "base", io.StringIO(text), output)
    return code, [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_lines_in_order(tmp_path):
    code, answers = answer('one\n\n"two"\n{"id": 3, "prompt": "three"}\n', tmp_path / "a")
    assert code == 0
    assert [(one["id"], one["text"]) for one in answers] == [
        (None, "one"), (None, "two"), (3, "three"),
    ]  # fmt: skip


def test_failures_name_their_line_and_the_rest_goes_on(tmp_path, capsys):
    code, answers = answer('{"id": 1\nfail\nslow\ngood\n', tmp_path / "a")
    assert code == 1
    assert [one["error"] and one["error"].split(":")[0] for one in answers] == [
        "line 1", "line 2", "line 3", None,
    ]  # fmt: skip
    assert "no whole answer within 3 s" in answers[2]["error"]
    assert "3 requests failed" in capsys.readouterr().err


def test_output_is_never_overwritten(tmp_path):
    path = tmp_path / "a"
    answer("one\n", path)
    with pytest.raises(CommandError, match="exists already; go on with it"):
        answer("two\n", path)
    with pytest.raises(CommandError, match="choose another place"):
        answer("two\n", tmp_path / "nowhere/a")
    assert len(path.read_text().splitlines()) == 1


def test_resume_answers_what_is_missing(tmp_path, capsys):
    path = tmp_path / "a"
    answer('{"id": 1, "prompt": "x"}\nplain\n', path)
    # Killed in the middle of a line.
    with path.open("a") as file:
        file.write('{"id": 2, "prom')
    code, answers = answer(
        '{"id": 1, "prompt": "x"}\n{"id": 2, "prompt": "y"}\nplain\nplain\n', path, resume=True
    )
    assert code == 0
    assert [(one["id"], one["prompt"]) for one in answers] == [
        (1, "x"), (None, "plain"), (2, "y"), (None, "plain"),
    ]  # fmt: skip
    said = capsys.readouterr().err
    assert "ends in half a line" in said
    assert "2 requests were answered already" in said
    again = answer('{"id": 1, "prompt": "x"}\n', path, resume=True)[1]
    assert again == answers


def test_resume_on_a_foreign_file_changes_nothing(tmp_path):
    path = tmp_path / "notes"
    path.write_text("dear diary\n")
    with pytest.raises(CommandError, match=r"line 1 of .* is no answer"):
        answer("one\n", path, resume=True)
    assert path.read_text() == "dear diary\n"


def test_resume_begins_where_there_is_no_file(tmp_path):
    assert len(answer("one\n", tmp_path / "new", resume=True)[1]) == 1


def test_half_a_character_is_valid_json(tmp_path):
    _, answers = answer('"a\\ud800b"\n', tmp_path / "a")
    assert answers[0]["text"] == "a\ud800b"


def test_pipe_is_read_while_others_wait():
    """A program that sends one line and waits for its answer gets it."""
    reading, writing = os.pipe()
    with os.fdopen(reading) as stream, os.fdopen(writing, "w") as sender:
        source = _Source(stream)
        with pytest.raises(BlockingIOError):
            source.take(False)
        threading.Timer(0.05, lambda: print("late", file=sender, flush=True)).start()
        assert source.take(True) == (1, "late\n")
        sender.close()
        with pytest.raises(EOFError):
            source.take(True)
