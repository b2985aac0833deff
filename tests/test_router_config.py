"""adapters.yaml: what is right is read, whatever is wrong is one line with exit code 2."""

import pytest

from integration._cli import USAGE, CommandError
from integration.router_config import load_config, note_weak_classes
from tests.router_stubs import config_text, make_config

GOOD = {
    "adapters": (
        "adapters:\n"
        "  - {name: json, file: a.gguf, rules: ['json'], examples: ['as json', 'json please']}\n"
        "  - {name: code, file: b.gguf, examples: ['a function', 'a class']}\n"
    ),
    "base": "base: {examples: ['hello', 'a poem']}\n",
}


def write(tmp_path, text: str):
    path = tmp_path / "adapters.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_good_file_is_read(tmp_path):
    config = load_config(write(tmp_path, GOOD["adapters"] + GOOD["base"]))
    assert [one.name for one in config.classes] == ["json", "code", "base"]
    assert config.adapters[0].rules == ("json",)
    assert config.base.examples == ("hello", "a poem")


def test_shipped_file_is_good():
    from integration.router_config import DEFAULT_CONFIG

    assert len(load_config(DEFAULT_CONFIG).adapters) >= 3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: json", "name: base", "means the model without adapter"),
        ("name: json", "name: code", "two adapters are called 'code'"),
        ("name: json", "name: 'a+b'", "letters, digits"),
        ("name: json", "name: 'a:b'", "letters, digits"),
        ("name: json, ", "", "adapter 1 has no name"),
        ("name: json", "name: 7", "has no name"),
        ("file: a.gguf, ", "", "'json' has no file"),
        ("rules: ['json']", "rule: ['json']", "did you mean 'rules'"),
        ("base:", "bases:", "did you mean 'base'"),
        ("rules: ['json']", "rules: ['(']", "no regular expression"),
        ("rules: ['json']", "rules: ['x*']", "matches every request"),
        ("rules: ['json']", "rules: json", "rules is a text; expected a list"),
        ("'as json'", "17", "number 1 of examples is a number"),
        ("'as json'", "' '", "is empty"),
        ("'as json'", "'A  Function'", "under 'json' and 'code'"),
        ("'as json'", "'JSON please'", "twice under 'json'"),
        (", examples: ['a function', 'a class']", "", "neither examples nor rules"),
        ("base: {", "base: [{", "no YAML"),
        ("base: {examples: ['hello', 'a poem']}", "base: hello", "base is a text"),
        ("{name: code", "code #", "adapter 2 is a text"),
    ],
)
def test_mistake_is_one_line(tmp_path, old, new, message):
    text = GOOD["adapters"] + GOOD["base"]
    assert old in text
    with pytest.raises(CommandError, match=message) as caught:
        load_config(write(tmp_path, text.replace(old, new, 1)))
    assert caught.value.exit_code == USAGE
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds nothing"),
        ("- a", "holds a list"),
        ("base: {examples: [a]}", "names no adapters"),
        ("adapters: []", "names no adapters"),
        ("adapters: [{name: a, file: f, examples: [x, y]}]", "examples of a only"),
        ("adapters: [{name: a, file: f, rules: [x]}]", "examples of nothing only"),
    ],
)
def test_content_without_a_choice(tmp_path, text, message):
    with pytest.raises(CommandError, match=message):
        load_config(write(tmp_path, text))


def test_missing_and_binary_file(tmp_path):
    with pytest.raises(CommandError, match="does not exist"):
        load_config(tmp_path / "no.yaml")
    path = tmp_path / "b.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CommandError, match="no YAML"):
        load_config(path)


def test_few_examples_are_noted_and_enough_are_not(tmp_path, capsys):
    note_weak_classes(make_config(tmp_path, {"json": 3, "coding": 13, "support": 13, "base": 13}))
    notes = capsys.readouterr().err
    assert "'json' has 3 examples" in notes
    assert "about as many" in notes
    note_weak_classes(make_config(tmp_path))
    assert capsys.readouterr().err == ""
    assert "name: json" in config_text()
