"""Scoring of tool calls: what is right, what is exact, and what is counted how; and the shipped requests."""

import json
import re
from pathlib import Path

import pytest

from scripts.tool_answers import read_requests
from scripts.tool_outcomes import (
    ARGUMENT_ERRORS,
    TOOL_NAMES,
    Call,
    ToolAnswer,
    ToolRequest,
    argument_errors,
    bare_text,
    judge,
    normalized,
)
from scripts.tool_requests import REQUESTS_DIR
from scripts.tool_scores import Share, compare, score, score_parts
from tools import TOOLS

TEXT = "The ferry leaves at seven."
OTHER = Call("template_generator", {"template_type": "email"})
DATA_DIR = REQUESTS_DIR.parent
SHIPPED = {"tool_eval_test": 150, "tool_eval_dev": 100}


def wrap(**arguments: object) -> Call:
    return Call("text_formatter", {"text": TEXT, **arguments})


def outcome(expected: Call | None, answer: ToolAnswer, name: str = "a", group: str = "g"):
    return judge(ToolRequest(name, group, [], expected), answer)


def test_tool_names_are_those_of_the_tools():
    assert [tool.name for tool in TOOLS] == list(TOOL_NAMES)


@pytest.mark.parametrize(
    ("expected", "got"),
    [
        ({"text": TEXT}, {"text": f"  {TEXT}\n"}),
        *(({"text": TEXT}, {"text": f"{pair[0]}{TEXT}{pair[1]}"}) for pair in ('""', "''", "``")),
        *(
            ({"text": TEXT}, {"text": f"{pair[0]}{TEXT}{pair[1]}"})
            for pair in ("“”", "‘’", "«»", "„“")
        ),
        ({"text": "I don't"}, {"text": "'I don't'"}),
        ({"text": TEXT}, {"text": TEXT, "width": 80}),
        ({"text": TEXT, "width": 80, "indent": 0}, {"text": TEXT}),
        ({"rules": ["is_url", "not_empty"]}, {"rules": ["not_empty", "is_url", "is_url"]}),
        ({"template_type": "email"}, {"template_type": "email", "fields": {}}),
        ({"template_type": "email", "fields": None}, {"template_type": "email"}),
    ],
)
def test_equal_arguments_have_no_error(expected, got):
    assert argument_errors(expected, got) == ()
    assert normalized(expected) == normalized(got)


@pytest.mark.parametrize(
    ("expected", "got", "errors"),
    [
        ({"text": TEXT}, {"text": TEXT[:-1]}, {"text_cut"}),
        ({"text": TEXT}, {"text": f"Wrap: {TEXT}"}, {"text_too_long"}),
        ({"text": TEXT}, {"text": TEXT.replace("seven", "eight")}, {"text_other"}),
        ({"text": TEXT}, {}, {"text_other"}),
        ({"text": TEXT}, {"text": 7}, {"text_other"}),
        ({"text": TEXT}, {"text": f'"{TEXT}'}, {"text_too_long"}),
        ({"text": TEXT}, {"text": f"“{TEXT}»"}, {"text_too_long"}),
        ({"text": TEXT}, {"text": f"''{TEXT}''"}, {"text_too_long"}),
        ({"width": 40}, {"width": 44}, {"width_wrong"}),
        ({"width": 40}, {"width": "40"}, {"width_wrong"}),
        ({"width": 40}, {}, {"width_missing"}),
        ({"width": 40}, {"width": 80}, {"width_missing"}),
        ({}, {"width": 40}, {"width_added"}),
        ({}, {"width": None}, {"width_added"}),
        ({"indent": 1}, {"indent": True}, {"indent_wrong"}),
        ({"indent": 4}, {"indent": 0}, {"indent_missing"}),
        ({}, {"indent": 4}, {"indent_added"}),
        ({"rules": ["is_url", "not_empty"]}, {"rules": ["is_url"]}, {"rules_missing"}),
        ({"rules": ["is_url"]}, {"rules": ["is_url", "not_empty"]}, {"rules_added"}),
        ({"rules": ["is_url"]}, {"rules": ["is_json"]}, {"rules_missing", "rules_added"}),
        ({"rules": ["min_words:5"]}, {"rules": ["min_words:6"]}, {"rule_parameter"}),
        ({"rules": ["min_words:5"]}, {"rules": ["max_words:5"]}, {"rules_missing", "rules_added"}),
        (
            {"rules": ["min_words:5", "is_url"]},
            {"rules": ["min_words:6", "is_json"]},
            {"rule_parameter", "rules_missing", "rules_added"},
        ),
        ({"rules": ["is_url"]}, {"rules": "is_url"}, {"other"}),
        ({"rules": ["is_url"]}, {"rules": [["is_url"]]}, {"other"}),
        ({"rules": ["is_url"]}, {}, {"rules_missing"}),
        ({"rules": ["is_url"]}, {"rules": []}, {"rules_missing"}),
        ({}, {"rules": []}, {"other"}),
        ({"template_type": "email"}, {"template_type": "report"}, {"template_type"}),
        ({"template_type": "email"}, {}, {"template_type"}),
        ({"fields": {"title": "A"}}, {"fields": {}}, {"fields_missing"}),
        ({}, {"fields": {"title": "A"}}, {"fields_added"}),
        ({"fields": {"title": "A"}}, {"fields": {"title": "B"}}, {"field_value"}),
        (
            {"fields": {"title": "A"}},
            {"fields": {"author": "A"}},
            {"fields_missing", "fields_added"},
        ),
        ({"fields": {"title": "A"}}, {"fields": "A"}, {"other"}),
        ({}, {"colour": "red"}, {"other"}),
    ],
)
def test_different_arguments_are_named(expected, got, errors):
    found = argument_errors(expected, got)
    assert set(found) == errors
    assert list(found) == [kind for kind in ARGUMENT_ERRORS if kind in errors]


def test_quotes_within_a_text_stay():
    assert bare_text('"a" and "b"') == '"a" and "b"'
    assert bare_text('""') == ""
    assert bare_text('"') == '"'


@pytest.mark.parametrize(
    ("expected", "answer", "called", "right", "exact", "errors"),
    [
        (wrap(width=40), ToolAnswer(call=wrap(width=40)), "text_formatter", True, True, ()),
        (wrap(width=40), ToolAnswer(call=wrap(width=44)), "text_formatter", True, False, ("width_wrong",)),
        (wrap(), ToolAnswer("Sure!"), "none", False, False, ("missed_call",)),
        (wrap(), ToolAnswer(call=OTHER), "template_generator", False, False, ("wrong_tool",)),
        (wrap(), ToolAnswer(malformed="cut off"), "malformed", False, False, ("malformed",)),
        (wrap(), ToolAnswer(call=Call("calculator")), "malformed", False, False, ("malformed",)),
        (None, ToolAnswer("Hello!"), "none", True, None, ()),
        (None, ToolAnswer(call=wrap()), "text_formatter", False, None, ("false_call",)),
        (None, ToolAnswer(malformed="no JSON"), "malformed", False, None, ("malformed",)),
    ],
)  # fmt: skip
def test_answers_are_judged(expected, answer, called, right, exact, errors):
    found = outcome(expected, answer)
    assert (found.called, found.right, found.exact, found.errors) == (called, right, exact, errors)


def test_an_outcome_keeps_what_was_got():
    kept = outcome(wrap(width=40), ToolAnswer("x" * 300, call=wrap(width=44))).to_json()
    assert kept["expected"]["arguments"]["width"] == 40
    assert kept["got"]["arguments"]["width"] == 44
    assert kept["text"] == "x" * 200
    assert outcome(wrap(), ToolAnswer(malformed="cut off")).to_json()["got"] == {
        "name": "",
        "arguments": {},
        "error": "cut off",
    }
    assert outcome(None, ToolAnswer("Hi")).to_json()["got"] is None


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    # By hand: centre (p + z²/2n) / (1 + z²/n) with z² = 3.8415; 10 of 10 gives n / (n + z²).
    [(10, 10, 0.7225, 1.0), (0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (90, 100, 0.8256, 0.9448)],
)  # fmt: skip
def test_wilson_interval(hits, total, low, high):
    assert Share(hits, total).interval == pytest.approx((low, high), abs=1e-4)


def test_a_share_of_nothing_has_no_value():
    assert Share.of([None, None]).to_json() == {
        "hits": 0, "total": 0, "share": None, "interval_95": None,
    }  # fmt: skip


OUTCOMES = [
    outcome(wrap(width=40), ToolAnswer(call=wrap(width=40)), "1", "formatter"),
    outcome(wrap(width=40), ToolAnswer(call=wrap(width=44)), "2", "formatter"),
    outcome(wrap(), ToolAnswer("Sure!"), "3", "formatter"),
    outcome(wrap(), ToolAnswer(malformed="cut"), "4", "formatter"),
    outcome(wrap(), ToolAnswer(call=Call("content_validator", {})), "5", "follow_up"),
    outcome(None, ToolAnswer("Hi!"), "6", "none_small_talk"),
    outcome(None, ToolAnswer(call=wrap()), "7", "none_small_talk"),
    outcome(None, ToolAnswer(malformed="cut"), "8", "none_mention"),
]


def test_scores_count_every_kind():
    found = score(OUTCOMES)
    assert (found.choice.hits, found.choice.total) == (3, 8)
    assert (found.exact.hits, found.exact.total) == (1, 5)
    assert (found.false_calls.hits, found.false_calls.total) == (2, 3)
    assert (found.false_calls_small_talk.hits, found.false_calls_small_talk.total) == (1, 2)
    assert (found.missed_calls.hits, found.missed_calls.total) == (1, 5)
    assert found.malformed == 2
    assert found.confusion["text_formatter"] == {
        "text_formatter": 2, "template_generator": 0, "content_validator": 1, "none": 1, "malformed": 1,
    }  # fmt: skip
    assert found.confusion["none"]["text_formatter"] == 1
    assert sum(sum(row.values()) for row in found.confusion.values()) == len(OUTCOMES)
    assert found.argument_errors == {"width_wrong": 1}
    assert found.to_json()["choice"]["share"] == 0.375


def test_parts_add_up_to_the_whole():
    groups = score_parts(OUTCOMES, lambda one: one.group)
    assert list(groups) == ["formatter", "follow_up", "none_small_talk", "none_mention"]
    assert sum(part.choice.hits for part in groups.values()) == 3
    assert groups["formatter"].choice.hits == 2


def test_comparison_counts_both_ways():
    exact, wrong, missed = (
        ToolAnswer(call=wrap()),
        ToolAnswer(call=wrap(width=9)),
        ToolAnswer("no"),
    )
    before = [outcome(wrap(), one, str(n)) for n, one in enumerate([exact, exact, missed, wrong])]
    now = [outcome(wrap(), one, str(n)) for n, one in enumerate([exact, wrong, exact, missed])]
    changes = compare(before, now)
    assert (changes["choice"].became_wrong, changes["choice"].became_right) == (["3"], ["2"])
    assert (changes["exact"].became_wrong, changes["exact"].became_right) == (["1"], ["2"])
    assert compare(before, [*now[:3], before[3]])["choice"].points == 25
    assert compare(before, before)["exact"].to_json()["points"] == 0
    with pytest.raises(ValueError, match="same requests"):
        compare(before, now[:2])


# The shipped requests ----------------------------------------------------------------------------


def user_turns(request: ToolRequest) -> list[str]:
    """What the user wrote; results of tools come in user turns too."""
    turns = [turn["content"] for turn in request.messages if turn["role"] == "user"]
    return [turn for turn in turns if not turn.startswith("<tool_response>")]


def problems(request: ToolRequest) -> list[str]:
    """What is wrong with a request as a measure."""
    if request.call is None:
        return []
    tool = next(tool for tool in TOOLS if tool.name == request.call.name)
    arguments, found = request.call.arguments, []
    if str(tool.invoke(arguments)).startswith("error: "):
        found.append("the tool refuses the call")
    values = [arguments["text"]] if "text" in arguments else []
    values += (arguments.get("fields") or {}).values()
    turns = user_turns(request)
    found += [value for value in values if not any(value in turn for turn in turns)]
    return found


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_requests_are_valid(name):
    requests = read_requests(DATA_DIR / f"{name}.jsonl")  # refuses ids that come twice
    assert len(requests) >= SHIPPED[name]
    assert {request.call.name for request in requests if request.call} == set(TOOL_NAMES)
    assert {one.id: found for one in requests if (found := problems(one))} == {}


def test_the_two_files_share_no_request():
    one, other = (
        {tuple(user_turns(request)) for request in read_requests(DATA_DIR / f"{name}.jsonl")}
        for name in SHIPPED
    )
    assert one & other == set()


def test_an_invalid_request_is_found():
    messages = [{"role": "user", "content": f"Wrap: {TEXT}"}]
    assert problems(ToolRequest("a", "g", messages, wrap(width=40))) == []
    assert problems(ToolRequest("a", "g", messages, wrap(width=4))) == ["the tool refuses the call"]
    assert problems(ToolRequest("a", "g", [{"role": "user", "content": "Wrap"}], wrap())) == [TEXT]


_WORDS = re.compile(r"\{\w+\}|[^\W_]+(?:['’][^\W_]+)*")
SHARED_WORDS = 6


def skeleton(text: str) -> list[str]:
    """Words of a request, its numbers and what it is about as placeholders."""
    text = re.sub(r"\{(?:width|indent|n|m)\}|\d+", "{n}", text)
    return [word.lower() for word in _WORDS.findall(text)]


def runs(words: list[str]) -> set[tuple[str, ...]]:
    """Runs of so many words that a placeholder does not interrupt; and a short request as a whole."""
    grams = zip(*(words[at:] for at in range(SHARED_WORDS)), strict=False)
    found = {gram for gram in grams if not any(word.startswith("{") for word in gram)}
    return found | ({("whole", *words)} if len(words) >= 4 else set())


def shared_phrasings(requests: list[ToolRequest], phrasings: list[str]) -> dict[str, list[str]]:
    known = {run for phrasing in phrasings for run in runs(skeleton(phrasing))}
    found = {}
    for request in requests:
        text = (request.call.arguments if request.call else {}).get("text")
        written = request.messages[-1]["content"]
        written = written.replace(text, "{text}") if text else written
        if both := runs(skeleton(written)) & known:
            found[request.id] = [" ".join(run) for run in both]
    return found


def training_phrasings() -> list[str]:
    lines = [
        json.loads(line)
        for path in sorted(Path(REQUESTS_DIR).glob("*.jsonl"))
        if path.stem != "texts"
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    assert len(lines) > 1000
    return [line[key] for line in lines for key in ("request", "then") if line.get(key)]


@pytest.mark.parametrize("name", SHIPPED)
def test_no_shipped_request_has_a_phrasing_of_the_training_data(name):
    found = shared_phrasings(read_requests(DATA_DIR / f"{name}.jsonl"), training_phrasings())
    assert found == {}


@pytest.mark.parametrize("name", SHIPPED)
def test_no_shipped_text_is_one_of_the_training_data(name):
    lines = (REQUESTS_DIR / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    texts = {" ".join(skeleton(json.loads(line)["text"])) for line in lines}
    requests = read_requests(DATA_DIR / f"{name}.jsonl")
    own = [one.call.arguments.get("text", "") for one in requests if one.call]
    assert [text for text in own if text and " ".join(skeleton(text)) in texts] == []


def test_a_shared_phrasing_is_found():
    def request(content: str) -> list[ToolRequest]:
        return [ToolRequest("a", "g", [{"role": "user", "content": content}], wrap())]

    known = ["Please be good and fold this for me: {text}", "make it {width} wide: {text}"]
    same = f"Hi! Please be good and fold this. {TEXT}"
    assert shared_phrasings(request(same), known) == {"a": ["please be good and fold this"]}
    assert list(shared_phrasings(request(f"Make it 30 wide: {TEXT}"), known)) == ["a"]
    assert shared_phrasings(request(f"Be good and fold {TEXT}"), known) == {}
