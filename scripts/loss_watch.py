"""Watch a run's loss, and stop it with a reason instead of training on garbage."""

import math
import statistics

# A fresh fp16 loss scale starts at 65536 and skips the first steps until it fits; more in a row is no warm-up.
MAX_SKIPPED_IN_A_ROW = 10
COLLAPSED_LOSS = 1e-4
_WINDOW = 5
_DIVERGED_FACTOR, _DIVERGED_RISE = 2.0, 2.0


class LossWatch:
    """Judge every optimizer step.

    Args:
        fp16: Steps are scaled; a step whose gradient overflowed was skipped, not applied.
    """

    def __init__(self, fp16: bool = False) -> None:
        self.fp16, self.applied, self.skipped = fp16, 0, 0
        self._skipped_in_a_row = 0
        self._first: list[float] = []
        self._recent: list[float] = []

    def observe(self, loss: float, gradient_norm: float | None) -> str | None:
        """Take one step's loss and gradient norm.

        Returns:
            None while all is well, else what went wrong and what to change.
        """
        if not math.isfinite(loss):
            return f"the loss became {loss}; lower learning_rate, or lower max_grad_norm" + (
                ", or train with load_in_4bit: false" if not self.fp16 else ""
            )
        if gradient_norm is not None and not math.isfinite(gradient_norm):
            if not self.fp16:
                return f"the gradient became {gradient_norm}; lower learning_rate or max_grad_norm"
            self.skipped += 1
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
                return (
                    f"{self._skipped_in_a_row} steps in a row overflowed in fp16 and were skipped; "
                    "set packing: true, or lower learning_rate"
                )
            return None
        self._skipped_in_a_row = 0
        self.applied += 1
        return self._judge(loss)

    def _judge(self, loss: float) -> str | None:
        """Compare an applied step's loss with the run's first ones."""
        self._recent = [*self._recent, loss][-_WINDOW:]
        if len(self._first) < _WINDOW:
            self._first.append(loss)
            return None
        first, now = statistics.median(self._first), statistics.median(self._recent)
        if max(self._recent) < COLLAPSED_LOSS:
            return (
                f"the loss collapsed to {loss:.1g} for {_WINDOW} steps: nothing is learned from it; "
                "lower learning_rate and look at the rows with --preview 3"
            )
        if now > max(_DIVERGED_FACTOR * first, first + _DIVERGED_RISE):
            return f"the loss rose from {first:.2f} to {now:.2f}; lower learning_rate"
        return None
