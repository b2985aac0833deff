"""Verdicts about adapters' answers: the form that counts, and what only looks like it."""

import itertools

import pytest

from scripts.adapter_scores import (
    SPECIALITIES,
    fenced_blocks,
    judge,
    judge_coding,
    judge_json,
    judge_support,
    mcnemar_p,
    parses_as_python,
)


def test_every_measure_is_judged_and_the_main_one_is_among_them():
    rows = {"json": {"keys": []}, "coding": {"check": ""}, "support": {}}
    for name, speciality in SPECIALITIES.items():
        verdicts = judge(name, rows[name], "Hello", lambda code, check: True)
        assert tuple(verdicts) == speciality.measures
        assert speciality.main in speciality.measures
        assert not any(verdicts.values())


# JSON ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1}', ' \n{"a": 1}\n', '{\r\n"a": 1\r\n}\r\n', "[]", "{}", "[1, null]", '{"a": 1e999}',
        '{"a": 1, "a": 2}',  # doubtful, but JSON: the last one wins
        '{"a": "NaN"}', '{"a": "```"}', '["\\ud800"]',
    ],
)  # fmt: skip
def test_valid_json(text):
    assert judge_json(text, [])["valid"] is True
    assert judge_json(text, [])["fenced"] is False


@pytest.mark.parametrize(
    "text",
    [
        "", "  ", "7", "-0.5", '"text"', "null", "true",  # JSON, but no object or array
        '{"a": NaN}', "[Infinity]", "[-Infinity]",
        '{"a": 1,}', "{'a': 1}", "{a: 1}", '{"a": 1', '{"a": 1}}', '{"a": 1} {"b": 2}', '{"a": "\n"}',
        '{"a": 1} // done', 'Here you are: {"a": 1}', '{"a": 1}\n\nI hope this helps!', '\ufeff{"a": 1}',
        "[" * 100_000, "[" + "9" * 5000 + "]",
    ],
)  # fmt: skip
def test_what_is_no_valid_json(text):
    assert judge_json(text, []) == {"valid": False, "fenced": False, "keys": False, "both": False}


@pytest.mark.parametrize(
    ("text", "fenced"),
    [
        ('```json\n{"a": 1}\n```', True),
        ('```JSON\r\n{"a": 1}\r\n```\r\n', True),
        ('```\n{"a": 1}\n```', True),
        ('````json\n{"a": 1}\n````', True),
        ('  ``` json \n{\n "a": 1\n}\n ```', True),
        ('```json\n{"a": NaN}\n```', False),
        ("```json\n7\n```", False),
        ('```python\n{"a": 1}\n```', False),
        ('```json\n{"a": 1}', False),
        ('````json\n{"a": 1}\n```', False),
        ('```json {"a": 1} ```', False),
        ('Sure:\n```json\n{"a": 1}\n```', False),
        ('```json\n{"a": 1}\n```\nDone.', False),
        ('```json\n```json\n{"a": 1}\n```\n```', False),  # one fence is removed, not two
        ('```json\n{"a": 1}\n```\n```json\n{"a": 2}\n```', False),
    ],
)
def test_a_fence_is_reported_and_does_not_count(text, fenced):
    verdicts = judge_json(text, ["a"])
    assert verdicts == {"valid": False, "fenced": fenced, "keys": fenced, "both": False}


@pytest.mark.parametrize(
    ("text", "keys", "found"),
    [
        ('{"a": 1, "b": null}', ["a", "b"], True),
        ('{"b": 1, "c": 2, "a": 3}', ["a", "b"], True),
        ('{"a": 1}', ["a", "b"], False),
        ('{"A": 1}', ["a"], False),
        ('{"x": {"a": 1}}', ["a"], False),
        ('{"имя": "Артём"}', ["имя"], True),
        ('[{"a": 1}, {"a": 2, "b": 3}]', ["a"], True),
        ('[{"a": 1}, {"b": 2}]', ["a"], False),
        ('[{"a": 1}, "a"]', ["a"], False),
        ('["a"]', ["a"], False),
        ('[["a"]]', ["a"], False),
        ("[]", ["a"], False),
        ("[]", [], True),
        ('["x", 1]', [], True),
    ],
)
def test_keys_are_those_of_every_object(text, keys, found):
    assert judge_json(text, keys) == {"valid": True, "fenced": False, "keys": found, "both": found}


# Code --------------------------------------------------------------------------------------------


def never(code: str, check: str) -> bool:
    raise AssertionError("nothing is to be run")


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("```python\nx = 1\n```", [("python", "x = 1")]),
        ("```Python title=a\r\nx = 1\r\n```\r\nDone.", [("python", "x = 1")]),
        ("~~~\nx\n~~~", [("", "x")]),
        ("```\n```", [("", "")]),
        ("````md\n```python\nx\n```\n````", [("md", "```python\nx\n```")]),
        ("```python\na\n```text\nb\n```", [("python", "a\n```text\nb")]),
        ("```\na\n~~~\nb\n`````", [("", "a\n~~~\nb")]),
        ("1. So:\n   ```python\n   if x:\n       y()\n\n   ```", [("python", "if x:\n    y()\n")]),
        ("```js\na\n```\n\n```py\nb\n```", [("js", "a"), ("py", "b")]),
        ("```python\nx = 1", []),
        ("```python\nx = 1\n``", []),
        ("````python\nx = 1\n```", []),
        ("`x = 1` or ```x = 2```", []),
        ("x = 1", []),
    ],
)
def test_fenced_blocks_are_those_of_markdown(text, blocks):
    assert fenced_blocks(text) == blocks


@pytest.mark.parametrize(
    ("code", "parses"),
    [
        ("x = 1", True), ("if x:\n\ty()\n\tz()", True), ('"\\d"', True), ('x is "18"', True), ("...", True),
        ("", False), ("\n \n", False), ("# only a comment", False), ("def f(:", False), ("x = 1\0", False),
        ("if x:\n\ty()\n        z()", False), ("def f():\nreturn 1", False), (">>> x = 1", False),
        ("print 'x'", False), ("(" * 500, False), ("\ud800", False), ("-" * 100_000 + "1", False),
    ],
)  # fmt: skip
def test_python_parses_and_is_not_empty(code, parses, recwarn):
    assert parses_as_python(code) is parses
    assert list(recwarn) == []


@pytest.mark.parametrize(
    ("text", "block", "parses"),
    [
        ("```python\nx = 1\n```\n\nIt sets x.", True, True),
        ("Sure!\n\n```py\nx = 1\n```", True, True),
        ("```\nx = 1\n```", True, True),
        ("```js\nlet x\n```\n```python\nx = 1\n```", True, True),
        ("```\nnot python\n```\n```python3\nx = 1\n```", True, True),  # the tag is asked first
        ("```python\nx = \n```\n```python\nx = 1\n```", True, False),  # the first one counts
        ("```js\nx = 1\n```", True, False),
        ("```python\n\n```", True, False),
        ("```python\nx = 1", False, False),
        ("x = 1", False, False),
    ],
)
def test_the_first_python_block_counts(text, block, parses):
    assert judge_coding(text, "", never) == {"block": block, "parses": parses, "passes": None}


def test_only_code_that_parses_is_run():
    asked = []

    def run(code: str, check: str) -> bool:
        asked.append((code, check))
        return code == "x = 1"

    texts = ("```python\nx = 1\n```", "```python\nx = 2\n```", "```python\nx = \n```", "x = 1")
    verdicts = [judge_coding(text, "assert x == 1", run)["passes"] for text in texts]
    assert verdicts == [True, False, False, False]
    assert asked == [("x = 1", "assert x == 1"), ("x = 2", "assert x == 1")]


# Support -----------------------------------------------------------------------------------------

OPENING = "A lamp that blinks all night is tiring."
STEPS = [
    "Turn it off.",
    "Wait a minute.",
    "Turn it on.",
    "Change the bulb.",
    "Call an electrician.",
]
CLOSING = "If this does not help, send us a photo."


def support(
    opening: str = OPENING, steps: int = 3, closing: str = CLOSING, blank: str = "\n\n"
) -> str:
    numbered = [f"{at}. {step}" for at, step in enumerate((STEPS * 2)[:steps], 1)]
    return blank.join([opening, "\n".join(numbered), closing])


GOOD = support()


@pytest.mark.parametrize(
    "text",
    [
        GOOD, support(steps=4), support(steps=5), f"\n{GOOD}\n ", GOOD.replace("\n", "\r\n"),
        GOOD.replace("\n", "  \n"), support("Does the lamp blink?"), support("My word, it blinks!"),
        support(" ".join(["word"] * 29) + " end."), support('The lamp says "off."'),
        support(closing="If this does not help, write to a.b@example.org. We answer in a day."),
    ],
)  # fmt: skip
def test_the_form_of_support(text):
    assert judge_support(text) == {"form": True, "steps": True, "closing": True}


@pytest.mark.parametrize(
    ("text", "steps", "closing"),
    [
        (support(steps=2), False, True),
        (support(steps=6), True, True),
        (support("It really blinks."), True, True),  # three words
        (support(" ".join(["word"] * 30) + " end."), True, True),  # thirty-one
        (support("Your lamp blinks all night"), True, True),
        (support("Your lamp blinks.\nThat is tiring."), True, True),
        (support("- A lamp that blinks is tiring."), True, True),
        (support("1. A lamp that blinks is tiring."), True, True),
        (support(blank="\n"), True, True),
        (support(blank="\n\n\n"), True, True),
        (GOOD.replace("1. ", "1) "), True, True),
        (GOOD.replace("1. ", "- "), False, True),
        (GOOD.replace("1. ", "0. "), False, True),
        (GOOD.replace("3. ", "2. "), False, True),
        (GOOD.replace("2. ", "\n2. "), True, True),
        (GOOD.replace("2. Wait", "2. \nWait"), False, True),
        (GOOD.replace("1. ", "**1.** "), False, True),
        (f"{GOOD}\n\nGood luck!", True, False),
        (f"Hello!\n\n{GOOD}", True, True),
        (support(closing="If that does not help, call."), True, False),
        (support(closing="if this does not help, call."), True, False),
        (support(closing="If this does not help, send us a"), True, True),  # cut off
        (support(closing="If this does not help,"), True, False),
        (f"{OPENING}\n\n{CLOSING}", False, True),
        ("", False, False),
    ],
)
def test_what_is_not_the_form_of_support(text, steps, closing):
    assert judge_support(text) == {"form": False, "steps": steps, "closing": closing}


# Comparison --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "wrong", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 0, 2 / 32),
        (0, 5, 2 / 32),
        (6, 1, 2 * (1 + 7) / 128),
        (3, 3, 1.0),
        (60, 0, 2 / 2**60),
    ],
)
def test_mcnemar_by_hand(right, wrong, p):
    assert mcnemar_p(right, wrong) == pytest.approx(p, rel=1e-12)


def test_mcnemar_counts_outcomes_that_are_as_far_from_even():
    changed, right = 9, 7
    as_far = [
        flips
        for flips in itertools.product((0, 1), repeat=changed)
        if abs(sum(flips) - changed / 2) >= abs(right - changed / 2)
    ]
    assert mcnemar_p(right, changed - right) == pytest.approx(len(as_far) / 2**changed)
