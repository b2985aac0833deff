"""Read a GGUF's header without the C library: is the file whole, and what is it?

llama.cpp can abort the process on a broken file, so every file passes here first. Layout: the GGUF
specification of the ggml project (docs/gguf.md), version 2 and 3, little-endian.
"""

import mmap
import struct
from dataclasses import dataclass, field
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
_STRING, _ARRAY = 8, 9
_MAX_COUNT = 1 << 24
_MAX_DIMENSIONS = 4
# ggml type: (weights in a block, bytes of a block), from ggml's type table.
_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110),
    22: (256, 82), 23: (256, 136), 29: (256, 56), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8),
    30: (1, 2),
}  # fmt: skip


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF says of itself.

    Attributes:
        path: The file.
        metadata: Scalars and strings; of an array only its length, under ``<key>.length``.
        tensor_names: Names of the tensors.
    """

    path: Path
    metadata: dict[str, Any] = field(default_factory=dict)
    tensor_names: frozenset[str] = frozenset()

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
        if kind == _STRING:
            for _ in range(length):
                self.at += 8 + struct.unpack_from("<Q", self.data, self.at)[0]
                if self.at > len(self.data):
                    raise ValueError("an array runs past the end of the file")
        elif kind in _SCALARS:
            self.at += struct.calcsize(_SCALARS[kind]) * length
        else:
            raise ValueError(f"array of unknown type {kind}")
        return length


def _read_metadata(reader: _Reader, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key, kind = reader.string(), reader.scalar("I")
        if kind == _STRING:
            metadata[key] = reader.string()
        elif kind == _ARRAY:
            metadata[f"{key}.length"] = reader.skip_array()
        elif kind in _SCALARS:
            metadata[key] = reader.scalar(_SCALARS[kind])
        else:
            raise ValueError(f"metadata '{key}' has unknown type {kind}")
    return metadata


def _read_tensors(reader: _Reader, count: int) -> tuple[frozenset[str], int]:
    """Read the tensor list: names, and the offset in the data part at which the last one ends."""
    end = 0
    names = []
    for _ in range(count):
        names.append(reader.string())
        num_dimensions = reader.scalar("I")
        if num_dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"a tensor of {num_dimensions} dimensions")
        weights = 1
        for _ in range(num_dimensions):
            weights *= reader.scalar("Q")
        kind, offset = reader.scalar("I"), reader.scalar("Q")
        block_weights, block_bytes = _BLOCKS.get(kind, (1, 0))
        end = max(end, offset + weights // block_weights * block_bytes)
    return frozenset(names), end


def read_header(path: Path) -> GgufHeader:
    """Read and check a GGUF's header.

    Raises:
        CommandError: Exit 3; the file is missing, empty, no GGUF, damaged or truncated.
    """
    if not path.is_file():
        raise CommandError(
            f"model '{path}' does not exist; expected a .gguf file; make one with make demo", MODEL
        )
    size = path.stat().st_size
    if size == 0:
        raise CommandError(f"model '{path}' is empty; expected a GGUF; export it again", MODEL)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != _MAGIC:
            raise CommandError(
                f"model '{path}' is no GGUF: it begins with {bytes(data[:4])!r}, expected {_MAGIC!r}; "
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
            metadata = _read_metadata(reader, metadata_count)
            names, end = _read_tensors(reader, tensor_count)
        except (struct.error, ValueError) as error:
            raise CommandError(
                f"model '{path}' has a damaged header ({error}); copy or export it again", MODEL
            ) from error
        alignment = int(metadata.get("general.alignment", 32)) or 32
        expected = -(-reader.at // alignment) * alignment + end
    if size < expected:
        raise CommandError(
            f"model '{path}' is truncated: got {size} bytes, expected {expected}; copy or export it "
            "again",
            MODEL,
        )
    return GgufHeader(path, metadata, names)
