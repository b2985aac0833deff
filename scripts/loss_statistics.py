"""Held-out losses of rows in, loss and perplexity with their 95 % intervals out. No torch.

A row's tokens are not independent of each other, so the rows are the sample: the loss is the ratio of
two sums over rows, and its standard error that of a ratio estimator (Cochran, Sampling Techniques,
3rd ed. 1977, section 6.3), with Student's t for few rows.
"""

import math
from collections.abc import Sequence
from typing import Any

from scripts.held_out import RowLoss

_LARGEST_EXPONENT = 700  # exp of more is no float


def _interval(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float] | None:
    """Give the 95 % interval of a ratio of sums; None of a single row."""
    total = sum(counts)
    ratio = sum(sums) / total
    rows = len(sums)
    if rows < 2:
        return None
    from scipy.stats import t

    squares = sum((one - ratio * count) ** 2 for one, count in zip(sums, counts, strict=True))
    error = math.sqrt(rows / (rows - 1) * squares) / total
    half = float(t.ppf(0.975, rows - 1)) * error
    return ratio - half, ratio + half


def _perplexity(loss: float) -> float:
    return round(math.exp(min(loss, _LARGEST_EXPONENT)), 3)


def summarize(rows: Sequence[RowLoss]) -> dict[str, Any]:
    """Give loss (nats per token) and perplexity with 95 % intervals, tokens and rows.

    Raises:
        ValueError: No token is scored.
    """
    sums, counts = [total for total, _ in rows], [count for _, count in rows]
    if not sum(counts):
        raise ValueError("no token is scored")
    loss = sum(sums) / sum(counts)
    ends = _interval(sums, counts)
    return {
        "loss": round(loss, 4),
        "perplexity": _perplexity(loss),
        "tokens": sum(counts),
        "rows": len(rows),
        "loss_95": [round(end, 4) for end in ends] if ends else None,
        "perplexity_95": [_perplexity(end) for end in ends] if ends else None,
    }


def change(before: Sequence[RowLoss], after: Sequence[RowLoss]) -> dict[str, Any]:
    """Compare two models on the same rows; the interval is of the paired difference.

    Raises:
        ValueError: They are not the same rows.
    """
    counts = [count for _, count in before]
    if counts != [count for _, count in after]:
        raise ValueError("the two models were not measured on the same tokens")
    differences = [now - then for (then, _), (now, _) in zip(before, after, strict=True)]
    ends = _interval(differences, counts)
    return {
        "loss": round(sum(differences) / sum(counts), 4),
        "loss_95": [round(end, 4) for end in ends] if ends else None,
        "rows_better": sum(one < 0 for one in differences),
        "rows": len(differences),
    }
