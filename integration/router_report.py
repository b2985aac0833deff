"""Figures of the router as text for a terminal."""

from collections.abc import Sequence
from typing import Any

from integration.chat_screen import visible


def training_text(report: dict[str, Any]) -> str:
    """Describe what training found."""
    sizes = ", ".join(f"{name} {size}" for name, size in report["classes"].items())
    right = report["accepted_right"]
    lines = [
        f"{sum(report['classes'].values())} examples: {sizes}",
        f"cross-validation ({report['folds']} folds, {report['repeats']} times): "
        f"{report['accuracy']:.1%} right, log-loss {report['log_loss']:.3f} "
        f"(strength {report['strength']:g}, temperature {report['temperature']:g})",
        f"an adapter needs {report['threshold']:.1%} and a similarity of "
        f"{report['min_similarity']:.2f}: {report['accepted']:.1%} of its requests reach it, "
        f"{'none' if right is None else f'{right:.1%}'} of those sent are right",
        f"a later turn needs {report['switch_threshold']:.1%} to change the adapter",
        confusion_table(report["confusion"]),
    ]
    return "\n".join(lines)


def evaluation_text(result: dict[str, Any]) -> str:
    """Describe an evaluation."""
    low, high = result["interval"]
    lines = [
        f"{result['right']} of {result['requests']} right: {result['accuracy']:.1%} "
        f"(95 % interval {low:.1%} to {high:.1%})"
    ]
    if result["conversations"]:
        lines.append(
            f"{result['conversations_right']} of {result['conversations']} conversations right "
            "in every turn"
        )
    lines += ["", *_figures(result["classes"]), "", confusion_table(result["confusion"]), ""]
    lines.append(f"{result['abstained']} went to the base because no adapter was sure enough")
    latency = result["latency_ms"]
    lines.append(f"latency: median {latency['median']:.1f} ms, p95 {latency['p95']:.1f} ms")
    if result["wrong"]:
        lines += ["", "wrong:"]
    for one in result["wrong"]:
        lines.append(
            visible(
                f"  line {one['line']}, turn {one['turn']}: {one['expected']} went to {one['got']} "
                f"({one['reason']}): {' '.join(one['text'].split())[:100]}"
            )
        )
    return "\n".join(lines)


def explanation_text(found: dict[str, Any]) -> str:
    """Describe why a request goes where it goes."""
    lines = [f"adapter: {found['adapter'] or 'base'}", f"reason:  {found['reason']}", "scores:"]
    width = max(len(name) for name in found["scores"])
    ranked = sorted(found["scores"].items(), key=lambda pair: -pair[1])
    lines += [f"  {name:<{width}}  {score:.1%}" for name, score in ranked]
    if found["nearest"]:
        lines.append("nearest examples:")
    for one in found["nearest"]:
        lines.append(f"  {one['similarity']:.2f}  {one['adapter']}: {one['example']}")
    if found["words"]:
        lines.append(f"words (what {found['likeliest']} loses without them):")
    lines += [f"  {one['change']:+.1%}  {one['word']}" for one in found["words"]]
    return visible("\n".join(lines))


def confusion_table(confusion: dict[str, dict[str, int]]) -> str:
    """Lay out a confusion matrix: a row for each class that was meant, a column for each answer."""
    columns = list(next(iter(confusion.values())))
    rows = [[name, *(str(row[column]) for column in columns)] for name, row in confusion.items()]
    return "\n".join(_table([["meant \\ got", *columns], *rows]))


def _figures(classes: dict[str, dict[str, Any]]) -> list[str]:
    rows = [["adapter", "requests", "precision", "recall"]]
    for name, one in classes.items():
        shares = ["-" if one[key] is None else f"{one[key]:.1%}" for key in ("precision", "recall")]
        rows.append([name, str(one["requests"]), *shares])
    return _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
