"""Quantize to Q4_K, Q5_K and Q6_K with our own compiled code, where it gives llama.cpp's bytes.

scripts/setup.sh compiles export/fast_quants.c. Before a type is used, a set of awkward rows goes
through both: a compiler or a llama.cpp that rounds differently is seen, and llama.cpp's code stays.
"""

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export._cli import log

if TYPE_CHECKING:
    import numpy as np

LIBRARY = Path(sys.prefix) / "share" / "tomeforge" / "fast_quants.so"
# Name and bytes of a block, by ggml's type number (gguf.GGMLQuantizationType).
TYPES = {12: ("q4_K", 144), 13: ("q5_K", 176), 14: ("q6_K", 210)}
BLOCK = 256
IN_USE = "in use"
_SWITCH = "TOMEFORGE_PLAIN_QUANTS"


class FastQuantizer:
    """The functions of fast_quants.so that have shown to give the library's bytes.

    Args:
        by_library: Quantizes rows (n, width) to a type, as llama.cpp does: the reference.
    """

    def __init__(self, by_library: "Callable[[int, np.ndarray], np.ndarray]") -> None:
        self._by_library = by_library
        self._lock = threading.Lock()
        self._functions: dict[int, Any] = {}
        self._states: dict[int, str] = {}

    def quantize(self, kind: int, rows: "np.ndarray") -> "np.ndarray | None":
        """Quantize rows, if this type can be done here.

        Args:
            kind: ggml type; any.
            rows: float32, finite, shape (n, width), C-contiguous.

        Returns:
            uint8, one dimension; None if the library has to do it.
        """
        if kind not in TYPES or rows.shape[1] % BLOCK or self._state(kind) != IN_USE:
            return None
        return self._call(kind, rows)

    def status(self) -> dict[str, str]:
        """Give "in use", or the reason why not, for each type."""
        return {name: self._state(kind) for kind, (name, _) in TYPES.items()}

    def _state(self, kind: int) -> str:
        with self._lock:  # one thread checks, the others wait for its verdict
            if kind not in self._states:
                self._states[kind] = self._check(kind)
            return self._states[kind]

    def _check(self, kind: int) -> str:
        import numpy as np

        name, _ = TYPES[kind]
        if os.environ.get(_SWITCH) == "1":
            return f"switched off by {_SWITCH}=1"
        if not LIBRARY.is_file():
            return f"{LIBRARY} does not exist"
        try:
            function = getattr(ctypes.CDLL(str(LIBRARY)), f"tf_quantize_{name}")
        except (OSError, AttributeError) as error:
            return f"cannot be loaded: {error}"
        function.restype = ctypes.c_size_t
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
        self._functions[kind] = function
        rows = awkward_rows()
        made = self._call(kind, rows)
        if made is None:
            return "this CPU has neither AVX2 nor AVX-512"
        if not np.array_equal(made, self._by_library(kind, rows)):
            log(
                f"note: {LIBRARY.name} and the installed llama.cpp give different bytes for "
                f"{name.upper()}; llama.cpp's own code is used, which is slower"
            )
            return "gives other bytes than the installed llama.cpp"
        return IN_USE

    def _call(self, kind: int, rows: "np.ndarray") -> "np.ndarray | None":
        import numpy as np

        count, width = rows.shape
        out = np.empty(count * width // BLOCK * TYPES[kind][1], dtype=np.uint8)
        written = self._functions[kind](rows.ctypes.data, out.ctypes.data, count, width)
        assert written in (0, out.nbytes), f"{written} bytes written, expected {out.nbytes}"
        return out if written else None


def awkward_rows() -> "np.ndarray":
    """Make float32 rows, shape (n, 256), that tell a different rounding or a missed case.

    Among them: zeros of both signs, constants, steps of one float, values from the smallest to the
    largest, sub-blocks of very different size, weights far from zero and close to each other.
    """
    import numpy as np

    random = np.random.default_rng(5)

    def normal(count: int) -> "np.ndarray":
        return random.standard_normal((count, BLOCK))

    def spread(low: float, high: float, *shape: int) -> "np.ndarray":
        return 10.0 ** random.uniform(low, high, shape)

    constants = [0, 1, -1, 1e-45, -1e-45, 1e-38, 3e38, -3e38, 1e-15, -9e-16, 65504, -1e-8]
    pairs = [(0.0, -0.0), (1, -1), (3e38, -3e38), (1e-45, 0), (-5, -5.0000005), (1e4, 10000.001)]
    mixed = normal(4)
    mixed[0, ::2], mixed[1, :32], mixed[2, 16:], mixed[3, 1:] = 0, 0, 0, -0.0
    around = np.array([[1], [-1], [100], [-100], [1e4], [-1e4]])
    parts = [
        normal(40) * 0.02,
        np.repeat(np.array(constants)[:, None], BLOCK, axis=1),
        np.tile(pairs, BLOCK // 2),
        normal(28) * 10.0 ** np.arange(-45, 37, 3)[:28, None],
        np.concatenate([around + normal(6) * scale for scale in (1, 1e-2, 1e-4, 1e-6)]),
        normal(8) * spread(-40, 37, 8, 8).repeat(32, axis=1),
        normal(8) * spread(-9, 3, 8, 16).repeat(16, axis=1),
        np.sign(normal(4)) * spread(-44, 37, 4, BLOCK),
        random.integers(-3, 4, (8, BLOCK)) * spread(-12, 3, 8, 1),
        mixed,
        normal(1),  # an odd number of rows
    ]
    return np.concatenate(parts).clip(-3.4e38, 3.4e38).astype(np.float32)
