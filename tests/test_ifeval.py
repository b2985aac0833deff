"""Prompts with verifiable rules: the reader, the verdicts of every checker, the scores; the shipped prompts."""

import importlib
import itertools
import json
import logging
import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from scripts import ifeval
from scripts._cli import FAILED, CommandError
from scripts.ifeval import Judged, Prompt, compare, judge, read_prompts, score

SHIPPED = Path("scripts/data/ifeval_prompts.jsonl")
ENGLISH, RUSSIAN = range(5001, 5073), range(5101, 5125)
LEAST, FEWER = "at least", "less than"
QUESTION = "What is a tide?"
GERMAN = "Das Meer steigt und fällt zweimal am Tag, weil der Mond das Wasser anzieht."
TIDE = "The sea rises and falls twice a day because the moon pulls the water."
RUSSIAN_TIDE = "Море поднимается и опускается два раза в день, потому что его притягивает луна."

# Instruction id, arguments, an answer that follows it, one that does not.
RULES = [
    ("keywords:existence", {"keywords": ["moon", "sea"]}, "The MOON pulls the sea.", "The moon."),
    ("keywords:existence", {"keywords": ["соль"]}, "Соль и вода", "Солёная вода"),
    (
        "keywords:frequency",
        {"keyword": "moon", "relation": LEAST, "frequency": 2},
        "Moon by moon",
        "moon",
    ),
    ("keywords:frequency", {"keyword": "moon", "relation": FEWER, "frequency": 1}, "sea", "moon"),
    ("keywords:forbidden_words", {"forbidden_words": ["good"]}, "goods", "Good, then"),
    ("keywords:forbidden_words", {"forbidden_words": ["цветы"]}, "цветок", "Цветы."),
    (
        "keywords:letter_frequency",
        {"letter": "Z", "let_relation": LEAST, "let_frequency": 2},
        "Zig zag",
        "zebra",
    ),
    (
        "keywords:letter_frequency",
        {"letter": "#", "let_relation": LEAST, "let_frequency": 4},
        "#a #b #c #d",
        "#a #b #c and many letters",
    ),
    (
        "keywords:letter_frequency",
        {"letter": "!", "let_relation": FEWER, "let_frequency": 2},
        "Hello there!",
        "Oh! Hi!",
    ),
    ("language:response_language", {"language": "de"}, GERMAN, TIDE),
    ("language:response_language", {"language": "ru"}, RUSSIAN_TIDE, TIDE),
    (
        "length_constraints:number_sentences",
        {"relation": LEAST, "num_sentences": 3},
        "It is. Is it? Yes!",
        "It is 3.5 metres high, Dr. Sea says. Yes.",
    ),
    (
        "length_constraints:number_sentences",
        {"relation": LEAST, "num_sentences": 3},
        "Ночью темно. Солнце ушло! Утром оно вернётся.",
        "Ночью темно, утром светло. Вот и всё.",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
    (
        "length_constraints:number_words",
        {"relation": FEWER, "num_words": 3},
        "только два",
        "здесь три слова",
    ),
    ("length_constraints:number_words", {"relation": LEAST, "num_words": 3}, "a b c", "a b"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "however"},
        "It is.\n\nHowever, no.",
        "However, no.\n\nIt is.",
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        "[name], [имя]",
        "[name], (date)",
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        "Yes.\nP.S. No.",
        "Yes.\nPS: No.",
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.P.S"},
        "A.\nP.P.S Yes.",
        "A.\nP.S. B.",
    ),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n* b\n* c"),
    ("detectable_format:constrained_response", {}, "My answer is maybe.", "Maybe."),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        "*a* and *b*",
        "*a* b",
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Раздел", "num_sections": 2},
        "Раздел 1\nа\nРаздел 2\nб",
        "Раздел 1\nа\nб",
    ),
    ("detectable_format:json_format", {}, '```json\n{"а": [1]}\n```', "{'a': 1}"),
    ("detectable_format:title", {}, "<<Луна>>\nи море", "<< >>\nи море"),
    ("combination:two_responses", {}, "one\n******\ntwo", "one\n******\none"),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": QUESTION},
        f"{QUESTION} {TIDE}",
        f"You ask: {QUESTION}",
    ),
    ("startend:end_checker", {"end_phrase": "Ask me."}, "It is so. ask me.", "Ask me. It is so."),
    (
        "change_case:capital_word_frequency",
        {"capital_relation": LEAST, "capital_frequency": 2},
        "STOP it NOW",
        "STOP it Now",
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_relation": FEWER, "capital_frequency": 2},
        "STOP it",
        "STOP it NOW",
    ),
    ("change_case:english_capital", {}, TIDE.upper(), TIDE),
    ("change_case:english_lowercase", {}, TIDE.lower(), GERMAN.lower()),
    ("punctuation:no_comma", {}, "one; two", "one, two"),
    ("startend:quotation", {}, ' "yes" ', "«yes»"),
]


def one_rule(rule: str, given: dict) -> Prompt:
    return Prompt("7", QUESTION, [rule], [given])


def row(**changes) -> dict:
    return {
        "key": 1,
        "prompt": QUESTION,
        "instruction_id_list": ["length_constraints:number_words", "punctuation:no_comma"],
        "kwargs": [{"relation": LEAST, "num_words": 30}, {}],
        **changes,
    }


def rule_row(rule: str, **given) -> dict:
    return row(instruction_id_list=[rule], kwargs=[given])


@pytest.fixture
def write(tmp_path):
    def call(*rows, encoding: str = "utf-8", end: str = "\n") -> Path:
        path = tmp_path / "prompts.jsonl"
        lines = [one if isinstance(one, str) else json.dumps(one) for one in rows]
        path.write_bytes("".join(line + end for line in lines).encode(encoding))
        return path

    return call


@pytest.fixture(scope="module")
def shipped() -> list[Prompt]:
    return read_prompts(SHIPPED)


# Judging -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "given", "good", "bad"), RULES)
def test_each_rule_is_followed_by_one_answer_and_not_by_the_other(rule, given, good, bad):
    prompt = one_rule(rule, given)
    assert judge(prompt, good) == Judged([True], [True])
    assert judge(prompt, bad).followed == [False]


def test_table_has_every_instruction_id():
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

    assert {rule for rule, *_ in RULES} == set(INSTRUCTION_DICT)
    assert len(INSTRUCTION_DICT) == 25


@pytest.mark.parametrize(
    ("answer", "loosely"),
    [("Sure, here it is:\nno comma", True), ("no comma\nBye, now", True), ("a, b\nc\nd, e", True)],
)
def test_loose_verdict_looks_past_a_first_and_a_last_line(answer, loosely):
    assert judge(one_rule("punctuation:no_comma", {}), answer) == Judged([False], [loosely])


def test_loose_verdict_does_not_look_past_the_middle():
    assert judge(one_rule("punctuation:no_comma", {}), "a\nb, c\nd") == Judged([False], [False])


def test_rules_of_a_prompt_are_judged_apart_and_in_order():
    rules = ["punctuation:no_comma", "detectable_format:json_format", "detectable_format:title"]
    prompt = Prompt("7", QUESTION, rules, [{}, {}, {}])
    assert judge(prompt, "[1, 2]").followed == [False, True, False]
    assert judge(prompt, "<<a>>").followed == [True, False, True]


@pytest.mark.parametrize("answer", ["", " \n\t", "<think>no comma", "<think>no comma</think>\n"])
def test_empty_answer_follows_nothing(answer):
    rules = ["punctuation:no_comma", "length_constraints:number_words"]
    prompt = Prompt("7", QUESTION, rules, [{}, {"relation": FEWER, "num_words": 9}])
    assert judge(prompt, answer) == Judged([False, False], [False, False])
    assert judge(prompt, answer + "</think>x").followed == [True, True]


def test_json_nested_too_deeply_is_not_followed_and_ends_nothing():
    prompt = one_rule("detectable_format:json_format", {})
    assert judge(prompt, "[" * 5000 + "]" * 5000) == Judged([False], [False])
    assert judge(prompt, "[" * 50 + "]" * 50).followed == [True]


def test_answer_without_letters_counts_as_published_and_is_not_logged(caplog):
    prompt = one_rule("language:response_language", {"language": "ru"})
    assert judge(prompt, "1 2 3").followed == [True]
    assert not caplog.records
    logging.error("logging works again")
    assert len(caplog.records) == 1


def test_unknown_rule_is_no_silent_verdict():
    with pytest.raises(KeyError):
        judge(one_rule("keywords:none", {}), TIDE)


# langdetect samples a text, and what is missing is drawn: both would differ from run to run.
CHANCE = [
    ("language:response_language", {"language": "en"}),
    ("language:response_language", {}),
    ("length_constraints:number_words", {"relation": LEAST}),
    ("length_constraints:number_sentences", {"num_sentences": 2}),
    ("keywords:letter_frequency", {"letter": "e", "let_relation": LEAST}),
    ("keywords:existence", {}),
]


def test_verdicts_do_not_depend_on_chance_nor_change_it():
    prompts = [
        Prompt(str(at), QUESTION, [rule], [given]) for at, (rule, given) in enumerate(CHANCE * 6)
    ]
    answers = [
        *(" ".join([TIDE] * count) for count in (1, 12)),
        "The sea is blue and wide. heute haben wir Zeit",
    ]
    seen = []
    for seed in (1, 2, 3):
        random.seed(seed)
        state = random.getstate()
        seen.append([judge(prompt, answer) for prompt in prompts for answer in answers])
        assert random.getstate() == state
    assert seen[0] == seen[1] == seen[2]
    # What is missing is still drawn, once for each prompt.
    drawn = [judge(prompt, "eeeee").followed[0] for prompt in prompts[4 :: len(CHANCE)]]
    assert set(drawn) == {True, False}


def test_published_checker_draws_a_letter_instead_of_a_number_sign():
    """The twin of the "#" row above: what the published class says of it is left to chance."""
    from if_verifiable.ifeval.instructions import LetterFrequencyChecker

    verdicts = set()
    state = random.getstate()
    for seed in range(40):
        random.seed(seed)
        checker = LetterFrequencyChecker("keywords:letter_frequency")
        checker.build_description(letter="#", let_relation=LEAST, let_frequency=2)
        verdicts.add(checker.check_following("many letters"))
    random.setstate(state)
    assert verdicts == {True, False}
    given = {"letter": "#", "let_relation": LEAST, "let_frequency": 2}
    assert not judge(one_rule("keywords:letter_frequency", given), "many letters").followed[0]


# Reading -----------------------------------------------------------------------------------------


def test_published_form_and_hub_form_read_the_same(write):
    published = row(key=1001)
    names = ("relation", "num_words", "keywords", "letter", "num_bullets", "prompt_to_repeat")
    hub = [dict.fromkeys(names) | given for given in published["kwargs"]]
    expected = Prompt("1001", QUESTION, published["instruction_id_list"], published["kwargs"])
    assert read_prompts(write(published)) == [expected]
    assert read_prompts(write(row(key="1001", kwargs=hub))) == [expected]


def test_byte_order_mark_line_ends_and_line_separators_are_read(write):
    text = "Привет\u2028мир"
    line = json.dumps(row(prompt=text), ensure_ascii=False)
    for rows, form in (
        ((line, "", row(key=2)), {"encoding": "utf-8-sig"}),
        ((line, " ", row(key=2)), {"end": "\r\n"}),
    ):
        read = read_prompts(write(*rows, **form))
        assert [(one.id, one.prompt) for one in read] == [("1", text), ("2", QUESTION)]


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ('{"key": 1,', "got no JSON"),
        ("[" * 100_000, "got no JSON"),
        ("[1]", "got list, expected an object with key, prompt"),
        ({"key": 1, "prompt": "a"}, "instruction_id_list, kwargs: missing"),
        (row(key=1.5), "key: got 1.5, expected a number or a text"),
        (row(key=True), "key: got True"),
        (row(key=""), "key: got ''"),
        (row(prompt=" "), "prompt: got ' '"),
        (row(prompt=None), "prompt: got None"),
        (row(instruction_id_list="punctuation:no_comma"), "expected a list of instruction ids"),
        (row(instruction_id_list=[], kwargs=[]), "expected a list of instruction ids"),
        (row(kwargs={}), "kwargs: got {}, expected a list of objects"),
        (row(kwargs=[{}, None]), "expected a list of objects"),
        (row(kwargs=[{}]), "kwargs: got 1 for 2 instructions, expected one each"),
        (rule_row("punctuation:no_coma"), "'punctuation:no_coma' is unknown, the nearest "
         "instruction id is 'punctuation:no_comma'"),
        (rule_row("?"), "'?' is unknown, the nearest"),
        (rule_row("keywords:existence", keyword="a"), "does not know 'keyword', expected keywords"),
        (rule_row("punctuation:no_comma", n=1), "does not know 'n', expected no argument"),
        (rule_row("keywords:existence", keywords="sea"), "keywords of keywords:existence is 'sea'"),
        (rule_row("keywords:forbidden_words", forbidden_words=[1]), "does not take"),
        (rule_row("keywords:frequency", keyword="(a"), "does not take {'keyword': '(a'} (missing )"),
        (rule_row("length_constraints:number_words", num_words="9"), "does not take"),
        (rule_row("length_constraints:number_words", relation="more"), "supported relation"),
        (rule_row("language:response_language", language="xx"), "does not take"),
        (rule_row("startend:end_checker", end_phrase=5), "does not take"),
        (rule_row("combination:repeat_prompt"), "prompt_to_repeat must be set"),
        (row(key=7), "key: '7' was line 1 already, expected another"),
        (row(key="7"), "key: '7' was line 1 already"),
    ],
)  # fmt: skip
def test_bad_line_is_named_with_what_was_expected(write, bad, expected):
    path = write(row(key=7), "", bad)
    with pytest.raises(CommandError, match=re.escape(expected)) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert str(caught.value).endswith("; correct this line")


def test_line_that_is_no_utf8_is_named(write):
    path = write(row())
    path.write_bytes(path.read_bytes() + b'{"key": "\xff"}\n')
    with pytest.raises(CommandError, match=r"prompts\.jsonl:2: got a byte that is no UTF-8"):
        read_prompts(path)


def test_file_without_prompts_or_no_file_is_refused(write, tmp_path):
    with pytest.raises(CommandError, match="has no prompt"):
        read_prompts(write("", " "))
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(CommandError, match=r"cannot be read \(.+\); expected a JSONL file"):
            read_prompts(path)


@pytest.mark.parametrize("missing", ["if_verifiable", "punkt_tab"])
def test_what_is_not_installed_is_one_line(write, monkeypatch, missing):
    import nltk

    if missing == "punkt_tab":
        monkeypatch.setattr(nltk.data, "path", [])
    else:
        name = "if_verifiable.ifeval.instructions"
        importlib.import_module(name)
        monkeypatch.setitem(sys.modules, name, None)
    ifeval._checkers.cache_clear()
    with pytest.raises(CommandError, match=rf"{missing}.* install it: scripts/setup\.sh") as caught:
        read_prompts(write(row()))
    assert caught.value.exit_code == FAILED
    monkeypatch.undo()
    assert len(read_prompts(write(row()))) == 1


# Scores ------------------------------------------------------------------------------------------

COUNTED = [
    Prompt("1", "a", ["keywords:existence", "startend:quotation"], [{}, {}]),
    Prompt("2", "b", ["keywords:frequency"], [{}]),
    Prompt("3", "c", ["keywords:existence", "punctuation:no_comma"], [{}, {}]),
]
BASE = [
    Judged([True, True], [True, True]),
    Judged([False], [True]),
    Judged([True, False], [True, False]),
]
TUNED = [
    Judged([True, False], [True, True]),
    Judged([True], [True]),
    Judged([False, True], [False, True]),
]


def test_scores_are_those_counted_by_hand():
    result = score(COUNTED, BASE).to_json()
    counts = {name: (share["hits"], share["total"]) for name, share in result["groups"].items()}
    assert counts == {"keywords": (2, 3), "punctuation": (0, 1), "startend": (1, 1)}
    del result["groups"]
    assert {name: (share["hits"], share["total"]) for name, share in result.items()} == {
        "prompt_strict": (1, 3),
        "prompt_loose": (2, 3),
        "instruction_strict": (3, 5),
        "instruction_loose": (4, 5),
    }
    assert result["instruction_strict"]["share"] == 0.6
    low, high = result["instruction_strict"]["interval_95"]
    assert 0 < low < 0.6 < high < 1


def test_scores_of_nothing_and_of_another_number_of_verdicts():
    assert score([], []).to_json()["prompt_strict"]["share"] is None
    with pytest.raises(ValueError, match="shorter"):
        score(COUNTED, BASE[:2])


def test_comparison_counts_prompts_by_followed_rules():
    assert vars(compare(BASE, TUNED)) == {"wins": 1, "ties": 1, "losses": 1, "p_value": 1.0}
    assert vars(compare(BASE, BASE)) == {"wins": 0, "ties": 3, "losses": 0, "p_value": 1.0}
    better = compare([Judged([False], [True])] * 8, [Judged([True], [True])] * 8)
    # 8 of 8 by chance, on either side: 2 / 2 ** 8.
    assert better.to_json() == {"wins": 8, "ties": 0, "losses": 0, "p_value": 0.007812}
    with pytest.raises(ValueError, match="shorter"):
        compare(BASE, TUNED[:2])


# The shipped prompts -----------------------------------------------------------------------------


def conflicts(prompts: list[Prompt]) -> list[str]:
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_CONFLICTS

    return [
        one.id
        for one in prompts
        for first, second in itertools.permutations(one.rules, 2)
        if second in INSTRUCTION_CONFLICTS[first]
    ]


def missing_arguments(prompts: list[Prompt]) -> list[str]:
    return [
        one.id
        for one in prompts
        for rule, given in zip(one.rules, one.kwargs, strict=True)
        if set(given) != set(ifeval._checkers()[rule](rule).get_instruction_args_keys())
    ]


def unstated_arguments(prompts: list[Prompt]) -> list[str]:
    """Rules with a text argument that the prompt does not show."""
    named = ("keywords", "keyword", "forbidden_words", "letter", "end_phrase", "first_word",
             "section_spliter", "postscript_marker", "prompt_to_repeat")  # fmt: skip
    found = []
    for one in prompts:
        for given in one.kwargs:
            for name in set(named) & set(given):
                texts = given[name] if isinstance(given[name], list) else [given[name]]
                found += [one.id for text in texts if text not in one.prompt]
    return found


def test_shipped_prompts_are_as_many_as_promised(shipped):
    by_language = [[one for one in shipped if int(one.id) in keys] for keys in (ENGLISH, RUSSIAN)]
    assert list(map(len, by_language)) == [len(ENGLISH), len(RUSSIAN)]
    assert len({" ".join(one.prompt.casefold().split()) for one in shipped}) == len(shipped) == 96
    assert Counter(len(one.rules) for one in shipped) == {1: 58, 2: 29, 3: 9}
    english = Counter(rule for one in by_language[0] for rule in one.rules)
    assert set(english) == set(ifeval._checkers())
    assert min(english.values()) >= 2
    assert all(re.search("[а-яё]", one.prompt) for one in by_language[1])
    assert not any(re.search("[а-яё]", one.prompt) for one in by_language[0])


def test_shipped_prompts_state_their_rules_and_leave_nothing_to_chance(shipped):
    assert not conflicts(shipped)
    assert not missing_arguments(shipped)
    assert not unstated_arguments(shipped)


def test_faults_of_shipped_prompts_would_be_found():
    rules = ["detectable_format:json_format", "detectable_format:title"]
    json_title = Prompt("1", "x", rules, [{}, {}])
    words = one_rule("length_constraints:number_words", {"num_words": 9})
    ending = one_rule("startend:end_checker", {"end_phrase": "Bye."})
    assert conflicts([json_title]) == ["1"]
    assert missing_arguments([words, ending]) == ["7"]
    assert unstated_arguments([words, ending]) == ["7"]


def test_no_answer_of_a_kind_follows_every_shipped_prompt(shipped):
    for answer in (TIDE, RUSSIAN_TIDE, "", "[" * 1500):
        verdicts = [judge(one, answer) for one in shipped]
        assert all(len(one.rules) == len(got.followed) == len(got.loosely)
                   for one, got in zip(shipped, verdicts, strict=True))  # fmt: skip
        assert score(shipped, verdicts).instruction_strict.value < 0.5
