"""Read what a GGUF file says about itself, without its weights and without a long list of tokens.

In: a GGUF file. Out: a `GgufHeader`: metadata, tensors, sizes; or one clear error if the file is
truncated, empty, or no model. gguf's own reader makes an object of every token, which takes
seconds; arrays are skipped here, only their lengths are kept.
"""

import mmap
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from export._cli import MODEL, CommandError

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
_KEEP_LONGEST = 64
# The types that llama.cpp's mixtures consist of; any other matrix type is a fallback. From
# llama_ftype_get_default_type and llama_tensor_get_type_impl (src/llama-quant.cpp), with and without
# imatrix, tied embeddings or not; mixtures of experts and Falcon are left out.
MEANT_TYPES = {
    "F32": {"F32"},
    "F16": {"F16"},
    "BF16": {"BF16"},
    "Q8_0": {"Q8_0"},
    "Q6_K": {"Q6_K"},
    "Q5_K_M": {"Q5_K", "Q6_K"},
    "Q5_K_S": {"Q5_K", "Q6_K"},
    "Q5_1": {"Q5_1", "Q6_K"},
    "Q5_0": {"Q5_0", "Q5_1", "Q6_K"},
    "Q4_K_M": {"Q4_K", "Q5_K", "Q6_K"},
    "Q4_K_S": {"Q4_K", "Q5_K", "Q6_K"},
    "Q4_1": {"Q4_1", "Q6_K"},
    "Q4_0": {"Q4_0", "Q4_1", "Q6_K"},
    "IQ4_NL": {"IQ4_NL", "Q5_K", "Q6_K"},
    "IQ4_XS": {"IQ4_XS", "Q5_K", "Q6_K"},
    "Q3_K_L": {"Q3_K", "Q4_K", "Q5_K", "Q6_K"},
    "Q3_K_M": {"Q3_K", "Q4_K", "Q5_K", "Q6_K"},
    "Q3_K_S": {"Q3_K", "Q6_K"},
    "IQ3_M": {"IQ3_S", "Q4_K", "Q6_K"},
    "IQ3_S": {"IQ3_S", "Q4_K", "Q6_K"},
    "IQ3_XS": {"IQ3_S", "IQ3_XXS", "Q4_K", "Q6_K"},
    "IQ3_XXS": {"IQ3_XXS", "IQ3_S", "IQ2_S", "Q3_K", "Q4_K", "Q5_K"},
    "Q2_K": {"Q2_K", "Q3_K", "Q4_K", "Q6_K"},
    "Q2_K_S": {"Q2_K", "Q4_K", "Q6_K"},
    "IQ2_M": {"IQ2_S", "IQ3_S", "Q4_K", "Q5_K"},
    "IQ2_S": {"IQ2_XS", "IQ3_S", "Q4_K", "Q5_K"},
    "IQ2_XS": {"IQ2_XS", "Q2_K", "Q4_K", "Q5_K"},
    "IQ2_XXS": {"IQ2_XXS", "Q2_K", "Q4_K", "Q5_K"},
    "IQ1_M": {"IQ1_M", "IQ2_XXS", "Q2_K", "Q4_K", "Q5_K"},
    "IQ1_S": {"IQ1_S", "IQ2_XXS", "Q2_K", "Q4_K", "Q5_K"},
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor; `shape` as ggml has it, the row width first; `begin` is its place in the file."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    num_weights: int
    num_bytes: int
    begin: int = 0


@dataclass(frozen=True)
class GgufHeader:
    """A whole, readable GGUF file. Long arrays in `metadata` are given as their length."""

    path: Path
    file_bytes: int
    metadata: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]

    @property
    def type_name(self) -> str:
        """The quantization type the file claims, as ggml prints it: `Q4_K_M`."""
        from gguf.constants import LlamaFileType

        try:
            name = LlamaFileType(self.metadata.get("general.file_type", 1024)).name
        except ValueError:
            return "UNKNOWN"
        return name.replace("MOSTLY_", "").replace("ALL_", "")

    @property
    def bits_per_weight(self) -> float:
        """Bytes of all tensors over their weights: what the type really costs in this model."""
        weights = sum(tensor.num_weights for tensor in self.tensors)
        return sum(tensor.num_bytes for tensor in self.tensors) * 8 / weights

    @property
    def fallbacks(self) -> Mapping[str, int]:
        """Matrices whose type is none of those the named type consists of, counted by type."""
        meant = MEANT_TYPES.get(self.type_name)
        matrices = [tensor.type_name for tensor in self.tensors if len(tensor.shape) > 1]
        return Counter(kind for kind in matrices if meant is not None and kind not in meant)

    @property
    def num_matrices(self) -> int:
        """Count the tensors that quantization is about."""
        return sum(len(tensor.shape) > 1 for tensor in self.tensors)

    def describe(self) -> str:
        """Say in one line what the file really is."""
        line = (
            f"{self.path.name}: {self.file_bytes / 1e6:.1f} MB, "
            f"{self.bits_per_weight:.2f} bits per weight"
        )
        if self.fallbacks:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.fallbacks.items()))
            line += (
                f"; {sum(self.fallbacks.values())} of {self.num_matrices} matrices fell back to "
                f"another type ({kinds}): their rows are no multiples of 256"
            )
        return line

    @property
    def has_full_blocks(self) -> bool:
        """Tell whether every row is a multiple of 256, so that K-quants are what they say."""
        return all(tensor.shape[0] % 256 == 0 for tensor in self.tensors if len(tensor.shape) > 1)


class _Cursor:
    """A position in a mapped file that never reads beyond its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if count < 0 or self.at + count > len(self.data):
            raise ValueError("the file ends within its header")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_SCALARS[kind])
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS and count > _KEEP_LONGEST:
            self.take(struct.calcsize("<" + _SCALARS[inner]) * count)
            return count
        if inner == _STRING and count > _KEEP_LONGEST:
            for _ in range(count):
                self.take(self.number("Q"))
            return count
        return [self.value(inner) for _ in range(count)]


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check a GGUF model's header, and that all its tensors are in the file.

    Raises:
        CommandError: Exit 3: missing, empty, no GGUF, truncated, or an adapter, not a model.
    """
    if not path.is_file():
        raise CommandError(f"'{path}' is no file; expected a GGUF model", MODEL)
    size = path.stat().st_size
    with path.open("rb") as file:
        magic = file.read(4)
        if magic != b"GGUF":
            found = "is empty" if not size else f"begins with {magic!r}"
            raise CommandError(f"'{path}' {found}; expected a GGUF model ('GGUF')", MODEL)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                header = _parse(path, _Cursor(data), size)
            except (ValueError, KeyError, struct.error, OverflowError, RecursionError) as error:
                raise CommandError(
                    f"'{path}' is truncated or damaged ({error}); copy or export it again", MODEL
                ) from error
    if header.metadata.get("general.type", "model") != "model":
        raise CommandError(
            f"'{path}' is of general.type '{header.metadata['general.type']}'; expected a whole "
            "model. A LoRA GGUF is used beside one: integration.ask --adapter NAME=FILE",
            MODEL,
        )
    if not header.tensors:
        raise CommandError(f"'{path}' holds no tensors; expected a whole model", MODEL)
    return header


def _parse(path: Path, cursor: _Cursor, size: int) -> GgufHeader:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    cursor.take(4)
    version = cursor.number("I")
    if version not in (2, 3):
        raise ValueError(f"version {version}, expected 2 or 3")
    num_tensors, num_keys = cursor.number("Q"), cursor.number("Q")
    metadata = {}
    for _ in range(num_keys):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.number("I"))
    tensors = []
    end = 0
    for _ in range(num_tensors):
        name = cursor.text()
        shape = tuple(cursor.number("Q") for _ in range(cursor.number("I")))
        kind, offset = GGMLQuantizationType(cursor.number("I")), cursor.number("Q")
        weights = 1
        for length in shape:
            weights *= length
        block, block_bytes = GGML_QUANT_SIZES[kind]
        num_bytes = weights // block * block_bytes
        tensors.append(GgufTensor(name, shape, kind.name, weights, num_bytes, offset))
        end = max(end, offset + num_bytes)
    alignment = int(metadata.get("general.alignment", 32))
    data_start = -(-cursor.at // alignment) * alignment
    if data_start + end > size and tensors:
        raise ValueError(f"{size} bytes, its tensors need {data_start + end}")
    placed = tuple(replace(tensor, begin=data_start + tensor.begin) for tensor in tensors)
    return GgufHeader(path, size, metadata, placed)
