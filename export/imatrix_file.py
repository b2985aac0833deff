"""The file of an importance matrix: llama.cpp's imatrix GGUF with keys that say where it is from.

In: sums of squared inputs. Out: an imatrix GGUF; read again, an `Imatrix` as quantization takes it,
checked against the model that is to be quantized.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export._cli import MODEL, CommandError

if TYPE_CHECKING:
    import numpy as np

# Matrices in a block that llama.cpp never quantizes (llama-quant.cpp, tensor_allows_quantization).
_NEVER_QUANTIZED = re.compile(
    r"_norm\.weight|ffn_gate_inp\.|ffn_gate_tid2eid\.|altup|laurel|ssm_conv1d|shortconv\.conv\."
    r"|indexer\.[kq]_proj\.|time_mix_(first|[wvag]\d|decay_w\d)|attn_rel_b\."
)


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix as quantization takes it.

    Args:
        path: Where it was read from.
        values: By tensor name: mean squared input of each column, float32, shape
            (row width × experts,), expert after expert.
        datasets: Names of the files it was computed from.
        chunks: Number of chunks of `imatrix.chunk_size` tokens.
        tokens: Number of tokens evaluated.
        rows: Number of conversations; 0 if another tool made it.
        data_sha256: Hash of the token ids, conversation after conversation: their number and
            the ids, as little-endian int32; empty if another tool made it.
        model: File name of the model it was computed with; empty if another tool made it.
    """

    path: Path
    values: "Mapping[str, np.ndarray]"
    datasets: tuple[str, ...]
    chunks: int
    tokens: int
    rows: int
    data_sha256: str
    model: str


def write_imatrix(
    output: Path,
    tensors: "Mapping[str, np.ndarray]",
    datasets: Sequence[str],
    chunk_size: int,
    origin: Mapping[str, Any],
) -> None:
    """Write what llama-imatrix writes (tools/imatrix/imatrix.cpp, save_imatrix), and our keys.

    Args:
        output: The file; it appears whole, and replaces an existing one.
        tensors: Float32: `<name>.in_sum2`, shape (experts, columns), `<name>.counts`, (experts,).
        datasets: File names of the rows.
        chunk_size: Tokens of a chunk.
        origin: `data_sha256`, `tokens`, `rows` and `model`, as in `Imatrix`.
    """
    import gguf

    class Writer(gguf.GGUFWriter):
        def add_architecture(self) -> None:
            """Leave it out: the file is no model."""

    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        writer = Writer(temporary, "imatrix")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", list(datasets))
        # Rounded up, because llama-quantize drops a count of 0.
        writer.add_uint32("imatrix.chunk_count", -(-origin["tokens"] // chunk_size))
        writer.add_uint32("imatrix.chunk_size", chunk_size)
        for key in ("data_sha256", "model"):
            writer.add_string(f"tomeforge.imatrix.{key}", origin[key])
        for key in ("tokens", "rows"):
            writer.add_uint32(f"tomeforge.imatrix.{key}", origin[key])
        for name in sorted(tensors):
            rows = tensors[name.rpartition(".")[0] + ".counts"].size
            writer.add_tensor(name, tensors[name].reshape(rows, -1))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)


def read_imatrix(path: Path) -> Imatrix:
    """Read an imatrix GGUF, ours or llama-imatrix's.

    Raises:
        CommandError: Exit 3: no importance matrix, truncated, or with numbers that are none.
    """
    import gguf
    import numpy as np

    if not path.is_file():
        raise CommandError(f"'{path}' is no file; expected an importance matrix (GGUF)", MODEL)
    with path.open("rb") as file:
        # Its metadata comes first; gguf's reader would take seconds over the tokens of a model.
        if b"imatrix.chunk_count" not in file.read(1 << 20):
            raise CommandError(
                f"'{path}' is no importance matrix (a GGUF of general.type 'imatrix'); make one "
                "with export.imatrix",
                MODEL,
            )
    try:
        reader = gguf.GGUFReader(path)
        keys = {key: field.contents() for key, field in reader.fields.items()}
        if keys["general.type"] != "imatrix":
            raise ValueError(f"general.type is {keys['general.type']!r}, expected 'imatrix'")
        tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
        values = {
            name: _mean_squares(name, tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"])
            for name in sorted({name.rpartition(".")[0] for name in tensors})
        }
        most = max(counts.max() for name, counts in tensors.items() if name.endswith(".counts"))
        return Imatrix(
            path,
            values,
            tuple(keys["imatrix.datasets"]),
            int(keys["imatrix.chunk_count"]),
            int(keys.get("tomeforge.imatrix.tokens", most)),
            int(keys.get("tomeforge.imatrix.rows", 0)),
            str(keys.get("tomeforge.imatrix.data_sha256", "")),
            str(keys.get("tomeforge.imatrix.model", "")),
        )
    except (ValueError, LookupError, TypeError, ArithmeticError, MemoryError) as error:
        raise CommandError(
            f"'{path}' is truncated or damaged ({error}); make it again with export.imatrix", MODEL
        ) from error


def _mean_squares(name: str, sums: "np.ndarray", counts: "np.ndarray") -> "np.ndarray":
    """Divide sums, shape (experts, columns), by counts, as llama-quantize's load_imatrix does."""
    import numpy as np

    if sums.dtype != np.float32 or counts.dtype != np.float32:
        raise ValueError(f"'{name}' is {sums.dtype} and {counts.dtype}, expected float32")
    if not counts.size or sums.size % counts.size:
        raise ValueError(f"'{name}' has {sums.size} sums for {counts.size} counts")
    for array in (sums, counts):
        if not np.isfinite(array).all() or (array < 0).any():
            raise ValueError(f"'{name}' holds NaN, infinity or numbers below 0")
    rows, counts = sums.reshape(counts.size, -1), counts.reshape(-1, 1)
    # An expert that no token chose: all columns weigh the same, value 1 (quantize.cpp, there too).
    return np.where(counts > 0, rows / np.maximum(counts, 1), np.float32(1)).reshape(-1)


def check_imatrix(imatrix: Imatrix, tensors: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Check that a matrix is of the model that is to be quantized.

    Args:
        imatrix: The matrix.
        tensors: By GGUF name the shapes as ggml has them, row width first (`GgufTensor.shape`).

    Returns:
        Names of matrices inside blocks that will be quantized without it, for a note.

    Raises:
        CommandError: Exit 3: it names a tensor that the model lacks, one of another size, or
            nothing of a block.
    """

    def refuse(problem: str) -> CommandError:
        return CommandError(
            f"importance matrix '{imatrix.path}' is of another model: {problem}; compute it with "
            "this model: python -m export.imatrix",
            MODEL,
        )

    for name, values in imatrix.values.items():
        if name not in tensors:
            raise refuse(f"this one has no tensor '{name}'")
        width, _, *matrices = (*tensors[name], 1, 1)
        size = width
        for length in matrices:
            size *= length
        if values.size != size:
            raise refuse(f"'{name}' has {values.size} values, expected {size}")
    uncovered = [
        name
        for name, shape in tensors.items()
        if _is_block_matrix(name, shape) and name not in imatrix.values
    ]
    covered = {_block(name) for name in imatrix.values}
    # Blocks that predict further tokens (nextn) do not run in a normal pass.
    skipped = {_block(name) for name in tensors if ".nextn." in name}
    for name in uncovered:
        if _block(name) not in covered | skipped:
            raise refuse(f"it has nothing for '{name}' and its block")
    return uncovered


def _block(name: str) -> str:
    return ".".join(name.split(".")[:2])


def _is_block_matrix(name: str, shape: tuple[int, ...]) -> bool:
    is_matrix = any(length > 1 for length in shape[1:])
    is_weight = name.startswith("blk.") and name.endswith("weight")
    return is_matrix and is_weight and not _NEVER_QUANTIZED.search(name)


def quantize_metadata(imatrix: Imatrix) -> list[tuple[str, object]]:
    """Give the keys that a file quantized with this matrix carries; integers are u32.

    The first four are llama-quantize's own. Files are named without their folders: where they lay
    on this machine is nobody's business.
    """
    keys: list[tuple[str, object]] = [("quantize.imatrix.file", imatrix.path.name)]
    if imatrix.datasets:
        keys.append(("quantize.imatrix.dataset", re.split(r"[/\\]", imatrix.datasets[0])[-1]))
    keys.append(("quantize.imatrix.entries_count", len(imatrix.values)))
    if imatrix.chunks > 0:
        keys.append(("quantize.imatrix.chunks_count", imatrix.chunks))
    keys.append(("tomeforge.imatrix.tokens", imatrix.tokens))
    if imatrix.data_sha256:
        keys += [
            ("tomeforge.imatrix.data_sha256", imatrix.data_sha256),
            ("tomeforge.imatrix.rows", imatrix.rows),
            ("tomeforge.imatrix.model", imatrix.model),
        ]
    return keys
