"""Stream tensors through GGUF files: read rows, merge, quantize to every type, append.

Threads work on portions of rows; a handful of them is in memory at a time, whatever the model's
size. Runs in the child process of export.export_gguf.
"""

import contextlib
import errno
import itertools
import math
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from export._cli import FAILED, USAGE, CommandError
from export.ggml_quantize import GgmlQuantizer
from export.gguf_writer import GgufFile
from export.lazy_convert import Converted, PlannedTensor
from export.merge_adapter import check_finite
from export.merged_weights import row_blocks

if TYPE_CHECKING:
    import numpy as np

    from export.imatrix_file import Imatrix

# Weights in one portion: 4 MB of float32, small beside the model, large beside a function call.
PORTION_WEIGHTS = 1 << 20
# These are noise without an importance matrix (tensor_requires_imatrix in llama-quant.cpp).
_NEED_IMPORTANCE = {"IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S"}
_FREE_OF_IT = {"token_embd.weight", "per_layer_token_embd.weight", "output.weight"}


@dataclass(frozen=True)
class _Portion:
    """Rows of one tensor: compute them, check them, quantize them to every type.

    Attributes:
        index: Of the tensor.
        is_last: No rows of this tensor follow.
        whole: Its values, where the converter rearranges them.
    """

    converted: Converted
    quantizer: GgmlQuantizer
    index: int
    first: int
    count: int
    is_last: bool
    kinds: tuple[int, ...]
    whole: "np.ndarray | None"
    importance: "np.ndarray | None"

    def make(self) -> "dict[int, np.ndarray]":
        """Give the bytes for each type."""
        import gguf
        import numpy as np

        tensor = self.converted.tensors[self.index]
        if self.whole is not None:
            rows = self.whole[self.first : self.first + self.count]
        elif len(tensor.shape) == 2:
            rows = self.converted.rows_of(tensor, self.first, self.count)
        else:
            rows = self.converted.rows_of(tensor, 0, None).reshape(1, -1)
        check_finite(tensor.name, bool(np.isfinite(rows).all()), "float32")
        made = {}
        for kind in self.kinds:
            data = self.quantizer.quantize(kind, rows, self.importance)
            check_finite(tensor.name, data is not None, gguf.GGMLQuantizationType(kind).name)
            assert data is not None
            made[kind] = data
        return made


def stream_rows(
    converted: Converted,
    files: Sequence[GgufFile],
    imatrix: "Imatrix | None",
    n_threads: int,
    progress: Callable[[int, int], None],
) -> None:
    """Write the weights of all files, in one pass over the tensors.

    Args:
        converted: The tensors, in the files' order.
        files: Begun, their headers written.
        imatrix: Importance of the columns, for the types that use it.
        n_threads: Portions that are worked on at the same time.
        progress: Called with the bytes written so far and in the end.

    Raises:
        CommandError: Exit 1: the disk is full. Exit 2: a type that needs an importance matrix.
            Exit 3: a value that is no finite number, or too large for its type.
    """
    total = sum(file.total for file in files)
    portions = _portions(converted, files, imatrix)
    waiting: deque[tuple[_Portion, Future[dict[int, np.ndarray]]]] = deque()
    with full_disk_told(files), ThreadPoolExecutor(n_threads) as pool:
        try:
            while True:
                portion = next(portions, None)
                if portion is not None:
                    waiting.append((portion, pool.submit(portion.make)))
                # As many portions in the air as keep every thread busy, and no more.
                while waiting and (portion is None or len(waiting) > n_threads + 1):
                    _append(files, *waiting.popleft())
                    progress(sum(file.written for file in files), total)
                if portion is None:
                    break
        finally:
            for _, future in waiting:
                future.cancel()


def _portions(
    converted: Converted, files: Sequence[GgufFile], imatrix: "Imatrix | None"
) -> Iterator[_Portion]:
    """Cut every tensor into portions, in the order of the files."""
    kinds_of = [tuple(sorted({f.kinds[i] for f in files})) for i in range(len(converted.tensors))]
    for tensor, kinds in zip(converted.tensors, kinds_of, strict=True):
        _importance(imatrix, tensor, kinds)  # refuses, before anything takes time
    quantizer = GgmlQuantizer()
    for kind in set(itertools.chain(*kinds_of)):
        quantizer.prepare(kind)
    for index, tensor in enumerate(converted.tensors):
        kinds = kinds_of[index]
        width = tensor.shape[-1] if tensor.shape else 1
        # A stack of experts: each has an importance of its own.
        rows_each = tensor.shape[-2] if len(tensor.shape) > 1 else 1
        groups = math.prod(tensor.shape) // (width * rows_each)
        importance = _importance(imatrix, tensor, kinds)
        whole = None if tensor.weight else tensor.read().reshape(groups, rows_each, width)
        for group in range(groups):
            for first, count in row_blocks(rows_each, PORTION_WEIGHTS // width):
                yield _Portion(
                    converted,
                    quantizer,
                    index,
                    first,
                    count,
                    group + 1 == groups and first + count == rows_each,
                    kinds,
                    None if whole is None else whole[group],
                    None if importance is None else importance[group],
                )


def _importance(
    imatrix: "Imatrix | None", tensor: PlannedTensor, kinds: Sequence[int]
) -> "np.ndarray | None":
    """Give the importance of the columns, (groups, width), where there is one."""
    import gguf
    import numpy as np

    values = None if imatrix is None else imatrix.values.get(tensor.name)
    if values is not None and values.size == math.prod((*tensor.shape[:-2], tensor.shape[-1])):
        return np.ascontiguousarray(values, dtype=np.float32).reshape(-1, tensor.shape[-1])
    needing = {gguf.GGMLQuantizationType(kind).name for kind in kinds} & _NEED_IMPORTANCE
    if needing and tensor.name not in _FREE_OF_IT:
        raise CommandError(
            f"'{tensor.name}' as {', '.join(sorted(needing))} would be noise without an "
            "importance matrix; compute one from the training rows: --imatrix auto",
            USAGE,
        )
    return None


def _append(
    files: Sequence[GgufFile], portion: _Portion, future: "Future[dict[int, np.ndarray]]"
) -> None:
    made = future.result()
    for file in files:
        file.append(made[file.kinds[portion.index]].data)
        if portion.is_last:
            file.pad()


@contextlib.contextmanager
def full_disk_told(files: Sequence[GgufFile]) -> Iterator[None]:
    """Make a full disk an error that names the missing bytes."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        missing = sum(file.total - file.written for file in files)
        free = shutil.disk_usage(files[0].path.parent).free
        raise CommandError(
            f"the disk is full: {missing} bytes were still to be written, {free} are free. "
            "Nothing is left half-written; free some space, or use another disk: --output",
            FAILED,
        ) from error
