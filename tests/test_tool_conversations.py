"""Generated conversations: calls that the tools accept, made of what the user wrote, nothing else."""

import json
import random
import re
from collections import Counter

import pytest

from scripts import tool_conversations
from scripts.tool_conversations import ANSWER_OPENING, Conversations, answer_from
from scripts.tool_requests import REQUESTS_DIR, Phrasing, is_held_out, read_lines, read_phrasings
from scripts.tool_texts import Corpus, Message, number_in_words
from tools import TOOLS
from tools._language import LANGUAGES
from tools.protocol import (
    RESPONSE_START,
    ToolCall,
    parse_tool_call,
    render_tool_call,
    render_tool_result,
)

BY_NAME = {tool.name: tool for tool in TOOLS}
KINDS = [*BY_NAME, "no_tool", "ask_back", "follow_up"]
SENTENCES = [
    f"Sentence {'abcdefghijklmnopqrstuvwxyz'[n]} of the corpus says nothing new." for n in range(26)
]
QUESTIONS = [
    [
        {"role": "user", "content": f"Question {n}?"},
        {"role": "assistant", "content": f"Answer {n}."},
    ]
    for n in range(25)
]
CORPUS = Corpus(SENTENCES, QUESTIONS)


def make(kind: str, number: int, seed: int = 0, held_out: bool = False) -> list[list[Message]]:
    made = Conversations(CORPUS, random.Random(seed), held_out)
    return [getattr(made, kind)() for _ in range(number)]


TALKS = {(kind, half): make(kind, 250, 1, half) for kind in KINDS for half in (False, True)}
ALL = [talk for talks in TALKS.values() for talk in talks]


def calls_of(talk: list[Message]) -> list[tuple[int, ToolCall]]:
    found = [(at, parse_tool_call(turn["content"])) for at, turn in enumerate(talk)]
    return [(at, call) for at, call in found if call and talk[at]["role"] == "assistant"]


def says_number(number: int, told: str) -> bool:
    return bool(re.search(rf"(?<!\d){number}(?!\d)|\b{number_in_words(number)}\b", told.lower()))


def says_rule(rule: str, told: str) -> bool:
    """Whether what the rule needs is said; fixed languages are judged with the phrasings."""
    family, _, value = rule.partition(":")
    if family in {"min_words", "max_words"}:
        return says_number(int(value), told)
    return True


def problems_of(talk: list[Message]) -> list[str]:
    """Say what is wrong with a conversation."""
    problems = []
    if [turn["role"] for turn in talk] != ["user", "assistant"] * (len(talk) // 2):
        problems.append("turns do not alternate")
    problems += ["empty turn" for turn in talk if not turn["content"].strip()]
    results = {at + 1 for at, _ in calls_of(talk)}
    former: dict[str, object] = {}
    for at, call in calls_of(talk):
        result = BY_NAME[call.name].invoke(call.arguments)
        if result.startswith("error: "):
            problems.append(result)
        if talk[at]["content"] != render_tool_call(call):
            problems.append("a call is not written as calls are")
        if at + 1 < len(talk):
            if talk[at + 1]["content"] != render_tool_result(result):
                problems.append("result is not the tool's")
            if talk[at + 2]["content"] != answer_from(call, result):
                problems.append("answer is not of the result")
        said = [turn["content"] for turn in talk[:at] if turn["role"] == "user"]
        said = [content for content in said if not content.startswith(RESPONSE_START)]
        given = dict(call.arguments)
        text = given.get("text", "")
        if not any(text in content for content in said):
            problems.append("text is not what the user wrote")
        # A number within the text is none that the user set.
        told = "\n".join(content.replace(text, "") for content in said if text)
        for name in ("width", "indent"):
            if name in given and not says_number(given[name], told):
                problems.append(f"{name} is not said")
        for value in (given.get("fields") or {}).values():
            if not any(value in content for content in said):
                problems.append(f"{value} is not said")
        problems += [f"{r} is not said" for r in given.get("rules", []) if not says_rule(r, told)]
        former = given
    for at, turn in enumerate(talk):
        if turn["content"].startswith(RESPONSE_START) and at not in results:
            problems.append("a result without a call")
    if re.search(r"\{(clauses|language|code)\}", str(former)):
        problems.append("a placeholder in a call")
    return problems


def test_every_conversation_is_sound():
    wrong = [(found, talk) for talk in ALL if (found := problems_of(talk))]
    assert wrong == []
    assert sum(len(calls_of(talk)) for talk in ALL) > 1800


def with_call(talk: list[Message], at: int, **changes) -> list[Message]:
    call = parse_tool_call(talk[at]["content"])
    assert call
    call = ToolCall(call.name, {**call.arguments, **changes})
    return [*talk[:at], {**talk[at], "content": render_tool_call(call)}, *talk[at + 1 :]]


def with_content(talk: list[Message], at: int, content: str) -> list[Message]:
    return [*talk[:at], {**talk[at], "content": content}, *talk[at + 1 :]]


def first(kind: str, wanted) -> tuple[list[Message], int, dict]:
    """Give the first conversation of a kind, with its last call, for whose arguments it holds."""
    for talk in TALKS[kind, False]:
        for at, call in calls_of(talk)[-1:]:
            if wanted(call.arguments):
                return talk, at, call.arguments
    raise AssertionError(kind)


@pytest.mark.parametrize(
    ("kind", "key", "change", "problem"),
    [
        ("text_formatter", "width", lambda width: 399, "width is not said"),
        ("text_formatter", "indent", lambda indent: 97, "error: "),
        ("text_formatter", "indent", lambda indent: 14, "indent is not said"),
        ("text_formatter", "text", lambda text: text + ".", "not what the user wrote"),
        ("follow_up", "text", lambda text: text[:-1] + "~", "not what the user wrote"),
        ("follow_up", "width", lambda width: 398, "width is not said"),
        ("ask_back", "text", lambda text: " " + text, "not what the user wrote"),
        ("ask_back", "width", lambda width: 397, "width is not said"),
        ("content_validator", "rules", lambda rules: [*rules, "max_words:987"], "987 is not said"),
        ("content_validator", "rules", lambda rules: ["is_nice"], "error: rules"),
        ("template_generator", "fields", lambda f: dict.fromkeys(f, "Zz"), "Zz is not said"),
        ("template_generator", "template_type", lambda kind: "memo", "error: template_type"),
    ],
)  # fmt: skip
def test_wrong_calls_are_found(kind, key, change, problem):
    talk, at, arguments = first(kind, lambda given: key in given and given.get("width", 99) > 14)
    assert problem in "; ".join(problems_of(with_call(talk, at, **{key: change(arguments[key])})))


def test_wrong_results_answers_and_turns_are_found():
    talk = next(talk for talk in TALKS["text_formatter", False] if len(talk) == 4)
    assert problems_of(talk) == []
    edited = talk[2]["content"].replace("\n</", ".\n</")
    assert problems_of(with_content(talk, 2, edited)) == ["result is not the tool's"]
    assert problems_of(with_content(talk, 3, "Done.")) == ["answer is not of the result"]
    assert "empty turn" in problems_of(with_content(talk, 3, " "))
    assert "a result without a call" in problems_of(with_content(talk, 1, "Sure."))
    assert problems_of(talk[1:])[0] == "turns do not alternate"
    spaced = with_content(talk, 1, talk[1]["content"].replace('": ', '":'))
    assert problems_of(spaced) == ["a call is not written as calls are"]


def names_called(kind: str) -> set[str | None]:
    talks = TALKS[kind, False] + TALKS[kind, True]
    return {call[0][1].name if (call := calls_of(talk)) else None for talk in talks}


def test_kinds_call_the_tool_that_their_name_says():
    for name in BY_NAME:
        assert names_called(name) == {name}
        assert all(calls_of(talk)[0][0] == 1 for talk in TALKS[name, False])
    assert names_called("no_tool") == {None}
    assert names_called("follow_up") == set(BY_NAME)


def test_asking_back_has_no_call_at_first_and_later_sometimes_one():
    for half in (False, True):
        talks = TALKS["ask_back", half]
        assert all(parse_tool_call(talk[1]["content"]) is None for talk in talks)
        called = [calls_of(talk) for talk in talks if len(talk) > 2]
        assert all(calls[0][0] == 3 and len(calls) == 1 for calls in called)
        assert 0.2 < len(called) / len(talks) < 0.5
        unfilled = {turn[0]["content"] for turn in talks if len(turn) > 2}
        assert not unfilled & {
            line["request"] for line in read_lines("ask_back") if not line["call"]
        }


def test_follow_ups_keep_what_they_do_not_change():
    changed: Counter[str] = Counter()
    for talk in TALKS["follow_up", False] + TALKS["follow_up", True]:
        (_, before), *later = calls_of(talk)
        assert len(later) <= 1
        assert len(talk) >= 6
        for _, call in later:
            old, new = before.arguments, call.arguments
            names = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
            changed["+".join(sorted(names)) if call.name == before.name else "switch"] += 1
            if call.name == before.name:
                assert names <= {"width", "indent"} or len(names) == 1 or names == {
                    "template_type", "fields",  # another template has other fields
                }  # fmt: skip
            else:
                assert old["text"] == new["text"]
            assert list(new) == [name for name in BY_NAME[call.name].args if name in new]
    assert changed.keys() >= {
        "width", "indent", "indent+width", "text", "rules", "template_type", "fields", "switch",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "call"),
    [
        ({"width": "{width}"}, {"text": "a", "width": 40, "indent": 3}),
        ({"indent": "{indent}"}, {"text": "a", "width": 30, "indent": 5}),
        ({"width": "", "indent": ""}, {"text": "a", "width": 40, "indent": 5}),
        ({"text": "{text}"}, {"text": "b", "width": 30, "indent": 3}),
        ({"rules": ["is_url"]}, {"text": "a", "rules": ["is_url"]}),
        ({"switch": "text_formatter", "width": ""}, {"text": "a", "width": 40}),
    ],
)  # fmt: skip
def test_change_of_a_call(change, call):
    before = ToolCall("text_formatter", {"text": "a", "width": 30, "indent": 3})
    meant = {"text": "b", "width": 40, "indent": 5}
    assert tool_conversations._changed(before, change, meant).arguments == call
    assert before.arguments == {"text": "a", "width": 30, "indent": 3}


@pytest.mark.parametrize(
    ("request_", "holds"),
    [
        ("a bit wider: {width}", int.__gt__),
        ("narrower, {width}", int.__lt__),
        ("at {width}", int.__ne__),
    ],
)
def test_new_width_is_another_one_as_the_request_says(request_, holds):
    made = Conversations(CORPUS, random.Random(0), False)
    for old in (20, 60, 100):
        new = [made._new_settings(request_, {"width": old, "indent": 4}) for _ in range(50)]
        assert all(holds(settings["width"], old) for settings in new)
        assert all(settings["indent"] != 4 for settings in new)
    widths = [made._new_settings("now {width}", {"width": 60})["width"] for _ in range(50)]
    assert min(widths) < 60 < max(widths)  # nothing said: either


def test_numbers_of_a_request_are_those_of_its_call(monkeypatch):
    """For every phrasing, in digits and in words; and none is in the call that has no place."""
    monkeypatch.setattr("scripts.tool_texts._WORDS_SHARE", 0.5)
    monkeypatch.setattr(tool_conversations, "CARELESS_SHARE", 0)
    made = Conversations(CORPUS, random.Random(0), False)
    written: Counter[str] = Counter()
    for line in read_lines("text_formatter"):
        request, call = made._format(Phrasing(**line), "Some text.")
        numbers = {name: call.arguments[name] for name in call.arguments if name != "text"}
        assert numbers.keys() == {n for n in ("width", "indent") if f"{{{n}}}" in line["request"]}
        for name, number in numbers.items():
            shown = [str(number), number_in_words(number)]
            options = [line["request"].replace(f"{{{name}}}", one) for one in shown]
            assert any(says_number(number, one) for one in options)
            written["words" if shown[1] in request.lower() else "digits"] += 1
            assert says_number(number, request)
    assert min(written.values()) > 0.25 * written.total()


@pytest.mark.parametrize(
    ("phrasing", "in_digits"),
    [
        (Phrasing("{width} columnas: {text}", "foreign", "foreign"), True),
        (Phrasing("width={width} {text}", "width", "technical"), True),
        (Phrasing("{width} columns: {text}", "width", "terse"), False),
    ],
)
def test_other_languages_and_code_have_their_numbers_in_digits(phrasing, in_digits, monkeypatch):
    monkeypatch.setattr("scripts.tool_texts._WORDS_SHARE", 0.5)
    monkeypatch.setattr(tool_conversations, "CARELESS_SHARE", 0)
    made = Conversations(CORPUS, random.Random(0), False)
    monkeypatch.setattr(made, "_draw", lambda *_: phrasing)
    requests = [made.text_formatter()[0]["content"] for _ in range(40)]
    assert all(re.match(r"(width=)?\d+ ", request) for request in requests) is in_digits


@pytest.mark.parametrize("words_share", [0, 1])
@pytest.mark.parametrize("name", ["content_validator_single", "content_validator_several"])
def test_rules_have_the_numbers_and_languages_of_their_request(name, words_share, monkeypatch):
    monkeypatch.setattr("scripts.tool_texts._WORDS_SHARE", words_share)
    monkeypatch.setattr(tool_conversations, "CARELESS_SHARE", 0)
    made = Conversations(CORPUS, random.Random(0), False)
    seen: Counter[str] = Counter()
    # The longest spelling first, or "forty-two-fifty" would begin with forty.
    spelled = sorted(map(number_in_words, range(1000)), key=len, reverse=True)
    number = "|".join([r"\d+", *spelled])
    for line in read_lines(name):
        if line["form"] not in {"single", "several"}:
            continue
        slots = {
            "{n}": rf"(?P<n>{number})",
            "{m}": rf"(?P<m>{number})",
            "{language}": r"(?P<code>\w+)",
        }
        request, call = made._check(Phrasing(**line))
        pattern = re.escape(line["request"])
        for slot, group in slots.items():
            pattern = pattern.replace(re.escape(slot), group, 1)
        pattern = pattern.replace(re.escape("{text}"), re.escape(call.arguments["text"]))
        pattern = re.sub(r"\\\{(n|m|language)\\\}", r".+?", pattern)
        said = re.fullmatch(pattern, request, re.DOTALL)
        assert said, request
        rules = list(line["rules"])
        for slot, shown in said.groupdict().items():
            value = shown
            if slot == "code":
                value = next(code for code, name in LANGUAGES.items() if name == shown)
            elif not shown.isdigit():
                value = next(str(n) for n in range(1000) if number_in_words(n) == shown)
            rules = [rule.replace(f"{{{slot}}}", value) for rule in rules]
            seen[slot] += 1
        assert call.arguments["rules"] == rules
    assert seen["n"] > 30
    assert seen["code"] > 10 or name.endswith("several")


def test_clauses_are_two_or_three_different_rules_in_their_order():
    made = Conversations(CORPUS, random.Random(0), False)
    clauses = read_phrasings("content_validator_several", False)
    by_rule: dict[str, list[str]] = {}
    for line in clauses:
        if line.form == "clause":
            by_rule.setdefault(line.rules[0].partition(":")[0], []).append(line.request)
    numbers: Counter[int] = Counter()
    for _ in range(300):
        request, call = made._check_clauses(Phrasing("{text}\n>>{clauses}<<", "frame", "foreign"))
        rules, told = call.arguments["rules"], request.partition("\n>>")[2]
        told = request.removeprefix(call.arguments["text"]).strip("\n><")
        assert len({rule.partition(":")[0] for rule in rules}) == len(rules)
        numbers[len(rules)] += 1
        start = 0
        for rule in rules:
            family, _, value = rule.partition(":")
            shown = {"language": [LANGUAGES.get(value, "")]}.get(
                family, [value, number_in_words(int(value))] if value.isdigit() else [""]
            )
            options = [
                one.replace("{n}", how).replace("{language}", how)
                for one in by_rule[family]
                for how in shown
            ]
            ends = [told.find(one, start) + len(one) for one in options if one in told[start:]]
            assert ends, (told, rule)
            start = min(ends)
        low, high = (
            next((int(rule[10:]) for rule in rules if rule.startswith(name)), None)
            for name in ("min_words:", "max_words:")
        )
        assert low is None or high is None or low < high
    assert numbers.keys() == {2, 3}


def test_answer_is_the_verdict_or_the_result():
    check = ToolCall("content_validator", {"text": "a@b.org", "rules": ["is_email"]})
    for text, verdict in (("a@b.org", "Yes."), ("a@", "No.")):
        result = BY_NAME["content_validator"].invoke({**check.arguments, "text": text})
        answer = answer_from(check, result)
        assert answer == f"{verdict} {result.splitlines()[1]}"
    both = "1 of 2 rules passed\nis_url: failed (a)\nis_email: passed (b)"
    assert answer_from(check, both) == f"{ANSWER_OPENING}\n\n{both}"
    wrap = ToolCall("text_formatter", {"text": "a b"})
    assert answer_from(wrap, "a\nb: passed (") == f"{ANSWER_OPENING}\n\na\nb: passed ("


def all_families(half: bool) -> set[str]:
    made = Conversations(CORPUS, random.Random(0), half)
    for kind in KINDS:
        for _ in range(500):
            getattr(made, kind)()
    return made.families


def test_no_family_is_in_both_halves_and_each_is_used():
    train, held_out = all_families(False), all_families(True)
    assert not train & held_out
    assert {is_held_out(family) for family in train} == {False}
    assert {is_held_out(family) for family in held_out} == {True}
    names = [path.stem for path in REQUESTS_DIR.glob("*.jsonl")]
    lines = [line for name in names for line in read_lines(name) if "request" in line]
    assert {line["request"] for line in lines} >= train | held_out
    assert len(train) > 0.8 * sum(not is_held_out(line["request"]) for line in lines)


def test_questions_of_the_corpus_are_asked_when_there_are_enough():
    def asked(number: int) -> int:
        made = Conversations(Corpus(SENTENCES, QUESTIONS[:number]), random.Random(0), False)
        return sum(made.no_tool() in QUESTIONS for _ in range(300))

    assert asked(19) == 0
    assert 30 < asked(20) < 90


def test_conversations_are_not_shared_with_the_corpus():
    before = json.dumps(QUESTIONS)
    made = Conversations(CORPUS, random.Random(0), False)
    for _ in range(200):
        made.no_tool().append({"role": "user", "content": "more"})
    assert json.dumps(QUESTIONS) == before
