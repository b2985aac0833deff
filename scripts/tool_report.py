"""What ``tools_evaluation.json`` says, for people: tables in Markdown, a summary, confusion matrices."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from scripts.tool_outcomes import ARGUMENT_ERRORS, MALFORMED, NONE, TOOL_NAMES

_CLASSES = (*TOOL_NAMES, NONE)
_HEADER = (
    "contender",
    "choice",
    "exact",
    "false calls",
    "in small talk",
    "missed",
    "malformed",
    "s",
)
Result = dict[str, Any]


def percent(share: Result, interval: bool = False) -> str:
    """Write a share, such as `93.3 %`, or with its 95 % interval `93.3 % [89.4–95.8]`."""
    if share["share"] is None:
        return "–"
    text = f"{100 * share['share']:.1f} %"
    if interval:
        low, high = share["interval_95"]
        text += f" [{100 * low:.1f}–{100 * high:.1f}]"
    return text


def _summary_rows(result: Result) -> list[list[str]]:
    rows = []
    for name, one in result["contenders"].items():
        scores = one["scores"]
        rows.append(
            [
                name,
                percent(scores["choice"], interval=True),
                percent(scores["exact"], interval=True),
                percent(scores["false_calls"]),
                percent(scores["false_calls_small_talk"]),
                percent(scores["missed_calls"]),
                str(scores["malformed"]),
                f"{one['seconds']:.0f}",
            ]
        )
    return rows


def summary(result: Result) -> str:
    """Give the summary as lines for a terminal."""
    rows = [list(_HEADER), *_summary_rows(result)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table; numbers stand right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _part_table(result: Result, by: str, measure: str) -> str:
    contenders = result["contenders"]
    parts = list(dict.fromkeys(part for one in contenders.values() for part in one[by]))
    rows = []
    for part in parts:
        shares = [one[by][part][measure] for one in contenders.values()]
        if shares[0]["total"]:
            rows.append([f"{part} ({shares[0]['total']})", *map(percent, shares)])
    return _table(["requests", *contenders], rows)


def _error_table(result: Result) -> str:
    contenders = result["contenders"]
    counts = [one["scores"]["argument_errors"] for one in contenders.values()]
    kinds = [kind for kind in ARGUMENT_ERRORS if any(kind in count for count in counts)]
    rows = [[kind, *(str(count.get(kind, 0)) for count in counts)] for kind in kinds]
    return _table(["error", *contenders], rows) if rows else "None."


def _comparison_table(result: Result) -> str:
    rows = []
    for one in result["comparisons"]:
        cells = []
        for measure in ("choice", "exact"):
            change = one[measure]
            cells += [
                f"{change['points']:+.1f}",
                f"{change['became_wrong']} / {change['became_right']}",
            ]
        rows.append([f"{one['from']} → {one['to']}", *cells])
    header = ["from → to", "choice, points", "wrong / right", "exact, points", "wrong / right"]
    return _table(header, rows) if rows else "None."


def _confusion_table(scores: Result) -> str:
    columns = (*_CLASSES, MALFORMED)
    rows = [
        [row, *(str(scores["confusion"][row][column]) for column in columns)] for row in _CLASSES
    ]
    return _table(["expected \\ called", *columns], rows)


def markdown(result: Result) -> str:
    """Write the tables."""
    requests = result["requests"]
    shown = "\n\n".join(
        f"{name}\n\n{_confusion_table(result['contenders'][name]['scores'])}"
        for name in shown_contenders(result)
    )
    return f"""# Tool calls

{requests["asked"]} requests of `{requests["file"]}`, greedy decoding, no call is run.
*choice*: the right tool, or rightly none, of all requests. *exact*: the right tool with equal
arguments, of the {requests["with_call"]} requests that expect a call. *false calls*: any call where none is
right. *missed*: no call where one is right. Wilson 95 % intervals in brackets; s is seconds for all.

{_table(_HEADER, _summary_rows(result))}

## What the grammar and the quantization change

Points of a hundred; then how many requests became wrong, and how many became right.

{_comparison_table(result)}

## Right choice, by expected tool

{_part_table(result, "by_tool", "choice")}

## Exact calls, by expected tool

{_part_table(result, "by_tool", "exact")}

## Right choice, by group

{_part_table(result, "by_group", "choice")}

## Errors in the arguments of calls of the right tool

A call may have several.

{_error_table(result)}

## Expected and called

{shown}
"""


def shown_contenders(result: Result) -> list[str]:
    """Choose what the picture shows: a base, and the tuned Q8_0 or the first tuned one there is."""
    contenders = result["contenders"]
    bases = [name for name, one in contenders.items() if one["model"] != "tuned"]
    tuned = [name for name, one in contenders.items() if one["model"] == "tuned"]
    small = [name for name in tuned if name.startswith("Q8_0")]
    return [*bases[:1], *(small or tuned)[:1]]


def plot_confusion(result: Result, image_path: Path) -> None:
    """Draw expected against called: counts, and shares of the row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = shown_contenders(result)
    figure, panels = pyplot.subplots(
        1, len(names), figsize=(5.6 * len(names), 5.8), squeeze=False, layout="constrained"
    )
    labels = [name.replace("_", "_\n") for name in _CLASSES]
    for axes, name in zip(panels[0], names, strict=True):
        scores = result["contenders"][name]["scores"]
        counts = [[scores["confusion"][row][column] for column in _CLASSES] for row in _CLASSES]
        totals = [sum(scores["confusion"][row].values()) for row in _CLASSES]
        shares = [
            [count / max(1, total) for count in row]
            for row, total in zip(counts, totals, strict=True)
        ]
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for y, row in enumerate(counts):
            for x, count in enumerate(row):
                share = shares[y][x]
                axes.text(
                    x,
                    y,
                    f"{count}\n{share:.0%}",
                    ha="center",
                    va="center",
                    fontsize=12,
                    color="white" if share > 0.55 else "#1f2933",
                )
        axes.set_xticks(range(len(labels)), labels)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xticks([edge - 0.5 for edge in range(1, len(labels))], minor=True)
        axes.set_yticks([edge - 0.5 for edge in range(1, len(labels))], minor=True)
        axes.grid(which="minor", color="white", linewidth=2)
        axes.tick_params(which="both", length=0)
        axes.set_ylabel("expected")
        # A malformed call has no column: the shares of its row add up to less.
        malformed = scores["malformed"]
        axes.set_xlabel(
            "called" + (f"\n(malformed, in no column: {malformed})" if malformed else "")
        )
        axes.set_title(f"{name}: {percent(scores['choice'])} right")
    temporary = image_path.with_name(f".{image_path.name}.tmp")
    figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)
    temporary.replace(image_path)
