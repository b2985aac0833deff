"""`scripts.benchmark`: its options, and the targets of training."""

import subprocess
import sys

import pytest

from scripts import benchmark


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "scripts.benchmark", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_missing_model_says_how_to_get_one():
    done = run("chat", "--model", "nowhere.gguf")
    assert (done.returncode, "make demo" in done.stderr) == (3, True)


def figures(ours_speed=300.0, padding=0.0, peak=2.5):
    notebook = {"tokens_per_second": 150.0, "padding": 0.4, "peak_gb": 3.0}
    ours = {"tokens_per_second": ours_speed, "padding": padding, "peak_gb": peak}
    return {"ours": ours, "ours-lean": ours, "unsloth": notebook, "unsloth-lean": notebook}


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({}, []),
        ({"ours_speed": 210.0}, ["real tokens/s: ours / Unsloth notebook"]),
        ({"padding": 0.06}, ["padding of ours"]),
        ({"peak": 3.1}, ["peak memory: ours / Unsloth notebook"]),
    ],
)
def test_training_targets_can_be_missed(change, missed):
    targets = benchmark.judge_training(figures(**change))
    assert [target["name"] for target in targets if not target["met"]] == missed


def test_failing_contender_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"conversations": []}\n')
    done = run("train", "--rounds", "1", "--data", str(tmp_path / "rows.jsonl"))
    assert done.returncode == 1
    assert "contender 'ours' failed: error: " in done.stderr
