"""The hand-written phrasings hold what their forms promise, and are dealt, filled and misspelt well."""

import difflib
import random
import re
from collections import Counter
from typing import Any, get_args

import pytest

from scripts import tool_requests
from scripts.tool_requests import (
    HELD_OUT_EVERY,
    Deck,
    Phrasing,
    fill,
    is_held_out,
    read_lines,
    read_phrasings,
    type_carelessly,
)
from scripts.tool_texts import number_in_words
from tools import TOOLS
from tools._language import LANGUAGES
from tools.content_validator import check_content
from tools.protocol import CALL_START
from tools.template_generator import TemplateType, list_fields

SLOTS = re.compile(r"\{(text|width|indent|n|m|name|language|code|clauses)\}")
TEXT_FORMATTER = {
    "width": {"text", "width"},
    "indent": {"text", "indent"},
    "width_indent": {"text", "width", "indent"},
    "bare": {"text"},
    "foreign": {"text", "width"},
}
ASK_BACK = {"no_text_format", "no_text_check", "no_rule", "no_type", "impossible"}
SEVERAL = {"clause", "several", "frame"}
TEMPLATE_FORMS = {"any", "direct", "fields", "foreign"}
CHANGES = {
    "width", "indent", "width_indent", "text", "template_type", "fields", "rules", "switch", "none",
}  # fmt: skip


def change_form(line: Phrasing) -> str:
    """Name what a follow-up changes."""
    change = line.change
    if change is None:
        return "none"
    if "switch" in change or "of" in change:
        return "switch" if "switch" in change else "fields"
    return "_".join(change)


TOOL_NAMES = {tool.name for tool in TOOLS}
# They name the language in itself, or by its code.
NAMED_OTHERWISE = {"language:es": "español", "language:fr": "français", "language:en": "lang=en"}


def slots(text: str) -> Counter[str]:
    return Counter(SLOTS.findall(text))


def states_number(number: str, text: str) -> bool:
    words = number_in_words(int(number)) if int(number) < 1000 else number
    return bool(re.search(rf"(?<!\d){number}(?!\d)|\b{words}\b", text.lower()))


def names_language(code: str, text: str) -> bool:
    """Whether a language is named, perhaps misspelt."""
    words = re.findall(r"\w+", text.lower())
    name = LANGUAGES[code].lower()
    return (
        any(difflib.SequenceMatcher(None, name, word).ratio() >= 0.7 for word in words)
        or NAMED_OTHERWISE.get(f"language:{code}", name) in text
    )


def rule_problems(rules: list[str], told: str) -> list[str]:
    """Say which rules do not exist, or what they need that the user does not say."""
    problems = []
    known = {"n": "7", "m": "9", "code": "en"}
    for rule in rules:
        try:
            check_content("text", [fill(rule, known)])
        except Exception as error:
            problems.append(f"unknown rule: {error}")
            continue
        family, _, value = rule.partition(":")
        if not value or value.startswith("{"):
            continue
        said = names_language if family == "language" else states_number
        problems += [] if said(value, told) else [f"{value} is not said"]
    wanted = {"language" if name == "code" else name for name in slots(" ".join(rules))}
    if wanted != slots(told).keys() & {"n", "m", "language", "code"}:
        problems.append("parameters of rules and request differ")
    if len(set(rules)) != len(rules):
        problems.append("a rule comes twice")
    return problems


def field_problems(kind: Any, fields: dict[str, str], told: str) -> list[str]:
    """Say which fields a template does not have, and which values the user does not write."""
    if kind not in get_args(TemplateType):
        return [f"unknown type {kind}"]
    return [f"no field {name}" for name in fields if name not in list_fields(kind)] + [
        f"{value} is not said" for value in fields.values() if not value or value not in told
    ]


def format_problems(line: Phrasing) -> list[str]:
    wanted = Counter(TEXT_FORMATTER.get(line.form, {"unknown form"}))
    return [] if slots(line.request) == wanted else ["placeholders are not those of the form"]


def check_problems(line: Phrasing) -> list[str]:
    texts = {"clause": (0, 0), "frame": (1, 1)}.get(line.form, (1, 0))
    counted = slots(line.request)
    problems = rule_problems(line.rules, line.request)
    if (counted["text"], counted["clauses"]) != texts:
        problems.append("placeholders are not those of the form")
    if line.form not in SEVERAL | {"single"}:
        problems.append(f"unknown form {line.form}")
    number = len(line.rules)
    right = {"clause": number == 1, "frame": number == 0, "single": number == 1}
    if not right.get(line.form, number > 1):
        problems.append(f"{number} rules")
    if line.form == "clause" and "m" in counted:
        problems.append("a clause has one limit, {n}")
    return problems


def template_problems(line: Phrasing) -> list[str]:
    if line.form not in TEMPLATE_FORMS:
        return [f"unknown form {line.form}"]
    any_type = line.form == "any"
    problems = [] if slots(line.request) == Counter(["name"] * any_type) else ["placeholders"]
    if any_type != (not line.template_type) or bool(line.fields) != (line.form == "fields"):
        problems.append("type or fields are not those of the form")
    return problems + (
        [] if any_type else field_problems(line.template_type, line.fields, line.request)
    )


def call_problems(call: dict, told: str) -> list[str]:
    """Say what is wrong with a call that a phrasing leads to."""
    given = call["arguments"]
    kept = {name for name in ("text", "width", "indent") if name in given}
    problems = [] if all(given[name] == f"{{{name}}}" for name in kept) else ["fixed argument"]
    counted = slots(told)
    if counted.keys() != kept or counted["text"] > 1:
        problems.append("placeholders are not those of the call")
    if call["name"] not in TOOL_NAMES or set(call) != {"name", "arguments"}:
        problems.append("unknown tool")
    if call["name"] == "template_generator":
        problems += field_problems(given["template_type"], given.get("fields", {}), told)
    return problems + rule_problems(given.get("rules", []), told)


def ask_back_problems(line: Phrasing) -> list[str]:
    told = f"{line.request}\n{line.then}"
    problems = [] if line.answer.strip() else ["no answer"]
    if line.form not in ASK_BACK:
        problems.append(f"unknown form {line.form}")
    if slots(line.answer).keys() - slots(line.request).keys():
        problems.append("answers what was not said")
    if slots(line.request).keys() - {"text", "width", "indent"}:
        problems.append("placeholders")
    if (line.call is None) != (not line.then) or (line.form == "impossible" and line.call):
        problems.append("a next message without a call, or a call without one")
    missing = {"no_text_format": "text", "no_text_check": "text"}.get(line.form)
    if missing and missing in slots(line.request):
        problems.append("nothing is missing")
    return problems + (call_problems(line.call, told) if line.call else [])


def follow_up_problems(line: Phrasing) -> list[str]:
    form, change = change_form(line), line.change or {}
    problems = [] if form in CHANGES else [f"unknown form {form}"]
    if line.after not in TOOL_NAMES | {"any"}:
        problems.append(f"unknown tool {line.after}")
    if bool(line.answer) != (line.change is None):
        problems.append("an answer beside a call, or neither")
    settings = {name for name in ("text", "width", "indent") if name in change}
    if slots(line.request) != Counter(settings) or any(
        change[name] != f"{{{name}}}" for name in settings
    ):
        problems.append("placeholders are not those of the change")
    after = {"width": "text_formatter", "indent": "text_formatter", "fields": "template_generator"}
    after |= {"width_indent": "text_formatter", "template_type": "template_generator"}
    if line.after != after.get(form, line.after) or (
        form in {"rules", "text", "switch"} and line.after in {"template_generator", "any"}
    ):
        problems.append(f"{form} cannot change after {line.after}")
    if form == "fields":
        problems += field_problems(change["of"], change["fields"], line.request)
    if form == "template_type":
        problems += field_problems(change["template_type"], {}, line.request)
    return problems + rule_problems(change.get("rules", []), line.request)


def answer_problems(line: Phrasing) -> list[str]:
    """Say what is wrong with a request that needs no tool: it is never filled in."""
    problems = [] if line.answer.strip() and line.request.strip() else ["no answer or request"]
    if CALL_START in line.answer or line.rules or line.call:
        problems.append("it calls a tool")
    return problems


CHECKS = {
    "text_formatter": format_problems,
    "content_validator_single": check_problems,
    "content_validator_several": check_problems,
    "template_generator": template_problems,
    "ask_back": ask_back_problems,
    "follow_ups": follow_up_problems,
    "no_tool_near": answer_problems,
    "no_tool_general": answer_problems,
}


@pytest.mark.parametrize("name", CHECKS)
def test_every_line_holds_what_its_form_promises(name):
    lines = [Phrasing(**line) for line in read_lines(name)]
    assert len(lines) > 200
    wrong = {line.request: found for line in lines if (found := CHECKS[name](line))}
    assert wrong == {}


FORMAT = {"name": "text_formatter", "arguments": {"text": "{text}", "width": "{width}"}}
CHECK = {"name": "content_validator", "arguments": {"text": "{text}", "rules": ["max_words:50"]}}
TEMPLATE = {"name": "template_generator", "arguments": {"template_type": "memo"}}
WRONG_LINES = [
    ("text_formatter", {"form": "width", "request": "wrap {text}"}, "placeholders"),
    ("text_formatter", {"form": "width", "request": "{text} {text} {width}"}, "placeholders"),
    ("text_formatter", {"form": "bare", "request": "{indent} {text}"}, "placeholders"),
    ("text_formatter", {"form": "new", "request": "{text}"}, "placeholders"),
    ("single", {"request": "{n} {text}", "rules": ["max_words:{m}"]}, "parameters"),
    ("single", {"request": "long? {text}", "rules": ["max_words:50"]}, "50 is not said"),
    ("single", {"request": "150? {text}", "rules": ["max_words:50"]}, "50 is not said"),
    ("single", {"request": "Dutch? {text}", "rules": ["language:cs"]}, "cs is not said"),
    ("single", {"request": "? {text}", "rules": ["language:xx"]}, "unknown rule"),
    ("single", {"request": "? {text}", "rules": ["is_nice"]}, "unknown rule"),
    ("single", {"request": "? {text}", "rules": []}, "0 rules"),
    ("single", {"request": "mail?", "rules": ["is_email"]}, "placeholders"),
    ("several", {"request": "? {text}", "rules": ["is_url"], "form": "several"}, "1 rules"),
    ("several", {"request": "? {text}", "rules": ["is_url"] * 2, "form": "several"}, "twice"),
    ("several", {"request": "{text}?", "rules": ["is_url"], "form": "clause"}, "placeholders"),
    ("several", {"request": "{text}?", "form": "frame"}, "placeholders"),
    ("template", {"form": "any", "request": "a template"}, "placeholders"),
    ("template", {"form": "direct", "request": "a memo", "template_type": "memo"}, "unknown type"),
    ("template", {"fields": {"colour": "a"}}, "no field colour"),
    ("template", {"fields": {"sender": "Bo"}}, "Bo is not said"),
    ("template", {"fields": {"sender": ""}}, " is not said"),
    ("template", {"form": "direct", "fields": {"sender": "a"}}, "type or fields"),
    ("ask_back", {"answer": ""}, "no answer"),
    ("ask_back", {"answer": "At {width}?"}, "what was not said"),
    ("ask_back", {"then": "{text}", "call": FORMAT}, "not those of the call"),
    ("ask_back", {"then": "{text} 60 {width}", "call": CHECK}, "50 is not said"),
    ("ask_back", {"then": "a memo", "call": TEMPLATE}, "unknown type memo"),
    ("ask_back", {"then": "{text}"}, "without a call"),
    ("ask_back", {"request": "{text}", "form": "no_text_check"}, "nothing is missing"),
    ("follow_ups", {"change": {"indent": 2, "width": 3}}, "unknown form indent_width"),
    ("follow_ups", {"change": {"width": "{width}"}}, "placeholders"),
    ("follow_ups", {"request": "{indent}", "change": {"width": "{width}"}}, "placeholders"),
    ("follow_ups", {"after": "any", "change": {"rules": ["is_url"]}}, "cannot change"),
    ("follow_ups", {"change": {"of": "email", "fields": {"sender": "Bo"}}}, "Bo is not said"),
    ("follow_ups", {"change": {"rules": ["is_nice"]}}, "unknown rule"),
    ("follow_ups", {}, "or neither"),
    ("follow_ups", {"answer": "Yes.", "change": {"template_type": "email"}}, "beside a call"),
    ("no_tool_near", {"answer": " "}, "no answer"),
    ("no_tool_near", {"answer": f"{CALL_START}{{}}"}, "calls a tool"),
]
DEFAULTS = {
    "single": {"form": "single"},
    "template": {"form": "fields", "request": "a mail", "template_type": "email"},
    "ask_back": {"form": "no_type", "request": "Hi", "answer": "Which?"},
    "follow_ups": {"request": "again", "after": "text_formatter"},
    "no_tool_near": {"request": "Hi"},
}
NAMES = {"single": "content_validator_single", "several": "content_validator_several"}
NAMES["template"] = "template_generator"


@pytest.mark.parametrize(("short", "line", "problem"), WRONG_LINES)
def test_wrong_lines_are_found(short, line, problem):
    found = CHECKS[NAMES.get(short, short)](Phrasing(**DEFAULTS.get(short, {}) | line))
    assert problem in "; ".join(found)


def duplicates(requests: list[str]) -> list[str]:
    counted = Counter(" ".join(request.lower().split()) for request in requests)
    return [request for request, number in counted.items() if number > 1]


def test_no_request_or_text_comes_twice():
    names = sorted(path.stem for path in tool_requests.REQUESTS_DIR.glob("*.jsonl"))
    assert names == sorted([*CHECKS, "texts"])  # so that none goes unchecked
    lines = [line for name in names for line in read_lines(name)]
    requests = [str(line.get("request", line.get("text"))) for line in lines]
    assert duplicates(requests) == []
    assert duplicates([*requests, " Wrap   it", "wrap it"]) == ["wrap it"]


def test_held_out_lines_are_one_in_twelve_of_every_file_and_in_no_other_half():
    for name in CHECKS:
        halves = [{line.request for line in read_phrasings(name, half)} for half in (False, True)]
        assert not halves[0] & halves[1]
        assert halves[0] | halves[1] == {line["request"] for line in read_lines(name)}
        assert 0.3 < len(halves[1]) * HELD_OUT_EVERY / sum(map(len, halves)) < 2
    # By content, so that a line keeps its half when others are added.
    assert [text for text in map(str, range(60)) if is_held_out(text)] == ["14", "16", "28", "49"]


def test_unknown_field_of_a_line_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tool_requests, "REQUESTS_DIR", tmp_path)
    (tmp_path / "some.jsonl").write_text('{"request": "Grüße"}\n', encoding="utf-8")
    halves = [read_phrasings("some", half) for half in (False, True)]
    assert [*halves[0], *halves[1]] == [Phrasing("Grüße")]
    (tmp_path / "some.jsonl").write_text('{"request": "a", "anwser": "b"}\n', encoding="utf-8")
    with pytest.raises(TypeError, match="anwser"):
        read_phrasings("some", False)


def test_values_are_not_filled_again():
    values = {"text": "{width} and {text} and {}", "width": "40"}
    assert fill("{width}: {text} {indent} {x}", values) == (
        "40: {width} and {text} and {} {indent} {x}"
    )
    twice = "{width}: {text}".replace("{text}", values["text"]).replace("{width}", "40")
    assert "{width}" not in twice  # what one replacement after the other would do


@pytest.mark.parametrize("seed", range(5))
def test_deck_deals_all_before_any_repeats(seed):
    deck = Deck(range(10), random.Random(seed))
    rounds = [[deck.draw() for _ in range(10)] for _ in range(4)]
    assert all(sorted(some) == list(range(10)) for some in rounds)
    assert len({tuple(some) for some in rounds}) == 4
    rng = random.Random(seed)
    assert len({rng.choice(range(10)) for _ in range(10)}) < 10  # what mere choosing gives


def test_deck_keeps_the_callers_list_and_needs_an_item():
    items = [1, 2, 3]
    Deck(items, random.Random(0)).draw()
    assert items == [1, 2, 3]
    with pytest.raises(ValueError, match="at least one item"):
        Deck([], random.Random(0))


def test_careless_typing_keeps_placeholders_and_numbers():
    templates = [
        *(line["request"] for name in CHECKS for line in read_lines(name)),
        "{text}", "{width}", "Hi", "", "Wrap {text} to {width}, indent{indent}.",
    ]  # fmt: skip
    changed = 0
    rng = random.Random(1)
    for template in templates:
        typed = type_carelessly(template, rng)
        changed += typed != template
        assert slots(typed) == slots(template)
        assert re.findall(r"\d+", typed) == re.findall(r"\d+", template)
        assert abs(len(typed) - len(template)) <= 4
        assert difflib.SequenceMatcher(None, typed.lower(), template.lower()).ratio() > 0.75 or (
            len(template) < 12
        )
    assert changed > 0.75 * len(templates)  # some have no capital and no full stop to drop
    assert slots("wrap {wdith}") != slots("wrap {width}")


def test_careless_typing_both_misspells_and_drops_capitals():
    template = "Please wrap This Paragraph for ME."
    typed = {type_carelessly(template, random.Random(seed)) for seed in range(60)}
    assert "please wrap this paragraph for me" in typed
    misspelt = typed - {"please wrap this paragraph for me"}
    assert len(misspelt) > 15
    assert all(one.endswith(" for ME.") for one in misspelt)  # short words stay
