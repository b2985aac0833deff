"""Order of rows: a step is a random draw, and dealing its rows to micro-batches changes nothing."""

import itertools
import random

import pytest
import torch

from scripts.batching import StepSampler, epoch_batches, padding_share

NUM_ROWS = 150  # not a multiple of the steps' 8 rows


def make_lengths(count: int = NUM_ROWS) -> list[int]:
    rng = random.Random(1)
    return [rng.choice((rng.randint(30, 90), rng.randint(200, 600))) for _ in range(count)]


def make_batches(
    lengths: list[int], size: int = 4, micro_batches: int = 2, padded: bool = False, seed: int = 1
) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return epoch_batches(lengths, size, micro_batches, generator, padded)


def rows_per_step(batches: list[list[int]], micro_batches: int) -> list[set[int]]:
    return [
        set(itertools.chain(*batches[at : at + micro_batches]))
        for at in range(0, len(batches), micro_batches)
    ]


def sorted_order(lengths: list[int]) -> list[list[int]]:
    """What this module replaced: rows of similar length in one step."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    return [order[at : at + 4] for at in range(0, len(order), 4)]


def spread(batches: list[list[int]], lengths: list[int]) -> float:
    """Mean difference in tokens between the two micro-batches of a whole step."""
    tokens = [sum(lengths[row] for row in batch) for batch in batches if len(batch) == 4]
    pairs = list(zip(tokens[::2], tokens[1::2], strict=False))
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("count", [NUM_ROWS, 8, 3, 1])
def test_every_row_once_and_only_the_last_batch_is_short(count, padded):
    batches = make_batches(make_lengths(count), padded=padded)
    assert sorted(itertools.chain(*batches)) == list(range(count))
    assert all(len(batch) == 4 for batch in batches[:-1])
    assert len(batches[-1]) == count % 4 or 4


def test_dealing_does_not_choose_the_rows_of_a_step():
    lengths = make_lengths()
    even, alike = (make_batches(lengths, padded=padded) for padded in (False, True))
    assert rows_per_step(even, 2) == rows_per_step(alike, 2)
    assert even != alike  # it does choose their order
    assert rows_per_step(even, 2) != rows_per_step(make_batches(lengths, seed=2), 2)


@pytest.mark.parametrize(("size", "micro_batches"), [(8, 1), (2, 4), (1, 8)])
def test_smaller_micro_batches_keep_the_rows_of_a_step(size, micro_batches):
    lengths = make_lengths()
    usual = rows_per_step(make_batches(lengths), 2)
    assert rows_per_step(make_batches(lengths, size, micro_batches), micro_batches) == usual
    # Half the rows in a step is another training.
    assert rows_per_step(make_batches(lengths, 4, 1), 1) != usual


def test_kinds_of_rows_are_mixed_in_a_step():
    lengths = [50] * 64 + [500] * 64
    short_rows = [
        sum(lengths[row] == 50 for row in step)
        for step in rows_per_step(make_batches(lengths, padded=True), 2)
    ]
    assert sum(0 < count < 8 for count in short_rows) >= 15  # of 16 steps
    by_length = rows_per_step(sorted_order(lengths), 2)
    assert all(sum(lengths[row] == 50 for row in step) in (0, 8) for step in by_length)


def test_even_dealing_balances_the_tokens_of_micro_batches():
    lengths = make_lengths()
    shuffled = torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(1)).tolist()
    plain = [shuffled[at : at + 4] for at in range(0, NUM_ROWS, 4)]
    even = make_batches(lengths)
    assert spread(even, lengths) < spread(plain, lengths) / 4


def test_sorted_dealing_saves_padding():
    lengths = make_lengths()
    alike = padding_share(make_batches(lengths, padded=True), lengths)
    even = padding_share(make_batches(lengths), lengths)
    assert alike < 0.6 * even


def test_padding_share_is_computed_minus_real():
    lengths = [10, 5, 4, 4]
    assert padding_share([[0, 1], [2, 3]], lengths) == pytest.approx(1 - 23 / 28)
    assert padding_share([[2, 3]], lengths) == 0


def test_same_seed_same_order_and_another_one_each_epoch():
    lengths = make_lengths()
    sampler, twin, other = (StepSampler(lengths, 4, 2, seed, padded=False) for seed in (3, 3, 5))
    first = list(sampler)
    assert list(sampler) == first == list(twin)
    assert list(other) != first
    assert len(sampler) == len(first) == NUM_ROWS
    sampler.start_epoch(1)
    second = list(sampler)
    assert second != first
    assert sorted(second) == sorted(first)
    sampler.start_epoch(0)
    assert list(sampler) == first


def test_only_start_epoch_chooses_the_epoch():
    """Accelerate calls ``set_epoch`` wherever it finds one, and counts anew after a resume."""
    from accelerate.data_loader import prepare_data_loader

    sampler = StepSampler(make_lengths(), 4, 2, seed=3, padded=False)
    sampler.start_epoch(1)
    expected = list(sampler)
    rows = torch.arange(NUM_ROWS)
    loader = prepare_data_loader(torch.utils.data.DataLoader(rows, batch_size=4, sampler=sampler))
    loader.set_epoch(7)
    assert torch.cat(list(loader)).tolist() == expected


class _Obeying(StepSampler):
    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def test_a_set_epoch_method_would_be_called():
    from accelerate.data_loader import prepare_data_loader

    sampler = _Obeying(make_lengths(), 4, 2, seed=3, padded=False)
    expected = list(sampler)
    rows = torch.arange(NUM_ROWS)
    loader = prepare_data_loader(torch.utils.data.DataLoader(rows, batch_size=4, sampler=sampler))
    loader.set_epoch(7)
    assert torch.cat(list(loader)).tolist() != expected
