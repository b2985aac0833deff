"""A GGUF in llama.cpp: tokens in, logits out, with several cached sequences.

What `llama_cpp.Llama` does and this does not: keep a float copy of the logits for every token of a
batch, compile every chat template of the file when it loads, count the host's cores, allow two threads
at once (llama.cpp then aborts), and forget which adapter a cached prefix was evaluated with.
"""

import ctypes
import functools
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np

from integration._cli import CONTEXT, MODEL, CommandError
from integration.backend import Feed
from integration.gguf_header import GgufHeader
from integration.prefix_store import PrefixStore, file_identity

_N_BATCH = 512
# Portions of a batch that are computed at once: at 512 a 135M model reads 10 % slower.
_N_UBATCH = 256
_MIN_SAVED_PREFIX = 64
_MAX_STATES = 4
_CONVERSATION, _MAX_CONVERSATION_BYTES = "-conversation", 1 << 28


@dataclass
class _Sequence:
    """A sequence of the KV cache: the tokens it holds, and how many of them its prompt shared."""

    number: int
    ids: list[int] = field(default_factory=list)
    shared: int = 0
    busy: bool = False
    last_use: int = 0


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
        _initialize_backend()
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
        self._memory = llama_cpp.llama_get_memory(self.context)
        self._batch = _internals.LlamaBatch(
            n_tokens=params.n_batch, embd=0, n_seq_max=1, verbose=False
        )
        self._pieces: dict[int, bytes] = {}
        self._sequences = [_Sequence(number) for number in range(n_sequences)]
        self._clock = itertools.count(1)
        self._store, self._adapter_key = store, ""
        self._states: OrderedDict[str, np.ndarray] = OrderedDict()

    @property
    def context(self) -> Any:
        """Pointer to the ``llama_context``."""
        return self._context.ctx

    @property
    def n_sequences(self) -> int:
        """Sequences that can be evaluated side by side."""
        return len(self._sequences)

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
        self._lib.llama_memory_clear(self._memory, True)
        for sequence in self._sequences:
            sequence.ids.clear()

    def warm_up(self) -> None:
        """Evaluate one token and forget it: that reads the weights into memory."""
        with self.lock:
            self._decode([(self._sequences[0], (0,))])
            self.clear()

    def load_adapter(self, path: Path) -> Any:
        """Load a LoRA GGUF that has been checked; None when llama.cpp refuses it."""
        handle = self._lib.llama_adapter_lora_init(self._model.model, str(path).encode("utf-8"))
        return handle or None

    def set_adapters(self, handles: Sequence[Any], key: str) -> bool:
        """Make these the active adapters; keys and values depend on them, so the cache is cleared.

        Args:
            handles: What ``load_adapter`` gave; none for the plain base.
            key: Tells this set from any other, also in another process.
        """
        pointers = (self._lib.llama_adapter_lora_p_ctypes * len(handles))(*handles)
        scales = (ctypes.c_float * len(handles))(*[1.0] * len(handles))
        if self._lib.llama_set_adapters_lora(self.context, pointers, len(handles), scales) != 0:
            return False
        self._adapter_key = key
        self.clear()
        return True

    def take_sequence(self) -> int:
        """Reserve the idle sequence that was used last (its cache fits best); give its number.

        Raises:
            RuntimeError: All are taken.
        """
        idle = [sequence for sequence in self._sequences if not sequence.busy]
        if not idle:
            raise RuntimeError("every sequence is busy")
        chosen = max(idle, key=lambda one: one.last_use)
        chosen.busy = True
        return chosen.number

    def release_sequence(self, number: int) -> None:
        """Let another conversation have a sequence; what it holds stays until then."""
        self._sequences[number].busy = False
        self._sequences[number].last_use = next(self._clock)

    def evaluate(self, feeds: Sequence[tuple[int, Feed]]) -> list[int]:
        """Evaluate tokens of one or several sequences in one pass.

        Args:
            feeds: Sequence and tokens. A prompt must be the only one.

        Returns:
            For each of them the row of the logits after its last token.

        Raises:
            CommandError: Exit 4; the context is full.
        """
        if len(feeds) == 1 and feeds[0][1].is_prompt:
            return [self._evaluate_prompt(self._sequences[feeds[0][0]], feeds[0][1])]
        return self._decode([(self._sequences[number], feed.tokens) for number, feed in feeds])

    def _evaluate_prompt(self, sequence: _Sequence, feed: Feed) -> int:
        ids, shared = list(feed.tokens), min(feed.shared, len(feed.tokens) - 1)
        sequence.shared = shared
        if feed.continues and _common(sequence.ids, ids) < shared:
            self._recall(sequence, ids[:shared])
        reused = _common(sequence.ids, ids)
        if not feed.continues or reused < shared:
            # At the same place every time: how a prompt is cut changes its rounding, and with it
            # sometimes a greedy answer. So a line answers alike, whatever was asked before it.
            reused = shared if reused >= shared else 0
        reused = min(reused, len(ids) - 1)
        if shared > reused:
            self._provide_prefix(sequence, ids[:shared])
            reused = shared
        else:
            self._cut(sequence, reused)
        return self._evaluate_rest(sequence, ids[reused:])

    def _evaluate_rest(self, sequence: _Sequence, tokens: Sequence[int]) -> int:
        rows = [0]
        for start in range(0, len(tokens), self.params.n_batch):
            rows = self._decode([(sequence, tokens[start : start + self.params.n_batch])])
        return rows[0]

    def _provide_prefix(self, sequence: _Sequence, ids: list[int]) -> None:
        """Let a sequence hold a shared prefix: restored, or evaluated and saved."""
        self._cut(sequence, 0)
        key = self._prefix_key(ids) if len(ids) >= _MIN_SAVED_PREFIX else None
        state = self._states.get(key) if key else None
        if state is None and key and self._store is not None:
            state = self._store.load(key)
        if state is not None and self._restore(sequence, state):
            sequence.ids = list(ids)
        else:
            self._evaluate_rest(sequence, ids)
            if key is None:
                return
            state = self._state(sequence)
            if self._store is not None:
                self._store.save(key, state)
        if key and self.n_sequences > 1:
            self._states[key] = state
            if len(self._states) > _MAX_STATES:
                self._states.popitem(last=False)

    def remember(self) -> None:
        """Keep the conversations that are cached for the next process, the last one of each prefix."""
        if self._store is None:
            return
        for sequence in self._sequences:
            if sequence.shared >= _MIN_SAVED_PREFIX and len(sequence.ids) > sequence.shared:
                state = self._state(sequence)
                if state.size <= _MAX_CONVERSATION_BYTES:
                    ids = np.array([len(sequence.ids), *sequence.ids], np.int32)
                    key = self._prefix_key(sequence.ids[: sequence.shared])
                    self._store.save(
                        key + _CONVERSATION, np.concatenate([ids.view(np.uint8), state])
                    )

    def _recall(self, sequence: _Sequence, prefix: list[int]) -> None:
        """Take up the conversation that another process had behind this prefix, if there is one."""
        if self._store is None or len(prefix) < _MIN_SAVED_PREFIX:
            return
        data = self._store.load(self._prefix_key(prefix) + _CONVERSATION)
        if data is None:
            return
        size = 4 * (1 + int(data[:4].view(np.int32)[0]))
        self._cut(sequence, 0)
        if self._restore(sequence, data[size:]):
            sequence.ids = data[4:size].view(np.int32).tolist()

    @functools.cached_property
    def _identity(self) -> str:
        return file_identity(self.header.path)

    def _prefix_key(self, ids: list[int]) -> str:
        # Rendered with the template already, the ids stand for it, the system prompt and the tools.
        return PrefixStore.key(
            self._lib.__version__,
            self._identity,
            self._adapter_key,
            np.array(ids, np.int32).tobytes(),
        )

    def _state(self, sequence: _Sequence) -> np.ndarray:
        size = self._lib.llama_state_seq_get_size(self.context, sequence.number)
        state = np.empty(size, np.uint8)
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        self._lib.llama_state_seq_get_data(self.context, pointer, size, sequence.number)
        return state

    def _restore(self, sequence: _Sequence, state: np.ndarray) -> bool:
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        read = self._lib.llama_state_seq_set_data(
            self.context, pointer, state.size, sequence.number
        )
        if read == 0:
            self._cut(sequence, 0)
        return bool(read)

    def _cut(self, sequence: _Sequence, size: int) -> None:
        """Keep the first ``size`` tokens of a sequence, and whatever was evaluated unrecorded not."""
        if size and not self._lib.llama_memory_seq_rm(self._memory, sequence.number, size, -1):
            size = 0  # a recurrent model cannot go back
        if not size:
            self._lib.llama_memory_seq_rm(self._memory, sequence.number, -1, -1)
        del sequence.ids[size:]

    def _decode(self, parts: Sequence[tuple[_Sequence, Sequence[int]]]) -> list[int]:
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
                self._cut(sequence, len(sequence.ids))
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
def _initialize_backend() -> None:
    import llama_cpp

    llama_cpp.llama_backend_init()
