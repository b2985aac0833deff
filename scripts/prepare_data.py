"""Data set to `data/train.jsonl`, `data/eval.jsonl` and `data/report.json` of a run.

Reads FineTome's schema (``conversations`` of ``from``/``value``) and ``messages`` of
``role``/``content``, from the hub or from a file. Nothing is dropped without being counted by reason.

    python -m scripts.prepare_data --config scripts/recipes/smollm2-135m-cpu.yaml
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from scripts._cli import OK, CommandError, log, run_command
from scripts.make_tool_data import Corpus, generate_conversations
from scripts.recipe import TrainingRecipe, parse_recipe, write_atomically

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
MAX_BAD_SHARE = 0.05
DATA_FORMAT = 1


class RowRejectedError(ValueError):
    """A row cannot be used; the message is the reason that the report counts."""


def read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield line number and parsed line; a line that is no JSON yields a ``JSONDecodeError``."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                yield number, error


def read_file(path: Path) -> tuple[list[Any], list[str]]:
    """Read a .jsonl or .json file.

    Returns:
        Rows, and one text per unreadable line that names its number.

    Raises:
        CommandError: The file is missing, empty, of another type, or more than 5 % of its lines are
            no JSON.
    """
    if not path.is_file():
        raise CommandError(
            f"data set '{path}' does not exist; expected a .jsonl or .json file or a hub name; "
            "set dataset_name in the recipe"
        )
    if path.suffix == ".json":
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CommandError(f"data set '{path}' is no valid JSON: {error}") from error
        if not isinstance(rows, list):
            raise CommandError(f"data set '{path}' holds a {type(rows).__name__}, expected a list")
        bad: list[str] = []
    else:
        lines = list(read_jsonl(path))
        rows = [row for _, row in lines if not isinstance(row, json.JSONDecodeError)]
        bad = [
            f"line {number}: {error.msg} (column {error.colno})"
            for number, error in lines
            if isinstance(error, json.JSONDecodeError)
        ]
    for text in bad[:10]:
        log(f"{path}: {text}; the line is left out")
    if len(bad) > MAX_BAD_SHARE * (len(rows) + len(bad)):
        raise CommandError(
            f"data set '{path}': {len(bad)} of {len(rows) + len(bad)} lines are no JSON, first "
            f"{bad[0]}; expected one JSON object a line and at most 5 % bad ones; repair the file"
        )
    if not rows:
        raise CommandError(f"data set '{path}' is empty; expected one conversation a line")
    return rows, bad


def read_hub(recipe: TrainingRecipe) -> Iterable[Any]:
    """Load a data set from the hub (memory-mapped by ``datasets``)."""
    from datasets import load_dataset

    try:
        return load_dataset(recipe.dataset_name, split=recipe.dataset_split)
    except Exception as error:  # the hub client raises many unrelated types
        raise CommandError(
            f"data set '{recipe.dataset_name}' could not be loaded from the hub "
            f"({type(error).__name__}: {error}); check the name and the connection, or set "
            "dataset_name to a local .jsonl file"
        ) from error


def _turn(raw: Any) -> tuple[Any, Any]:
    if not isinstance(raw, dict):
        raise RowRejectedError("a turn is no object")
    if "from" in raw and "value" in raw:
        return raw["from"], raw["value"]
    if "role" in raw and "content" in raw:
        return raw["role"], raw["content"]
    raise RowRejectedError("a turn has neither from/value nor role/content")


def to_messages(row: Any) -> list[dict[str, str]]:
    """Turn a FineTome or ``messages`` row into checked messages.

    Returns:
        Optional system turn, then user and assistant in turn, the assistant last.

    Raises:
        RowRejectedError: With the reason.
    """
    turns = row.get("conversations", row.get("messages")) if isinstance(row, dict) else None
    if not isinstance(turns, list) or not turns:
        raise RowRejectedError("no list of conversations or messages")
    messages = []
    for raw in turns:
        role, content = _turn(raw)
        if role not in ROLES:
            raise RowRejectedError(f"unknown role {role!r}")
        if not isinstance(content, str):
            raise RowRejectedError("a turn's text is no string")
        if not content.strip():
            raise RowRejectedError("empty turn")
        messages.append({"role": ROLES[role], "content": content.strip()})
    # A user turn without an answer trains nothing; what comes before it does.
    if len(messages) > 2 and messages[-1]["role"] == "user":
        messages.pop()
    body = messages[1:] if messages[0]["role"] == "system" else messages
    expected = ["user", "assistant"] * (len(body) // 2)
    if not body or [message["role"] for message in body] != expected:
        raise RowRejectedError("turns do not alternate between user and assistant")
    return messages


def _order_key(messages: Sequence[dict[str, str]], seed: int) -> str:
    text = json.dumps(messages, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(f"{seed}\n{text}".encode()).hexdigest()


def split_rows(
    rows: Iterable[Any], recipe: TrainingRecipe
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Counter[str]]:
    """Check, deduplicate, sample and split; the result does not depend on the order of the rows.

    Returns:
        Training rows, held-out rows, and the number of rows left out by reason.
    """
    rejected: Counter[str] = Counter()
    by_key: dict[str, dict[str, Any]] = {}
    for row in rows:
        try:
            messages = to_messages(row)
        except RowRejectedError as error:
            rejected[str(error)] += 1
            continue
        key = _order_key(messages, recipe.seed)
        if key in by_key:
            rejected["exact duplicate"] += 1
            continue
        by_key[key] = {"messages": messages, "source": row.get("source")}
    keys = sorted(by_key)
    if recipe.max_rows and len(keys) > recipe.max_rows:
        rejected["over max_rows"] = len(keys) - recipe.max_rows
        keys = keys[: recipe.max_rows]
    num_eval = min(recipe.max_eval_rows, max(1, round(len(keys) * recipe.eval_fraction)))
    if len(keys) - num_eval < 1:
        reasons = ", ".join(f"{count} {reason}" for reason, count in rejected.most_common(3))
        raise CommandError(
            f"data set '{recipe.dataset_name}' has {len(keys)} usable rows ({reasons or 'none left out'}); "
            "expected at least 2; see README, Data, for the formats"
        )
    held_out = [by_key[key] for key in keys[:num_eval]]
    return [by_key[key] for key in keys[num_eval:]], held_out, rejected


def input_hash(recipe: TrainingRecipe) -> str:
    """Hash what this stage depends on: the file's bytes (or the hub name) and the recipe's keys."""
    path = Path(recipe.dataset_name)
    digest = hashlib.sha256()
    if path.is_file():
        digest.update(path.read_bytes())
    for module in ("scripts/make_tool_data.py", "tools/protocol.py") if recipe.tool_rows else ():
        digest.update((Path(__file__).parent.parent / module).read_bytes())
    keys = [
        "dataset_name",
        "dataset_split",
        "max_rows",
        "tool_rows",
        "eval_fraction",
        "max_eval_rows",
        "seed",
    ]
    digest.update(json.dumps([DATA_FORMAT, *(getattr(recipe, key) for key in keys)]).encode())
    return digest.hexdigest()


def _to_jsonl(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def prepare(recipe: TrainingRecipe) -> Path:
    """Write ``data/train.jsonl``, ``data/eval.jsonl``, ``data/report.json``; return the folder.

    Files that are already there for the same inputs are kept.
    """
    data_dir = recipe.run_dir / "data"
    fingerprint = input_hash(recipe)
    report_path = data_dir / "report.json"
    if report_path.is_file() and (data_dir / "train.jsonl").is_file():
        report = json.loads(report_path.read_text(encoding="utf-8"))
        if report.get("input_hash") == fingerprint:
            log(f"prepare: {data_dir} is up to date")
            return data_dir

    looks_local = Path(recipe.dataset_name).suffix in {".json", ".jsonl"}
    rows: Any
    bad_lines: list[str] = []
    if looks_local or Path(recipe.dataset_name).exists():
        rows, bad_lines = read_file(Path(recipe.dataset_name))
    else:
        rows = read_hub(recipe)
    train, held_out, rejected = split_rows(rows, recipe)
    corpus = Corpus.of(row["messages"] for row in train) if recipe.tool_rows else Corpus([], [])
    tool_rows = list(generate_conversations(recipe.tool_rows, recipe.seed, corpus))
    report = {
        "input_hash": fingerprint,
        "dataset": recipe.dataset_name,
        "rows_read": len(rows) + len(bad_lines),
        "bad_lines": bad_lines,
        "left_out": dict(rejected.most_common()),
        "train_rows": len(train),
        "tool_rows": len(tool_rows),
        "eval_rows": len(held_out),
        "sources": dict(Counter(str(row["source"]) for row in train).most_common(20)),
    }
    write_atomically(data_dir / "train.jsonl", _to_jsonl(train + tool_rows))
    write_atomically(data_dir / "eval.jsonl", _to_jsonl(held_out))
    write_atomically(report_path, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    log(f"prepare: read {report['rows_read']} rows from {recipe.dataset_name}")
    for reason, count in (("unreadable line", len(bad_lines)), *rejected.most_common()):
        if count:
            log(f"prepare: {count:6d} left out: {reason}")
    log(
        f"prepare: {len(train)} to train on, {len(tool_rows)} generated tool rows, "
        f"{len(held_out)} held out"
    )
    return data_dir


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare a run's data and print its folder."""
    recipe, _ = parse_recipe("Data set to train.jsonl, eval.jsonl and report.json of a run.", argv)
    print(prepare(recipe))
    return OK


if __name__ == "__main__":
    run_command(main)
