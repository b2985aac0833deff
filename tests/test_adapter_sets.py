"""Sets of adapters as text: parsed, written back, and refused in one line."""

import pytest

from integration._cli import USAGE, CommandError
from integration.adapter_sets import AdapterSet, parse_set

NAMES = ("json", "coding", "support")


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("base", "base"),
        ("json", "json"),
        ("json:1", "json"),
        ("json:0.5+coding:0.5", "coding:0.5+json:0.5"),
        (" coding:.25 + json ", "coding:0.25+json"),
        ("json:-0.5", "json:-0.5"),
    ],
)
def test_sets_have_one_label(text, label):
    chosen = parse_set(text, NAMES)
    assert chosen.label == label
    assert parse_set(chosen.label, NAMES) == chosen


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("jsno", "did you mean 'json'"),
        ("zzz", "expected base, json, coding, support"),
        ("", "no adapter is called ''"),
        ("json+", "no adapter is called ''"),
        ("json+base", "no adapter is called 'base'"),
        ("json+json:0.5", "names the adapter 'json' twice"),
        ("json:", "'' is no weight"),
        ("json:x", "'x' is no weight"),
        ("json:0", "'0' is no weight"),
        ("json:nan", "'nan' is no weight"),
        ("json:inf", "'inf' is no weight"),
        ("json:9", "at most 8"),
    ],
)
def test_bad_sets_are_one_line(text, message):
    with pytest.raises(CommandError, match=message) as caught:
        parse_set(text, NAMES)
    assert caught.value.exit_code == USAGE
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("parts", "odd"),
    [
        ((("json", 1.0),), None),
        ((("json", 2.0),), None),
        ((("coding", 0.5), ("json", 0.5)), None),
        ((("coding", 1.0), ("json", 1.0)), "sum to 2"),
        ((("coding", 0.1), ("json", 0.1)), "sum to 0.2"),
        ((("coding", 1.0), ("json", -1.0)), "sum to 0"),
        ((("json", -1.0),), "negative weight"),
    ],
)
def test_odd_weights_are_told(parts, odd):
    told = AdapterSet(parts).oddity
    assert told is None if odd is None else odd in told
