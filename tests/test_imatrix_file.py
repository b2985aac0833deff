"""Files of importance matrices: written as llama.cpp reads them, read again, refused by name."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export._cli import MODEL, CommandError
from export.imatrix_file import (
    Imatrix,
    check_imatrix,
    quantize_metadata,
    read_imatrix,
    write_imatrix,
)

ORIGIN = {"data_sha256": "ab" * 32, "model": "m-F16.gguf", "tokens": 1030, "rows": 3}
SHAPES = {
    "token_embd.weight": (4, 90),
    "blk.0.attn_norm.weight": (4,),
    "blk.0.attn_q.weight": (4, 6),
    "blk.0.ffn_gate_inp.weight": (4, 2),
    "blk.0.ffn_up_exps.weight": (2, 5, 3),
}


def small_tensors() -> dict[str, np.ndarray]:
    return {
        "blk.0.attn_q.weight.in_sum2": np.array([[2, 4, 6, 8]], np.float32),
        "blk.0.attn_q.weight.counts": np.array([2], np.float32),
        # Three experts; no token chose the second one.
        "blk.0.ffn_up_exps.weight.in_sum2": np.array([[3, 6], [0, 0], [5, 1]], np.float32),
        "blk.0.ffn_up_exps.weight.counts": np.array([3, 0, 1], np.float32),
    }


def small_imatrix(path: Path) -> Imatrix:
    write_imatrix(path, small_tensors(), ["train.jsonl", "more.jsonl"], 512, ORIGIN)
    return read_imatrix(path)


def test_values_are_means_by_expert_and_one_where_nothing_came(tmp_path: Path) -> None:
    read = small_imatrix(tmp_path / "m.gguf")
    # Sums over counts by hand; llama-quantize takes 1 for an expert without data.
    assert read.values["blk.0.attn_q.weight"].tolist() == [1, 2, 3, 4]
    assert read.values["blk.0.ffn_up_exps.weight"].tolist() == [1, 2, 1, 1, 5, 1]
    assert (read.chunks, read.tokens, read.rows) == (3, 1030, 3)
    assert read.datasets == ("train.jsonl", "more.jsonl")
    assert quantize_metadata(read) == [
        ("quantize.imatrix.file", "m.gguf"),
        ("quantize.imatrix.dataset", "train.jsonl"),
        ("quantize.imatrix.entries_count", 2),
        ("quantize.imatrix.chunks_count", 3),
        ("tomeforge.imatrix.tokens", 1030),
        ("tomeforge.imatrix.data_sha256", "ab" * 32),
        ("tomeforge.imatrix.rows", 3),
        ("tomeforge.imatrix.model", "m-F16.gguf"),
    ]


def test_llama_cpp_reads_the_file(tmp_path: Path) -> None:
    from llama_cpp._ctypes_extensions import load_shared_library
    from llama_cpp._ggml import libggml_base_path

    class Params(ctypes.Structure):
        _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))

    library = load_shared_library("ggml-base", libggml_base_path)
    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_init_from_file.argtypes = ctypes.c_char_p, Params
    for name in ("gguf_find_key", "gguf_find_tensor"):
        getattr(library, name).restype = ctypes.c_int64
        getattr(library, name).argtypes = ctypes.c_void_p, ctypes.c_char_p
    library.gguf_get_kv_type.argtypes = ctypes.c_void_p, ctypes.c_int64
    path = small_imatrix(tmp_path / "m.gguf").path
    context = library.gguf_init_from_file(str(path).encode(), Params(True, None))
    kinds = {"general.type": 8, "imatrix.datasets": 9}  # GGUF_TYPE_STRING, _ARRAY
    kinds |= {"imatrix.chunk_count": 4, "imatrix.chunk_size": 4}  # GGUF_TYPE_UINT32
    for key, kind in kinds.items():
        at = library.gguf_find_key(context, key.encode())
        assert library.gguf_get_kv_type(context, at) == kind, key
    assert library.gguf_find_key(context, b"general.architecture") == -1
    assert all(library.gguf_find_tensor(context, name.encode()) >= 0 for name in small_tensors())


def foreign_matrix(path: Path, **changed: Any) -> Path:
    """Write what our own writer would not; an empty array leaves a tensor out."""
    import gguf

    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["/home/someone/C:\\texts\\wiki.txt"])
    writer.add_uint32("imatrix.chunk_count", 0)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, array in {**small_tensors(), **changed}.items():
        if array.size:
            writer.add_tensor(name, array)
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    return path


def test_matrix_of_another_tool_is_read(tmp_path: Path) -> None:
    read = read_imatrix(foreign_matrix(tmp_path / "other.gguf"))
    assert (read.tokens, read.rows, read.data_sha256, read.model) == (3, 0, "", "")
    assert quantize_metadata(read) == [
        ("quantize.imatrix.file", "other.gguf"),
        ("quantize.imatrix.dataset", "wiki.txt"),
        ("quantize.imatrix.entries_count", 2),
        ("tomeforge.imatrix.tokens", 3),
    ]


SUMS = "blk.0.attn_q.weight.in_sum2"


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({SUMS: np.array([[1, np.nan, 1, 1]], np.float32)}, "holds NaN"),
        ({SUMS: np.array([[1, np.inf, 1, 1]], np.float32)}, "holds NaN, infinity"),
        ({SUMS: np.array([[1, -1, 1, 1]], np.float32)}, "below 0"),
        ({SUMS: np.ones((1, 4), np.float64)}, "expected float32"),
        ({SUMS: np.array([], np.float32)}, "attn_q"),
        ({"blk.0.ffn_up_exps.weight.counts": np.ones(4, np.float32)}, "6 sums for 4 counts"),
    ],
)
def test_damaged_matrix_is_one_line(tmp_path: Path, changed: dict, problem: str) -> None:
    path = foreign_matrix(tmp_path / "m.gguf", **changed)
    with pytest.raises(CommandError, match=problem) as caught:
        read_imatrix(path)
    assert caught.value.exit_code == MODEL


def test_truncated_matrix_is_one_line(tmp_path: Path) -> None:
    data = small_imatrix(tmp_path / "m.gguf").path.read_bytes()
    # Up to the padding behind the last tensor, which nobody misses.
    for length in [*range(0, len(data) - 32, 7), len(data) - 33]:
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        with pytest.raises(CommandError, match=r"no importance matrix|truncated") as caught:
            read_imatrix(tmp_path / "cut.gguf")
        assert caught.value.exit_code == MODEL


@pytest.mark.parametrize("content", [None, b"", b"Dear diary", b"GGUF" + b"\xff" * 400])
def test_file_that_is_no_matrix_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CommandError, match=r"no file|no importance matrix") as caught:
        read_imatrix(path)
    assert caught.value.exit_code == MODEL


@pytest.mark.parametrize(
    ("shapes", "problem"),
    [
        ({"blk.0.attn_q.weight": (8, 6)}, r"'blk\.0\.attn_q\.weight' has 4 values, expected 8"),
        ({"blk.0.ffn_up_exps.weight": (2, 5, 4)}, "has 6 values, expected 8"),
        ({"blk.0.attn_q.weight": None}, r"no tensor 'blk\.0\.attn_q\.weight'"),
        ({"blk.1.attn_q.weight": (4, 6)}, r"nothing for 'blk\.1\.attn_q\.weight'"),
    ],
)
def test_matrix_of_another_model_is_refused(tmp_path: Path, shapes: dict, problem: str) -> None:
    tensors = {name: shape for name, shape in {**SHAPES, **shapes}.items() if shape}
    with pytest.raises(CommandError, match=problem) as caught:
        check_imatrix(small_imatrix(tmp_path / "m.gguf"), tensors)
    assert caught.value.exit_code == MODEL
    assert "python -m export.imatrix" in str(caught.value)


def test_uncovered_matrices_are_given_back(tmp_path: Path) -> None:
    read = small_imatrix(tmp_path / "m.gguf")
    assert check_imatrix(read, SHAPES) == []
    # A block that predicts the token after next does not run, so nothing of it can be there.
    more = {"blk.0.attn_k_b.weight": (4, 2, 3), "blk.1.nextn.eh_proj.weight": (8, 4)}
    assert check_imatrix(read, SHAPES | more) == list(more)
