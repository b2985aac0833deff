"""A run's `metrics.jsonl`: what was logged, as numbers and as a picture."""

import json
from collections.abc import Sequence
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


def plot_loss(metrics_path: Path, image_path: Path) -> None:
    """Draw training loss, held-out loss and learning rate over steps from ``metrics.jsonl``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_metrics(metrics_path)
    steps = [
        (row["step"], row["loss"], row["learning_rate"])
        for row in rows
        if row.get("loss") is not None
    ]
    if not steps:
        return
    numbers, losses, rates = zip(*steps, strict=True)
    held_out = [(row["step"], row["eval_loss"]) for row in rows if row.get("eval_loss")]
    window = max(1, len(losses) // 20)
    parts = [losses[max(0, at - window) : at + 1] for at in range(len(losses))]
    smooth = [sum(part) / len(part) for part in parts]
    dot = "o" if len(losses) == 1 else None  # a line needs two points
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    right = axes.twinx()
    right.set_zorder(-1)  # behind the losses
    axes.patch.set_visible(False)
    axes.plot(numbers, losses, color="#1f4e79", alpha=0.35, linewidth=1)
    axes.plot(
        numbers, smooth, color="#1f4e79", linewidth=2, marker=dot, label="training loss (smoothed)"
    )
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="#2e7d32", marker="o", label="held-out loss")
    right.plot(
        numbers,
        rates,
        color="#c55a11",
        linewidth=1,
        linestyle="--",
        marker=dot,
        label="learning rate",
    )
    axes.set_xlabel("optimizer step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("loss per trained token (nats)")
    axes.grid(alpha=0.25)
    right.set_ylabel("learning rate", color="#c55a11")
    right.set_ylim(0, 1.15 * max(rates) or 1)
    axes.legend(handles=[*axes.get_lines()[1:], *right.get_lines()], loc="upper right")
    figure.tight_layout()
    temporary = image_path.with_name(f".{image_path.name}.tmp")
    figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)
    temporary.replace(image_path)


def restart_metrics(metrics_path: Path, step: int) -> None:
    """Keep the metrics up to ``step``: the steps after it are trained again."""
    kept = [row for row in read_metrics(metrics_path) if row["step"] <= step] if step else []
    write_atomically(metrics_path, "".join(json.dumps(row) + "\n" for row in kept))
