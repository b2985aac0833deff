"""The shell pipelines of `scripts/examples`, run as a user would, from another folder."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "scripts/examples"
NAMES = ["csv_answers.sh", "format_commit_messages.sh", "summarize_notes.sh"]
WITH_MODEL = ["csv_answers.sh", "summarize_notes.sh"]


@pytest.fixture
def run(tmp_path):
    """Run a script where folders called like ours stand in the way, and no locale is set."""
    away = tmp_path / "away"
    for name in ("tools", "integration"):
        (away / name).mkdir(parents=True)
        (away / name / "__init__.py").write_text("raise ImportError('not ours')\n")

    def start(name: str, *arguments: str | Path, stdin: bytes = b"", **variables: str | Path):
        env = {key: value for key, value in os.environ.items() if not key.startswith("LC_")}
        env |= {"LANG": "C", "PYTHON": sys.executable, "TOMEFORGE_CACHE": str(tmp_path / "cache")}
        env |= {key: str(value) for key, value in variables.items()}
        command = [str(EXAMPLES / name), *map(str, arguments)]
        done = subprocess.run(
            command, input=stdin, capture_output=True, check=False, cwd=away, env=env, timeout=120
        )
        done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
        return done

    return start


def error_of(done) -> tuple[int, str]:
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.returncode, done.stderr


def any_input(name: str) -> Path:
    return EXAMPLES if name == "summarize_notes.sh" else EXAMPLES / name


@pytest.mark.model
def test_every_note_has_a_summary_or_says_why_not(run, embedded_gguf, tmp_path):
    notes = tmp_path / "my notes"
    notes.mkdir()
    (notes / "réunion d'équipe.md").write_text("# Team\nWe ship on Friday, if tests pass.\n")
    (notes / "shopping list.TXT").write_bytes(b"Buy milk & \xff eggs.\n")
    (notes / os.fsdecode(b"latin-\xe9.txt")).write_text("Not every name is UTF-8.\n")
    (notes / "empty.txt").write_text(" \n")
    (notes / "photo.png").write_text("no note\n")
    (notes / "folder.md").mkdir()
    done = run("summarize_notes.sh", notes, MODEL=embedded_gguf, MAX_TOKENS="6")
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    answers = {answer["id"]: answer for answer in map(json.loads, done.stdout.splitlines())}
    failed = {name: answer["error"] is not None for name, answer in answers.items()}
    assert failed == {
        "empty.txt": True,
        "latin-�.txt": False,
        "réunion d'équipe.md": False,
        "shopping list.TXT": False,
    }
    for name, answer in answers.items():
        assert answer["usage"]["completion_tokens"] <= 6
        assert bool(answer["text"]) is not failed[name]
    assert "ship on Friday" in answers["réunion d'équipe.md"]["prompt"]


@pytest.mark.model
def test_csv_keeps_its_cells_and_gains_three(run, embedded_gguf, tmp_path):
    rows = [
        ["who", "question"],
        ["Ana, Bo", 'Say "hi", please.\nThen stop.'],
        ["Cé", "Name a colour"],
    ]
    path = tmp_path / "my questions.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([*rows, []])
    done = run("csv_answers.sh", path, MODEL=embedded_gguf, MAX_TOKENS="5")
    assert done.returncode == 0, done.stderr
    header, *answers = csv.reader(io.StringIO(done.stdout, newline=""))
    assert header == ["who", "question", "answer", "tool_calls", "error"]
    assert [answer[:2] for answer in answers] == rows[1:]
    for _, _, text, calls, error in answers:
        assert text or error or json.loads(calls)
        assert isinstance(json.loads(calls), list)


@pytest.mark.model
def test_question_without_an_answer_is_exit_1(run, embedded_gguf, tmp_path):
    path = tmp_path / "questions.csv"
    path.write_text('question\n" "\n')
    done = run("csv_answers.sh", path, MODEL=embedded_gguf)
    assert done.returncode == 1
    _, (question, text, calls, error) = csv.reader(io.StringIO(done.stdout))
    assert (question, text, calls, "the prompt is empty" in error) == (" ", "", "[]", True)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "'question' is not in list"),
        (b"Question\nhi\n", "'question' is not in list"),
        (b"question\nhi,there\n", "differ in length"),
        (b'question\n"hi\n', "unexpected end of data"),
        (b"question\n\xff\n", "codec can't decode"),
    ],
)
def test_csv_without_questions_is_exit_2(run, embedded_gguf, tmp_path, content, said):
    path = tmp_path / "questions.csv"
    path.write_bytes(content)
    code, message = error_of(run("csv_answers.sh", path, MODEL=embedded_gguf))
    assert (code, said in message) == (2, True), message


BODY = (
    b"The old one read each file twice, which took long where the folder was on a network drive.\n"
)
TRAILERS = b"Signed-off-by: Ana <ana@example.org>\nFixes: #12\n"


def test_bodies_are_wrapped_and_trailers_kept(run):
    messages = [b"Fix typo\n", b"Read once\n\n- one\n- two\n\n" + BODY + b"\n" + TRAILERS]
    done = run("format_commit_messages.sh", stdin=b"".join(one + b"\0" for one in messages))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split("\0") == [
        "Fix typo\n",
        "Read once\n\n- one\n- two\n\nThe old one read each file twice, which took long where the "
        "folder was\non a network drive.\n\n" + TRAILERS.decode(),
    ]


def test_invalid_messages_are_named_and_left_out(run):
    messages = [b"Valid\n", b"\n", b"Close (this\n", b"TODO: say what\n", "é".encode() * 73, b"So"]
    done = run("format_commit_messages.sh", stdin=b"\0".join(messages))
    assert (done.returncode, done.stdout.split("\0")) == (5, ["Valid\n", "So\n"])
    errors = done.stderr.splitlines()
    assert [line.split(" ")[2] for line in errors] == ["2", "3", "4", "5"]
    for line, reason in zip(
        errors, ["not_empty", "balanced_brackets", "no_placeholders", "73 columns"], strict=True
    ):
        assert line.startswith("error: message ")
        assert reason in line


def test_messages_come_from_files_or_a_log_without_commits(run, tmp_path):
    (tmp_path / "a message").write_text("One\nmore")
    done = run("format_commit_messages.sh", tmp_path / "a message", tmp_path / "a message")
    assert (done.returncode, done.stdout) == (0, "One\n\nmore\n\0One\n\nmore\n")
    done = run("format_commit_messages.sh")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", NAMES)
def test_help_and_missing_input(run, name, tmp_path):
    done = run(name, "-h")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {name} ")
    code, message = error_of(run(name, tmp_path / "nowhere"))
    assert (code, "nowhere' is no" in message) == (2, True)
    code, message = error_of(run(name, any_input(name), PYTHON=tmp_path / "no-python"))
    assert (code, "scripts/setup.sh" in message) == (1, True)


@pytest.mark.parametrize("name", WITH_MODEL)
def test_missing_model_is_exit_3(run, name, tmp_path):
    code, message = error_of(run(name, any_input(name), MODEL=tmp_path / "none.gguf"))
    assert (code, "make demo" in message) == (3, True)


def test_folder_without_notes_is_exit_2(run, embedded_gguf, tmp_path):
    code, message = error_of(run("summarize_notes.sh", tmp_path / "away", MODEL=embedded_gguf))
    assert (code, "no *.md or *.txt" in message) == (2, True)


def test_scripts_are_short_and_checked():
    paths = sorted(EXAMPLES.glob("*.sh"))
    assert [path.name for path in paths] == NAMES
    for path in paths:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 40
        assert "set -euo pipefail" in lines
        assert any(f"scripts/examples/{path.name}" in line for line in lines if line[0] == "#")
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", *paths], capture_output=True, text=True, check=False)
        assert done.stdout == ""
