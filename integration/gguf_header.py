"""Read a GGUF's header without the C library: is the file whole, and what is it?

llama.cpp can abort the process on a broken file, so every file passes here first. Layout: the GGUF
specification of the ggml project (docs/gguf.md), version 2 and 3, little-endian.
"""

import math
import mmap
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from integration._cli import MODEL, CommandError

_MAGIC = b"GGUF"
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
FLOAT32, STRING, _ARRAY = 6, 8, 9
_MAX_COUNT = 1 << 24
_MAX_DIMENSIONS = 4
_MAKERS = {"model": "make demo", "adapter": "python -m export.export_lora_gguf"}
# ggml type: (weights in a block, bytes of a block), from ggml's type table.
_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110),
    22: (256, 82), 23: (256, 136), 29: (256, 56), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8),
    30: (1, 2),
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies.

    Attributes:
        shape: In GGUF's order, the fastest dimension first: a matrix is (in, out).
        kind: Its ggml type.
        offset: Its first byte in the file.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def num_bytes(self) -> int:
        """Size; 0 for a type that is not known here."""
        block_weights, block_bytes = _BLOCKS.get(self.kind, (1, 0))
        return math.prod(self.shape) // block_weights * block_bytes


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF says of itself.

    Attributes:
        path: The file.
        metadata: Scalars and strings; of an array only its length, under ``<key>.length``.
        kinds: GGUF's type of each value of ``metadata``.
        tensors: What the file holds, by name.
    """

    path: Path
    metadata: dict[str, Any] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    tensors: dict[str, TensorEntry] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """Name of the model architecture, such as ``llama``."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def is_adapter(self) -> bool:
        """Whether the file is a LoRA GGUF."""
        return self.metadata.get("general.type") == "adapter"

    @property
    def chat_template(self) -> str | None:
        """The Jinja chat template, if there is one."""
        return self.metadata.get("tokenizer.chat_template")

    def number(self, key: str, default: int = 0) -> int:
        """Read an integer of the architecture, such as ``block_count``."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        return int(value) if isinstance(value, int | float) else default


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize(code)
        return value

    def count(self) -> int:
        value = self.scalar("Q")
        if value > _MAX_COUNT:
            raise ValueError(f"a count of {value} is out of range")
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        if self.at + length > len(self.data):
            raise ValueError("a text runs past the end of the file")
        text = self.data[self.at : self.at + length].decode("utf-8", errors="replace")
        self.at += length
        return text

    def skip_array(self) -> int:
        kind, length = self.scalar("I"), self.count()
        if kind == STRING:
            for _ in range(length):
                self.at += 8 + struct.unpack_from("<Q", self.data, self.at)[0]
                if self.at > len(self.data):
                    raise ValueError("an array runs past the end of the file")
        elif kind in _SCALARS:
            self.at += struct.calcsize(_SCALARS[kind]) * length
        else:
            raise ValueError(f"array of unknown type {kind}")
        return length


def _read_metadata(reader: _Reader, count: int) -> tuple[dict[str, Any], dict[str, int]]:
    metadata: dict[str, Any] = {}
    kinds: dict[str, int] = {}
    for _ in range(count):
        key, kind = reader.string(), reader.scalar("I")
        kinds[key] = kind
        if kind == STRING:
            metadata[key] = reader.string()
        elif kind == _ARRAY:
            metadata[f"{key}.length"] = reader.skip_array()
        elif kind in _SCALARS:
            metadata[key] = reader.scalar(_SCALARS[kind])
        else:
            raise ValueError(f"metadata '{key}' has unknown type {kind}")
    return metadata, kinds


def _read_tensors(reader: _Reader, count: int) -> dict[str, TensorEntry]:
    """Read the tensor list; offsets are those in the data part."""
    tensors = {}
    for _ in range(count):
        name = reader.string()
        num_dimensions = reader.scalar("I")
        if num_dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"a tensor of {num_dimensions} dimensions")
        shape = tuple(reader.scalar("Q") for _ in range(num_dimensions))
        tensors[name] = TensorEntry(shape, reader.scalar("I"), reader.scalar("Q"))
    return tensors


def read_header(path: Path, what: str = "model") -> GgufHeader:
    """Read and check a GGUF's header.

    Args:
        path: The file.
        what: What errors call it.

    Raises:
        CommandError: Exit 3; the file is missing, empty, no GGUF, damaged or truncated.
    """
    if not path.is_file():
        raise CommandError(
            f"{what} '{path}' does not exist; expected a .gguf file; make one with {_MAKERS[what]}",
            MODEL,
        )
    size = path.stat().st_size
    if size == 0:
        raise CommandError(f"{what} '{path}' is empty; expected a GGUF; export it again", MODEL)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != _MAGIC:
            raise CommandError(
                f"{what} '{path}' is no GGUF: it begins with {bytes(data[:4])!r}, expected {_MAGIC!r}; "
                "name a file made by export.export_gguf or llama.cpp",
                MODEL,
            )
        reader = _Reader(data)
        try:
            reader.at = 4
            version = reader.scalar("I")
            if version not in (2, 3):
                raise ValueError(f"version {version}, expected 2 or 3")
            tensor_count, metadata_count = reader.count(), reader.count()
            metadata, kinds = _read_metadata(reader, metadata_count)
            entries = _read_tensors(reader, tensor_count)
        except (struct.error, ValueError) as error:
            raise CommandError(
                f"{what} '{path}' has a damaged header ({error}); copy or export it again", MODEL
            ) from error
        alignment = int(metadata.get("general.alignment", 32)) or 32
        start = -(-reader.at // alignment) * alignment
        tensors = {
            name: replace(entry, offset=start + entry.offset) for name, entry in entries.items()
        }
        expected = max(
            (entry.offset + entry.num_bytes for entry in tensors.values()), default=start
        )
    if size < expected:
        raise CommandError(
            f"{what} '{path}' is truncated: got {size} bytes, expected {expected}; copy or export it "
            "again",
            MODEL,
        )
    return GgufHeader(path, metadata, kinds, tensors)
