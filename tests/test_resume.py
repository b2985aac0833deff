"""Killed anywhere, a run goes on with the same command and ends in the very same adapter."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts import train_lora
from scripts.batching import StepSampler
from scripts.checkpoints import newest_whole, step_of
from tests.tiny_runs import (
    losses_of,
    metrics_of,
    same_bits,
    train_command,
    write_recipe,
)

pytestmark = pytest.mark.model

# Six steps are an epoch; the second one is where the order of rows must be found again.
MAX_STEPS = 12
ADAPTER = "adapter/adapter_model.safetensors"


def kill_when(recipe: Path, reached: Callable[[], bool]) -> str:
    """Start a run and kill it, as a machine that is taken away does; give what it said."""
    process = subprocess.Popen(
        train_command(recipe), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        end = time.monotonic() + 200
        while process.poll() is None and not reached() and time.monotonic() < end:
            time.sleep(0.005)
    finally:
        process.kill()
    said = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, said
    return said


def checkpoint_folder(root: Path) -> Path:
    """The folder of the one training below, in the run or where `checkpoint_dir` says."""
    (folder,) = {path.parent for path in root.glob("**/checkpoint-*")}
    return folder


@pytest.fixture(scope="module")
def undisturbed(tiny_model_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = write_recipe(folder, tiny_model_dir, max_steps=MAX_STEPS)
    assert train_lora.main(["--config", str(recipe)]) == 0
    return folder / "outputs/tiny"


@pytest.fixture(scope="module")
def killed(tiny_model_dir, tmp_path_factory) -> Path:
    """A run killed twice; its newest checkpoint is damaged. Checkpoints are elsewhere, as on Colab."""
    folder = tmp_path_factory.mktemp("killed")
    elsewhere = folder / "mounted"
    recipe = write_recipe(
        folder, tiny_model_dir, max_steps=MAX_STEPS, checkpoint_dir=str(elsewhere)
    )
    run_dir = folder / "outputs/tiny"
    # Between two checkpoints, then while the tenth step's one is written.
    kill_when(recipe, lambda: 3 in losses_of(run_dir))
    assert not (run_dir / "adapter").exists()
    newest = newest_whole(checkpoint_folder(elsewhere))
    assert newest is not None
    said = kill_when(recipe, lambda: any(elsewhere.glob("*/*/checkpoint-10")))
    assert f"going on from step {step_of(newest)} ({newest})" in said
    newest = newest_whole(checkpoint_folder(elsewhere))
    if step_of(newest) >= 10:
        os.truncate(newest / "optimizer.pt", 1000)
    assert not (run_dir / "checkpoints").exists()
    return folder


@pytest.fixture
def copied(killed, tmp_path) -> Path:
    """A copy of the killed run, with a recipe that points to it: the same training."""
    for name in ("outputs", "mounted"):
        shutil.copytree(killed / name, tmp_path / name)
    text = (killed / "tiny.yaml").read_text()
    for name in ("outputs", "mounted"):
        text = text.replace(str(killed / name), str(tmp_path / name))
    (tmp_path / "tiny.yaml").write_text(text)
    return tmp_path


def go_on(folder: Path, *flags: str) -> Path:
    assert train_lora.main(["--config", str(folder / "tiny.yaml"), *flags]) == 0
    return folder / "outputs/tiny"


def test_killed_twice_and_damaged_ends_in_the_same_adapter(undisturbed, copied, capsys):
    run_dir = go_on(copied)
    said = capsys.readouterr().err
    assert "checkpoint-10 is skipped: " in said
    assert "going on from step 8 " in said  # in the second epoch
    assert json.loads((run_dir / "provenance.json").read_text())["training"]["resumed_from"] == 8
    assert (run_dir / ADAPTER).read_bytes() == (undisturbed / ADAPTER).read_bytes()
    assert same_bits(run_dir / "adapter", undisturbed / "adapter")
    # One line a step, as if nothing had happened.
    assert losses_of(run_dir) == losses_of(undisturbed)
    steps = [row["step"] for row in metrics_of(run_dir) if "loss" in row]
    assert steps == list(range(1, MAX_STEPS + 1))
    measured = [
        [(row["step"], row["eval_loss"]) for row in metrics_of(folder) if "eval_loss" in row]
        for folder in (run_dir, undisturbed)
    ]
    assert measured[0] == measured[1]


def test_order_of_rows_lost_in_the_resume_would_be_seen(undisturbed, copied, monkeypatch):
    monkeypatch.setattr(StepSampler, "start_epoch", lambda self, epoch: None)
    run_dir = go_on(copied)
    assert losses_of(run_dir)[9] != losses_of(undisturbed)[9]
    assert not same_bits(run_dir / "adapter", undisturbed / "adapter")


def test_another_seed_is_another_training(undisturbed, copied, capsys):
    run_dir = go_on(copied, "--seed", "5", "--max-steps", "2")
    said = capsys.readouterr().err
    assert "starting anew" in said
    assert "going on" not in said
    assert losses_of(run_dir)[1] != losses_of(undisturbed)[1]
    assert not same_bits(run_dir / "adapter", undisturbed / "adapter")


def test_checkpoints_elsewhere_outlive_the_run_folder(undisturbed, copied, capsys):
    shutil.rmtree(copied / "outputs")
    run_dir = go_on(copied)
    assert "going on from step 8 " in capsys.readouterr().err
    assert (run_dir / ADAPTER).read_bytes() == (undisturbed / ADAPTER).read_bytes()
    assert list(losses_of(run_dir)) == [9, 10, 11, 12]  # earlier metrics are lost with the folder


def test_half_written_metrics_line_is_no_obstacle(copied):
    metrics = copied / "outputs/tiny/metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"loss": 11.2, "gra')
    assert list(losses_of(go_on(copied))) == list(range(1, MAX_STEPS + 1))


def test_moved_run_finds_its_best_checkpoint(tiny_model_dir, tmp_path, capsys):
    """The trainer's state names the best checkpoint by the place where it was."""
    settings = {
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "save_steps": 1,
        "max_steps": 4,
    }
    write_recipe(tmp_path, tiny_model_dir, **settings)
    run_dir = go_on(tmp_path)
    measured = [row["eval_loss"] for row in metrics_of(run_dir) if "eval_loss" in row]
    best = 1 + measured.index(min(measured))
    assert best < 4  # the last weights are not the best ones
    assert same_bits(run_dir / "adapter", checkpoint_folder(run_dir) / f"checkpoint-{best}")
    kept, moved = tmp_path / "kept", tmp_path / "elsewhere"
    (run_dir / "adapter").replace(kept)
    (tmp_path / "outputs").replace(moved)
    go_on(tmp_path, "--output-root", str(moved))
    assert "going on from step 4 " in capsys.readouterr().err
    assert same_bits(moved / "tiny/adapter", kept)
