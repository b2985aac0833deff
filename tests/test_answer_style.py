"""Length, ends, chat markers and repetition of answers."""

import pytest

from scripts.answer_style import Answer, is_clean, is_looping, repeated_ngrams, summarize


@pytest.mark.parametrize(
    "text",
    [
        "So.<|im_end|>",
        "<|im_start|>user\nHi",
        "Yes</s>",
        "[INST] Hi [/INST]",
        "A.\n### Instruction:\nB",
        "### Response: A",
    ],
)
def test_chat_markers_are_found(text):
    assert not is_clean(text)


@pytest.mark.parametrize(
    "text", ["", "a < b | c > d", "### Instructions for use\n1. Open", "Привет, мир!"]
)
def test_plain_text_is_clean(text):
    assert is_clean(text)


@pytest.mark.parametrize("period", [1, 2, 7, 30])
def test_loops_are_seen_at_the_end_only(period):
    words = [f"w{number}" for number in range(period)]
    looping = " ".join(["One", "start", *(words * 30)])
    assert is_looping(looping)
    assert is_looping(looping + " w0")  # it may be cut anywhere
    assert not is_looping(looping + " and so it ends")


def test_lists_and_refrains_are_no_loops():
    assert not is_looping("one two three " * 2)
    assert not is_looping(" ".join(f"{number}. item" for number in range(60)))
    assert not is_looping("la la la")
    assert is_looping("la " * 24)


def test_repeated_ngrams_by_hand():
    # a b a b a: pairs ab ba ab ba, two of four were there before.
    assert repeated_ngrams("a b a b a", 2) == 0.5
    assert repeated_ngrams("a b c d", 2) == 0
    assert repeated_ngrams("a", 4) == 0


def test_summary_counts_by_hand():
    found = summarize(
        [Answer("one two three", 4, True), Answer("", 0, True), Answer("no " * 40, 41, False)]
    )
    assert (found["tokens_mean"], found["tokens_median"], found["words_median"]) == (15.0, 4, 3)
    shares = {name: found[name]["hits"] for name in ("ended", "clean", "empty", "looping")}
    assert shares == {"ended": 2, "clean": 3, "empty": 1, "looping": 1}
    assert found["repeated_4grams"] == pytest.approx((0 + 0 + 36 / 37) / 3, abs=1e-4)


def test_no_answers_is_an_error():
    with pytest.raises(ValueError, match="no answers"):
        summarize([])
