"""A GGUF being written: its header with every tensor's type, place and size, then bytes in order.

Runs in the child process of export.export_gguf, with the `gguf` package of llama.cpp's converter.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.lazy_convert import Converted

if TYPE_CHECKING:
    pass


def tensor_bytes(converted: Converted, names: Mapping[str, str]) -> list[int]:
    """Give the bytes of each tensor, in order, from ggml's name of its type."""
    import gguf

    sizes = []
    for tensor in converted.tensors:
        kind = gguf.GGMLQuantizationType[names[tensor.name].upper()]
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        sizes.append(math.prod(tensor.shape) // block * block_bytes)
    return sizes


def padded(sizes: Iterable[int], alignment: int) -> int:
    """Sum up tensors that each begin at a multiple of `alignment`."""
    return sum(size + -size % alignment for size in sizes)


class GgufFile:
    """One file: the header is written at once, weights are appended.

    Args:
        converted: Metadata and tensors.
        path: The file to write.
        type_name: Quantization type, `Q4_K_M`, say.
        names: ggml's name of the type of each tensor.
        more: Metadata of this file alone, `gguf.GGUFValue` by key.

    Attributes:
        kinds: ggml's type numbers, in the order of the tensors.
        header: Bytes before the first tensor; the same for every type.
        total: Bytes of the whole file.
        written: Bytes so far.
    """

    def __init__(
        self,
        converted: Converted,
        path: Path,
        type_name: str,
        names: Mapping[str, str],
        more: Mapping[str, Any] | None = None,
    ) -> None:
        import gguf
        import numpy as np

        self.path, self.type_name = path, type_name
        types = [gguf.GGMLQuantizationType[names[t.name].upper()] for t in converted.tensors]
        self.kinds = [int(kind) for kind in types]
        sizes = tensor_bytes(converted, names)
        writer = gguf.GGUFWriter(path, converted.architecture)
        writer.kv_data = [{**converted.metadata, **(more or {})}]
        writer.remove_key("general.file_type")
        prefix = "ALL_" if type_name == "F32" else "MOSTLY_"
        writer.add_file_type(int(gguf.LlamaFileType[prefix + type_name]))
        for tensor, kind, size in zip(converted.tensors, types, sizes, strict=True):
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        self.alignment = writer.data_alignment
        self._digest = hashlib.sha256(path.read_bytes())
        self.written = path.stat().st_size
        self._stream = path.open("ab")
        self.pad()
        self.header = self.written
        self.total = self.header + padded(sizes, self.alignment)

    def append(self, data: memoryview | bytes) -> None:
        """Append bytes of the tensor at hand."""
        self._stream.write(data)
        self._digest.update(data)
        self.written += len(data)

    def pad(self) -> None:
        """Fill up to where the next tensor begins."""
        self.append(bytes(-self.written % self.alignment))

    def make_room(self) -> None:
        """Give the file its whole length without writing: a sparse file, for planning."""
        self._stream.close()
        with self.path.open("r+b") as file:
            file.truncate(self.total)

    def close(self) -> str:
        """Close the file and give its sha256; writes what is still buffered."""
        self._stream.close()
        return str(self._digest.hexdigest())
