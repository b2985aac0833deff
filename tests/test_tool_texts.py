"""The texts that tool requests are about: numbers in words, a corpus, and texts for rules."""

import json
import random
from collections import Counter

import pytest

from scripts._cli import CommandError
from scripts.tool_requests import Phrasing, is_held_out, read_lines
from scripts.tool_texts import MIN_SENTENCES, Corpus, Texts, number_in_words
from tools.content_validator import check_content

# num2words' spellings, checked by hand.
NUMBERS = {
    0: "zero", 1: "one", 10: "ten", 11: "eleven", 12: "twelve", 13: "thirteen", 14: "fourteen",
    15: "fifteen", 18: "eighteen", 19: "nineteen", 20: "twenty", 21: "twenty-one", 30: "thirty",
    40: "forty", 42: "forty-two", 55: "fifty-five", 68: "sixty-eight", 77: "seventy-seven",
    80: "eighty", 99: "ninety-nine", 100: "one hundred", 101: "one hundred and one",
    112: "one hundred and twelve", 120: "one hundred and twenty",
    345: "three hundred and forty-five", 900: "nine hundred",
    999: "nine hundred and ninety-nine",
}  # fmt: skip
SENTENCES = [f"Sentence {n} of the corpus is long enough to be used here." for n in range(30)]
BANK = read_lines("texts")
HALVES = {
    half: {line["text"] for line in BANK if is_held_out(line["text"]) == half}
    for half in (False, True)
}


def make_texts(seed: int = 0, held_out: bool = False, sentences: list[str] = SENTENCES) -> Texts:
    return Texts(Corpus(sentences, []), random.Random(seed), held_out)


@pytest.mark.parametrize(("number", "words"), NUMBERS.items())
def test_number_in_words(number, words):
    assert number_in_words(number) == words


def test_all_numbers_have_words_of_their_own():
    words = [number_in_words(number) for number in range(1000)]
    assert len(set(words)) == 1000
    known = {part for word in NUMBERS.values() for part in word.replace("-", " ").split()}
    rest = {part for word in words for part in word.replace("-", " ").split()} - known
    assert rest == {"four", "six", "sixteen", "seventeen"}  # spelt as they should be


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


USABLE = "This plain sentence has between 40 and 160 characters."
NOT_USABLE = [
    "Too short to be used.",
    "This one " + "is far too long to be used as a text " * 5 + ".",
    "this one begins with a small letter, which plain ones don't.",
    "This one has no full stop at its end and is a heading perhaps",
    *(f"This one has a {mark} in it, which may be markup of some kind." for mark in '`*|#"{}<>'),
]


def test_corpus_takes_plain_sentences_once():
    text = " ".join([USABLE, "Is this question also taken, as it is long enough? Yes!"])
    text += "\n" + "\n".join(NOT_USABLE)
    corpus = Corpus.of([[message("system", USABLE), message("user", text)]])
    assert corpus.sentences == [USABLE, "Is this question also taken, as it is long enough?"]


@pytest.mark.parametrize("length", [29, 30, 110, 111])
def test_corpus_takes_sentences_of_30_to_110_characters(length):
    sentence = "A" * (length - 1) + "."
    found = Corpus.of([[message("user", sentence)]]).sentences
    assert found == ([sentence] if 30 <= length <= 110 else [])


def test_corpus_takes_short_single_exchanges_as_questions():
    short = [message("user", "Why?"), message("assistant", "So.")]
    others = [
        [message("system", "Be brief."), *short],
        [*short, *short],
        [message("user", "Why?"), message("assistant", "x" * 596)],
    ]
    assert Corpus.of([short, *others]).questions == [short]
    others[-1][1]["content"] = "x" * 595
    assert Corpus.of([short, *others]).questions == [short, others[-1]]


def test_too_small_a_corpus_is_refused():
    with pytest.raises(CommandError, match="tool_rows: the data has 19 plain sentences") as caught:
        Corpus(SENTENCES[: MIN_SENTENCES - 1], []).require_sentences()
    assert "expected at least 20" in str(caught.value)
    Corpus(SENTENCES[:MIN_SENTENCES], []).require_sentences()


def drawn_texts(texts: Texts) -> set[str]:
    return {texts.any() for _ in range(900)}


@pytest.mark.parametrize("half", [False, True])
def test_bank_and_corpus_are_both_used_and_the_other_half_never(half):
    texts = make_texts(held_out=half)
    drawn = drawn_texts(texts)
    drawn |= {texts.for_rules([rule]) for rule in ("language:en", "has_headings") * 200}
    assert drawn >= HALVES[half] - {line["text"] for line in BANK if line["form"] == "code"}
    assert not drawn & HALVES[not half]
    assert drawn >= set(SENTENCES)
    assert drawn & drawn_texts(make_texts(held_out=not half)) & HALVES[half] == set()


def test_bank_is_well_formed():
    forms = Counter(line["form"] for line in BANK)
    assert set(map(frozenset, BANK)) == {frozenset({"form", "text"})}
    assert {"short", "markdown", "code", "email_body", "non_english"} <= forms.keys()
    assert min(forms.values()) >= 12
    assert all(line["text"].strip() and len(line["text"]) < 2000 for line in BANK)
    # Each form that rules draw from has texts in both halves.
    for half in (False, True):
        left = {line["form"] for line in BANK if is_held_out(line["text"]) == half}
        assert {"short", "markdown", "code", "email_body", "non_english"} <= left


def test_no_text_of_the_bank_stands_within_one_of_the_other_half():
    def within(some: set[str], others: set[str]) -> list[str]:
        return [text for text in some if any(text in other for other in others)]

    for half in (False, True):
        assert within(HALVES[half], HALVES[not half]) == []
    text = min(HALVES[True])
    assert within({text}, {f"Re: {text}"}) == [text]


@pytest.mark.parametrize(
    "rule",
    ["is_email", "is_url", "is_json", "has_headings", "no_placeholders", "balanced_brackets"],
)
def test_about_every_other_text_holds_its_rule(rule):
    texts = make_texts()
    held = sum(check_content(texts.for_rules([rule]), [rule])[0].passed for _ in range(400))
    assert 0.35 < held / 400 < 0.65
    other = sum(check_content(texts.any(), [rule])[0].passed for _ in range(400))
    assert not 0.35 < other / 400 < 0.65  # any texts nearly all hold it, or nearly none


def test_texts_for_other_rules_are_made_for_them():
    texts = make_texts()
    fenced = ["```" in texts.for_rules(["has_code_block"]) for _ in range(300)]
    assert 0.12 < sum(fenced) / 300 < 0.5
    assert sum("```" in texts.any() for _ in range(300)) < 0.1 * 300
    lengths = [len(texts.for_rules(["not_empty"])) for _ in range(100)]
    assert sorted(lengths)[50] < 40
    languages = [texts.for_rules(["language:{code}"]) for _ in range(200)]
    foreign = {line["text"] for line in BANK if line["form"] == "non_english"}
    assert 0.3 < sum(text in foreign for text in languages) / 200 < 0.6


def test_a_made_text_is_of_one_of_the_rules():
    texts = make_texts()
    made = [texts.for_rules(["max_words:{n}", "is_json"]) for _ in range(200)]
    assert sum(text[:1] in "{[" for text in made) > 150
    assert sum(texts.for_rules(["max_words:{n}"])[:1] in "{[" for _ in range(200)) < 30


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def test_broken_json_is_broken_and_whole_json_is_whole(monkeypatch):
    texts = make_texts()
    for whole in (True, False):
        monkeypatch.setattr(texts, "_holds", lambda whole=whole: whole)
        made = [texts._json() for _ in range(300)]
        assert {is_json(text) for text in made} == {whole}
        assert len(set(made)) > 150


def test_made_texts_have_no_white_space_at_their_ends():
    texts = make_texts()
    made = [texts.for_rules([rule]) for rule in texts._makers for _ in range(300)]
    assert [text for text in made if text != text.strip()] == []


def test_texts_of_the_bank_have_no_white_space_at_their_ends():
    assert [line["text"] for line in BANK if line["text"] != line["text"].strip()] == []


def test_widths_indents_and_limits_are_what_tools_accept():
    texts = make_texts()
    widths = [texts.width() for _ in range(2000)]
    indents = [texts.indent() for _ in range(500)]
    # The narrowest line has room for the deepest indent and two columns.
    assert min(widths) >= max(indents) + 2
    assert min(widths) >= 10
    assert max(widths) <= 400
    assert min(indents) >= 1
    assert len(set(widths)) > 60
    assert len(set(indents)) == 10
    near = 0
    for words in (1, 4, 30, 120):
        text = "word " * words
        for _ in range(100):
            low, high = texts.word_limits(text)
            assert 2 <= low < high <= 999
            near += abs(low - words) <= 6
    assert near > 40


def test_numbers_are_sometimes_words():
    texts = make_texts()
    written = Counter(texts.number(42, Phrasing("{width} columns")) for _ in range(1000))
    assert written.keys() == {"42", "forty-two"}
    assert 80 < written["forty-two"] < 170


def test_same_seed_same_texts():
    def some(seed: int) -> list[str]:
        texts = make_texts(seed)
        rules = ["is_email", "is_url", "is_json", "balanced_brackets", "no_placeholders"]
        return [texts.for_rules([rule]) for rule in rules * 4] + [texts.any() for _ in range(9)]

    assert some(1) == some(1)
    assert some(1) != some(2)
