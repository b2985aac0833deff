"""Order of training rows: every optimizer step is a random draw, its micro-batches fit together.

Length sorting across steps lines up rows of one kind (short tool calls, long answers) and made
training unstable. Here lengths only decide how the rows of one step are dealt to its micro-batches,
which changes neither the step's rows nor its gradient.
"""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


def _deal_evenly(rows: list[int], lengths: Sequence[int], size: int) -> list[list[int]]:
    """Fill micro-batches of ``size`` rows with about the same number of tokens each."""
    num_batches = -(-len(rows) // size)
    room = [size] * num_batches
    room[-1] = len(rows) - size * (num_batches - 1)
    batches: list[list[int]] = [[] for _ in room]
    tokens = [0] * num_batches
    for row in sorted(rows, key=lambda index: -lengths[index]):
        free = [at for at in range(num_batches) if len(batches[at]) < room[at]]
        lightest = min(free, key=lambda at: tokens[at])
        batches[lightest].append(row)
        tokens[lightest] += lengths[row]
    return batches


def _deal_sorted(rows: list[int], lengths: Sequence[int], size: int) -> list[list[int]]:
    """Fill micro-batches with rows of similar length, so that little is padded."""
    ordered = sorted(rows, key=lambda index: lengths[index])
    return [ordered[at : at + size] for at in range(0, len(ordered), size)]


def epoch_batches(
    lengths: Sequence[int],
    micro_batch_size: int,
    micro_batches: int,
    generator: torch.Generator,
    padded: bool,
) -> list[list[int]]:
    """Give the micro-batches of one epoch.

    Args:
        lengths: Tokens of each row.
        micro_batch_size: Rows in a micro-batch.
        micro_batches: Micro-batches in one optimizer step, over all devices.
        generator: Source of randomness.
        padded: Rows are padded to the longest of their micro-batch.

    Returns:
        Row indices of each micro-batch, every row once; only the last one may be short.
    """
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    step_size = micro_batch_size * micro_batches
    deal = _deal_sorted if padded else _deal_evenly
    batches = []
    for start in range(0, len(shuffled), step_size):
        batches += deal(shuffled[start : start + step_size], lengths, micro_batch_size)
    return batches


def padding_share(batches: Sequence[Sequence[int]], lengths: Sequence[int]) -> float:
    """Give the share of computed tokens that would be padding if these batches were padded."""
    real = sum(lengths[row] for batch in batches for row in batch)
    computed = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    return 1 - real / computed


class StepSampler(Sampler[int]):
    """Yield rows in the order of ``epoch_batches``; the same seed gives the same epochs.

    The epoch is set by ``start_epoch``, not by ``set_epoch``: accelerate calls the latter with the
    number of times its loader was iterated, which is wrong after a resume.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        micro_batch_size: int,
        micro_batches: int,
        seed: int,
        padded: bool,
    ) -> None:
        self.lengths, self.micro_batch_size = list(lengths), micro_batch_size
        self.micro_batches, self.seed, self.padded, self.epoch = micro_batches, seed, padded, 0

    def start_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def batches(self) -> list[list[int]]:
        """Give the micro-batches of the chosen epoch."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return epoch_batches(
            self.lengths, self.micro_batch_size, self.micro_batches, generator, self.padded
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter([row for batch in self.batches() for row in batch])
