"""Data: schemas, reasons, bad lines, a split that does not depend on the order of rows."""

import json
import random
from pathlib import Path

import pytest

from scripts._cli import CommandError
from scripts.prepare_data import RowRejectedError, prepare, read_file, split_rows, to_messages
from scripts.recipe import TrainingRecipe

SHARED = Path(__file__).parent.parent.parent / "shared/data"


def row(number: int) -> dict:
    return {
        "conversations": [
            {"from": "human", "value": f"Question {number}?"},
            {
                "from": "gpt",
                "value": f"This is the long and careful answer with the number {number}.",
            },
        ],
        "source": "test",
        "score": 4.0,
    }


def recipe_for(tmp_path: Path, **values) -> TrainingRecipe:
    values = {"run_name": "run", "output_root": str(tmp_path / "outputs"), **values}
    return TrainingRecipe(**values)


def write_rows(tmp_path: Path, lines: list[str]) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_finetome_row_becomes_messages():
    turns = [("system", "Be brief."), ("human", " Hi "), ("gpt", "Hello.")]
    raw = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    assert to_messages(raw) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
    ]


def test_messages_row_and_trailing_question():
    raw = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ]
    }
    assert [message["content"] for message in to_messages(raw)] == ["a", "b"]


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "no list"),
        ([("human", "a")], "alternate"),
        ([("gpt", "a"), ("human", "b")], "alternate"),
        ([("human", "a"), ("human", "b"), ("gpt", "c")], "alternate"),
        ([("human", "a"), ("system", "b"), ("gpt", "c")], "alternate"),
        ([("human", "a"), ("gpt", "  ")], "empty turn"),
        ([("human", "a"), ("gpt", 3)], "no string"),
        ([("human", "a"), ("robot", "b")], "unknown role 'robot'"),
    ],
)
def test_bad_rows_are_rejected_with_the_reason(turns, reason):
    raw = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    with pytest.raises(RowRejectedError, match=reason):
        to_messages(raw)


def test_split_does_not_depend_on_the_order(tmp_path):
    rows = [row(number) for number in range(60)]
    first = split_rows(rows, recipe_for(tmp_path))
    random.Random(1).shuffle(rows)
    assert split_rows(rows, recipe_for(tmp_path)) == first
    other = split_rows(rows, recipe_for(tmp_path, seed=1))
    assert other[1] != first[1]


def test_nothing_is_dropped_without_being_counted(tmp_path):
    rows = [row(number) for number in range(20)] + [row(3), {"text": "x"}, row(4)]
    train, held_out, rejected = split_rows(rows, recipe_for(tmp_path, max_rows=15))
    assert rejected == {
        "exact duplicate": 2,
        "no list of conversations or messages": 1,
        "over max_rows": 5,
    }
    assert len(train) + len(held_out) + sum(rejected.values()) == len(rows)


def test_train_and_held_out_share_no_row(tmp_path):
    train, held_out, _ = split_rows([row(n) for n in range(50)], recipe_for(tmp_path))
    texts = {json.dumps(item["messages"]) for item in held_out}
    assert held_out
    assert not any(json.dumps(item["messages"]) in texts for item in train)


def test_missing_file():
    with pytest.raises(
        CommandError, match=r"nowhere\.jsonl' does not exist; expected .*dataset_name"
    ):
        read_file(Path("nowhere.jsonl"))


def test_empty_file(tmp_path):
    with pytest.raises(CommandError, match="is empty; expected one conversation a line"):
        read_file(write_rows(tmp_path, []))


def test_bad_line_is_named_and_the_rest_kept(tmp_path, capsys):
    lines = [json.dumps(row(number)) for number in range(40)]
    lines[6] = '{"conversations": ['
    rows, bad = read_file(write_rows(tmp_path, lines))
    assert (len(rows), len(bad)) == (39, 1)
    assert "line 7" in bad[0]
    assert "line 7" in capsys.readouterr().err


def test_more_than_five_percent_bad_lines_stop(tmp_path):
    lines = [json.dumps(row(number)) for number in range(30)] + ["nope"] * 2
    with pytest.raises(CommandError, match=r"2 of 32 lines are no JSON, first line 31"):
        read_file(write_rows(tmp_path, lines))


def test_too_few_rows_say_why(tmp_path):
    path = write_rows(tmp_path, [json.dumps({"text": "x"})])
    with pytest.raises(CommandError, match=r"0 usable rows .*no list of conversations"):
        prepare(recipe_for(tmp_path, dataset_name=str(path)))


def test_prepare_writes_files_and_keeps_them(tmp_path, capsys):
    path = write_rows(tmp_path, [json.dumps(row(number)) for number in range(30)])
    recipe = recipe_for(tmp_path, dataset_name=str(path), tool_rows=5)
    data_dir = prepare(recipe)
    report = json.loads((data_dir / "report.json").read_text())
    assert (report["rows_read"], report["train_rows"], report["tool_rows"]) == (30, 28, 5)
    assert len((data_dir / "train.jsonl").read_text().splitlines()) == 33
    before = (data_dir / "train.jsonl").stat().st_mtime_ns
    prepare(recipe)
    assert (data_dir / "train.jsonl").stat().st_mtime_ns == before
    assert "up to date" in capsys.readouterr().err
    path.write_text(path.read_text() + json.dumps(row(99)) + "\n")
    prepare(recipe)
    assert json.loads((data_dir / "report.json").read_text())["rows_read"] == 31


def test_hub_failure_is_one_line(tmp_path):
    with pytest.raises(CommandError, match=r"'nobody/nothing' could not be loaded from the hub"):
        prepare(recipe_for(tmp_path, dataset_name="nobody/nothing"))


def test_shipped_sample_is_whole():
    rows, bad = read_file(Path("scripts/data/finetome_sample.jsonl"))
    assert bad == []
    assert len(rows) >= 240
    texts = [to_messages(item) for item in rows]
    assert len({json.dumps(text) for text in texts}) == len(rows)
    assert all(set(item) == {"conversations", "source", "score"} for item in rows)
    assert sum(text[0]["role"] == "system" for text in texts) >= 20
    assert sum(len(text) > 3 for text in texts) >= 40


@pytest.mark.skipif(not SHARED.is_dir(), reason="the measurement data is not beside this clone")
def test_other_peoples_rows_load(tmp_path):
    rows, bad = read_file(SHARED / "instructions_800.jsonl")
    train, held_out, rejected = split_rows(rows, recipe_for(tmp_path))
    assert not bad
    assert len(train) + len(held_out) + sum(rejected.values()) == 800
    assert len(train) > 700
