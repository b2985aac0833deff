"""Requests out of data sets: every form of row, sources, and one line for whatever is wrong."""

import json

import pytest

from integration._cli import USAGE, CommandError
from integration.router_config import load_config
from integration.router_examples import MAX_REQUESTS, read_requests

ROWS = [
    {"prompt": "first", "source": "a"},
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "second"}]},
    {"conversations": [{"from": "human", "value": "third"}, {"from": "gpt", "value": "x"}]},
]


def write(path, rows) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    return str(path)


def test_every_form_of_row_gives_its_first_request(tmp_path):
    path = tmp_path / "x.jsonl"
    write(path, ROWS)
    assert read_requests(path, (), "here") == ["first", "second", "third"]
    assert read_requests(path, ("a",), "here") == ["first"]


def test_many_are_spread_evenly(tmp_path):
    path = tmp_path / "x.jsonl"
    write(path, [{"prompt": str(at)} for at in range(3 * MAX_REQUESTS)])
    found = read_requests(path, (), "here")
    assert len(found) == MAX_REQUESTS
    assert found[:3] == ["0", "3", "6"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 1 is no JSON"),
        ('{"prompt": "a"}\n[1]', "line 2 holds no request"),
        ('{"prompt": " "}', "line 1 holds no request"),
        ('{"messages": [{"role": "user", "content": 3}]}', "line 1 holds no request"),
        ("", "holds no requests; expected rows"),
        (b"\xff", "no UTF-8"),
        (None, "No such file"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, content, message):
    path = tmp_path / "x.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CommandError, match=f"here: examples_from.*{message}") as caught:
        read_requests(path, (), "here")
    assert caught.value.exit_code == USAGE
    assert "\n" not in str(caught.value)


def test_source_that_no_row_has_is_told(tmp_path):
    path = tmp_path / "x.jsonl"
    write(path, ROWS)
    with pytest.raises(CommandError, match="no requests of the sources zzz"):
        read_requests(path, ("zzz",), "here")


def config(tmp_path, examples_from, examples=("one", "two")):
    content = {
        "adapters": [{"name": "x", "file": "x.gguf", "examples": list(examples)}],
        "base": {"examples": ["other", "else"]},
    }
    content["adapters"][0]["examples_from"] = examples_from
    path = tmp_path / "adapters.yaml"
    path.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    return load_config(path)


def test_config_takes_files_with_and_without_sources(tmp_path):
    file = write(tmp_path / "x.jsonl", [*ROWS, {"prompt": "ONE "}])
    one = config(tmp_path, file).adapters[0]
    # What the list has already is not taken twice.
    assert (one.examples, one.more) == (("one", "two"), ("first", "second", "third"))
    assert config(tmp_path, [{"file": file, "sources": ["a"]}]).adapters[0].more == ("first",)
    assert config(tmp_path, [file, file]).adapters[0].more == ("first", "second", "third")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "examples_from has a number"),
        ([{"sources": ["a"]}], "examples_from has a mapping"),
        ([{"file": "x", "source": "a"}], "did you mean 'sources'"),
        ("no.jsonl", "cannot be read"),
    ],
)
def test_bad_examples_from(tmp_path, value, message):
    with pytest.raises(CommandError, match=message):
        config(tmp_path, value)


def test_request_of_two_classes_is_refused(tmp_path):
    file = write(tmp_path / "x.jsonl", [{"prompt": "Other"}])
    with pytest.raises(CommandError, match="under 'x' and 'base'"):
        config(tmp_path, file)
