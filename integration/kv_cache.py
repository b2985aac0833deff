"""The sequences of a llama.cpp context: which conversation lies where, and for which adapters.

Keys and values depend on the adapters that were active when they were computed. So a sequence belongs
to a set of adapters, and switching between sets evaluates nothing anew. Where there are more sets than
sequences, the one that was used longest ago gives way: its state is copied aside, and back when its
adapters return.
"""

import ctypes
import functools
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from integration.prefix_store import PrefixStore, file_identity

_MIN_SAVED_PREFIX = 64
_MAX_STATES = 8
_CONVERSATION, _MAX_CONVERSATION_BYTES = "-conversation", 1 << 28
_MAX_PARKED_BYTES = 1 << 28


@dataclass
class CachedSequence:
    """A sequence of the context.

    Attributes:
        ids: The tokens it holds.
        shared: How many of them its prompt shares with other prompts.
        adapter_key: The adapters that they were evaluated with.
        last_use: Grows with each use.
    """

    number: int
    ids: list[int] = field(default_factory=list)
    shared: int = 0
    adapter_key: str = ""
    busy: bool = False
    last_use: int = 0


@dataclass(frozen=True)
class CacheUse:
    """What one conversation takes.

    Attributes:
        adapter_key: The adapters it was evaluated with.
        tokens: Cached tokens.
        num_bytes: Their keys and values.
        is_parked: They lie outside the context, and are copied back when they are needed.
    """

    adapter_key: str
    tokens: int
    num_bytes: int
    is_parked: bool = False


@dataclass(frozen=True)
class _Parked:
    ids: list[int]
    shared: int
    state: np.ndarray


class KvCache:
    """The sequences of one context.

    Args:
        library: The module ``llama_cpp``.
        context: Pointer to the ``llama_context``.
        model: The model's file, which states on disk are bound to.
        n_sequences: How many conversations the context holds.
        store: Where states of shared prefixes are kept between runs, or None.

    Attributes:
        adapter_key: Tells the active adapters from any others, also in another process.
    """

    def __init__(
        self,
        library: Any,
        context: Any,
        model: Path,
        n_sequences: int,
        store: PrefixStore | None = None,
    ) -> None:
        self._lib, self._context, self._model = library, context, model
        self._memory = library.llama_get_memory(context)
        self.sequences = [CachedSequence(number) for number in range(n_sequences)]
        self.adapter_key = ""
        self._store = store
        self._clock = itertools.count(1)
        self._states: OrderedDict[str, np.ndarray] = OrderedDict()
        self._parked: OrderedDict[str, _Parked] = OrderedDict()

    def take(self) -> CachedSequence:
        """Reserve an idle sequence for the active adapters.

        The one of theirs that was used last fits best, then an empty one; else the one that was used
        longest ago gives way.

        Raises:
            RuntimeError: All are taken.
        """
        idle = [sequence for sequence in self.sequences if not sequence.busy]
        if not idle:
            raise RuntimeError("every sequence is busy")
        own = [one for one in idle if one.ids and one.adapter_key == self.adapter_key]
        if own:
            chosen = max(own, key=lambda one: one.last_use)
        else:
            chosen = min(idle, key=lambda one: (bool(one.ids), one.last_use))
            self._hand_over(chosen)
        chosen.busy = True
        return chosen

    def release(self, sequence: CachedSequence) -> None:
        """Let another conversation have a sequence; what it holds stays until then."""
        sequence.busy, sequence.last_use = False, next(self._clock)

    def claim(self, sequence: CachedSequence) -> None:
        """Make sure that a sequence holds nothing of adapters other than the active ones."""
        if sequence.adapter_key != self.adapter_key:
            self.cut(sequence, 0)
            sequence.adapter_key = self.adapter_key

    def _hand_over(self, sequence: CachedSequence) -> None:
        """Let the active adapters have a sequence; a conversation in it is kept aside."""
        if len(sequence.ids) > max(sequence.shared, _MIN_SAVED_PREFIX):
            self._parked[sequence.adapter_key] = _Parked(
                list(sequence.ids), sequence.shared, self._state(sequence)
            )
            while sum(one.state.size for one in self._parked.values()) > _MAX_PARKED_BYTES:
                self._parked.popitem(last=False)
        self.cut(sequence, 0)
        sequence.adapter_key = self.adapter_key
        back = self._parked.pop(self.adapter_key, None)
        if back is not None and self._restore(sequence, back.state):
            sequence.ids, sequence.shared = back.ids, back.shared

    def cut(self, sequence: CachedSequence, size: int) -> None:
        """Keep the first ``size`` tokens of a sequence, and whatever was evaluated unrecorded not."""
        if size and not self._lib.llama_memory_seq_rm(self._memory, sequence.number, size, -1):
            size = 0  # a recurrent model cannot go back
        if not size:
            self._lib.llama_memory_seq_rm(self._memory, sequence.number, -1, -1)
        del sequence.ids[size:]

    def clear(self) -> None:
        """Forget every cached token: the next prompt is evaluated as in a new process."""
        self._lib.llama_memory_clear(self._memory, True)
        self._parked.clear()
        for sequence in self.sequences:
            sequence.ids.clear()

    def forget(self, adapter_key: str) -> None:
        """Drop what a set of adapters holds."""
        self._parked.pop(adapter_key, None)
        for sequence in self.sequences:
            if sequence.adapter_key == adapter_key:
                self.cut(sequence, 0)

    def use(self) -> list[CacheUse]:
        """Tell what each conversation takes, the ones that were used last at the end."""
        held = sorted((one for one in self.sequences if one.ids), key=lambda one: one.last_use)
        parked = [
            CacheUse(key, len(one.ids), one.state.size, True) for key, one in self._parked.items()
        ]
        return parked + [
            CacheUse(one.adapter_key, len(one.ids), self._state_size(one)) for one in held
        ]

    def restore_prefix(self, sequence: CachedSequence, ids: Sequence[int]) -> bool:
        """Let a sequence hold a shared prefix, and nothing else, if its state is known."""
        self.cut(sequence, 0)
        if len(ids) < _MIN_SAVED_PREFIX:
            return False
        key = self._prefix_key(sequence, ids)
        state = self._states.get(key)
        if state is None and self._store is not None:
            state = self._store.load(key)
        if state is None or not self._restore(sequence, state):
            return False
        sequence.ids = list(ids)
        self._keep(key, state)
        return True

    def keep_prefix(self, sequence: CachedSequence) -> None:
        """Keep the state of a sequence that holds a shared prefix and nothing else."""
        if len(sequence.ids) < _MIN_SAVED_PREFIX:
            return
        key, state = self._prefix_key(sequence, sequence.ids), self._state(sequence)
        if self._store is not None:
            self._store.save(key, state)
        self._keep(key, state)

    def _keep(self, key: str, state: np.ndarray) -> None:
        if len(self.sequences) > 1:
            self._states[key] = state
            if len(self._states) > _MAX_STATES:
                self._states.popitem(last=False)

    def remember(self) -> None:
        """Keep the conversations that are cached for the next process, the last one of each prefix."""
        if self._store is None:
            return
        for sequence in self.sequences:
            if sequence.shared >= _MIN_SAVED_PREFIX and len(sequence.ids) > sequence.shared:
                state = self._state(sequence)
                if state.size <= _MAX_CONVERSATION_BYTES:
                    ids = np.array([len(sequence.ids), *sequence.ids], np.int32)
                    key = self._prefix_key(sequence, sequence.ids[: sequence.shared])
                    self._store.save(
                        key + _CONVERSATION, np.concatenate([ids.view(np.uint8), state])
                    )

    def recall(self, sequence: CachedSequence, prefix: Sequence[int]) -> None:
        """Take up the conversation that another process had behind this prefix, if there is one."""
        if self._store is None or len(prefix) < _MIN_SAVED_PREFIX:
            return
        data = self._store.load(self._prefix_key(sequence, prefix) + _CONVERSATION)
        if data is None:
            return
        size = 4 * (1 + int(data[:4].view(np.int32)[0]))
        self.cut(sequence, 0)
        if self._restore(sequence, data[size:]):
            sequence.ids = data[4:size].view(np.int32).tolist()

    @functools.cached_property
    def _identity(self) -> str:
        return file_identity(self._model)

    def _prefix_key(self, sequence: CachedSequence, ids: Sequence[int]) -> str:
        # Rendered with the template already, the ids stand for it, the system prompt and the tools.
        return PrefixStore.key(
            self._lib.__version__,
            self._identity,
            sequence.adapter_key,
            np.array(ids, np.int32).tobytes(),
        )

    def _state_size(self, sequence: CachedSequence) -> int:
        size: int = self._lib.llama_state_seq_get_size(self._context, sequence.number)
        return size

    def _state(self, sequence: CachedSequence) -> np.ndarray:
        state = np.empty(self._state_size(sequence), np.uint8)
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        self._lib.llama_state_seq_get_data(self._context, pointer, state.size, sequence.number)
        return state

    def _restore(self, sequence: CachedSequence, state: np.ndarray) -> bool:
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        read = self._lib.llama_state_seq_set_data(
            self._context, pointer, state.size, sequence.number
        )
        if read == 0:
            self.cut(sequence, 0)
        return bool(read)
