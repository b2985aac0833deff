"""The picture shows every curve of `metrics.jsonl`, and a resumed run keeps the steps it keeps."""

import json
from pathlib import Path

import pytest

from scripts.metrics import plot_loss, restart_metrics


def step_row(step: int) -> dict[str, float]:
    return {"step": step, "loss": 3 / step, "learning_rate": 1e-4 * (10 - step), "grad_norm": 1.0}


def write_metrics(path: Path, rows: list[dict[str, float]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def some_rows(steps: int = 6) -> list[dict[str, float]]:
    rows = []
    for step in range(1, steps + 1):
        rows.append(step_row(step))
        if step % 2 == 0:
            rows.append({"step": step, "eval_loss": 4 / step})
    return [*rows, {"step": steps, "train_runtime": 3.0}]


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draw rows; give the picture's file and its axes by their label."""
    from matplotlib import pyplot

    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)

    def draw(rows):
        image = tmp_path / "loss.png"
        plot_loss(write_metrics(tmp_path / "metrics.jsonl", rows), image)
        return image, {axes.get_ylabel(): axes for axes in figures[-1].axes} if figures else {}

    yield draw
    monkeypatch.undo()
    for figure in figures:
        pyplot.close(figure)


LOSS, RATE = "loss per trained token (nats)", "learning rate"


def lines_of(axes) -> dict[str, list[tuple[float, float]]]:
    return {
        line.get_label(): list(zip(*(list(data) for data in line.get_data()), strict=True))
        for line in axes.get_lines()
    }


def test_picture_shows_every_curve(draw):
    image, axes = draw(some_rows())
    assert image.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert set(axes) == {LOSS, RATE}
    losses = lines_of(axes[LOSS])
    assert losses["held-out loss"] == [(2, 2.0), (4, 1.0), (6, pytest.approx(4 / 6))]
    assert [step for step, _ in losses["training loss (smoothed)"]] == [1, 2, 3, 4, 5, 6]
    rates = lines_of(axes[RATE])["learning rate"]
    assert rates[0] == (1, pytest.approx(9e-4))
    assert axes[LOSS].get_xlabel() == "optimizer step"
    legend = [text.get_text() for text in axes[LOSS].get_legend().get_texts()]
    assert legend == ["training loss (smoothed)", "held-out loss", "learning rate"]


def test_picture_without_held_out_loss_has_no_such_curve(draw):
    _, axes = draw([step_row(1), step_row(2)])
    assert "held-out loss" not in lines_of(axes[LOSS])
    assert len(axes[LOSS].get_legend().get_texts()) == 2


def test_raw_losses_are_drawn_behind_the_smooth_ones(draw):
    _, axes = draw(some_rows(9))
    raw, smooth = axes[LOSS].get_lines()[:2]
    assert list(raw.get_ydata()) == [3 / step for step in range(1, 10)]
    assert smooth.get_ydata()[2] == pytest.approx((3 / 2 + 3 / 3) / 2)


@pytest.mark.parametrize("steps", [1, 2])
def test_every_curve_can_be_seen_from_the_first_step(draw, steps):
    rows = [*map(step_row, range(1, steps + 1)), {"step": steps, "eval_loss": 2.0}]
    _, axes = draw(rows)
    named = [
        line
        for part in axes.values()
        for line in part.get_lines()
        if not line.get_label().startswith("_")
    ]
    assert len(named) == 3
    for line in named:  # a line of one point has no length
        assert len(line.get_xdata()) > 1 or line.get_marker() == "o"
    low, high = axes[RATE].get_ylim()
    assert low <= 9e-4 <= high


def test_loss_that_is_not_a_number_is_no_obstacle(draw):
    image, _ = draw([*some_rows(), {**step_row(7), "loss": float("nan")}])
    assert image.is_file()


def test_nothing_trained_yet_is_no_picture(draw):
    image, _ = draw([{"step": 0, "eval_loss": 3.0}])
    assert not image.exists()
    assert draw([step_row(1)])[0].exists()


def test_picture_is_replaced_whole(draw):
    image, _ = draw(some_rows(2))
    first = image.read_bytes()
    assert draw(some_rows(6))[0].read_bytes() != first
    assert [path.name for path in image.parent.iterdir() if path.suffix != ".jsonl"] == ["loss.png"]


def test_resumed_run_keeps_the_steps_up_to_its_own(tmp_path):
    path = write_metrics(tmp_path / "metrics.jsonl", some_rows(6))
    restart_metrics(path, 4)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert kept == some_rows(6)[:6]  # steps 1 to 4, and two measurements
    restart_metrics(path, 0)
    assert path.read_text() == ""


def test_fresh_run_without_metrics_has_an_empty_file(tmp_path):
    restart_metrics(tmp_path / "metrics.jsonl", 5)
    assert (tmp_path / "metrics.jsonl").read_text() == ""
