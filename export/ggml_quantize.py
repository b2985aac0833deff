"""Quantize rows with the functions of the installed llama_cpp library (ggml-quants.c).

`llama_model_quantize` calls the same function for portions of rows, so the bytes are the same.
Three types have faster code of our own that gives these bytes too (export/fast_quantize.py).
ctypes releases the interpreter's lock, so that threads quantize side by side.
"""

import ctypes
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export._cli import FAILED, CommandError
from export.fast_quantize import FastQuantizer

if TYPE_CHECKING:
    import numpy as np


class GgmlQuantizer:
    """ggml's own quantization, by type number (`gguf.GGMLQuantizationType`)."""

    def __init__(self) -> None:
        self._fast = FastQuantizer(self._by_library)

    @cached_property
    def _library(self) -> Any:
        import llama_cpp

        folder = Path(llama_cpp.__file__).parent / "lib"
        names = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        try:
            library = ctypes.CDLL(str(path or names[0]))
            library.ggml_quantize_chunk.restype = ctypes.c_size_t
            library.ggml_quantize_chunk.argtypes = [
                ctypes.c_int,
                ctypes.c_void_p,
                ctypes.c_void_p,
                *[ctypes.c_int64] * 3,
                ctypes.c_void_p,
            ]
            library.ggml_row_size.restype = ctypes.c_size_t
            library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
            library.ggml_validate_row_data.restype = ctypes.c_bool
            library.ggml_validate_row_data.argtypes = [
                ctypes.c_int,
                ctypes.c_void_p,
                ctypes.c_size_t,
            ]
            library.ggml_quantize_init.argtypes = [ctypes.c_int]
        except (OSError, AttributeError) as error:
            raise CommandError(
                f"the installed llama_cpp does not offer ggml_quantize_chunk ({error}); "
                "set up again: scripts/setup.sh",
                FAILED,
            ) from error
        return library

    def prepare(self, kind: int) -> None:
        """Build a type's tables once, before threads share them."""
        self._library.ggml_quantize_init(kind)

    def row_bytes(self, kind: int, width: int) -> int:
        """Give the bytes of one row."""
        return int(self._library.ggml_row_size(kind, width))

    def quantize(
        self, kind: int, rows: "np.ndarray", importance: "np.ndarray | None" = None
    ) -> "np.ndarray | None":
        """Quantize rows.

        Args:
            kind: ggml type; the width must be a multiple of its block.
            rows: float32, shape (n, width), C-contiguous.
            importance: float32, shape (width,), or None.

        Returns:
            uint8, one dimension; None if a value cannot be held (too large for float16, say).
        """
        out = self._fast.quantize(kind, rows) if importance is None else None
        if out is None:
            out = self._by_library(kind, rows, importance)
        valid = self._library.ggml_validate_row_data(kind, out.ctypes.data, out.nbytes)
        return out if valid else None

    def _by_library(
        self, kind: int, rows: "np.ndarray", importance: "np.ndarray | None" = None
    ) -> "np.ndarray":
        import numpy as np

        count, width = rows.shape
        out = np.empty(count * self.row_bytes(kind, width), dtype=np.uint8)
        self._library.ggml_quantize_chunk(
            kind,
            rows.ctypes.data,
            out.ctypes.data,
            0,
            count,
            width,
            None if importance is None else importance.ctypes.data,
        )
        return out
