"""Data set to `data/{train,eval,eval_tools,rejected}.jsonl` and `data/report.json` of a run.

Two passes over any number of rows, in bounded memory: the first checks each row and spools it to disk
with its keys; the second goes through them in the order of their keys, removes copies and splits.
Nothing is dropped without being counted by reason, and the result depends on the seed and the texts,
never on the order of the rows.

    python -m scripts.prepare_data --config scripts/recipes/smollm2-135m-cpu.yaml
"""

import hashlib
import itertools
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from scripts._cli import OK, CommandError, log, run_command
from scripts.conversations import Conversation, RowRejectedError, to_conversation
from scripts.deduplicate import (
    NearDuplicateIndex,
    RowStore,
    StoredRow,
    first_request,
    make_signature,
)
from scripts.make_tool_data import Diversity, generate_conversations
from scripts.read_rows import RawRow, check_unreadable, list_files, open_rows
from scripts.recipe import TrainingRecipe, parse_recipe, write_atomically
from scripts.tool_requests import REQUESTS_DIR
from scripts.tool_texts import MIN_SENTENCES, Corpus

DATA_FORMAT = 3
SHOWN_BAD_LINES, KEPT_BAD_LINES = 10, 20
# Reasons quote the data (a role's name), so a strange file could make millions of them.
MAX_REASONS, OTHER_REASONS = 100, "other reasons"
CLOSE_PROMPT = "prompt too close to a held-out row"
MAX_CORPUS_ROWS = 5000
MAX_EVAL_TOOL_ROWS, MIN_EVAL_TOOL_ROWS = 20, 4
_TOOL_MODULES = ("make_tool_data", "tool_requests", "tool_texts", "tool_conversations")
_TRAIN, _EVAL, _EVAL_TOOLS, _REJECTED = (
    f"{name}.jsonl" for name in ("train", "eval", "eval_tools", "rejected")
)
_HASHED_KEYS = (
    "dataset_name",
    "dataset_split",
    "max_rows",
    "min_score",
    "sources",
    "near_duplicate_threshold",
    "tool_rows",
    "tool_phrasings",
    "eval_fraction",
    "max_eval_rows",
    "seed",
)


def load_rows(path: Path) -> list[dict[str, Any]]:
    """Read rows that this stage wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def input_hash(recipe: TrainingRecipe) -> str:
    """Hash what this stage depends on: the files' bytes (or the hub name) and the recipe's keys."""
    path, digest = Path(recipe.dataset_name), hashlib.sha256()
    root = Path(__file__).parent.parent
    made_of = {root / "tools" / "protocol.py"}
    if recipe.tool_rows:
        made_of |= {root / "scripts" / f"{name}.py" for name in _TOOL_MODULES}
        made_of |= {*(root / "tools").glob("*.py"), *REQUESTS_DIR.iterdir()}
    files = {part.relative_to(root).as_posix(): part for part in sorted(made_of)}
    if path.is_dir():
        files |= {f"./{file.relative_to(path).as_posix()}": file for file in list_files(path)}
    elif path.is_file():
        files["./"] = path
    for name, file in files.items():
        with file.open("rb") as content:
            digest.update(name.encode("utf-8", "surrogateescape"))
            digest.update(hashlib.file_digest(content, "sha256").digest())
    keys = [DATA_FORMAT, *(getattr(recipe, key) for key in _HASHED_KEYS)]
    digest.update(json.dumps(keys).encode())
    return digest.hexdigest()


def to_json_line(value: Any) -> bytes:
    """Write a value as one line of JSON, whatever text it holds.

    Line separators of Unicode are escaped, because readers that split lines of text split there too;
    a lone surrogate, which UTF-8 cannot hold, becomes its escape.
    """
    text = json.dumps(value, ensure_ascii=False, default=str)
    for separator in "\u0085\u2028\u2029":
        if separator in text:
            text = text.replace(separator, f"\\u{ord(separator):04x}")
    return text.encode("utf-8", "backslashreplace") + b"\n"


class _Preparation:
    """One run of this stage: its open files, its counts, and the steps in order."""

    def __init__(self, recipe: TrainingRecipe, work_dir: Path) -> None:
        self.recipe, self.work_dir = recipe, work_dir
        self.rows_read = self.unreadable = self.rejected_rows = 0
        self.bad_lines: list[str] = []
        self.left_out: Counter[str] = Counter()
        self.repaired: Counter[str] = Counter()
        self.num_train = self.num_eval = self.num_tools = self.num_eval_tools = 0
        self.tool_diversity: dict[str, Any] = {}
        self.store = RowStore(work_dir, recipe.seed, recipe.near_duplicate_threshold)
        # Statistics are sorted on disk as well.
        self.database = self.store.database
        self.database.execute("CREATE TABLE trained (turns, characters, source)")
        self.train, self.held_out, self.rejected = (
            (work_dir / name).open("w+b") for name in (_TRAIN, _EVAL, _REJECTED)
        )

    def close(self) -> None:
        """Close every file, so that all of it is on disk."""
        for file in (self.train, self.held_out, self.rejected, self.store):
            file.close()

    def read(self, rows: Iterable[RawRow]) -> None:
        """Spool what can be used; count the rest.

        Raises:
            CommandError: Too much of the data set is unreadable.
        """
        for raw in rows:
            self.rows_read += 1
            if raw.error is not None:
                self._count_unreadable(raw)
                continue
            try:
                conversation = to_conversation(raw.value)
                reason = _filter(conversation, self.recipe)
                if reason is not None:
                    self._count(reason)
                    continue
                messages = conversation.messages
                line = to_json_line({"messages": messages, "source": conversation.source})
                self.store.add(StoredRow(raw.where, line, to_json_line(raw.value)), messages)
                self.repaired.update(conversation.repairs)
            except RowRejectedError as error:
                self._reject(raw.where, str(error), to_json_line(raw.value))
            except RecursionError:
                self._reject(raw.where, "nested too deeply", to_json_line(None))
        first = self.bad_lines[0] if self.bad_lines else ""
        check_unreadable(self.recipe.dataset_name, self.unreadable, self.rows_read, first)

    def _count_unreadable(self, raw: RawRow) -> None:
        self.unreadable += 1
        text = f"{raw.where}: {raw.error}"
        if len(self.bad_lines) < KEPT_BAD_LINES:
            self.bad_lines.append(text)
        if self.unreadable <= SHOWN_BAD_LINES:
            log(f"{self.recipe.dataset_name}: {text}; the line is left out")
        self._write_rejected(raw.where, f"unreadable: {raw.error}", to_json_line(raw.value))

    def _count(self, reason: str) -> None:
        if reason not in self.left_out and len(self.left_out) >= MAX_REASONS:
            reason = OTHER_REASONS
        self.left_out[reason] += 1

    def _reject(self, where: str, reason: str, raw: bytes, detail: str = "") -> None:
        self._count(reason)
        self._write_rejected(where, reason + detail, raw)

    def _write_rejected(self, where: str, reason: str, raw: bytes) -> None:
        self.rejected_rows += 1
        start = to_json_line({"where": where, "reason": reason}).rstrip(b"}\n")
        self.rejected.write(start + b', "row": ' + raw.rstrip(b"\n") + b"}\n")

    def split(self) -> None:
        """Remove copies, then hold rows out.

        Raises:
            CommandError: There are too few rows, or too many ask the same.
        """
        for left_out in self.store.keep_unique(self.recipe.max_rows):
            copy = left_out.row
            if copy is None:
                self._count(left_out.reason)
            else:
                self._reject(copy.where, left_out.reason, copy.raw, f" of {left_out.copy_of}")
        total, name = self.store.count_kept(), self.recipe.dataset_name
        if total < 2:
            reasons = ", ".join(f"{count} {what}" for what, count in self.left_out.most_common(3))
            raise CommandError(
                f"data set '{name}' has {total} usable rows ({reasons or 'none left out'}); "
                "expected at least 2; see README, Data, for the formats"
            )
        share = max(1, round(total * self.recipe.eval_fraction))
        if not self.store.hold_out(min(self.recipe.max_eval_rows, share)):
            raise CommandError(
                f"data set '{name}': too many of its {total} rows start with the same user text to "
                "hold any out; expected different first requests"
            )

    def write_rows(self) -> None:
        """Write held-out rows, then the training rows that ask nothing near to one of them.

        Raises:
            CommandError: No training row is left.
        """
        threshold = self.recipe.near_duplicate_threshold
        index = NearDuplicateIndex(self.database, "prompts", threshold)
        for row in self.store.kept_rows(held_out=True):
            self.held_out.write(row.line)
            self.num_eval += 1
            if threshold < 1:
                request = first_request(json.loads(row.line)["messages"])
                index.add(row.position, make_signature(request))
        for row in self.store.kept_rows(held_out=False):
            value = json.loads(row.line)
            messages = value["messages"]
            near = None
            if threshold < 1:
                near = index.find(make_signature(first_request(messages)))
            if near is not None:
                self._reject(row.where, CLOSE_PROMPT, row.raw, f", {self.store.where_is(near)}")
                continue
            self.train.write(row.line)
            self.num_train += 1
            turns = len(messages) - (messages[0]["role"] == "system")
            characters = sum(len(message["content"]) for message in messages)
            self.database.execute(
                "INSERT INTO trained VALUES (?, ?, ?)", (turns, characters, str(value["source"]))
            )
        if not self.num_train:
            raise CommandError(
                f"data set '{self.recipe.dataset_name}': every row asks nearly the same as a held-out "
                "row, so none is left to train on; raise near_duplicate_threshold or add rows"
            )

    def write_tool_rows(self) -> None:
        """Add generated tool use: from training texts to train, from held-out texts to watch."""
        if not self.recipe.tool_rows:
            return
        corpus, diversity = _corpus_of(self.train), Diversity()
        rows = generate_conversations(
            self.recipe.tool_rows,
            self.recipe.seed,
            corpus,
            basic=self.recipe.tool_phrasings == "basic",
        )
        self.num_tools = _write_lines(self.train, diversity.watch(rows))
        self.tool_diversity = diversity.to_json()
        held_out_corpus = _corpus_of(self.held_out)
        if len(held_out_corpus.sentences) < MIN_SENTENCES:
            log("prepare: too few held-out sentences; eval_tools.jsonl is made of training texts")
            held_out_corpus = corpus
        share = self.num_eval / (self.num_train + self.num_eval)
        wanted = max(MIN_EVAL_TOOL_ROWS, round(self.recipe.tool_rows * share))
        rows = generate_conversations(
            min(MAX_EVAL_TOOL_ROWS, wanted), self.recipe.seed + 1, held_out_corpus, held_out=True
        )
        with (self.work_dir / _EVAL_TOOLS).open("wb") as file:
            self.num_eval_tools = _write_lines(file, rows)

    def make_report(self) -> dict[str, Any]:
        """Collect the counts."""
        sources = self.database.execute(
            "SELECT source, count(*) FROM trained GROUP BY source ORDER BY 2 DESC, 1 LIMIT 20"
        )
        return {
            "rows_read": self.rows_read,
            "unreadable_rows": self.unreadable,
            "bad_lines": self.bad_lines,
            "left_out": dict(self.left_out.most_common()),
            "repaired": dict(self.repaired.most_common()),
            "filters": {"min_score": self.recipe.min_score, "sources": self.recipe.sources},
            "rejected_rows": self.rejected_rows,
            "train_rows": self.num_train,
            "tool_rows": self.num_tools,
            "tool_diversity": self.tool_diversity,
            "eval_rows": self.num_eval,
            "eval_tool_rows": self.num_eval_tools,
            "sources": dict(sources),
            "turns": self._spread("turns", {"min": 0, "median": 0.5, "max": 1}),
            "characters": self._spread("characters", {"median": 0.5, "p95": 0.95, "max": 1}),
        }

    def _spread(self, column: str, shares: dict[str, float]) -> dict[str, int]:
        return {
            name: self.database.execute(
                f"SELECT {column} FROM trained ORDER BY {column} LIMIT 1 OFFSET ?",
                (max(0, math.ceil(share * self.num_train) - 1),),
            ).fetchone()[0]
            for name, share in shares.items()
        }


def _filter(conversation: Conversation, recipe: TrainingRecipe) -> str | None:
    """Say why the user's own filters leave a row out."""
    if recipe.min_score > 0:
        score = conversation.score
        is_number = isinstance(score, int | float) and not isinstance(score, bool)
        if not is_number or (isinstance(score, float) and math.isnan(score)):
            return "no score"
        if score < recipe.min_score:
            return f"score below {recipe.min_score:g}"
    wanted = set(filter(None, recipe.sources))
    return "source not asked for" if wanted and conversation.source not in wanted else None


def _corpus_of(file: IO[bytes]) -> Corpus:
    """Take the texts of a file's first rows: they come in the order of their hashes, so at random."""
    file.seek(0)
    corpus = Corpus.of(
        json.loads(line)["messages"] for line in itertools.islice(file, MAX_CORPUS_ROWS)
    )
    file.seek(0, 2)
    return corpus


def _write_lines(file: IO[bytes], rows: Iterable[dict[str, Any]]) -> int:
    return sum(1 for row in rows if file.write(to_json_line(row)))


def _log_table(data_dir: Path, report: dict[str, Any]) -> None:
    lines = [("rows read", report["rows_read"]), ("unreadable", report["unreadable_rows"])]
    lines += [(f"left out: {reason}", count) for reason, count in report["left_out"].items()]
    lines += [(f"repaired: {reason}", count) for reason, count in report["repaired"].items()]
    lines += [
        ("to train on", report["train_rows"]),
        ("generated tool rows", report["tool_rows"]),
        ("held out", report["eval_rows"]),
        ("generated tool rows held out", report["eval_tool_rows"]),
    ]
    width = max(len(name) for name, _ in lines)
    log(f"prepare: {report['dataset']} to {data_dir} in {report['seconds']} s")
    for name, count in lines:
        log(f"  {name:{width}} {count:9,d}")


def _is_up_to_date(data_dir: Path, fingerprint: str) -> bool:
    if not all((data_dir / name).is_file() for name in ("report.json", _TRAIN, _EVAL)):
        return False
    try:
        report = json.loads((data_dir / "report.json").read_text(encoding="utf-8"))
    except ValueError:
        return False
    if report.get("eval_tool_rows") and not (data_dir / _EVAL_TOOLS).is_file():
        return False
    return report.get("input_hash") == fingerprint


def prepare(recipe: TrainingRecipe) -> Path:
    """Write the run's data files and their report; return the folder.

    Files that are already there for the same inputs are kept; an error or Ctrl-C changes nothing.

    Raises:
        CommandError: The data set is missing, unreadable, or too small to be split.
    """
    started = time.monotonic()
    data_dir = recipe.run_dir / "data"
    fingerprint = input_hash(recipe)
    if _is_up_to_date(data_dir, fingerprint):
        log(f"prepare: {data_dir} is up to date")
        return data_dir
    rows = open_rows(recipe.dataset_name, recipe.dataset_split)
    data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".work-", dir=data_dir) as work:
        work_dir = Path(work)
        preparation = _Preparation(recipe, work_dir)
        try:
            preparation.read(rows)
            preparation.split()
            preparation.write_rows()
            preparation.write_tool_rows()
            counts = preparation.make_report()
        finally:
            preparation.close()
        # Without a report the folder counts as unfinished, should this stop between two files.
        (data_dir / "report.json").unlink(missing_ok=True)
        for name in (_TRAIN, _EVAL, _EVAL_TOOLS, _REJECTED):
            if (work_dir / name).is_file():
                (work_dir / name).replace(data_dir / name)
            else:
                (data_dir / name).unlink(missing_ok=True)
    report = {
        "input_hash": fingerprint,
        "dataset": recipe.dataset_name,
        **counts,
        "seconds": round(time.monotonic() - started, 1),
    }
    write_atomically(
        data_dir / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    )
    _log_table(data_dir, report)
    return data_dir


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare a run's data and print its folder."""
    recipe, _ = parse_recipe(
        "Data set to train.jsonl, eval.jsonl, rejected.jsonl and report.json of a run.", argv
    )
    print(prepare(recipe))
    return OK


if __name__ == "__main__":
    run_command(main)
