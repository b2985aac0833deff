"""Reading safetensors without torch: the library's own values, and a refusal for damaged files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from export._cli import MODEL, CommandError
from export.safetensors_file import header_length, read_header, read_rows

TYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of two matrices, to be damaged."""
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, 2, dtype=torch.float16)}
    save_file(tensors, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def rewrite(path: Path, change: object) -> None:
    """Write another header in front of the same bytes."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    text = change(header) if callable(change) else change
    text = json.dumps(text).encode() if not isinstance(text, bytes) else text
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[start:])


def changed(name: str, **keys: object) -> object:
    return lambda header: header | {name: header[name] | keys}


def refused(path: Path, match: str) -> None:
    with pytest.raises(CommandError, match=match) as caught:
        read_header(path)
    assert caught.value.exit_code == MODEL
    assert str(path) in str(caught.value)
    assert "copy it again" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("type_name", TYPES)
def test_rows_are_what_the_library_reads(tmp_path: Path, type_name: str) -> None:
    values = torch.randn(9, 2, 3, generator=torch.Generator().manual_seed(0)).to(TYPES[type_name])
    one = torch.tensor(2.5, dtype=TYPES[type_name])
    tensors = {"first": torch.zeros(5, dtype=TYPES[type_name]), "x": values, "one": one}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert "__metadata__" not in header
    info = header["x"]
    assert (info.dtype, info.shape, info.num_weights) == (type_name, (9, 2, 3), 54)
    assert info.num_bytes == values.nbytes
    expected = values.float().numpy()
    for first, count in ((0, None), (0, 4), (4, 5), (8, 1), (3, None)):
        got = read_rows(info, first, count)
        assert got.dtype == np.float32
        assert got.flags["C_CONTIGUOUS"]
        assert got.flags["WRITEABLE"]
        assert np.array_equal(got, expected[first : None if count is None else first + count])
    assert read_rows(header["one"]).shape == ()
    assert float(read_rows(header["one"])) == 2.5
    # The twin: rows from the place beside.
    assert not np.array_equal(read_rows(info, 4, 4), expected[3:7])


def test_tensors_come_in_the_order_of_their_bytes(path: Path) -> None:
    rewrite(path, lambda header: dict(reversed(header.items())))
    infos = list(read_header(path).values())
    assert [info.begin for info in infos] == sorted(info.begin for info in infos)
    assert infos[0].begin == 8 + header_length(path)
    assert infos[-1].end == path.stat().st_size


def test_other_types_are_listed_and_their_size_is_theirs(tmp_path: Path) -> None:
    save_file({"q": torch.ones(3, 5, dtype=torch.uint8)}, tmp_path / "x.safetensors")
    (info,) = read_header(tmp_path / "x.safetensors").values()
    assert (info.dtype, info.shape, info.num_bytes) == ("U8", (3, 5), 15)


@pytest.mark.parametrize("size", [0, 5, 8, 20])
def test_too_short_a_file_is_refused(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])
    refused(path, "no valid safetensors file")


@pytest.mark.parametrize(
    "head", [b"\0" * 8, b"\xff" * 8, (1 << 40).to_bytes(8, "little")], ids=["0", "-1", "large"]
)
def test_impossible_header_length_is_refused(path: Path, head: bytes) -> None:
    path.write_bytes(head + path.read_bytes()[8:])
    refused(path, "no valid safetensors file")


@pytest.mark.parametrize("step", [-10, -1, 1, 100])
def test_file_of_another_length_is_incomplete(path: Path, step: int) -> None:
    content = path.read_bytes() + b"\0" * 100
    path.write_bytes(content[: step - 100 if step < 100 else None])
    refused(path, f"holds {40 + step} bytes of weights, its header says 40: incomplete")


@pytest.mark.parametrize(
    "header",
    [
        b"\xff\xfe",
        b"{",
        [],
        3,
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": 7},
        changed("a", shape=None),
        changed("a", shape=["2", 3]),
        changed("a", data_offsets=[0]),
        changed("a", data_offsets=[0, 1, 2]),
        changed("a", data_offsets=["0", "24"]),
        changed("a", dtype=["F32"]),
        changed("a", data_offsets=[-24, 0]),
        changed("a", shape=[-2, -3]),
    ],
)
def test_damaged_header_is_refused(path: Path, header: object) -> None:
    rewrite(path, header)
    refused(path, "no valid safetensors file")


@pytest.mark.parametrize(
    ("change", "got", "needed"),
    [({"shape": [2, 4]}, 24, 32), ({"dtype": "F16"}, 24, 12), ({"data_offsets": [0, 20]}, 20, 24)],
    ids=["shape", "type", "offsets"],
)
def test_bytes_that_do_not_fit_the_shape_are_refused(
    path: Path, change: dict[str, object], got: int, needed: int
) -> None:
    assert read_header(path)
    rewrite(path, changed("a", **change))
    refused(path, f"'a' has {got} bytes, its shape needs {needed}")
