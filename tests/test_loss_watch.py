"""The watch on the loss stops garbage and leaves every healthy curve alone."""

import math
import random

import pytest

from scripts.loss_watch import MAX_SKIPPED_IN_A_ROW, LossWatch

NAN, INF = float("nan"), float("inf")


def verdicts(watch: LossWatch, losses: list[float], norm: float | None = 1.0) -> list[str | None]:
    return [watch.observe(loss, norm) for loss in losses]


def falling(steps: int = 200) -> list[float]:
    rng = random.Random(1)
    return [1.2 + 2.3 * math.exp(-step / 40) + rng.uniform(-0.45, 0.45) for step in range(steps)]


def test_noisy_falling_loss_passes():
    watch = LossWatch()
    assert set(verdicts(watch, falling())) == {None}
    assert (watch.applied, watch.skipped) == (200, 0)


def test_a_single_outlier_passes():
    losses = falling()
    losses[100] = 15.0
    assert set(verdicts(LossWatch(), losses)) == {None}


@pytest.mark.parametrize("norm", [None, 1.0])
def test_norm_may_be_absent(norm):
    assert LossWatch().observe(2.0, norm) is None


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("fp16", [False, True])
def test_loss_that_is_not_finite_stops_at_once(bad, fp16):
    watch = LossWatch(fp16)
    verdicts(watch, [2.0, 1.9])
    reason = watch.observe(bad, 1.0)
    assert str(bad) in reason
    assert "learning_rate" in reason
    assert watch.applied == 2


@pytest.mark.parametrize("bad", [NAN, INF])
def test_gradient_that_is_not_finite_stops_bf16(bad):
    watch = LossWatch()
    assert "the gradient became" in watch.observe(2.0, bad)
    assert watch.applied == 0


def test_fp16_may_skip_its_first_steps():
    watch = LossWatch(fp16=True)
    assert set(verdicts(watch, [2.0] * MAX_SKIPPED_IN_A_ROW, INF)) == {None}
    assert (watch.applied, watch.skipped) == (0, MAX_SKIPPED_IN_A_ROW)
    assert set(verdicts(watch, falling())) == {None}
    assert watch.applied == 200


def test_fp16_skipping_on_and_on_stops():
    watch = LossWatch(fp16=True)
    *before, last = verdicts(watch, [2.0] * (MAX_SKIPPED_IN_A_ROW + 1), INF)
    assert set(before) == {None}
    assert "11 steps in a row overflowed" in last
    assert watch.applied == 0


def test_fp16_skips_count_in_a_row_only():
    watch = LossWatch(fp16=True)
    for step in range(60):
        assert watch.observe(2.0, 1.0 if step % 10 == 9 else INF) is None
    assert (watch.applied, watch.skipped) == (6, 54)


def test_collapse_to_zero_stops():
    watch = LossWatch()
    assert set(verdicts(watch, falling(20))) == {None}
    *before, last = verdicts(watch, [0.0] * 5)
    assert set(before) == {None}
    assert "collapsed" in last


@pytest.mark.parametrize("steady", [0.0, 1e-6])
def test_loss_that_is_zero_from_the_start_stops(steady):
    assert "collapsed" in verdicts(LossWatch(), [steady] * 6)[-1]


def test_low_loss_is_no_collapse():
    assert set(verdicts(LossWatch(), falling(20) + [0.003] * 50)) == {None}


def test_divergence_stops():
    rising = falling(50) + [1.2 * 1.15**step for step in range(20)]
    reasons = [reason for reason in verdicts(LossWatch(), rising) if reason]
    assert "the loss rose from" in reasons[0]


@pytest.mark.parametrize("level", [4.0, 0.4])
def test_a_loss_somewhat_above_its_start_passes(level):
    """Both bounds must be crossed: twice the start, and two nats above it."""
    start = [level] * 5
    assert set(verdicts(LossWatch(), start + [level + 1.9] * 20)) == {None}
    assert verdicts(LossWatch(), start + [2 * level + 2.1] * 20)[-1]
