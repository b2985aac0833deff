"""The child process of export.imatrix: runs a model over conversations and sums what it sees.

A column of a weight matrix matters as much as the input that it is multiplied with. llama.cpp shows
every node of its graph to a callback, which here adds up the squares of each matrix's inputs, by the
rules of llama.cpp's tools/imatrix/imatrix.cpp (collect_imatrix).

In: a job file (JSON) and `rows.jsonl` beside it. Out: `result.json` and `sums.npz` in that folder;
`phase.txt` and `progress.txt` say how far it came.

Run: python -m export.imatrix_child JOB.json (by export.imatrix)
"""

import argparse
import ctypes
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export._cli import MODEL, OK, USAGE, CommandError, run_command
from export.plain_tokens import of_llama_cpp

if TYPE_CHECKING:
    import numpy as np

# llama-imatrix's default chunk, and the batch below which it takes no matrix as a weight's input.
CHUNK_TOKENS = 512
MIN_BATCH_TOKENS = 16
_F32, _I32 = 0, 26


class Tensor(ctypes.Structure):
    """`struct ggml_tensor` of ggml/include/ggml.h; `open_ggml` checks that it is the library's."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


class _InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


class Ggml:
    """The installed ggml library, and the numbers it gives the two operations that are observed."""

    def __init__(self) -> None:
        from llama_cpp._ctypes_extensions import load_shared_library
        from llama_cpp._ggml import libggml_base_path

        self.library = load_shared_library("ggml-base", libggml_base_path)
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        for name, result, *arguments in (
            ("ggml_init", pointer, _InitParams),
            ("ggml_free", None, pointer),
            ("ggml_new_tensor_3d", pointer, pointer, ctypes.c_int, number, number, number),
            ("ggml_set_name", pointer, pointer, ctypes.c_char_p),
            ("ggml_get_name", ctypes.c_char_p, pointer),
            ("ggml_get_data", pointer, pointer),
            ("ggml_op_desc", ctypes.c_char_p, pointer),
            ("ggml_nbytes", ctypes.c_size_t, pointer),
            ("ggml_mul_mat", pointer, pointer, pointer, pointer),
            ("ggml_mul_mat_id", pointer, pointer, pointer, pointer, pointer),
            ("ggml_backend_buffer_is_host", ctypes.c_bool, pointer),
        ):
            function = getattr(self.library, name)
            function.restype, function.argtypes = result, arguments
        self.mul_mat, self.mul_mat_id = self._check_layout()

    def _check_layout(self) -> tuple[int, int]:
        """Make tensors that are known, and compare what the library and the structure say."""
        call = self.library
        context = call.ggml_init(_InitParams(1 << 16, None, False))
        try:
            weight = call.ggml_new_tensor_3d(context, _F32, 8, 4, 2)
            call.ggml_set_name(weight, b"blk.0.known.weight")
            x = call.ggml_new_tensor_3d(context, _F32, 8, 1, 6)
            ids = call.ggml_new_tensor_3d(context, _I32, 1, 6, 1)
            dense = call.ggml_mul_mat(context, weight, x)
            routed = call.ggml_mul_mat_id(context, weight, x, ids)
            known, first, second = map(Tensor.from_address, (weight, dense, routed))
            fits = (
                (known.type, list(known.ne), list(known.nb))
                == (_F32, [8, 4, 2, 1], [4, 32, 128, 256])
                and known.name == call.ggml_get_name(weight) == b"blk.0.known.weight"
                and known.data == call.ggml_get_data(weight)
                and known.ne[3] * known.nb[3] == call.ggml_nbytes(weight)
                and first.src[:3] == [weight, x, None]
                and second.src[:3] == [weight, x, ids]
                and call.ggml_op_desc(dense) == b"MUL_MAT"
                and call.ggml_op_desc(routed) == b"MUL_MAT_ID"
                and first.op != second.op
            )
            if not fits:
                raise CommandError(
                    "the installed llama_cpp lays tensors out in another way than version 0.3.36; "
                    "install that one (scripts/setup.sh)",
                    MODEL,
                )
            return first.op, second.op
        finally:
            call.ggml_free(context)


class Collector:
    """Adds up the squared inputs of every weight matrix of a graph.

    Attributes:
        sums: By weight name, float64, shape (matrices, row width); matrices are experts.
        counts: By weight name, int64: rows added to each expert; one number for a dense weight.
        error: What went wrong inside the callback, where nothing can be raised.
    """

    def __init__(self, ggml: Ggml) -> None:
        self.sums: dict[str, np.ndarray] = {}
        self.counts: dict[str, np.ndarray] = {}
        self.error: Exception | None = None
        self._ggml = ggml
        self._shared: tuple[int, Any] = (0, None)
        self._last_name = ""
        self._stop_at = ""

    def callback(self, address: int, ask: bool, _user_data: int | None) -> bool:
        """Serve llama.cpp's `cb_eval`: asked whether a node is wanted, then shown its result."""
        try:
            node = Tensor.from_address(address)
            if ask:
                return self._wants(node)
            name = self._add(node)
        except Exception as error:
            self.error = self.error or error
            return False
        self._last_name = name
        # False ends the pass: what follows the last weight is the output matrix, a fifth of the
        # time of a small model, and nothing of it is collected.
        return name != self._stop_at

    def end_batch(self) -> None:
        """Learn which weight comes last, and raise what the callback could not."""
        if self.error is not None:
            raise self.error
        self._stop_at = self._last_name
        self._shared = (0, None)

    def _wants(self, node: Tensor) -> bool:
        if node.op == self._ggml.mul_mat_id:
            return True
        if node.op != self._ggml.mul_mat:
            return False
        x = Tensor.from_address(node.src[1])
        if x.ne[1] < MIN_BATCH_TOKENS or x.type != _F32:
            return False
        return _weight_name(Tensor.from_address(node.src[0])).startswith("blk.")

    def _add(self, node: Tensor) -> str:
        import numpy as np

        weight = Tensor.from_address(node.src[0])
        name = _weight_name(weight)
        routed = node.op == self._ggml.mul_mat_id
        if routed:
            sums, counts = self._routed_squares(node, weight.ne[2])
        else:
            sums, counts = self._dense_squares(node.src[1], weight.ne[2], weight.ne[3])
        if not np.isfinite(sums).all():
            raise CommandError(
                f"the inputs of '{name}' are not finite: the model is damaged or overflows; "
                "export.verify_gguf tells more",
                MODEL,
            )
        if name not in self.sums:
            self.sums[name] = np.zeros(sums.shape, np.float64)
            self.counts[name] = np.zeros(counts.shape, np.int64)
        if self.sums[name].shape != sums.shape or self.counts[name].shape != counts.shape:
            raise CommandError(f"'{name}' is used with inputs of two sizes", MODEL)
        self.sums[name] += sums
        self.counts[name] += counts
        return name

    def _dense_squares(self, address: int, *matrices: int) -> "tuple[np.ndarray, np.ndarray]":
        """Give sums, shape (n_mat, columns), and one count, as llama.cpp does for dense weights."""
        import numpy as np

        if self._shared[0] != address:
            x = self._array(address, np.float32)
            self._shared = (address, np.einsum("abij,abij->abj", x, x))
        # Query, key and value have one input, gate and up another: summed once.
        squares = self._shared[1]
        n_mat = matrices[0] * matrices[1]
        sums = np.zeros((n_mat, squares.shape[-1]), np.float32)
        for outer, inner in np.ndindex(squares.shape[:2]):
            at = outer % matrices[1] * matrices[0] + inner % matrices[0]
            sums[at] += squares[outer, inner]
        rows = int(np.prod(Tensor.from_address(address).ne[1:4]))
        return sums, np.array([rows // n_mat])

    def _routed_squares(self, node: Tensor, num_experts: int) -> "tuple[np.ndarray, np.ndarray]":
        """Give sums, shape (experts, columns), and a count for each expert."""
        import numpy as np

        ids = self._array(node.src[2], np.int32)[0, 0]  # (tokens, experts used)
        x = self._array(node.src[1], np.float32)[0]  # (tokens, 1 or experts used, columns)
        sums = np.zeros((num_experts, x.shape[-1]), np.float32)
        for slot in range(ids.shape[1]):
            chosen = np.arange(num_experts)[:, None] == ids[None, :, slot]
            sums += chosen.astype(np.float32) @ np.square(x[:, slot % x.shape[1]])
        return sums, np.bincount(ids.ravel(), minlength=num_experts)

    def _array(self, address: int, dtype: Any) -> "np.ndarray":
        """View a tensor of four dimensions, the row width last; it need not be contiguous."""
        import numpy as np

        tensor = Tensor.from_address(address)
        if tensor.buffer and not self._ggml.library.ggml_backend_buffer_is_host(tensor.buffer):
            raise CommandError("an input lies in the memory of a GPU; expected the CPU's", MODEL)
        raw = (ctypes.c_char * self._ggml.library.ggml_nbytes(address)).from_address(tensor.data)
        return np.ndarray(tensor.ne[::-1], dtype, raw, strides=tensor.nb[::-1])


def _weight_name(weight: Tensor) -> str:
    """`CUDA0#blk.0.attn_k.weight#0` is a copy of `blk.0.attn_k.weight`."""
    name: str = weight.name.decode("utf-8", "replace")
    return name.split("#")[1] if "#" in name else name


class Evaluator:
    """A model with a context that shows its graph to a collector.

    Raises:
        CommandError: Exit 3: llama.cpp does not load the file or gives no context.
    """

    def __init__(self, gguf: str, n_threads: int, collector: Collector) -> None:
        import llama_cpp

        self._api = llama_cpp
        self._collector = collector
        try:
            # All on the CPU, where the callback can read the inputs.
            self.model = llama_cpp.Llama(
                gguf,
                n_ctx=32,
                n_batch=32,
                verbose=False,
                n_gpu_layers=0,
                offload_kqv=False,
                op_offload=False,
                n_threads=n_threads or None,
                n_threads_batch=n_threads or None,
            )
        except ValueError as error:
            raise CommandError(f"llama.cpp cannot load the file: {error}", MODEL) from error
        trained = llama_cpp.llama_model_n_ctx_train(self.model.model)
        self.chunk_size = min(CHUNK_TOKENS, trained or CHUNK_TOKENS)
        params = self.model.context_params
        params.n_ctx = params.n_batch = params.n_ubatch = self.chunk_size
        params.cb_eval = self._callback = llama_cpp.ggml_backend_sched_eval_callback(
            collector.callback
        )
        self._context = llama_cpp.llama_init_from_model(self.model.model, params)
        if self._context is None:
            raise CommandError("llama.cpp gives no context for this model", MODEL)
        self._batch = llama_cpp.llama_batch_init(self.chunk_size, 0, 1)
        self.has_template = bool(self.model.metadata.get("tokenizer.chat_template"))
        self._plain = of_llama_cpp(self.model)

    def evaluate(self, ids: list[int]) -> None:
        """Run one sequence from its start.

        Raises:
            CommandError: Exit 3: llama.cpp failed, or an input is not finite.
        """
        batch = self._batch
        batch.n_tokens = len(ids)
        for at, token in enumerate(ids):
            batch.token[at], batch.pos[at] = token, at
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
            # Without an output the last layer would see one token only.
            batch.logits[at] = True
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        code = self._api.llama_decode(self._context, batch)
        self._collector.end_batch()
        if code:
            raise CommandError(f"llama.cpp failed to evaluate {len(ids)} tokens ({code})", MODEL)

    def token_ids(self, messages: list[dict[str, str]]) -> list[int] | str:
        """Give a conversation as chat has it, or as plain text if the model has no template."""
        if self.has_template:
            return self._plain.chat_ids(messages, add_generation_prompt=False)
        text = "\n\n".join(turn["content"] for turn in messages)
        return list(self.model.tokenize(text.encode("utf-8"), add_bos=True, special=False))


def collect(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Evaluate rows up to a number of tokens; sums and counts go to `sums.npz`.

    Every conversation is a sequence of its own, cut at a chunk: packed behind another one it would
    attend to a stranger's text, which no chat does, and its start would be nowhere near the start.

    Args:
        job: `gguf`, `max_tokens`, `n_threads`.
        folder: Holds `rows.jsonl`: one list of messages a line.

    Raises:
        CommandError: Exit 2: no row can be used. Exit 3: llama.cpp or the model fails.
    """
    import numpy as np

    def tell(name: str, text: str) -> None:
        (folder / name).write_text(text, encoding="utf-8")

    tell("phase.txt", "loading")
    collector = Collector(Ggml())
    evaluator = Evaluator(job["gguf"], job["n_threads"], collector)
    tell("phase.txt", "evaluating")
    digest = hashlib.sha256()
    tokens = rows = too_short = refused = 0
    refusal = ""
    for messages in _read_lines(folder / "rows.jsonl"):
        left = job["max_tokens"] - tokens
        if left < MIN_BATCH_TOKENS:
            break
        ids = evaluator.token_ids(messages)
        if isinstance(ids, str):
            refused, refusal = refused + 1, refusal or ids
            continue
        ids = ids[: min(evaluator.chunk_size, left)]
        if len(ids) < MIN_BATCH_TOKENS:
            too_short += 1
            continue
        evaluator.evaluate(ids)
        digest.update(np.array([len(ids), *ids], "<i4").tobytes())
        tokens, rows = tokens + len(ids), rows + 1
        tell("progress.txt", str(tokens))
    if not collector.sums:
        why = f"{too_short} have fewer than {MIN_BATCH_TOKENS} tokens, {refused} are refused"
        raise CommandError(f"no row can be used: {why} {refusal}; give others: --data", USAGE)
    arrays: Any = {f"{name}.in_sum2": sums for name, sums in collector.sums.items()}
    arrays |= {f"{name}.counts": counts for name, counts in collector.counts.items()}
    np.savez(folder / "sums.npz", **arrays)
    return {
        "tokens": tokens,
        "rows": rows,
        "too_short": too_short,
        "refused": refused,
        "refusal": refusal,
        "chunk_size": evaluator.chunk_size,
        "has_template": evaluator.has_template,
        "data_sha256": digest.hexdigest(),
    }


def _read_lines(path: Path) -> Iterator[list[dict[str, str]]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m export.imatrix_child",
        description="Child process of export.imatrix: runs a model over rows, collects its inputs.",
    )
    parser.add_argument("job", type=Path, help="job file (JSON); results are written beside it")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one job; exit codes: 0 done, 2 no usable row, 3 the model fails."""
    args = build_parser().parse_args(argv)
    job = json.loads(args.job.read_text(encoding="utf-8"))
    result = collect(job, args.job.parent)
    (args.job.parent / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return OK


if __name__ == "__main__":
    run_command(main)
