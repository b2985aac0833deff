"""What each quantization type would cost this model, and which one fits a limit.

In: llama.cpp's plan of every type (`stream_job.plan_files`). Out: a menu; a choice by size or by
measured KL divergence. Nothing is written for it.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from export._cli import FAILED, USAGE, CommandError
from export.gguf_header import MEANT_TYPES

# From best to worst by the KL divergences that llama.cpp publishes (tools/quantize/README.md and
# tools/perplexity/README.md). Types that another one beats at the same size are not offered.
_BY_QUALITY = (
    *("F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "IQ4_NL", "IQ4_XS"),
    *("Q3_K_L", "Q3_K_M", "IQ3_M", "IQ3_S", "Q3_K_S", "IQ3_XS", "IQ3_XXS", "Q2_K", "IQ2_M"),
    *("IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"),
)
_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


@dataclass(frozen=True)
class MenuEntry:
    """One type: the size of its file, what a weight really costs, and how much fell back."""

    type_name: str
    num_bytes: int
    bits_per_weight: float
    num_matrices: int
    fallbacks: Mapping[str, int]
    needs_imatrix: bool


def make_menu(plan: Mapping[str, Mapping[str, Any]]) -> list[MenuEntry]:
    """Read llama.cpp's plan of every type, from large to small files."""
    entries = []
    for type_name, file in plan.items():
        matrices = [kind for _, shape, kind, _ in file["tensors"] if len(shape) > 1]
        weights = sum(math.prod(shape) for _, shape, _, _ in file["tensors"])
        meant = MEANT_TYPES[type_name]
        fallbacks = {kind: matrices.count(kind) for kind in set(matrices) - set(meant)}
        bits = 8 * sum(size for *_, size in file["tensors"]) / weights
        entries.append(
            MenuEntry(
                type_name, file["bytes"], bits, len(matrices), fallbacks, file["needs_imatrix"]
            )
        )
    return sorted(entries, key=lambda entry: -entry.num_bytes)


def format_menu(menu: Sequence[MenuEntry], has_imatrix: bool) -> str:
    """Give the menu as a table for people."""
    best = {entry.type_name for entry in candidates(menu, has_imatrix)}
    lines = [f"{'type':<9}{'MB':>9}{'bits/weight':>13}  "]
    for entry in menu:
        notes = []
        if entry.fallbacks:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(entry.fallbacks.items()))
            fell = sum(entry.fallbacks.values())
            notes.append(f"{fell} of {entry.num_matrices} matrices fall back ({kinds})")
        if entry.needs_imatrix:
            notes.append("needs --imatrix")
        if entry.type_name in _BY_QUALITY and entry.type_name not in best:
            notes.append("" if entry.needs_imatrix else "a better type is no larger")
        lines.append(
            f"{entry.type_name:<9}{entry.num_bytes / 1e6:>9.1f}{entry.bits_per_weight:>13.2f}  "
            + "; ".join(filter(None, notes))
        )
    return "\n".join(line.rstrip() for line in lines)


def candidates(menu: Sequence[MenuEntry], has_imatrix: bool) -> list[MenuEntry]:
    """Give the types worth choosing, from best to worst: each is smaller than all before it."""
    by_name = {entry.type_name: entry for entry in menu}
    chosen: list[MenuEntry] = []
    for name in _BY_QUALITY:
        entry = by_name.get(name)
        if entry is None or (entry.needs_imatrix and not has_imatrix):
            continue
        if not chosen or entry.num_bytes < chosen[-1].num_bytes:
            chosen.append(entry)
    return chosen


def parse_size(text: str) -> int:
    """Read `700M`, `1.5GB`, `650MiB` or a number of bytes.

    Raises:
        CommandError: Exit 2.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?)B?\s*", text.upper())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise CommandError(f"--max-size '{text}'; expected a size such as 700M or 1.5G", USAGE)
    return int(float(match[1]) * _UNITS[match[2]])


def choose_by_size(menu: Sequence[MenuEntry], limit: int, has_imatrix: bool) -> str:
    """Choose the best type whose file is no larger than `limit` bytes.

    Raises:
        CommandError: Exit 1: none is small enough; the message names the smallest.
    """
    offered = candidates(menu, has_imatrix)
    for entry in offered:
        if entry.num_bytes <= limit:
            return entry.type_name
    smallest = offered[-1]
    raise CommandError(
        f"no type fits {limit} bytes: the smallest, {smallest.type_name}, has "
        f"{smallest.num_bytes}"
        + ("" if has_imatrix else "; with --imatrix auto there are smaller ones"),
        FAILED,
    )


def choose_by_kl(
    menu: Sequence[MenuEntry], limit: float, has_imatrix: bool, measure: Callable[[str], float]
) -> str:
    """Choose the smallest file whose mean KL divergence is at most `limit`, by halving the menu.

    Args:
        menu: The types.
        limit: Nats per token.
        has_imatrix: Whether types that need an importance matrix may be taken.
        measure: Builds a type's file and gives its mean KL divergence.

    Raises:
        CommandError: Exit 1: not even the best type is as close.
    """
    offered = candidates(menu, has_imatrix)
    good, bad = -1, len(offered)
    measured = 0.0
    while bad - good > 1:
        middle = (good + bad) // 2
        measured = measure(offered[middle].type_name)
        # NaN compares false: a broken file is never chosen.
        if measured <= limit:
            good = middle
        else:
            bad = middle
    if good < 0:
        raise CommandError(
            f"no type reaches a mean KL divergence of {limit:g}: {offered[0].type_name} has "
            f"{measured:.4g}",
            FAILED,
        )
    return offered[good].type_name
