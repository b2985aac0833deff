"""Loss, perplexity and their intervals, held against a resampling of rows and numbers worked out by hand."""

import math
import random

import pytest

from scripts.loss_statistics import change, summarize

ROWS = [(20.0, 10), (33.0, 15), (8.0, 5), (50.0, 20)]


def test_loss_weighs_every_token_the_same():
    found = summarize(ROWS)
    assert (found["loss"], found["tokens"], found["rows"]) == (2.22, 50, 4)
    assert found["perplexity"] == round(math.exp(2.22), 3)
    assert found["loss"] != round(sum(total / count for total, count in ROWS) / 4, 4)


def test_interval_by_hand():
    # Residuals s - 2.22 n: -2.2, -0.3, -3.1, 5.6; their squares sum to 45.90. t(0.975; 3) = 3.18245.
    half = 3.18245 * math.sqrt(4 / 3 * 45.90) / 50
    assert summarize(ROWS)["loss_95"] == [round(2.22 - half, 4), round(2.22 + half, 4)]
    low, high = summarize(ROWS)["perplexity_95"]
    assert (low, high) == (round(math.exp(2.22 - half), 3), round(math.exp(2.22 + half), 3))


def make_rows(count: int, seed: int) -> list[tuple[float, int]]:
    rng = random.Random(seed)
    counts = [rng.randint(50, 400) for _ in range(count)]
    return [(tokens * rng.gauss(2.5, 0.5), tokens) for tokens in counts]


def test_interval_is_about_that_of_the_bootstrap():
    rows = make_rows(60, 1)
    rng = random.Random(2)
    losses = []
    for _ in range(2000):
        drawn = rng.choices(rows, k=len(rows))
        losses.append(sum(total for total, _ in drawn) / sum(count for _, count in drawn))
    losses.sort()
    low, high = summarize(rows)["loss_95"]
    assert low == pytest.approx(losses[50], abs=0.02)
    assert high == pytest.approx(losses[1950], abs=0.02)
    tokens_as_sample = 1.96 * 0.5 / math.sqrt(sum(count for _, count in rows))
    assert high - low > 5 * tokens_as_sample  # the mistake that makes intervals too narrow


def test_paired_difference_is_sharper_than_two_intervals():
    before = make_rows(13, 3)
    after = [(total - 0.2 * count, count) for total, count in before]
    found = change(before, after)
    assert (found["loss"], found["rows_better"], found["rows"]) == (-0.2, 13, 13)
    assert found["loss_95"] == [-0.2, -0.2]
    (low, _), (_, high) = summarize(before)["loss_95"], summarize(after)["loss_95"]
    assert low < high  # the intervals of the two overlap
    worse = change(after, before)
    assert (worse["loss"], worse["rows_better"]) == (0.2, 0)


def test_one_row_has_no_interval():
    assert summarize([(4.0, 2)])["loss_95"] is None
    assert summarize([(4.0, 2)])["perplexity_95"] is None
    assert change([(4.0, 2)], [(3.0, 2)])["loss_95"] is None


def test_rows_must_be_the_same_and_have_tokens():
    with pytest.raises(ValueError, match="not measured on the same tokens"):
        change([(4.0, 2)], [(4.0, 3)])
    with pytest.raises(ValueError, match="no token is scored"):
        summarize([(0.0, 0)])


def test_hopeless_loss_has_a_finite_perplexity():
    assert math.isfinite(summarize([(1e7, 10), (1e7, 10)])["perplexity"])
