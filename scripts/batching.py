"""Order of training rows: little padding, yet no long stretch of rows of one kind."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


def batch_order(lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> list[int]:
    """Order row indices so that neighbours in a micro-batch have similar lengths.

    Rows are shuffled, sorted by length inside groups of 16 micro-batches, and the micro-batches are
    shuffled again: sorting alone lines up rows of one kind (short tool calls, long answers), which
    made training unstable.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows in a micro-batch.
        generator: Source of randomness.

    Returns:
        A permutation of ``range(len(lengths))``; only the last micro-batch may be short.
    """
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    group_size = 16 * batch_size
    batches = []
    for start in range(0, len(shuffled), group_size):
        group = sorted(shuffled[start : start + group_size], key=lambda index: lengths[index])
        batches += [group[at : at + batch_size] for at in range(0, len(group), batch_size)]
    whole = [batch for batch in batches if len(batch) == batch_size]
    short = [index for batch in batches if len(batch) < batch_size for index in batch]
    mixed = torch.randperm(len(whole), generator=generator).tolist()
    return [index for position in mixed for index in whole[position]] + short


class LengthMixedSampler(Sampler[int]):
    """Yield ``batch_order`` anew for each epoch; the same seed gives the same epochs."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; the trainer calls this, also when it resumes."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(batch_order(self.lengths, self.batch_size, generator))
