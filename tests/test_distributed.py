"""Two processes train what one process trains: the same rows in each step, one of them writing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import train_lora
from scripts._cli import CommandError
from tests.tiny_runs import difference, losses_of, metrics_of, write_recipe

pytestmark = pytest.mark.model

# One row in a pass, four passes in a step: each of two processes takes two of them.
BATCH = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}


def run_on_two(recipe: Path) -> subprocess.CompletedProcess[str]:
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, "-m", *launcher, "-m", "scripts.train_lora", "--config", str(recipe)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=230,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def runs(tiny_model_dir, tmp_path_factory) -> tuple[Path, Path, subprocess.CompletedProcess[str]]:
    """The same recipe by one process and by two; what the two said."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    one, two = (write_recipe(folder, tiny_model_dir, **BATCH) for folder in folders)
    assert train_lora.main(["--config", str(one)]) == 0
    done = run_on_two(two)
    assert done.returncode == 0, done.stderr[-3000:]
    return folders[0] / "outputs/tiny", folders[1] / "outputs/tiny", done


def test_two_processes_take_the_steps_of_one(runs):
    one, two, _ = runs
    alone, together = losses_of(one), losses_of(two)
    assert list(together) == list(alone) == [1, 2, 3, 4]
    for step, loss in together.items():
        assert loss == pytest.approx(alone[step], abs=2e-2)
    assert abs(alone[1] - alone[2]) > 5e-2  # other rows would be seen
    tokens = [[row["tokens"] for row in metrics_of(run) if "tokens" in row] for run in (one, two)]
    assert tokens[0] == tokens[1]


def test_held_out_loss_is_that_of_all_rows(runs):
    one, two, _ = runs
    measured = [
        [row["eval_loss"] for row in metrics_of(run) if "eval_loss" in row] for run in (one, two)
    ]
    assert measured[1] == pytest.approx(measured[0], abs=2e-2)
    assert measured[0][0] - measured[0][1] > 5e-2


def test_adapters_are_close(runs):
    one, two, _ = runs
    assert difference(two / "adapter", one / "adapter") < 0.05


def test_one_process_writes(runs):
    _, two, done = runs
    rows = metrics_of(two)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 4]
    assert done.stdout == f"{two}/adapter\n"
    assert done.stderr.count("train: the adapter is that of step 4") == 1
    assert list(two.glob("adapter*")) == [two / "adapter"]
    training = (two / "provenance.json").read_text()
    assert '"devices": 2' in training
    assert '"rows": 24' in training


def test_passes_that_cannot_be_shared_are_refused(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(train_lora, "_Devices", _TwoDevices)
    settings = {**BATCH, "gradient_accumulation_steps": 3}
    recipe = write_recipe(tmp_path, tiny_model_dir, **settings)
    message = "gradient_accumulation_steps 3 cannot be shared by 2 devices"
    with pytest.raises(CommandError, match=message) as caught:
        train_lora.main(["--config", str(recipe)])
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


class _TwoDevices:
    """The first of two processes, as far as planning goes."""

    rank, world, is_main = 0, 2, True

    def wait(self) -> None:
        """Nobody else is there."""
