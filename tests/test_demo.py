"""The demo's closing text comes from the run's own files, and its failures say how to go on."""

import json

import pytest

from scripts import demo
from scripts._cli import CommandError

CALL = {"name": "text_formatter", "args": {"width": 44}, "result": "wrapped text", "error": None}


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "gguf").mkdir()
    # The last one is of an earlier adapter: there, but not current.
    for name in ("m-F16", "m-Q8_0", "a-Q8_0"):
        (tmp_path / f"gguf/{name}.gguf").write_bytes(bytes(2_000_000))
    files = {
        f"{name}.gguf": {"type": name[2:], "bytes": 2_000_000}
        for name in ("m-F16", "m-Q8_0", "a-Q8_0")
    }
    record = json.dumps({"current": ["m-F16.gguf", "m-Q8_0.gguf"], "files": files})
    (tmp_path / "gguf/export.json").write_text(record)
    evaluation = {
        "base": {"loss": 2.5, "perplexity": 12.18, "rows": 7},
        "tuned": {"loss": 2.25, "perplexity": 9.49, "rows": 7},
        "answers": [{"question": "Why?", "base": "Because it " * 12, "tuned": "So"}],
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    return tmp_path


def test_summary_shows_figures_answers_call_sizes_and_commands(run_dir):
    reply = {"prompt": "Wrap it", "tool_calls": [CALL], "text": "Here"}
    text = demo.summary(run_dir, [reply], 12.3)
    for part in [
        "2.5000",
        "2.2500",
        "on 7 conversations",
        "Why?",
        "called text_formatter",
        "2.0 MB",
        "report.html",
    ]:
        assert part in text
    assert "a-Q8_0" not in text
    commands = [line for line in text.splitlines() if ".venv/bin/python" in line]
    assert len(commands) == 3
    assert all("m-Q8_0.gguf" in line for line in commands)


def test_summary_is_honest_when_no_tool_was_called(run_dir):
    text = demo.summary(run_dir, [{"prompt": "Hi", "tool_calls": [], "text": "No."}], 1.0)
    assert "called no tool" in text
    assert "result" not in text


def test_long_results_are_cut_and_errors_are_called_errors(run_dir):
    bad = {"name": "a", "args": {}, "result": None, "error": "error: width"}
    long = {**CALL, "result": "line\n" * 9}
    text = demo._tool_text({"prompt": "x", "tool_calls": [bad, long], "text": "y"})
    assert "error error: width" in text
    assert "(lines left out: 5)" in text


def test_failed_stage_ends_the_demo_with_its_exit_code():
    with pytest.raises(CommandError, match="ended with exit code 3") as caught:
        demo._run(["bash", "-c", "exit 3"])
    assert caught.value.exit_code == 3


def test_columns_hold_both_texts():
    lines = demo._side_by_side("left " * 30, "right", 20).splitlines()
    assert lines[0].split() == ["BASE", "TUNED"]
    assert max(map(len, lines)) <= 43
