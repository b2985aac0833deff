"""What a run tells: metrics lines, one progress line, and the word that stops it."""

import json
import os
import signal
from types import SimpleNamespace

import pytest

from scripts import progress as progress_module
from scripts.loss_watch import LossWatch
from scripts.progress import RunProgress, format_seconds, stop_on_signal


def make_progress(folder, logging_steps: int = 1, is_main: bool = True) -> RunProgress:
    metrics, image = folder / "metrics.jsonl", folder / "loss.png"
    return RunProgress(metrics, image, logging_steps, LossWatch(), is_main)


def make_state(step: int, max_steps: int = 10, epoch: float = 0.0) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, max_steps=max_steps, epoch=epoch, best_metric=None)


def make_control() -> SimpleNamespace:
    return SimpleNamespace(should_save=True, should_evaluate=True, should_training_stop=False)


def log_step(progress: RunProgress, step: int, loss: float = 2.0, **more) -> SimpleNamespace:
    control = make_control()
    logs = {"loss": loss, "grad_norm": 1.0, "learning_rate": 1e-4, "epoch": 0.1, **more}
    progress.on_log(None, make_state(step), control, logs)
    return control


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_seconds_are_written_for_people():
    assert [format_seconds(value) for value in (0, 59.6, 61, 3599, 3723)] == [
        "0:00",
        "1:00",
        "1:01",
        "59:59",
        "1:02:03",
    ]


def test_every_step_is_a_metrics_line(tmp_path):
    progress = make_progress(tmp_path)
    controls = [log_step(progress, step, tokens=100 * step, note="text") for step in (1, 2)]
    progress.on_log(None, make_state(2), make_control(), {"eval_loss": 1.5})
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 2]
    assert rows[1]["tokens"] == 200
    assert rows[2]["eval_loss"] == 1.5
    assert "note" not in rows[0]  # numbers only
    assert progress.failure is None
    assert all(control == make_control() for control in controls)


def test_logging_steps_thin_the_steps_but_no_measurement(tmp_path):
    progress = make_progress(tmp_path, logging_steps=4)
    for step in range(1, 11):
        log_step(progress, step)
        progress.on_log(None, make_state(step), make_control(), {"eval_loss": 1.5})
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows if "loss" in row] == [4, 8, 10]
    assert sum("eval_loss" in row for row in rows) == 10


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (2.0, float("nan"))])
def test_step_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path, loss, norm):
    progress = make_progress(tmp_path, logging_steps=4)  # judged even where nothing is written
    assert log_step(progress, 1).should_save
    control = log_step(progress, 2, loss, grad_norm=norm)
    assert "became nan" in progress.failure
    assert control.should_training_stop
    assert not control.should_save
    assert not control.should_evaluate


def test_every_process_judges_but_one_writes(tmp_path):
    progress = make_progress(tmp_path, is_main=False)
    log_step(progress, 1, float("nan"))
    assert progress.failure
    assert list(tmp_path.iterdir()) == []


def test_last_step_is_measured_and_saved(tmp_path):
    progress = make_progress(tmp_path)
    for step, wanted in ((9, False), (10, True)):
        control = SimpleNamespace(
            should_save=False, should_evaluate=False, should_training_stop=False
        )
        progress.on_step_end(None, make_state(step), control)
        assert control.should_save is control.should_evaluate is wanted


def test_interrupted_run_saves_and_stops(tmp_path):
    progress = make_progress(tmp_path)
    progress.interrupted = True
    control = SimpleNamespace(should_save=False, should_evaluate=False, should_training_stop=False)
    progress.on_step_end(None, make_state(3), control)
    assert control.should_save
    assert control.should_training_stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_is_a_flag_and_the_second_one_stops(tmp_path, number):
    progress = make_progress(tmp_path)
    before = signal.getsignal(number)
    with stop_on_signal(progress):
        os.kill(os.getpid(), number)
        assert progress.interrupted
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("epoch", "expected"), [(0, 0), (0.999, 0), (1 - 1e-9, 1), (2.5, 2)])
def test_sampler_is_told_its_epoch_after_a_resume(tmp_path, epoch, expected):
    progress = make_progress(tmp_path)
    progress.on_epoch_begin(None, make_state(5, epoch=epoch), None)  # TRL orders the rows itself
    told = []
    progress.sampler = SimpleNamespace(start_epoch=told.append)
    progress.on_epoch_begin(None, make_state(5, epoch=epoch), None)
    assert told == [expected]


def test_progress_line_has_loss_speed_and_time_left(tmp_path, capsys, monkeypatch):
    clock = iter(range(0, 10_000, 2))
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(progress_module, "plot_loss", lambda *paths: None)
    progress = make_progress(tmp_path)
    progress.on_train_begin(None, make_state(0), None)
    progress.on_log(None, make_state(1), make_control(), {"eval_loss": 1.5})
    for step in range(2, 11):
        log_step(progress, step, 1.25, tokens_per_second=321.4)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) < 9  # every ten seconds, and the last
    assert lines[-1].startswith("step 10/10  loss 1.250  held-out 1.500  321 real tokens/s  0:00")
    assert not lines[0].endswith(" 0:00 left")


def test_resumed_run_reckons_with_its_own_steps(tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    progress = make_progress(tmp_path)
    progress.on_train_begin(None, make_state(80, max_steps=100), None)
    now[0] = 20.0  # ten steps of two seconds
    logs = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-4}
    progress.on_log(None, make_state(90, max_steps=100), make_control(), logs)
    assert capsys.readouterr().err.rstrip().endswith("0:20 left")


def test_picture_is_redrawn_while_training_runs(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    progress = make_progress(tmp_path)
    log_step(progress, 1)
    assert not (tmp_path / "loss.png").exists()
    now[0] = 31.0
    log_step(progress, 2)
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
