"""What a run tells while it trains: metrics as JSON lines, the picture, one tidy progress line."""

import contextlib
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from scripts._cli import log
from scripts.loss_watch import LossWatch
from scripts.metrics import plot_loss

_LINE_EVERY_S, _PLOT_EVERY_S = 10.0, 30.0


def format_seconds(seconds: float) -> str:
    """Write a duration as ``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextlib.contextmanager
def stop_on_signal(progress: "RunProgress") -> Iterator[None]:
    """Turn the first Ctrl-C or SIGTERM into a flag, so that a step ends and a checkpoint is kept."""

    def ask_to_stop(number: int, frame: Any) -> None:
        if progress.interrupted:
            raise KeyboardInterrupt
        progress.interrupted = True
        log("stopping after this step; the checkpoint is kept (again: stop at once)")

    old = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class RunProgress(TrainerCallback):
    """Metrics, picture, progress line, the watch on the loss, and the stop flag.

    Args:
        metrics_path: JSON lines, one per logged step and one per held-out measurement.
        image_path: Picture of the curves, redrawn while training runs.
        logging_steps: Write a metrics line every this many steps.
        watch: Judges every step.
        is_main: This process is the one that writes.

    Attributes:
        sampler: Order of the rows, told its epoch by this callback; None when TRL orders them.
        interrupted: The user asked to stop.
        failure: Why the run must not go on; None while all is well.
    """

    def __init__(
        self,
        metrics_path: Path,
        image_path: Path,
        logging_steps: int,
        watch: LossWatch,
        is_main: bool,
    ) -> None:
        self.metrics_path, self.image_path = metrics_path, image_path
        self.logging_steps, self.watch, self.is_main = logging_steps, watch, is_main
        self.sampler: Any = None
        self.interrupted = False
        self.failure: str | None = None
        self._started = self._line_at = self._plot_at = time.monotonic()
        self._first_step = 0
        self._held_out: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock; a resumed run starts at its own step."""
        self._started, self._first_step = time.monotonic(), state.global_step
        self._held_out = state.best_metric

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the sampler its epoch, also right after a resume."""
        if self.sampler is not None:
            self.sampler.start_epoch(math.floor((state.epoch or 0) + 1e-6))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure and save at the last step, and when the user asked to stop."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Judge the step, write its metrics and the progress line."""
        if "eval_loss" in logs:
            self._held_out = logs["eval_loss"]
        if "loss" in logs:
            self.failure = self.watch.observe(float(logs["loss"]), logs.get("grad_norm"))
            if self.failure:
                # What this step left behind must not become a checkpoint.
                control.should_training_stop = True
                control.should_save = control.should_evaluate = False
        is_last = state.global_step >= state.max_steps
        if not self.is_main:
            return
        if "loss" not in logs or is_last or state.global_step % self.logging_steps == 0:
            self._write(state.global_step, logs)
        if "loss" in logs:
            self._show(state, logs, is_last or self.failure is not None)

    def _write(self, step: int, logs: dict[str, Any]) -> None:
        # TRL's count is of one process; `tokens` is of all. JSON has no NaN.
        kept: dict[str, Any] = {
            key: value if math.isfinite(value) else None
            for key, value in logs.items()
            if isinstance(value, int | float) and key != "num_tokens"
        }
        kept |= {"step": step, "seconds": round(time.monotonic() - self._started, 1)}
        with self.metrics_path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(kept) + "\n")
        if time.monotonic() - self._plot_at > _PLOT_EVERY_S:
            plot_loss(self.metrics_path, self.image_path)
            self._plot_at = time.monotonic()

    def _show(self, state: Any, logs: dict[str, Any], is_last: bool) -> None:
        done = state.global_step - self._first_step
        left = (
            (time.monotonic() - self._started)
            / max(1, done)
            * (state.max_steps - state.global_step)
        )
        held_out = "" if self._held_out is None else f"  held-out {self._held_out:.3f}"
        line = (
            f"step {state.global_step}/{state.max_steps}  loss {float(logs['loss']):.3f}{held_out}  "
            f"{logs.get('tokens_per_second', 0):.0f} real tokens/s  {format_seconds(left)} left"
        )
        if sys.stderr.isatty():
            print(f"\r{line:<100}", end="\n" if is_last else "", file=sys.stderr, flush=True)
        elif is_last or time.monotonic() - self._line_at > _LINE_EVERY_S:
            log(line)
            self._line_at = time.monotonic()
