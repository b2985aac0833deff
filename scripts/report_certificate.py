"""The certificates of a run's GGUF files, as tables that say what each check means."""

from collections.abc import Callable
from typing import Any

from scripts.report_blocks import BAD, GOOD, OPEN, UNKNOWN, Block, Cell, Facts, Fold, Table
from scripts.report_numbers import count, decimal, percent, plural, significant

_MEANINGS = {
    "loads": "llama.cpp opens the file",
    "architecture": "layers, widths and constants are those of config.json",
    "vocabulary": "as many tokens as the model has",
    "metadata": "keys that readers of the file need",
    "eos_token": "the end token is the model's, and llama.cpp stops at it",
    "chat_template": "the template that trained it, letter for letter",
    "token_ids": "awkward strings give the same tokens",
    "chat_prompts": "conversations give the same prompt tokens",
    "bos_count": "as many tokens of beginning as in training",
    "mean_kl": "mean KL divergence of the next token from the trained model's, in nats",
    "kl_quantiles": "the same at single positions: all are numbers",
    "same_top_token": "how often both find the same token likeliest",
    "perplexity_ratio": "perplexity of the file over the trained model's",
    "next_token": "first token of an answer is the same",
    "stops": "an answer comes to its end",
}


def check_value(check: dict[str, Any], name: str) -> Any:
    """Find the value of the check with this name; None if it was not made."""
    return next((one["value"] for one in check["checks"] if one["name"] == name), None)


def _quantiles(value: dict[str, Any]) -> Cell:
    ends = f"99 % below {significant(value['p99'])}, largest {significant(value['max'])}"
    return Cell(f"median {significant(value['median'])}", ends)


def _ratio(value: dict[str, Any]) -> Cell:
    both = f"{decimal(value['reference'], 3)} → {decimal(value['gguf'], 3)}"
    return Cell(f"{decimal(value['ratio'], 4)} ± {decimal(value['error'], 4)}", both)


def _differing(value: dict[str, Any]) -> Cell:
    total = value.get("strings", value.get("chats"))
    return Cell(f"{value['differ']} of {total} differ", _written(value.get("first", "")))


def _stops(value: dict[str, Any]) -> Cell:
    how = "ended" if value["stopped"] else "not ended"
    return Cell(f"{how} after {plural(value['tokens'], 'token')}", value.get("text") or "")


# How a found value is shown; others are written out.
_SHOWN: dict[str, Callable[[Any], Cell]] = {
    "mean_kl": lambda value: Cell(significant(value)),
    "kl_quantiles": _quantiles,
    "same_top_token": lambda value: Cell(
        percent(value["share"]), plural(value["positions"], "position")
    ),
    "perplexity_ratio": _ratio,
    "next_token": lambda value: Cell(f"{value['equal']} of {value['prompts']}"),
    "token_ids": _differing,
    "chat_prompts": _differing,
    "stops": _stops,
    "metadata": lambda value: Cell(f"missing: {', '.join(value)}" if value else "complete"),
    "eos_token": lambda value: Cell(
        f"{value['id']}, {'stops' if value['stops'] else 'does not stop'}"
    ),
}


def _written(value: Any) -> str:
    """Write any JSON value in words."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_written(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_written, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return count(value)
    return UNKNOWN if value is None else str(value)


def _show_limit(name: str, limit: Any) -> str:
    if limit is None:
        return UNKNOWN
    if name in ("mean_kl", "perplexity_ratio"):
        return f"at most {limit:g}"
    if name in ("token_ids", "chat_prompts"):
        return f"{limit['differ']} differ"
    if name == "stops":
        return f"ends within {plural(limit['tokens'], 'token')}"
    if name == "eos_token":
        return str(limit["id"])
    return _written(limit)


def _check_row(check: dict[str, Any]) -> list[Cell]:
    name = check["name"]
    if not check["passed"]:
        result = Cell("failed", mark=BAD)
    elif check["threshold"] is None:
        result = Cell("noted", mark=OPEN)
    else:
        result = Cell("passed", mark=GOOD)
    show = _SHOWN.get(name, lambda value: Cell(_written(value)))
    value = show(check["value"])
    limit = Cell(_show_limit(name, check["threshold"]))
    return [
        Cell(name.replace("_", " ").replace("kl", "KL"), _MEANINGS.get(name, "")),
        value,
        limit,
        result,
    ]


def is_current(certificate: dict[str, Any], exported: dict[str, Any] | None) -> bool:
    """Tell whether the certificate is of the file that lies there now, by its hash."""
    return exported is None or certificate["sha256"] == exported["sha256"]


def certificate_verdict(
    certificate: dict[str, Any] | None, exported: dict[str, Any] | None
) -> Cell:
    """Say whether a file passed."""
    if certificate is None:
        return Cell("not verified", mark=OPEN)
    if not is_current(certificate, exported):
        return Cell("outdated", mark=OPEN)
    return Cell("passed", mark=GOOD) if certificate["passed"] else Cell("failed", mark=BAD)


def certificate_block(certificate: dict[str, Any], exported: dict[str, Any] | None) -> Fold:
    """Show one certificate."""
    reference = certificate["reference"]
    pairs = [
        ("File", certificate["file"]),
        ("SHA-256", certificate["sha256"] or UNKNOWN),
        ("Compared with", f"{reference['kind']} {reference['name']}"),
        ("SHA-256 of it", reference.get("sha256") or UNKNOWN),
    ]
    if rows := certificate.get("rows"):
        over = (
            f"{plural(rows['tokens'], 'token')} of {plural(rows['conversations'], 'conversation')}"
        )
        pairs.append(("Measured on", f"{over} ({rows['source']})"))
    if not is_current(certificate, exported):
        pairs.append(
            ("Outdated", "it is of an earlier file: the one that lies there has another hash")
        )
    checks = certificate["checks"]
    good = sum(check["passed"] for check in checks)
    columns = ["check", "found", "limit", "result"]
    blocks: list[Block] = [
        Facts(pairs),
        Table(columns, [_check_row(check) for check in checks], is_text=True),
    ]
    title = f"{certificate['type']}, {good} of {plural(len(checks), 'check')}"
    return Fold(title, certificate_verdict(certificate, exported), blocks)
