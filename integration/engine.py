"""A GGUF in llama.cpp: tokens in, logits out, with several cached sequences.

What `llama_cpp.Llama` does and this does not: keep a float copy of the logits for every token of a
batch, compile every chat template of the file when it loads, count the host's cores, allow two threads
at once (llama.cpp then aborts), and forget which adapter a cached prefix was evaluated with.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np

from integration._cli import CONTEXT, MODEL, CommandError
from integration.backend import Feed
from integration.gguf_header import GgufHeader
from integration.kv_cache import CachedSequence, KvCache
from integration.prefix_store import PrefixStore

_N_BATCH = 512
# Portions of a batch that are computed at once: at 512 a 135M model reads 10 % slower.
_N_UBATCH = 256


class Engine:
    """One loaded GGUF with its context.

    Not safe for threads by itself: hold ``lock`` from the first evaluation of an answer to its last.

    Args:
        header: The file's header; ``header.path`` is loaded.
        n_ctx: Context in tokens of each sequence.
        n_threads: Threads of evaluation.
        n_sequences: Sequences that can be evaluated side by side.
        store: Where states of shared prefixes are kept between runs, or None.
        kv_type: ggml type of cached keys and values, llama.cpp's own choice (F16) by default.

    Raises:
        CommandError: Exit 3; llama.cpp refuses the file.
    """

    def __init__(
        self,
        header: GgufHeader,
        n_ctx: int,
        n_threads: int,
        n_sequences: int = 1,
        store: PrefixStore | None = None,
        kv_type: int | None = None,
    ) -> None:
        import llama_cpp
        from llama_cpp import _internals, _logger

        self._lib = llama_cpp
        _logger.set_verbose(False)
        initialize_backend()
        model_params = llama_cpp.llama_model_default_params()
        model_params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_ctx * n_sequences
        params.n_batch, params.n_ubatch = min(_N_BATCH, n_ctx), min(_N_UBATCH, n_ctx)
        # Each sequence has cells of its own, from the first one on: where cells lie changes how sums
        # are rounded, and with that what a model answers.
        params.n_seq_max, params.kv_unified = n_sequences, False
        params.n_threads = params.n_threads_batch = n_threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.no_perf = True
        if kv_type is not None:
            params.type_k = params.type_v = kv_type
        self.params = params
        self.lock = RLock()
        self.header, self.n_threads = header, n_threads
        try:
            self._model = _internals.LlamaModel(
                path_model=str(header.path), params=model_params, verbose=False
            )
            self._context = _internals.LlamaContext(model=self._model, params=params, verbose=False)
        except ValueError as error:
            raise CommandError(
                f"model '{header.path}' could not be loaded (llama.cpp: {error}); check it with "
                "export.verify_gguf",
                MODEL,
            ) from error
        self.vocab = self._model.vocab
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.n_ctx = llama_cpp.llama_n_ctx_seq(self.context)
        self.cache = KvCache(llama_cpp, self.context, header.path, n_sequences, store)
        self._batch = _internals.LlamaBatch(
            n_tokens=params.n_batch, embd=0, n_seq_max=1, verbose=False
        )
        self._pieces: dict[int, bytes] = {}

    @property
    def context(self) -> Any:
        """Pointer to the ``llama_context``."""
        return self._context.ctx

    @property
    def n_sequences(self) -> int:
        """Sequences that can be evaluated side by side."""
        return len(self.cache.sequences)

    def close(self) -> None:
        """Free the context and the model now instead of when the object dies."""
        self._batch.close()
        self._context.close()
        self._model.close()

    def tokenize(self, text: str, special: bool = False, add_bos: bool = False) -> list[int]:
        """Tokenize text; control tokens in it count only with ``special``."""
        if not text and not add_bos:
            return []
        data = text.encode("utf-8", errors="replace")
        size = len(data) + 8
        while True:
            tokens = (self._lib.llama_token * size)()
            count = self._lib.llama_tokenize(
                self.vocab, data, len(data), tokens, size, add_bos, special
            )
            if count >= 0:
                return list(tokens[:count])
            size = -count

    def piece(self, token: int) -> bytes:
        """Give a token's bytes; control tokens are empty."""
        known = self._pieces.get(token)
        if known is None:
            buffer = ctypes.create_string_buffer(64)
            size = self._lib.llama_token_to_piece(self.vocab, token, buffer, 64, 0, False)
            if size < 0:
                buffer = ctypes.create_string_buffer(-size)
                size = self._lib.llama_token_to_piece(self.vocab, token, buffer, -size, 0, False)
            known = self._pieces[token] = buffer.raw[:size]
        return known

    def is_end(self, token: int) -> bool:
        """Whether a token ends the generation (EOS, end of turn)."""
        return bool(self._lib.llama_vocab_is_eog(self.vocab, token))

    def logits(self, row: int) -> np.ndarray:
        """Give the logits of a row of the newest evaluation, shape (vocabulary,), float32.

        The array is llama.cpp's own memory: the next evaluation overwrites it.
        """
        pointer = self._lib.llama_get_logits_ith(self.context, row)
        return np.ctypeslib.as_array(pointer, shape=(self.n_vocab,))

    def clear(self) -> None:
        """Forget every cached token: the next prompt is evaluated as in a new process."""
        self.cache.clear()

    def warm_up(self) -> None:
        """Evaluate one token and forget it: that reads the weights into memory."""
        with self.lock:
            sequence = self.cache.take()
            self.cache.cut(sequence, 0)
            self._decode([(sequence, (0,))])
            self.cache.cut(sequence, 0)
            self.cache.release(sequence)

    def load_adapter(self, path: Path) -> Any:
        """Load a LoRA GGUF that has been checked; None when llama.cpp refuses it."""
        handle = self._lib.llama_adapter_lora_init(self._model.model, str(path).encode("utf-8"))
        return handle or None

    def free_adapter(self, handle: Any) -> None:
        """Free an adapter that is not active."""
        self._lib.llama_adapter_lora_free(handle)

    def set_adapters(self, handles: Sequence[Any], weights: Sequence[float], key: str) -> None:
        """Make these the active adapters, within microseconds.

        What was evaluated with others stays in their own sequences, and is taken up when they return.

        Args:
            handles: What ``load_adapter`` gave; none for the plain base.
            weights: Of each, on top of its own scale alpha / rank.
            key: Tells this set from any other, also in another process.
        """
        pointers = (self._lib.llama_adapter_lora_p_ctypes * len(handles))(*handles)
        scales = (ctypes.c_float * len(handles))(*weights)
        self._lib.llama_set_adapters_lora(self.context, pointers, len(handles), scales)
        self.cache.adapter_key = key

    def take_sequence(self) -> int:
        """Reserve a sequence for the active adapters; give its number.

        Raises:
            RuntimeError: All are taken.
        """
        return self.cache.take().number

    def release_sequence(self, number: int) -> None:
        """Let another conversation have a sequence; what it holds stays until then."""
        self.cache.release(self.cache.sequences[number])

    def evaluate(self, feeds: Sequence[tuple[int, Feed]]) -> list[int]:
        """Evaluate tokens of one or several sequences in one pass.

        Args:
            feeds: Sequence and tokens. A prompt must be the only one.

        Returns:
            For each of them the row of the logits after its last token.

        Raises:
            CommandError: Exit 4; the context is full.
        """
        parts = [(self.cache.sequences[number], feed) for number, feed in feeds]
        for sequence, _ in parts:
            self.cache.claim(sequence)
        if len(parts) == 1 and parts[0][1].is_prompt:
            return [self._evaluate_prompt(*parts[0])]
        return self._decode([(sequence, feed.tokens) for sequence, feed in parts])

    def _evaluate_prompt(self, sequence: CachedSequence, feed: Feed) -> int:
        ids, shared = list(feed.tokens), min(feed.shared, len(feed.tokens) - 1)
        sequence.shared = shared
        if feed.continues and _common(sequence.ids, ids) < shared:
            self.cache.recall(sequence, ids[:shared])
        reused = _common(sequence.ids, ids)
        if not feed.continues or reused < shared:
            # At the same place every time: how a prompt is cut changes its rounding, and with it
            # sometimes a greedy answer. So a line answers alike, whatever was asked before it.
            reused = shared if reused >= shared else 0
        reused = min(reused, len(ids) - 1)
        if shared > reused:
            if not self.cache.restore_prefix(sequence, ids[:shared]):
                self._evaluate_rest(sequence, ids[:shared])
                self.cache.keep_prefix(sequence)
            reused = shared
        else:
            self.cache.cut(sequence, reused)
        return self._evaluate_rest(sequence, ids[reused:])

    def _evaluate_rest(self, sequence: CachedSequence, tokens: Sequence[int]) -> int:
        rows = [0]
        for start in range(0, len(tokens), self.params.n_batch):
            rows = self._decode([(sequence, tokens[start : start + self.params.n_batch])])
        return rows[0]

    def _decode(self, parts: Sequence[tuple[CachedSequence, Sequence[int]]]) -> list[int]:
        batch, rows, at = self._batch.batch, [], 0
        for sequence, tokens in parts:
            for position, token in enumerate(tokens, len(sequence.ids)):
                batch.token[at], batch.pos[at] = token, position
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence.number
                batch.logits[at] = False
                at += 1
            batch.logits[at - 1] = True
            rows.append(at - 1)
        batch.n_tokens = at
        code = self._lib.llama_decode(self.context, batch)
        if code != 0:
            for sequence, _ in parts:
                self.cache.cut(sequence, len(sequence.ids))
            raise CommandError(
                f"llama.cpp could not evaluate {at} more tokens (code {code}) in a context of "
                f"{self.n_ctx}; shorten the conversation, or give a larger --n-ctx",
                CONTEXT,
            )
        for sequence, tokens in parts:
            sequence.ids.extend(tokens)
        return rows


def _common(cached: Sequence[int], wanted: Sequence[int]) -> int:
    """Count the leading tokens that are the same."""
    size = min(len(cached), len(wanted))
    if cached[:size] == wanted[:size]:
        return size
    return next(at for at in range(size) if cached[at] != wanted[at])


@functools.cache
def initialize_backend() -> None:
    """Set llama.cpp up, once in a process."""
    import llama_cpp

    llama_cpp.llama_backend_init()
