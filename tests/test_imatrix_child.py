"""What the callback collects, on tensors of the installed ggml that are made by hand."""

import ctypes

import numpy as np
import pytest

from export import imatrix_child
from export._cli import MODEL, CommandError


class Graph:
    def __init__(self) -> None:
        self.ggml = imatrix_child.Ggml()
        self.call = self.ggml.library
        self.context = self.call.ggml_init(imatrix_child._InitParams(1 << 22, None, False))

    def tensor(self, array: np.ndarray, name: bytes = b"") -> int:
        kind = {np.dtype(np.float32): 0, np.dtype(np.int32): 26}[array.dtype]
        shape = [*reversed(array.shape), 1, 1][:3]
        address = self.call.ggml_new_tensor_3d(self.context, kind, *shape)
        array = np.ascontiguousarray(array)
        ctypes.memmove(self.call.ggml_get_data(address), array.ctypes.data, array.nbytes)
        self.call.ggml_set_name(address, name)
        return address


def observe(collector: imatrix_child.Collector, node: int) -> bool:
    wanted = collector.callback(node, True, None)
    if wanted:
        collector.callback(node, False, None)
        collector.end_batch()
    return wanted


def test_experts_are_summed_by_the_tokens_that_chose_them() -> None:
    rng = np.random.default_rng(0)
    for used in (1, 2):  # one input for all chosen experts, or one for each
        graph = Graph()
        x = rng.standard_normal((20, used, 8)).astype(np.float32)
        chosen = np.array([rng.permutation(4)[:2] for _ in range(20)], np.int32)
        chosen[chosen == 3] = 0  # nobody chooses the last one
        weight = graph.tensor(np.zeros((4, 6, 8), np.float32), b"CUDA0#blk.0.up_exps.weight#0")
        ids = graph.tensor(chosen)
        node = graph.call.ggml_mul_mat_id(graph.context, weight, graph.tensor(x), ids)
        collector = imatrix_child.Collector(graph.ggml)
        assert observe(collector, node)
        expected, counts = np.zeros((4, 8)), [0] * 4
        for token in range(20):
            for slot in range(2):
                expected[chosen[token, slot]] += x[token, slot % used].astype(float) ** 2
                counts[chosen[token, slot]] += 1
        np.testing.assert_allclose(collector.sums["blk.0.up_exps.weight"], expected, rtol=1e-5)
        assert collector.counts["blk.0.up_exps.weight"].tolist() == counts
        assert counts[3] == 0


def test_dense_input_may_lie_in_strides() -> None:
    graph = Graph()
    wide = np.arange(20 * 16, dtype=np.float32).reshape(20, 16) / 100
    x = graph.tensor(wide)
    imatrix_child.Tensor.from_address(x).ne[0] = 8  # a view of the first half of each row
    weight = graph.tensor(np.zeros((6, 8), np.float32), b"blk.0.attn_q.weight")
    node = graph.call.ggml_mul_mat(graph.context, weight, x)
    collector = imatrix_child.Collector(graph.ggml)
    assert observe(collector, node)
    assert observe(collector, node)
    expected = 2 * np.square(wide[:, :8].astype(float)).sum(0)
    np.testing.assert_allclose(collector.sums["blk.0.attn_q.weight"][0], expected, rtol=1e-5)
    assert collector.counts["blk.0.attn_q.weight"].tolist() == [40]


def test_matrices_in_one_dense_weight_stay_apart() -> None:
    graph = Graph()
    # Two matrices, four slices of input: llama.cpp deals the slices out in turn.
    x = np.random.default_rng(0).standard_normal((4, 16, 8)).astype(np.float32)
    weight = graph.tensor(np.zeros((2, 6, 8), np.float32), b"blk.0.attn_k_b.weight")
    node = graph.call.ggml_mul_mat(graph.context, weight, graph.tensor(x))
    collector = imatrix_child.Collector(graph.ggml)
    assert observe(collector, node)
    squares = np.square(x.astype(float)).sum(1)
    expected = [squares[0] + squares[2], squares[1] + squares[3]]
    np.testing.assert_allclose(collector.sums["blk.0.attn_k_b.weight"], expected, rtol=1e-5)
    assert collector.counts["blk.0.attn_k_b.weight"].tolist() == [32]


@pytest.mark.parametrize(
    ("name", "tokens", "wanted"),
    [
        (b"blk.3.ffn_down.weight", 16, True),
        (b"blk.3.ffn_down.weight", 15, False),
        (b"output.weight", 16, False),
        (b"token_embd.weight", 16, False),
        (b"Kcur-0", 16, False),
    ],
)
def test_only_weights_of_blocks_with_enough_tokens_are_wanted(
    name: bytes, tokens: int, wanted: bool
) -> None:
    graph = Graph()
    weight = graph.tensor(np.zeros((6, 8), np.float32), name)
    x = graph.tensor(np.zeros((tokens, 8), np.float32))
    node = graph.call.ggml_mul_mat(graph.context, weight, x)
    assert observe(imatrix_child.Collector(graph.ggml), node) is wanted


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_inputs_that_are_no_numbers_are_an_error(value: float) -> None:
    graph = Graph()
    x = np.zeros((16, 8), np.float32)
    x[3, 2] = value
    weight = graph.tensor(np.zeros((6, 8), np.float32), b"blk.0.attn_q.weight")
    node = graph.call.ggml_mul_mat(graph.context, weight, graph.tensor(x))
    with pytest.raises(CommandError, match=r"'blk\.0\.attn_q\.weight' are not finite") as caught:
        observe(imatrix_child.Collector(graph.ggml), node)
    assert caught.value.exit_code == MODEL


def test_another_layout_of_tensors_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, buffer, *others = imatrix_child.Tensor._fields_

    class Moved(ctypes.Structure):
        _fields_ = (kind, *others, buffer)

    monkeypatch.setattr(imatrix_child, "Tensor", Moved)
    with pytest.raises(CommandError, match="lays tensors out in another way") as caught:
        imatrix_child.Ggml()
    assert caught.value.exit_code == MODEL
