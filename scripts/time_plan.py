"""How long a run will take, from a short timed probe, and how many rows fit into a time budget."""

import datetime
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from scripts._cli import CommandError
from scripts.estimates import TRAINED_BYTES, VERIFY_POSITIONS, Workload
from scripts.recipe import TrainingRecipe

# Share of a budget that stays unplanned: probes are short, and machines are not always idle.
RESERVE = 0.10
MIN_ROWS = 8
# LoRA has no weight gradients for the base, so backward costs what forward does: forward is half.
FORWARD_SHARE = 0.5
# Export: seconds per 10^9 parameters on two cores (AMD EPYC, TinyLlama size), beside the start of
# parent, child and converter. Reading and merging happens once, quantization for each type.
REFERENCE_THREADS = 2
EXPORT_START, MERGE_RATE = 5.0, 2.0
# What a type's name begins with, more letters first. Q4_K to Q6_K are export/fast_quants.c, without
# which Q4_K_M would take 30; F32 to Q4_0 are as slow as the disk; I-quants search a grid for every
# few weights.
OTHER_RATE = 30.0
QUANTIZE_RATES = {
    **dict.fromkeys(("Q6_K", "Q5_K", "Q4_K"), 3.0),
    "Q3_K": 6.0,
    "Q2_K": 28.0,
    **dict.fromkeys(("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"), 3.5),
    "IQ4": 90.0,
    "IQ3": 200.0,
    "IQ": 250.0,
}
# Verification on two cores: imports, then 2 FLOP for each parameter and position. The reference
# computes in float32, once for all files; llama.cpp in 8 bits or 16, its answer of some words
# included (SmolLM2-135M, 4,096 positions: 30 CPU seconds for the reference, 17 for each file).
REFERENCE_START, REFERENCE_FLOPS = 6.0, 80e9
VERIFY_START, VERIFY_FLOPS = 5.0, 160e9
# `evaluate`: imports, then two greedy answers; a token reads all weights once, in 16 bits.
EVALUATE_START, ANSWER_TOKENS, TOKEN_SECONDS = 10.0, 240, 0.02
CPU_READ_RATE, CUDA_READ_RATE = 20e9, 300e9
# Then base and tuned answer prompts, so many side by side (SmolLM2-135M on two cores: 0.12 s a step
# of 16, answers of 250 tokens in the mean; a GPU is taken to be 100 times faster).
PROMPTS, PROMPTS_AT_ONCE, MEAN_ANSWER, ANSWER_FLOPS, CUDA_SPEED_UP = 96, 16, 250, 40e9, 100
# Loss, speed and memory of each file, on the CPU; large files take fewer rows (evaluation_gguf.py).
MEASURE_START, MEASURE_LIMIT = 4.0, 200.0
CHECKPOINT_SECONDS, WRITE_RATE = 0.5, 100e6
DOWNLOAD_RATE = 50e6  # an assumption: nothing is downloaded to measure it

_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(h|min|m|s)")
_UNIT_SECONDS = {"h": 3600, "min": 60, "m": 60, "s": 1}


def parse_duration(text: str) -> float:
    """Read ``55m``, ``1h30m``, ``90s`` or ``2h`` as seconds.

    Raises:
        CommandError: No duration, no unit, or zero.
    """
    compact = text.strip().lower()
    if re.fullmatch(r"\d+(\.\d+)?", compact):
        raise CommandError(
            f"duration '{text}' has no unit; did you mean {compact}m (minutes)? expected such as "
            "55m, 1h30m or 90s"
        )
    parts = _PART.findall(compact)
    units = [unit[0] for _, unit in parts]
    in_order = units == sorted(set(units), key="hms".index)
    if not parts or not in_order or _PART.sub("", compact).strip():
        raise CommandError(f"duration '{text}' is not understood; expected such as 55m or 1h30m")
    seconds = sum(float(number) * _UNIT_SECONDS[unit] for number, unit in parts)
    if seconds <= 0:
        raise CommandError(f"duration '{text}' is no time at all; expected such as 55m or 1h30m")
    return seconds


def format_duration(seconds: float) -> str:
    """Write a duration as people say it: ``54 s``, ``13 min``, ``1 h 05 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


@dataclass(frozen=True)
class PlanInputs:
    """What is known before training.

    Attributes:
        recipe: Batch sizes, epochs, how often checkpoints are written.
        workload: Row lengths in training order.
        parameters: Of the base model.
        adapter_parameters: Of the adapter.
        seconds_per_token: Of forward and backward, measured; padding counts as tokens.
        seconds_per_step: Of the optimizer, measured; 0 if it is in ``seconds_per_token``.
        load_seconds: Of loading the model, measured; the evaluation stage loads it again.
        elapsed_seconds: What was spent already: data, loading, the probe.
        eval_tokens: Tokens of all held-out rows.
        eval_steps: Optimizer steps between held-out evaluations in training; 0 = none.
        quantizations: GGUF types of the export.
        threads: For export and verification.
        on_cuda: Whether evaluation runs on a GPU.
        download_bytes: Still to be downloaded by the export.
    """

    recipe: TrainingRecipe
    workload: Workload
    parameters: int
    adapter_parameters: int
    seconds_per_token: float
    seconds_per_step: float = 0.0
    load_seconds: float = 10.0
    elapsed_seconds: float = 0.0
    eval_tokens: int = 0
    eval_steps: int = 0
    quantizations: Sequence[str] = ("F16", "Q8_0", "Q4_K_M")
    threads: int = REFERENCE_THREADS
    on_cuda: bool = False
    download_bytes: int = 0


@dataclass(frozen=True)
class TimePlan:
    """Rows, optimizer steps and tokens of a run (all epochs), and seconds by stage."""

    rows: int
    steps: int
    real_tokens: int
    computed_tokens: int
    seconds: dict[str, float]

    @property
    def total(self) -> float:
        """Seconds of all stages, with what was spent already."""
        return sum(self.seconds.values())

    @property
    def left(self) -> float:
        """Seconds that are still to come."""
        return self.total - self.seconds["so far"]

    def finish(self, now: datetime.datetime) -> datetime.datetime:
        """Give the time of day at which everything is done."""
        return now + datetime.timedelta(seconds=self.left)


def export_seconds(
    parameters: int, quantizations: Sequence[str], threads: int = REFERENCE_THREADS
) -> float:
    """Estimate the one pass that writes all GGUF files."""
    if not quantizations:
        return 0.0
    rates = [MERGE_RATE, *map(_quantize_rate, quantizations)]
    return EXPORT_START + sum(rates) * parameters / 1e9 / _speed(threads)


def _quantize_rate(kind: str) -> float:
    """Give the seconds per 10^9 parameters of a type."""
    rates = (rate for name, rate in QUANTIZE_RATES.items() if kind.upper().startswith(name))
    return next(rates, OTHER_RATE)


def verify_seconds(parameters: int, num_files: int, threads: int = REFERENCE_THREADS) -> float:
    """Estimate the verification of all GGUF files in one command."""
    if num_files == 0:
        return 0.0
    operations = 2 * parameters * VERIFY_POSITIONS / _speed(threads)
    reference = REFERENCE_START + operations / REFERENCE_FLOPS
    return reference + num_files * (VERIFY_START + operations / VERIFY_FLOPS)


def _speed(threads: int) -> float:
    return max(1, threads) / REFERENCE_THREADS


def evaluate_seconds(inputs: PlanInputs) -> float:
    """Estimate evaluation and report: held-out rows and answers of base and tuned, then each file."""
    read_rate = CUDA_READ_RATE if inputs.on_cuda else CPU_READ_RATE
    answers = ANSWER_TOKENS * (TOKEN_SECONDS + 2 * inputs.parameters / read_rate)
    losses = 2 * FORWARD_SHARE * inputs.seconds_per_token * inputs.eval_tokens
    speed = _speed(inputs.threads)
    prompts = PROMPTS if inputs.recipe.eval_prompts < 0 else inputs.recipe.eval_prompts
    steps = (
        2
        * math.ceil(prompts / PROMPTS_AT_ONCE)
        * min(MEAN_ANSWER, inputs.recipe.eval_answer_tokens)
    )
    flops = ANSWER_FLOPS * (CUDA_SPEED_UP if inputs.on_cuda else speed)
    step = TOKEN_SECONDS + PROMPTS_AT_ONCE * 2 * inputs.parameters / flops
    reading = inputs.eval_tokens * 2 * inputs.parameters / VERIFY_FLOPS / speed
    files = len(inputs.quantizations) * (MEASURE_START + min(MEASURE_LIMIT, reading))
    start = EVALUATE_START + inputs.load_seconds
    return start + losses + answers + steps * step + files


def plan_time(inputs: PlanInputs, rows: int | None = None) -> TimePlan:
    """Plan a run on the first ``rows`` rows, or on all of them."""
    recipe, workload = inputs.recipe, inputs.workload
    rows = len(workload.lengths) if rows is None else rows
    batches = workload.micro_batches(recipe.per_device_train_batch_size, recipe.max_length, rows)
    steps_per_epoch = math.ceil(len(batches) / recipe.gradient_accumulation_steps)
    steps = math.ceil(recipe.num_train_epochs * steps_per_epoch)
    if recipe.max_steps > 0:
        steps = recipe.max_steps  # it wins over epochs, as in transformers
    epochs = steps / steps_per_epoch if steps_per_epoch else 0.0
    tokens = round(epochs * sum(batches))
    real = round(epochs * sum(min(n, recipe.max_length) for n in workload.lengths[:rows]))
    evaluations = steps // inputs.eval_steps if inputs.eval_steps else 0
    held_out = FORWARD_SHARE * inputs.seconds_per_token * inputs.eval_tokens
    state_bytes = inputs.adapter_parameters * (
        TRAINED_BYTES["adapter"] + TRAINED_BYTES["optimizer"]
    )
    checkpoints = math.ceil(steps / recipe.save_steps)
    seconds = {
        "so far": inputs.elapsed_seconds,
        "training": tokens * inputs.seconds_per_token + steps * inputs.seconds_per_step,
        "held-out loss": evaluations * held_out,
        "checkpoints": checkpoints * (CHECKPOINT_SECONDS + state_bytes / WRITE_RATE),
        "evaluation": evaluate_seconds(inputs),
        "download": inputs.download_bytes / DOWNLOAD_RATE,
        "export": export_seconds(inputs.parameters, inputs.quantizations, inputs.threads),
        "verification": verify_seconds(
            inputs.parameters, len(inputs.quantizations), inputs.threads
        ),
    }
    return TimePlan(rows, steps, real, tokens, seconds)


def rows_within_budget(inputs: PlanInputs, budget_seconds: float) -> int:
    """Choose how many of the first rows end in time: training, evaluation, export and verification.

    A tenth of the budget stays in reserve. The number is whole optimizer steps, or all rows.

    Raises:
        CommandError: Not even one step (or 8 rows) fits, or ``max_steps`` alone takes longer.
    """
    usable = (1 - RESERVE) * budget_seconds
    available, step_rows = len(inputs.workload.lengths), _rows_per_step(inputs.recipe)
    if plan_time(inputs).total <= usable:
        return available
    if inputs.recipe.max_steps > 0:
        raise CommandError(
            f"a time budget of {format_duration(budget_seconds)} does not hold max_steps "
            f"{inputs.recipe.max_steps}, which need{_enough(plan_time(inputs).total)}; set "
            "max_steps: -1 and let the budget choose the rows"
        )
    low, high = 0, available // step_rows + 1  # in steps: low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        fits = plan_time(inputs, middle * step_rows).total <= usable
        low, high = (middle, high) if fits else (low, middle)
    least = min(available, max(MIN_ROWS, step_rows))
    if low * step_rows < least:
        whole, fixed = plan_time(inputs, least), plan_time(inputs, 0)
        raise CommandError(
            f"a time budget of {format_duration(budget_seconds)} is too short: model load, "
            f"evaluation and export alone need about {format_duration(fixed.total)}, and "
            f"{least} rows on top take{_enough(whole.total)}; give more time, fewer GGUF types, fewer prompts "
            "(--eval-prompts 16), or a smaller model"
        )
    return low * step_rows


def _rows_per_step(recipe: TrainingRecipe) -> int:
    return recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps


def _enough(seconds: float) -> str:
    """Name a budget that would do, the reserve included."""
    minutes = math.ceil(seconds / (1 - RESERVE) / 60)
    return f" a budget of {minutes}m"
