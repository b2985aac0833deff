"""Time: durations as people write them, stages as measured, rows that end within a budget."""

import dataclasses
import datetime

import pytest

from scripts._cli import CommandError
from scripts.estimates import Workload
from scripts.evaluate_model import PROMPTS_PATH
from scripts.recipe import TrainingRecipe
from scripts.time_plan import (
    FORWARD_SHARE,
    PROMPTS,
    PlanInputs,
    evaluate_seconds,
    export_seconds,
    format_duration,
    parse_duration,
    plan_time,
    rows_within_budget,
    verify_seconds,
)

RECIPE = TrainingRecipe(
    per_device_train_batch_size=4, gradient_accumulation_steps=2, save_steps=20, eval_prompts=0
)


def inputs(recipe=RECIPE, num_rows=10_000, **more) -> PlanInputs:
    return PlanInputs(
        recipe,
        Workload([100 + 40 * (at % 7) for at in range(num_rows)], padded=False),
        parameters=134_515_008,
        adapter_parameters=4_884_480,
        seconds_per_token=0.002,
        seconds_per_step=0.1,
        eval_tokens=5_000,
        eval_steps=20,
        **more,
    )


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("55m", 3300),
        ("1h30m", 5400),
        ("90s", 90),
        ("2h", 7200),
        (" 1H 05M ", 3900),
        ("1.5h", 5400),
        ("10min", 600),
    ],
)
def test_durations_are_read(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("45", r"'45' has no unit; did you mean 45m \(minutes\)\?"),
        ("", "not understood; expected such as 55m"),
        ("soon", "not understood"),
        ("5m1h", "not understood"),
        ("1h1h", "not understood"),
        ("1h30", "not understood"),
        ("-5m", "not understood"),
        ("0m", "no time at all"),
    ],
)
def test_what_is_no_duration_is_refused(text, message):
    with pytest.raises(CommandError, match=message):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(54, "54 s"), (99, "99 s"), (754, "13 min"), (3599, "1 h 00 min"), (3900, "1 h 05 min")],
)
def test_durations_are_written(seconds, text):
    assert format_duration(seconds) == text


# Two cores, a model of 1.17 B weights: seconds of starting, and half of the CPU seconds that came
# on top (other programs ran beside it).
@pytest.mark.parametrize(
    ("kinds", "measured"),
    [(["F16", "Q8_0", "Q4_0"], 5 + (31.7 - 8.4) / 2), (["Q4_K_M"], 5 + (18.8 - 8.4) / 2)],
)
def test_export_times_are_as_measured(kinds, measured):
    assert export_seconds(1_170_000_000, kinds) == pytest.approx(measured, rel=0.2)


def test_the_base_is_read_once_for_all_types():
    one, both = export_seconds(7e9, ["Q8_0"]), export_seconds(7e9, ["Q8_0", "F16"])
    apart = one + export_seconds(7e9, ["F16"])
    assert one < both < apart
    assert apart - both == pytest.approx(5 + 2 * 7)  # a start, and 2 s for 10^9 weights
    assert export_seconds(7e9, []) == 0


def test_types_cost_what_their_arithmetic_costs():
    names = ["F16", "Q8_0", "Q4_0", "q4_0", "Q4_K_M", "Q3_K_S", "Q2_K", "IQ4_XS", "IQ2_XS"]
    cost = {name: export_seconds(1e9, [name]) - export_seconds(0, [name]) - 2 for name in names}
    assert (
        cost["F16"]
        == cost["Q8_0"]
        == cost["Q4_0"]
        == cost["q4_0"]
        < cost["Q3_K_S"]
        < cost["Q2_K"]
        < cost["IQ4_XS"]
    )
    assert cost["Q4_K_M"] == pytest.approx(3.0)
    assert cost["IQ4_XS"] < cost["IQ2_XS"]


def test_more_threads_help_the_work_but_not_the_starts():
    for seconds in (
        lambda parameters, threads: export_seconds(parameters, ["Q4_K_M"], threads),
        lambda parameters, threads: verify_seconds(parameters, 1, threads),
    ):
        start = seconds(0, 2)
        assert start == seconds(0, 8) > 0
        assert seconds(7e9, 8) - start == pytest.approx((seconds(7e9, 2) - start) / 4)


def test_verification_times_are_as_measured():
    # SmolLM2-135M, CPU seconds for 4,096 positions: reference 30 (imports 6), each file 17 (start
    # 5); half as many positions are taken, and two cores share what is no start
    reference, file = 6 + (30 - 6) / 2 / 2, 5 + (17 - 5) / 2 / 2
    measured = reference + 3 * file
    assert verify_seconds(134_515_008, 3) == pytest.approx(measured, rel=0.2)
    assert verify_seconds(134_515_008, 1) == pytest.approx(reference + file, rel=0.2)
    assert verify_seconds(134_515_008, 0) == 0


def test_the_reference_is_evaluated_once_for_all_files():
    one, three = verify_seconds(7e9, 1), verify_seconds(7e9, 3)
    assert three < 2 * one  # the reference takes longer than two files
    assert three - one == pytest.approx(2 * (5 + 2 * 7e9 * 2048 / 160e9))


def test_plan_prices_export_and_verification_of_its_types():
    def stages(*kinds):
        return plan_time(inputs(num_rows=80, quantizations=kinds, threads=4)).seconds

    two = stages("F16", "Q4_K_M")
    assert two["export"] == export_seconds(134_515_008, ["F16", "Q4_K_M"], 4)
    assert two["verification"] == verify_seconds(134_515_008, 2, 4)
    assert stages("Q4_K_M")["verification"] < two["verification"]


def test_plan_prices_answers_and_files():
    def evaluation(kinds=(), **recipe):
        changed = dataclasses.replace(RECIPE, **recipe)
        return plan_time(inputs(changed, num_rows=80, quantizations=kinds)).seconds["evaluation"]

    none = evaluation(eval_prompts=0)
    # The demo: a batch of 16 prompts of 96 tokens took base and tuned some 25 s.
    few = evaluation(eval_prompts=16, eval_answer_tokens=96)
    assert few - none == pytest.approx(25, rel=0.2)
    assert evaluation(eval_prompts=17, eval_answer_tokens=96) - none == pytest.approx(
        2 * (few - none)
    )
    assert evaluation(eval_prompts=-1) == evaluation(eval_prompts=PROMPTS) > few
    assert len(PROMPTS_PATH.read_text(encoding="utf-8").splitlines()) == PROMPTS
    # 5,733 rows' tokens took each file of the demo some 13 s.
    assert evaluation(("Q8_0",), eval_prompts=0) - none == pytest.approx(13, rel=0.2)
    large = dataclasses.replace(inputs(num_rows=80), parameters=7_000_000_000, eval_tokens=10**6)
    more = dataclasses.replace(large, eval_tokens=2 * 10**6)
    losses = 2 * FORWARD_SHARE * 0.002 * 10**6
    assert evaluate_seconds(more) - evaluate_seconds(large) == pytest.approx(losses)


def test_plan_counts_steps_and_tokens_as_the_trainer_does():
    # 20 rows: five micro-batches of four, so three optimizer steps
    plan = plan_time(inputs(num_rows=20))
    assert (plan.rows, plan.steps) == (20, 3)
    assert plan.real_tokens == plan.computed_tokens == sum(inputs(num_rows=20).workload.lengths)
    expected = 0.002 * plan.computed_tokens + 3 * 0.1
    assert plan.seconds["training"] == pytest.approx(expected)
    assert plan.total == pytest.approx(sum(plan.seconds.values()))
    twice = plan_time(inputs(dataclasses.replace(RECIPE, num_train_epochs=2), num_rows=20))
    assert (twice.steps, twice.real_tokens) == (6, 2 * plan.real_tokens)


def test_max_steps_wins_over_epochs():
    plan = plan_time(inputs(dataclasses.replace(RECIPE, max_steps=5), num_rows=800))
    assert plan.steps == 5
    assert plan.real_tokens == pytest.approx(5 * 8 * 220, rel=0.05)


def test_padding_costs_time():
    whole = inputs(num_rows=80)
    padded = dataclasses.replace(whole, workload=Workload(whole.workload.lengths, padded=True))
    assert plan_time(padded).computed_tokens > plan_time(whole).computed_tokens
    assert plan_time(padded).real_tokens == plan_time(whole).real_tokens


def test_finish_leaves_out_what_is_over():
    now = datetime.datetime(2026, 1, 1, 12, 0)
    plan = plan_time(inputs(num_rows=80, elapsed_seconds=600))
    assert plan.finish(now) == now + datetime.timedelta(seconds=plan.total - 600)


@pytest.mark.parametrize("minutes", [5, 20, 55])
def test_rows_end_in_time_and_one_step_more_would_not(minutes):
    known = inputs(elapsed_seconds=30)
    rows = rows_within_budget(known, 60 * minutes)
    assert 8 <= rows < 10_000
    assert rows % 8 == 0
    assert plan_time(known, rows).total <= 0.9 * 60 * minutes
    assert plan_time(known, rows + 8).total > 0.9 * 60 * minutes


def test_everything_fits_into_a_long_budget():
    assert rows_within_budget(inputs(num_rows=77), 3600) == 77


def test_a_budget_that_holds_no_training_is_refused_with_one_that_does():
    with pytest.raises(CommandError, match="is too short: model load, evaluation and export") as e:
        rows_within_budget(inputs(), 60)
    enough = parse_duration(str(e.value).partition("a budget of ")[2].split(";")[0])
    assert rows_within_budget(inputs(), enough) >= 8


def test_max_steps_against_a_budget():
    recipe = dataclasses.replace(RECIPE, max_steps=10_000)
    with pytest.raises(CommandError, match=r"max_steps 10000.*set max_steps: -1"):
        rows_within_budget(inputs(recipe), 3600)
    free = dataclasses.replace(RECIPE, max_steps=-1)
    assert 8 <= rows_within_budget(inputs(free), 3600) < 10_000
