"""The arithmetic of a merge: by hand, bit for bit as PEFT's, whole and in portions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.lora_config import LoraConfig, parse_config
from export.lora_math import ROW_BLOCK, merge_embedding_rows, merge_rows
from export.merged_weights import row_blocks

PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
MODULE = "model.layers.0.self_attn.q_proj"


def array(*rows: object) -> np.ndarray:
    return np.array(rows, dtype=np.float32)


def scales(**keys: object) -> LoraConfig:
    return parse_config({**PLAIN, **keys})


def test_merge_rows_adds_the_scaled_product() -> None:
    # B @ A = [[1*1+0*3, 1*2+0*4], [2*1+1*3, 2*2+1*4]] = [[1, 2], [5, 8]]; times 0.5, plus W.
    weight = array([1, 1], [1, 1])
    merged = merge_rows(weight, array([1, 2], [3, 4]), array([1, 0], [2, 1]), 0.5)
    assert merged.dtype == np.float32
    assert merged.tolist() == [[1.5, 2.0], [3.5, 5.0]]
    assert weight.tolist() == [[1, 1], [1, 1]]


def test_merge_rows_with_magnitudes_sets_the_length_of_each_row() -> None:
    # W + 0.5 * (B @ A) = [[2, 4], [0, 1]] + [[1, 0], [0, 1]] = [[3, 4], [0, 2]]: rows of length 5
    # and 2 (columns: 3 and sqrt(20)), wanted are 10 and 1.
    weight = array([2, 4], [0, 1])
    a, b = np.eye(2, dtype=np.float32), 2 * np.eye(2, dtype=np.float32)
    merged = merge_rows(weight, a, b, 0.5, np.array([10, 1], dtype=np.float32))
    assert merged.tolist() == [[6.0, 8.0], [0.0, 1.0]]
    assert weight.tolist() == [[2.0, 4.0], [0.0, 1.0]]


def test_merge_embedding_rows_adds_the_transposed_product() -> None:
    # Three tokens of width 2, rank 1: (B @ A).T = [[3], [5]] x [1, 2, 4], turned.
    merged = merge_embedding_rows(
        np.zeros((3, 2), np.float32), array([1, 2, 4]), array([3], [5]), 2
    )
    assert merged.tolist() == [[6, 10], [12, 20], [24, 40]]


def test_scale_is_alpha_over_rank() -> None:
    assert scales().scale_of(MODULE) == 4 / 2


def test_scale_with_rslora_is_alpha_over_root_of_rank() -> None:
    assert scales(r=16, lora_alpha=16, use_rslora=True).scale_of(MODULE) == 16 / 4


def test_patterns_match_the_end_of_a_name_like_peft() -> None:
    config = scales(rank_pattern={"q_proj": 8}, alpha_pattern={"layers.0.self_attn.q_proj": 2})
    assert (config.rank_of(MODULE), config.scale_of(MODULE)) == (8, 2 / 8)
    assert config.scale_of("model.layers.1.self_attn.q_proj") == 4 / 8
    assert config.scale_of("model.layers.1.self_attn.my_q_proj") == 4 / 2
    rooted = scales(rank_pattern={r"layers\.[01]\..*": 4}, use_rslora=True)
    assert math.isclose(rooted.scale_of(MODULE), 4 / 2)


def test_patterns_agree_with_peft_itself() -> None:
    from peft.utils.other import get_pattern_key

    patterns = {"q_proj": 3, r"layers\.1\..*": 5, "model.layers.0.mlp.up_proj": 7}
    config = scales(rank_pattern=patterns)
    for name in (MODULE, "model.layers.1.mlp.up_proj", "model.layers.0.mlp.up_proj", "lm_head"):
        expected = patterns.get(get_pattern_key(list(patterns), name), 2)
        assert config.rank_of(name) == expected


@given(st.integers(1, 20_000), st.integers(0, 20_000))
def test_portions_cover_every_row_once_and_none_is_small(rows: int, per_block: int) -> None:
    blocks = list(row_blocks(rows, per_block))
    assert [row for first, count in blocks for row in range(first, first + count)] == list(
        range(rows)
    )
    assert all(count % ROW_BLOCK == 0 for _, count in blocks[:-1])
    assert blocks[-1][1] >= min(rows, ROW_BLOCK)
    # A portion is what was asked for, and the rest of less than one block at most.
    assert max(count for _, count in blocks) < max(per_block, ROW_BLOCK) + ROW_BLOCK


class Case:
    """A matrix and its factors, and PEFT's own merge of the whole of it."""

    def __init__(self, rows: int, width: int, rank: int = 8) -> None:
        rng = np.random.default_rng(rows + width)
        self.weight = rng.standard_normal((rows, width), dtype=np.float32)
        self.a = rng.standard_normal((rank, width), dtype=np.float32)
        self.b = rng.standard_normal((rows, rank), dtype=np.float32)
        self.magnitude = np.abs(rng.standard_normal(rows, dtype=np.float32)) + 1
        self.rank = rank

    def by_peft(self, **config: object) -> np.ndarray:
        """PEFT's layer on its own: its factors set to ours, then its `merge`."""
        import torch
        from peft import LoraConfig, inject_adapter_in_model

        model = torch.nn.Sequential(torch.nn.Linear(*self.weight.shape[::-1], bias=False))
        model[0].weight.data = torch.from_numpy(self.weight.copy())
        lora = LoraConfig(r=self.rank, lora_alpha=5, target_modules=["0"], **config)
        layer = inject_adapter_in_model(lora, model)[0]
        layer.lora_A["default"].weight.data = torch.from_numpy(self.a)
        layer.lora_B["default"].weight.data = torch.from_numpy(self.b)
        if config.get("use_dora"):
            layer.lora_magnitude_vector["default"].weight.data = torch.from_numpy(self.magnitude)
        layer.merge()
        merged: np.ndarray = layer.base_layer.weight.detach().numpy()
        return merged

    def in_portions(self, blocks: list[tuple[int, int]], is_dora: bool = False) -> np.ndarray:
        return np.concatenate(
            [
                merge_rows(
                    self.weight[first : first + count],
                    self.a,
                    self.b[first : first + count],
                    5 / self.rank,
                    self.magnitude[first : first + count] if is_dora else None,
                )
                for first, count in blocks
            ]
        )


@pytest.mark.parametrize(
    ("rows", "width"),
    [(7, 64), (65, 64), (100, 2048), (191, 576), (577, 2048), (1000, 576), (4097, 64)],
)
@pytest.mark.parametrize("is_dora", [False, True], ids=["lora", "dora"])
def test_portions_have_the_bits_of_pefts_whole_merge(rows: int, width: int, is_dora: bool) -> None:
    case = Case(rows, width)
    theirs = case.by_peft(use_dora=is_dora)
    for per_block in (rows, 1, 2 * ROW_BLOCK, 200):
        blocks = list(row_blocks(rows, per_block))
        assert np.array_equal(case.in_portions(blocks, is_dora), theirs), (per_block, blocks)
    # The twin: another order of the same operations is another result.
    product = case.b @ (case.a * np.float32(5 / case.rank))
    assert not np.array_equal(case.weight + product, theirs)


def test_smaller_portions_than_row_blocks_may_differ() -> None:
    """Why `row_blocks` exists: some matrix of these differs when it is cut into single rows."""
    differing = 0
    for rows, width in ((64, 64), (191, 576), (100, 2048)):
        case = Case(rows, width, rank=16)
        whole = case.in_portions([(0, rows)])
        for size in (1, 7):
            cut = case.in_portions([(at, min(size, rows - at)) for at in range(0, rows, size)])
            assert np.allclose(cut, whole, atol=1e-5)
            differing += not np.array_equal(cut, whole)
        assert np.array_equal(case.in_portions(list(row_blocks(rows, 1))), whole)
    assert differing


@pytest.mark.parametrize(("tokens", "width"), [(65, 64), (191, 576), (1025, 64)])
def test_portions_of_an_embedding_have_the_bits_of_the_whole(tokens: int, width: int) -> None:
    rng = np.random.default_rng(tokens)
    weight = rng.standard_normal((tokens, width), dtype=np.float32)
    a = rng.standard_normal((8, tokens), dtype=np.float32)
    b = rng.standard_normal((width, 8), dtype=np.float32)
    whole = merge_embedding_rows(weight, a, b, 0.625)
    for per_block in (1, 200):
        parts = [
            merge_embedding_rows(
                weight[first : first + count],
                np.ascontiguousarray(a[:, first : first + count]),
                b,
                0.625,
            )
            for first, count in row_blocks(tokens, per_block)
        ]
        assert np.array_equal(np.concatenate(parts), whole)
