"""Read safetensors files row by row, without torch and without mapping them, and begin new ones.

Mapped pages count as the process's memory while they are there; what is read here is gone when it
is used. Format: https://github.com/huggingface/safetensors.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from export._cli import MODEL, CommandError

if TYPE_CHECKING:
    import numpy as np

# Bytes of one weight, for the types that can be read as float32.
FLOAT_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: file, safetensors type, shape, first byte and end within the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_weights(self) -> int:
        """Count the elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.begin


def read_header(path: Path) -> dict[str, TensorInfo]:
    """List the tensors of one file, in the order of their bytes.

    Raises:
        CommandError: Exit 3: not a safetensors file, or one that was not copied to its end.
    """
    start = 8 + header_length(path)
    try:
        with path.open("rb") as file:
            file.seek(8)
            header = json.loads(file.read(start - 8))
        header.pop("__metadata__", None)
        numbers = [n for item in header.values() for n in (*item["shape"], *item["data_offsets"])]
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError(numbers)
        found = {
            name: TensorInfo(
                path,
                item["dtype"],
                tuple(item["shape"]),
                *(start + offset for offset in item["data_offsets"]),
            )
            for name, item in header.items()
        }
        sizes = [
            (name, info.num_bytes, info.num_weights * FLOAT_BYTES[info.dtype])
            for name, info in found.items()
            if info.dtype in FLOAT_BYTES
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path) from error
    end = max((info.end for info in found.values()), default=start)
    if end != path.stat().st_size:
        raise CommandError(
            f"'{path}' holds {path.stat().st_size - start} bytes of weights, its header says "
            f"{end - start}: incomplete; copy it again",
            MODEL,
        )
    for name, got, expected in sizes:
        if got != expected:
            raise CommandError(
                f"'{path}': '{name}' has {got} bytes, its shape needs {expected}; copy it again",
                MODEL,
            )
    return dict(sorted(found.items(), key=lambda item: item[1].begin))


def header_length(path: Path) -> int:
    """Give the length of the header; weights begin 8 bytes after it.

    Raises:
        CommandError: Exit 3: the file is too short to be one.
    """
    with path.open("rb") as file:
        head = file.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
    if not 0 < length <= path.stat().st_size - 8:
        raise _damaged(path)
    return int(length)


def write_header(writer: BinaryIO, tensors: Mapping[str, tuple[str, Sequence[int], int]]) -> None:
    """Begin a file; the tensors' bytes follow in the order given.

    Args:
        writer: Opened for writing, at its start.
        tensors: safetensors type, shape and bytes, by name.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, num_bytes) in tensors.items():
        begin, end = end, end + num_bytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    writer.write(len(text).to_bytes(8, "little") + text)


def read_rows(info: TensorInfo, first: int = 0, count: int | None = None) -> "np.ndarray":
    """Read rows of a float tensor, widened to float32.

    Args:
        info: A tensor of one of `FLOAT_BYTES`.
        first: The first row (index of the first dimension).
        count: How many; all that follow by default.

    Returns:
        Shape (count, *rest), C-contiguous and writable.
    """
    import numpy as np

    rest = info.shape[1:]
    rows = info.shape[0] if info.shape else 1
    count = rows - first if count is None else count
    per_row = math.prod(rest)
    kinds = {"F16": np.float16, "BF16": np.uint16, "F32": np.float32, "F64": np.float64}
    raw = np.fromfile(
        info.path,
        kinds[info.dtype],
        count * per_row,
        offset=info.begin + first * per_row * FLOAT_BYTES[info.dtype],
    )
    if info.dtype == "BF16":
        # A bfloat16 is the upper half of a float32.
        wide = raw.astype(np.uint32)
        wide <<= 16
        raw = wide.view(np.float32)
    values: np.ndarray = raw.astype(np.float32, copy=False)
    return values.reshape(count, *rest) if info.shape else values.reshape(())


def _damaged(path: Path) -> CommandError:
    return CommandError(f"'{path}' is no valid safetensors file; copy it again", MODEL)
