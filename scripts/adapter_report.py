"""What ``adapters_evaluation.json`` says, for people: tables in Markdown, answers side by side."""

import html
from collections.abc import Iterable, Sequence
from typing import Any

from scripts.tool_report import percent

_MEANINGS = {
    "json": "*valid*: the whole answer is a JSON object or array (NaN is none). *fenced*: it is one only "
    "without its fence, which does not count as valid. *keys*: every key that was asked for is there, "
    "in each object of an array. *both*: valid, and with its keys.",
    "coding": "*block*: there is a closed fenced block. *parses*: the first one of Python, or the first "
    "without a tag, is parsed and not empty. *passes*: the asserts of the request hold, of the "
    "requests that have some.",
    "support": "*form*: an opening sentence of 4 to 30 words, 3 to 5 steps, the closing sentence, blank "
    "lines between, nothing else. *steps*: at least three numbered steps. *closing*: the last line "
    "begins with “If this does not help,”.",
}
_SHOWN_CHARACTERS = 700
Result = dict[str, Any]


def _rows(adapter: Result) -> list[list[str]]:
    rows = [["contender", *adapter["measures"], "tokens", "cut"]]
    for name, one in adapter["contenders"].items():
        shares = (one["scores"][measure] for measure in adapter["measures"])
        cells = [percent(share, interval=True) for share in shares]
        rows.append([name, *cells, f"{one['mean_tokens']:.0f}", str(one["cut"])])
    return rows


def summary(result: Result) -> str:
    """Give the shares and p-values as lines for a terminal."""
    lines = []
    for name, adapter in result["adapters"].items():
        asked = adapter["requests"]["asked"]
        lines.append(f"{name}: {asked} requests, {adapter['main']} decides")
        rows = _rows(adapter)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append("  ".join(["", row[0].ljust(widths[0]), *cells[1:]]))
        lines += [
            f"  against {one['from']}: {one['became_right']} became right, {one['became_wrong']} "
            f"wrong, p = {p_value(one)}"
            for one in adapter["comparisons"]
        ]
    return "\n".join(lines)


def p_value(comparison: Result) -> str:
    """Write a p-value."""
    value: float = comparison["p_value"]
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def markdown(result: Result) -> str:
    """Write the tables, and some answers side by side."""
    parts = [
        f"""# The adapters against the plain base

Base `{result["model"]}`; greedy decoding, at most {result["max_tokens"]} tokens, no tools.
The base is asked without a system prompt, as the adapter is, and once more with the instruction
that somebody without the adapter would write. Wilson 95 % intervals in brackets.
*tokens* is the mean length of an answer,
*cut* how many answers reached the longest. p-values are McNemar's, exact and two-sided."""
    ]
    parts += [_adapter_part(name, adapter) for name, adapter in result["adapters"].items()]
    return "\n\n".join(parts) + "\n"


def _adapter_part(name: str, adapter: Result) -> str:
    requests = adapter["requests"]
    rows = _rows(adapter)
    changes = [
        [
            f"{one['from']} → {one['to']}",
            str(one["became_right"]),
            str(one["became_wrong"]),
            p_value(one) + (" (the better base)" if one["from"] == adapter["better_base"] else ""),
        ]
        for one in adapter["comparisons"]
    ]
    shown = "\n\n".join(_side_by_side(one) for one in adapter["answers"] if one["shown"])
    return f"""## {name}

{requests["asked"]} of {requests["of"]} requests of `{requests["file"]}`. Adapter: `{adapter["file"]}`.
Instruction: “{adapter["instruction"]}”

{_MEANINGS[name]} **{adapter["main"]}** decides.

{_table(rows[0], rows[1:])}

{_table(["from → to", "became right", "became wrong", "p"], changes)}

{shown}"""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table; numbers stand right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _side_by_side(answer: Result) -> str:
    """Show what every contender answered to a request, in columns."""
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in answer["contenders"])
    cells = "".join(
        f"<td><pre>{_cell(one['text'])}</pre></td>" for one in answer["contenders"].values()
    )
    prompt = f"<caption><pre>{_cell(answer['prompt'])}</pre></caption>"
    return f"<table>\n{prompt}\n<tr>{heads}</tr>\n<tr>{cells}</tr>\n</table>"


def _cell(text: str) -> str:
    if len(text) > _SHOWN_CHARACTERS:
        text = f"{text[:_SHOWN_CHARACTERS]}…"
    # A blank line would end the table for Markdown.
    return html.escape(text).replace("\r", "").replace("\n", "&#10;")
