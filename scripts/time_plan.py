"""How long a run will take, from a short timed probe, and how many rows fit into a time budget."""

import datetime
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from scripts._cli import CommandError
from scripts.estimates import TRAINED_BYTES, Workload
from scripts.recipe import TrainingRecipe

# Share of a budget that stays unplanned: probes are short, and machines are not always idle.
RESERVE = 0.10
MIN_ROWS = 8
# LoRA has no weight gradients for the base, so backward costs what forward does: forward is half.
FORWARD_SHARE = 0.5
# Export on two cores, TinyLlama size (1.1 B): merge 16 s, conversion 10 s, Q4_K_M 26 s; seconds
# per 10^9 parameters, beside a start of each process. Merge and conversion are bound by memory.
START_SECONDS, MERGE_RATE, CONVERT_RATE = 3.0, 14.5, 6.0
QUANTIZE_RATES = {"F16": 0.0, "Q8_0": 8.0, "Q4_0": 8.0}
K_QUANT_RATE = 22.0
REFERENCE_THREADS = 2
# Verification of one file: start and load; the float32 reference and llama.cpp on a few prompts.
VERIFY_START, VERIFY_RATE = 5.0, 25.0
# `evaluate`: imports, then two greedy answers; a token reads all weights once, in 16 bits.
EVALUATE_START, ANSWER_TOKENS, TOKEN_SECONDS = 10.0, 240, 0.02
CPU_READ_RATE, CUDA_READ_RATE = 20e9, 300e9
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
        threads: For quantizing.
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
    """Estimate merge, conversion and quantization."""
    billions = parameters / 1e9
    merge_convert = 2 * START_SECONDS + (MERGE_RATE + CONVERT_RATE) * billions
    speed = max(1, threads) / REFERENCE_THREADS
    kinds = [kind for kind in quantizations if kind != "F16"]
    rates = sum(QUANTIZE_RATES.get(kind, K_QUANT_RATE) for kind in kinds)
    return merge_convert + START_SECONDS * len(kinds) + rates * billions / speed


def verify_seconds(parameters: int, num_files: int) -> float:
    """Estimate the verification of all GGUF files."""
    return num_files * (VERIFY_START + VERIFY_RATE * parameters / 1e9)


def evaluate_seconds(inputs: PlanInputs) -> float:
    """Estimate the evaluation stage: base and tuned on the held-out rows, two answers."""
    read_rate = CUDA_READ_RATE if inputs.on_cuda else CPU_READ_RATE
    answers = ANSWER_TOKENS * (TOKEN_SECONDS + 2 * inputs.parameters / read_rate)
    losses = 2 * FORWARD_SHARE * inputs.seconds_per_token * inputs.eval_tokens
    return EVALUATE_START + inputs.load_seconds + losses + answers


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
        "verification": verify_seconds(inputs.parameters, len(inputs.quantizations)),
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
            f"{least} rows on top take{_enough(whole.total)}; give more time, fewer GGUF types, or a smaller "
            "model"
        )
    return low * step_rows


def _rows_per_step(recipe: TrainingRecipe) -> int:
    return recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps


def _enough(seconds: float) -> str:
    """Name a budget that would do, the reserve included."""
    minutes = math.ceil(seconds / (1 - RESERVE) / 60)
    return f" a budget of {minutes}m"
