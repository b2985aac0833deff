"""A run's `metrics.jsonl`: what was logged, as numbers and as a picture."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.recipe import write_atomically


def read_metrics(metrics_path: Path) -> list[dict[str, Any]]:
    """Read the metrics; a last line that was cut off by a kill is left out."""
    if not metrics_path.is_file():
        return []
    rows = []
    for line in metrics_path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def trained_tokens(rows: Sequence[dict[str, Any]]) -> int:
    """Give the real tokens trained on so far."""
    return max((row["tokens"] for row in rows if "tokens" in row), default=0)


@dataclass(frozen=True)
class LossColors:
    """Colors of the curves."""

    training: str = "#1f4e79"
    held_out: str = "#2e7d32"
    rate: str = "#c55a11"


def has_losses(rows: Sequence[dict[str, Any]]) -> bool:
    """Tell whether there is a training loss to draw."""
    return any(row.get("loss") is not None for row in rows)


def draw_loss(axes: Any, rows: Sequence[dict[str, Any]], colors: LossColors = LossColors()) -> None:
    """Draw training loss, held-out loss and learning rate over steps on matplotlib's axes."""
    steps = [
        (row["step"], row["loss"], row["learning_rate"])
        for row in rows
        if row.get("loss") is not None
    ]
    numbers, losses, rates = zip(*steps, strict=True)
    held_out = [(row["step"], row["eval_loss"]) for row in rows if row.get("eval_loss")]
    window = max(1, len(losses) // 20)
    parts = [losses[max(0, at - window) : at + 1] for at in range(len(losses))]
    smooth = [sum(part) / len(part) for part in parts]
    dot = "o" if len(losses) == 1 else None  # a line needs two points
    right = axes.twinx()
    right.set_zorder(-1)  # behind the losses
    axes.patch.set_visible(False)
    axes.plot(numbers, losses, color=colors.training, alpha=0.35, linewidth=1)
    axes.plot(
        numbers,
        smooth,
        color=colors.training,
        linewidth=2,
        marker=dot,
        label="training loss (smoothed)",
    )
    if held_out:
        axes.plot(
            *zip(*held_out, strict=True), color=colors.held_out, marker="o", label="held-out loss"
        )
    right.plot(
        numbers,
        rates,
        color=colors.rate,
        linewidth=1,
        linestyle="--",
        marker=dot,
        label="learning rate",
    )
    axes.set_xlabel("optimizer step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("loss per trained token (nats)")
    axes.grid(alpha=0.25)
    right.set_ylabel("learning rate", color=colors.rate)
    right.set_ylim(0, 1.15 * max(rates) or 1)
    axes.legend(handles=[*axes.get_lines()[1:], *right.get_lines()], loc="upper right")


def plot_loss(metrics_path: Path, image_path: Path) -> None:
    """Draw ``metrics.jsonl`` as a picture; nothing while no step was trained."""
    rows = read_metrics(metrics_path)
    if not has_losses(rows):
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    draw_loss(axes, rows)
    figure.tight_layout()
    temporary = image_path.with_name(f".{image_path.name}.tmp")
    figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)
    temporary.replace(image_path)


def restart_metrics(metrics_path: Path, step: int) -> None:
    """Keep the metrics up to ``step``: the steps after it are trained again."""
    kept = [row for row in read_metrics(metrics_path) if row["step"] <= step] if step else []
    write_atomically(metrics_path, "".join(json.dumps(row) + "\n" for row in kept))
