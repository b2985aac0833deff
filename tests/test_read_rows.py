"""Reading: files, folders and the hub, one row at a time, with one line for every failure."""

import itertools
import json
from pathlib import Path

import pytest

from scripts._cli import CommandError
from scripts.read_rows import check_unreadable, open_rows

ROWS = [{"n": number, "score": 0.5, "text": "ü\u2028"} for number in range(3)]


def values(path: Path, split: str = "train") -> list:
    return [row.value for row in open_rows(str(path), split)]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines_of(rows: list) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_parquet(path: Path, rows: list) -> Path:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


@pytest.mark.parametrize("start", ["", "\ufeff", "\n\n"])
def test_jsonl(tmp_path, start):
    path = write(tmp_path / "rows.jsonl", start + lines_of(ROWS))
    rows = list(open_rows(str(path)))
    assert [row.value for row in rows] == ROWS
    assert rows[0].where == f"line {1 + start.count(chr(10))}"


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS),
        "\ufeff" + json.dumps(ROWS, indent=1),
        json.dumps({"version": 1, "nested": {"x": [1]}, "data": ROWS}),
        json.dumps({"data": ROWS, "version": 1}, indent=2),
        lines_of(ROWS),
        "\ufeff" + lines_of(ROWS),
    ],
)
def test_json(tmp_path, content):
    path = write(tmp_path / "rows.json", content)
    assert values(path) == ROWS
    assert type(values(path)[0]["score"]) is float


def test_parquet(tmp_path):
    path = write_parquet(tmp_path / "rows.parquet", ROWS)
    assert values(path) == ROWS
    assert [row.where for row in open_rows(str(path))] == ["row 1", "row 2", "row 3"]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b'{"a": [', "Expecting value (column 8)"),
        (b'{"a": "\xff"}', "no valid UTF-8 (byte 8)"),
        (b"[" * 100_000, "recursion"),
        (b'{"a": ' + b"9" * 5000 + b"}", "4300"),
    ],
)
def test_broken_line_is_handed_on_with_its_error(tmp_path, line, error):
    path = write(tmp_path / "rows.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    rows = list(open_rows(str(path)))
    assert [row.where for row in rows] == ["line 1", "line 2", "line 3"]
    assert [row.error is None for row in rows] == [True, False, True]
    assert error in rows[1].error
    assert rows[1].value[:5] == line[:5].decode()
    assert len(rows[1].value) <= 2000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", "", "is empty; expected one conversation a line"),
        ("rows.jsonl", "\n\n", "is empty"),
        ("rows.json", "", "is empty"),
        ("rows.json", "[]", "is empty"),
        ("rows.json", "[1, 2", "is no valid JSON"),
        ("rows.json", b'[{"a": "\xff"}]', "is no valid JSON"),
        ("rows.json", "3", "expected a list of rows"),
        ("rows.json", '{"a": [1], "b": [2]}', r"an object with 2 lists \(a, b\)"),
        ("rows.parquet", "PAR1", "is no valid Parquet file"),
        ("rows.csv", "a,b", "ends in '.csv', expected .jsonl, .json or .parquet"),
    ],
)
def test_useless_files_are_one_line(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(CommandError, match=message) as caught:
        values(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "data/rows.csv"])
def test_missing_file_is_not_looked_up_on_the_hub(name):
    with pytest.raises(CommandError, match=r"does not exist; expected .*dataset_name"):
        open_rows(name)


def test_hub_failure_is_one_line():
    message = r"'nobody/nothing' could not be loaded from the hub \(.*check the name"
    with pytest.raises(CommandError, match=message) as caught:
        open_rows("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_hub_rows_and_split(monkeypatch):
    import datasets

    asked = []

    def load(name: str, split: str) -> list:
        asked.append((name, split))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [(row.where, row.value) for row in open_rows("some/data", "train[:3]")] == [
        (f"row {number}", row) for number, row in enumerate(ROWS, 1)
    ]
    assert asked == [("some/data", "train[:3]")]


def test_folder_is_read_in_sorted_order(tmp_path):
    write(tmp_path / "b.jsonl", lines_of([{"f": "b"}, {"f": "b2"}]))
    write(tmp_path / "sub/c.json", json.dumps([{"f": "c"}]))
    write_parquet(tmp_path / "a.parquet", [{"f": "a"}])
    for ignored in (".hidden.jsonl", ".cache/x.jsonl", "README.md", "dataset_info.json"):
        write(tmp_path / ignored, "no rows")
    rows = list(open_rows(str(tmp_path)))
    assert [row.value["f"] for row in rows] == ["a", "b", "b2", "c"]
    assert [row.where for row in rows][::3] == ["a.parquet row 1", "sub/c.json row 1"]
    assert rows[2].where == "b.jsonl line 2"


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.jsonl", "test.jsonl"),
        ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
        ("train/a.jsonl", "test/a.jsonl"),
        ("my_Training_rows.jsonl", "my_test_rows.jsonl"),
    ],
)
def test_folder_with_splits_gives_the_asked_one(tmp_path, train, test):
    write(tmp_path / train, lines_of([{"split": "train"}]))
    write(tmp_path / test, lines_of([{"split": "test"}]))
    assert values(tmp_path) == [{"split": "train"}]
    assert values(tmp_path, "test") == [{"split": "test"}]
    with pytest.raises(CommandError, match="no files of split 'validation', only of test, train"):
        values(tmp_path, "validation")


def test_folder_without_rows(tmp_path):
    write(tmp_path / "README.md", "x")
    with pytest.raises(CommandError, match=r"has no \.jsonl, \.json or \.parquet file"):
        values(tmp_path)


def test_saved_data_set_is_loaded(tmp_path):
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "two")
    assert values(tmp_path / "one") == ROWS
    assert values(tmp_path / "two", "test") == ROWS[:1]
    with pytest.raises(CommandError, match="has no split 'dev', only train, test"):
        values(tmp_path / "two", "dev")


def test_json_rows_come_before_the_end_is_read(tmp_path):
    """The end of the file is broken: only a reader that streams gives the rows before it."""
    path = write(tmp_path / "rows.json", json.dumps(ROWS * 5000)[:-1] + ", ")
    assert [row.value for row in itertools.islice(open_rows(str(path)), 3)] == ROWS
    with pytest.raises(CommandError, match="no valid JSON"):
        values(path)


def test_lines_are_read_when_they_are_asked_for(tmp_path):
    path = write(tmp_path / "rows.jsonl", lines_of(ROWS * 5000))
    rows = open_rows(str(path))
    next(rows)
    with path.open("a") as file:
        file.write('"late"')
    assert [row.value for row in rows][-1] == "late"


def test_more_than_five_percent_unreadable_is_refused():
    check_unreadable("x", 5, 100, "line 3")
    with pytest.raises(CommandError, match=r"6 of 100 lines are no JSON, first line 3"):
        check_unreadable("x", 6, 100, "line 3")
