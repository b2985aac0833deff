"""Rows of a data set, one after the other: from a file, a folder or the hub.

Reads ``.jsonl``, ``.json`` and ``.parquet`` without holding them in memory. What cannot be read is
handed on as a row with an error, so that the caller can count it.
"""

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from scripts._cli import CommandError, log

SUFFIXES = (".jsonl", ".json", ".parquet")
# Names that are clearly meant as files: a mistyped one must not be looked up on the hub.
FILE_SUFFIXES = {*SUFFIXES, ".csv", ".tsv", ".txt", ".gz", ".zip", ".xlsx", ".arrow"}
MAX_BAD_SHARE = 0.05
MAX_BAD_CHARACTERS = 2000
_BATCH_ROWS = 256
_MAX_FIRST_LINE_BYTES = 16 * 1024 * 1024
_BOM = b"\xef\xbb\xbf"
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
}
# What `datasets` and the hub keep beside the rows.
_NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


@dataclass(frozen=True)
class RawRow:
    """One row as it was read.

    Attributes:
        where: Its place, such as ``line 12`` or ``part.parquet row 3``.
        value: The row; the start of the text when it could not be read.
        error: Why it could not be read.
    """

    where: str
    value: Any
    error: str | None = None


def open_rows(name: str, split: str = "train") -> Iterator[RawRow]:
    """Give the rows of a file, a folder or a hub data set, one by one.

    Args:
        name: ``.jsonl``, ``.json`` or ``.parquet`` file; a folder of such files, or one written by
            ``save_to_disk``; otherwise a name on the hub.
        split: Split of a hub data set or a saved folder. In other folders it chooses the files whose
            names look like splits; a file ignores it.

    Raises:
        CommandError: Nothing is there, it is empty, or it is no list of rows.
    """
    path = Path(name)
    if path.is_dir():
        rows = _open_folder(path, split)
    elif path.exists() or _looks_local(name):
        rows = _open_file(path)
    else:
        rows = _number(_load_hub(name, split))
    return _check_stream(name, rows)


def list_files(folder: Path) -> list[Path]:
    """List what a folder is read from, in a fixed order; hidden files do not count."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def check_unreadable(name: str, num_bad: int, num_read: int, first: str) -> None:
    """Refuse a data set with too many unreadable rows; call it when all were read.

    Raises:
        CommandError: More than 5 % of the rows could not be read.
    """
    if num_bad > MAX_BAD_SHARE * num_read:
        raise CommandError(
            f"data set '{name}': {num_bad} of {num_read} lines are no JSON, first {first}; expected "
            "one JSON object a line and at most 5 % bad ones; repair the file"
        )


def _looks_local(name: str) -> bool:
    return Path(name).suffix in FILE_SUFFIXES or name.startswith(("/", "./", "../", "~"))


def _check_stream(name: str, rows: Iterator[RawRow]) -> Iterator[RawRow]:
    empty = True
    try:
        for row in rows:
            empty = False
            yield row
    except OSError as error:
        raise CommandError(f"data set '{name}' could not be read: {error}") from error
    if empty:
        raise CommandError(f"data set '{name}' is empty; expected one conversation a line")


def _number(values: Any) -> Iterator[RawRow]:
    for number, value in enumerate(values, 1):
        yield RawRow(f"row {number}", value)


def _open_file(path: Path) -> Iterator[RawRow]:
    if not path.exists():
        raise CommandError(
            f"data set '{path}' does not exist; expected a .jsonl, .json or .parquet file, a folder "
            "or a hub name; set dataset_name in the recipe"
        )
    if path.suffix == ".jsonl":
        return _read_jsonl(path)
    if path.suffix == ".json":
        return _read_json(path)
    if path.suffix == ".parquet":
        return _read_parquet(path)
    raise CommandError(
        f"data set '{path}' ends in '{path.suffix}', expected .jsonl, .json or .parquet; convert it"
    )


def _read_jsonl(path: Path) -> Iterator[RawRow]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            content = (line.removeprefix(_BOM) if number == 1 else line).strip()
            if content:
                yield _parse_line(f"line {number}", content)


def _parse_line(where: str, line: bytes) -> RawRow:
    try:
        return RawRow(where, json.loads(line.decode("utf-8")))
    except json.JSONDecodeError as error:
        problem = f"{error.msg} (column {error.colno})"
    except UnicodeDecodeError as error:
        problem = f"no valid UTF-8 (byte {error.start + 1})"
    except (ValueError, RecursionError) as error:
        problem = str(error)
    # Four bytes a character at most, so this is enough text.
    text = line[: 4 * MAX_BAD_CHARACTERS].decode("utf-8", "replace").strip()
    return RawRow(where, text[:MAX_BAD_CHARACTERS], problem)


def _read_json(path: Path) -> Iterator[RawRow]:
    """Read a list, an object that holds one list, or JSON lines under the wrong name."""
    import ijson

    if not path.stat().st_size:
        return
    with path.open("rb") as file:
        start = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
        file.seek(start)
        if _holds_json_lines(file):
            file.close()
            yield from _read_jsonl(path)
            return
        try:
            file.seek(start)
            prefix = _find_list(path, file)
            file.seek(start)
            yield from _number(ijson.items(file, prefix, use_float=True))
        except (ijson.JSONError, UnicodeDecodeError, ValueError) as error:
            raise CommandError(f"data set '{path}' is no valid JSON: {error}") from error


def _holds_json_lines(file: IO[bytes]) -> bool:
    """Say whether the first line with text is a whole JSON object and more text follows."""
    line = b""
    while not line.strip():
        line = file.readline(_MAX_FIRST_LINE_BYTES)
        if not line:
            return False
    try:
        whole = isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
    return whole and any(
        rest.strip() for rest in iter(lambda: file.read(io.DEFAULT_BUFFER_SIZE), b"")
    )


def _find_list(path: Path, file: IO[bytes]) -> str:
    """Give ijson's prefix of the rows: of the top-level list, or of the object's only list."""
    import ijson

    depth, key, lists = 0, "", []
    for event, value in ijson.basic_parse(file):
        if depth == 0 and event == "start_array":
            return "item"
        if depth == 0 and event != "start_map":
            raise CommandError(f"data set '{path}' holds a {event}, expected a list of rows")
        if depth == 1 and event == "map_key":
            key = value
        if depth == 1 and event == "start_array":
            lists.append(key)
        depth += event.startswith("start_") - event.startswith("end_")
    if len(lists) != 1:
        raise CommandError(
            f"data set '{path}' holds an object with {len(lists)} lists ({', '.join(lists[:5])}), "
            "expected a list of rows, or an object with one"
        )
    return f"{lists[0]}.item"


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for value in batch.to_pylist():
                    number += 1
                    yield RawRow(f"row {number}", value)
    except (pyarrow.ArrowException, OSError) as error:
        raise CommandError(f"data set '{path}' is no valid Parquet file: {error}") from error


def _open_folder(folder: Path, split: str) -> Iterator[RawRow]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _number(_load_saved(folder, split))
    files = [
        path
        for path in list_files(folder)
        if path.suffix in SUFFIXES and path.name not in _NOT_ROWS
    ]
    if not files:
        raise CommandError(
            f"data set '{folder}' has no .jsonl, .json or .parquet file; expected a folder of them, "
            "or one written by save_to_disk"
        )
    chosen = _choose_split(folder, files, split)
    if len(chosen) < len(files):
        log(f"{folder}: reading the {len(chosen)} of {len(files)} files that belong to '{split}'")
    return _read_files(folder, chosen)


def _choose_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    """Keep the files of one split, if any file's name or folder says which split it is."""
    asked = re.split(r"\W|_", split, maxsplit=1)[0]
    asked = _SPLIT_WORDS.get(asked, asked)
    found: dict[str, list[Path]] = {}
    for path in files:
        words = re.split(r"[\W_]+", str(path.relative_to(folder).with_suffix("")).lower())
        for name in {_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS}:
            found.setdefault(name, []).append(path)
    if not found:
        return files
    if asked not in found:
        raise CommandError(
            f"data set '{folder}' has no files of split '{split}', only of {', '.join(sorted(found))}; "
            "set dataset_split in the recipe"
        )
    return found[asked]


def _read_files(folder: Path, files: list[Path]) -> Iterator[RawRow]:
    for path in files:
        # A file's name may hold bytes that no report can.
        name = path.relative_to(folder).as_posix().encode("utf-8", "replace").decode()
        for row in _open_file(path):
            yield RawRow(f"{name} {row.where}", row.value, row.error)


def _load_saved(folder: Path, split: str) -> Any:
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(folder))
    except Exception as error:  # the library raises many unrelated types
        raise CommandError(
            f"data set '{folder}' could not be loaded ({type(error).__name__}: {error}); write it "
            "again with save_to_disk"
        ) from error
    if not isinstance(loaded, DatasetDict):
        return loaded
    if split not in loaded:
        raise CommandError(
            f"data set '{folder}' has no split '{split}', only {', '.join(loaded)}; set dataset_split "
            "in the recipe"
        )
    return loaded[split]


def _load_hub(name: str, split: str) -> Any:
    """Load a data set from the hub (memory-mapped by ``datasets``)."""
    from datasets import load_dataset

    try:
        return load_dataset(name, split=split)
    except Exception as error:  # the hub client raises many unrelated types
        raise CommandError(
            f"data set '{name}' could not be loaded from the hub "
            f"({type(error).__name__}: {error}); check the name and the connection, or set "
            "dataset_name to a local .jsonl file"
        ) from error
