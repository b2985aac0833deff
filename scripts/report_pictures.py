"""The pictures of a report, as SVG: loss over steps, and what each GGUF file's size costs.

The page gets each in light and dark, wide and narrow (text is not scaled down on a phone). The same
input gives the same bytes.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from scripts.metrics import LossColors, draw_loss
from scripts.report_numbers import significant, size

_WIDE, _NARROW = (7.2, 3.7), (4.2, 3.5)
# Up to so many points have their figures beside them; of more only the names have room.
_FEW_POINTS = 4
_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


@dataclass(frozen=True)
class Theme:
    """Colors of a picture; ``paper`` is that of the page."""

    text: str = "#3d4450"
    grid: str = "#c9ced6"
    paper: str = "#fdfdfc"
    good: str = "#1f4e79"
    bad: str = "#b3261e"
    held_out: str = "#2e7d32"
    rate: str = "#c55a11"


LIGHT = Theme()
DARK = Theme("#b9c0cb", "#4a515d", "#15171b", "#8ab8e6", "#f2a29b", "#7cc68d", "#e6a06a")


@dataclass(frozen=True)
class Point:
    """A file in the picture of sizes: bytes, mean KL divergence, and whether its certificate passed."""

    label: str
    bytes: int
    mean_kl: float
    passed: bool


@dataclass(frozen=True)
class Variants:
    """One picture for wide and for narrow screens."""

    wide: str
    narrow: str

    @property
    def wide_dark(self) -> str:
        """The wide one for a dark page."""
        return _darken(self.wide)

    @property
    def narrow_dark(self) -> str:
        """The narrow one for a dark page."""
        return _darken(self.narrow)


def _darken(svg: str) -> str:
    """Exchange the colors."""
    for light, dark in zip(astuple(LIGHT), astuple(DARK), strict=True):
        svg = svg.replace(light, dark)
    return svg


Draw = Callable[[Any], None]
Box = tuple[float, float, float, float]


def draw_variants(draw: Draw) -> Variants:
    """Draw a picture in all variants."""
    return Variants(_svg(draw, _WIDE), _svg(draw, _NARROW))


def _svg(draw: Draw, inches: tuple[float, float]) -> str:
    """Draw on axes without frame; text stays text, in the fonts of the page."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = {
        "svg.hashsalt": "tomeforge",
        "svg.fonttype": "none",
        "font.family": "DejaVu Sans",
        "font.size": 9.5,
        "text.color": LIGHT.text,
        "axes.labelcolor": LIGHT.text,
        "axes.edgecolor": LIGHT.grid,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": LIGHT.text,
        "ytick.color": LIGHT.text,
        "grid.color": LIGHT.grid,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
    }
    with matplotlib.rc_context(settings):
        figure, axes = pyplot.subplots(figsize=inches, layout="constrained")
        draw(axes)
        # A date would make every picture another one.
        written = io.StringIO()
        metadata = {"Date": None, "Creator": None}
        figure.savefig(written, format="svg", facecolor=LIGHT.paper, metadata=metadata)
        pyplot.close(figure)
    return written.getvalue().replace("'DejaVu Sans'", _FONTS)


def loss_picture(rows: Sequence[dict[str, Any]]) -> Variants:
    """Draw the curves of ``metrics.jsonl``."""
    colors = LossColors(LIGHT.good, LIGHT.held_out, LIGHT.rate)
    return draw_variants(lambda axes: draw_loss(axes, rows, colors))


def quantization_picture(points: Sequence[Point]) -> Variants:
    """Draw size against mean KL divergence, on a log axis."""
    return draw_variants(lambda axes: _draw_points(axes, points))


def _draw_points(axes: Any, points: Sequence[Point]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    # A log axis has no place for 0: it stands a decade below the others, and is called 0 there.
    lowest = min((point.mean_kl for point in points if point.mean_kl > 0), default=1e-6)
    zero = 10.0 ** (math.floor(math.log10(lowest)) - 1)
    points = sorted(points, key=lambda point: point.bytes)
    heights = [point.mean_kl or zero for point in points]
    sizes = [point.bytes / 1e6 for point in points]
    axes.plot(sizes, heights, color=LIGHT.grid, linewidth=1)
    for point, x, y in zip(points, sizes, heights, strict=True):
        color, marker = (LIGHT.good, "o") if point.passed else (LIGHT.bad, "X")
        axes.plot([x], [y], color=color, marker=marker, markersize=7, linestyle="", zorder=4)
    axes.set_yscale("log")
    # Whole decades, with room above for the labels; sizes with room for their width.
    low, high = math.floor(math.log10(min(heights))), math.ceil(math.log10(max(heights)))
    axes.set_ylim(10.0**low / 2, 10.0 ** max(high, low + 1) * 3)
    margin = max(0.2 * (max(sizes) - min(sizes)), 0.15 * max(sizes))
    axes.set_xlim(max(0, min(sizes) - margin), max(sizes) + 2 * margin)
    axes.yaxis.set_major_locator(LogLocator(base=10))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(
        FuncFormatter(
            lambda value, _: "0" if value <= zero * 1.01 else f"{value:.9f}".rstrip("0").rstrip(".")
        )
    )
    axes.grid(axis="y", alpha=0.6, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("size (MB)")
    axes.set_ylabel("mean KL divergence (nats)")
    texts = [point.label + ("" if point.passed else " (failed)") for point in points]
    if len(points) <= _FEW_POINTS:
        texts = [
            f"{text}\n{size(point.bytes)} · {significant(point.mean_kl)}"
            for text, point in zip(texts, points, strict=True)
        ]
    _label_points(axes, list(zip(texts, sizes, heights, strict=True)))


def _label_points(axes: Any, labels: list[tuple[str, float, float]]) -> None:
    """Write beside each point, where there is most room of eight places."""
    axes.figure.draw_without_rendering()  # the layout decides where a point is
    scale = 72 / axes.figure.dpi
    frame: Box = tuple(axes.get_window_extent().extents * scale)
    points = [axes.transData.transform((x, y)) * scale for _, x, y in labels]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    for (text, x, y), (left, bottom) in zip(labels, points, strict=True):
        lines = text.split("\n")
        width, height = 5.0 * max(map(len, lines)), 12.5 * len(lines)
        boxes = [
            (left + dx, bottom + dy, left + dx + width, bottom + dy + height)
            for dx in (8, -width - 8, -width / 2)
            for dy in (5, -height / 2, -height - 8)
            if (dx, dy) != (-width / 2, -height / 2)
        ]
        crowded = [
            round(
                sum(_overlap(box, other) for other in taken) + width * height - _overlap(box, frame)
            )
            for box in boxes
        ]
        box = boxes[crowded.index(min(crowded))]
        taken.append(box)
        axes.annotate(
            text,
            (x, y),
            xytext=(box[0] - left, box[1] - bottom),
            textcoords="offset points",
            fontsize=8.5,
            linespacing=1.3,
            bbox={"facecolor": LIGHT.paper, "edgecolor": "none", "pad": 0.5},
        )


def _overlap(one: Box, other: Box) -> float:
    """Give the area that two boxes share."""
    across = min(one[2], other[2]) - max(one[0], other[0])
    upright = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, across) * max(0.0, upright)
