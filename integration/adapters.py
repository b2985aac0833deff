"""LoRA GGUFs by name over one loaded base: loaded, weighted, stacked, switched and unloaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from integration._cli import MODEL, CommandError, log
from integration.adapter_file import AdapterFile, check_adapter_file
from integration.adapter_sets import AdapterSet, check_name, parse_set
from integration.ask_format import BASE
from integration.kv_cache import CacheUse
from integration.local_model import LocalModel


def parse_adapter_options(options: Sequence[str]) -> dict[str, Path]:
    """Read ``NAME=FILE`` options.

    Raises:
        CommandError: Exit 2; wrong form, or a name given twice.
    """
    named: dict[str, Path] = {}
    for option in options:
        name, sign, file = option.partition("=")
        if not (name and sign and file):
            raise CommandError(f"--adapter: got '{option}', expected NAME=FILE")
        if check_name(name) in named:
            raise CommandError(f"--adapter: the name '{name}' is taken; choose another one")
        named[name] = Path(file)
    return named


def find_adapter_files(patterns: Mapping[str, str]) -> dict[str, Path]:
    """Find the files that a router knows adapters by; of several the newest.

    Args:
        patterns: Paths by name, with wildcards, relative to the working directory.

    Raises:
        CommandError: Exit 3; none of them is there.
    """
    found = {}
    for name, pattern in patterns.items():
        path = Path(pattern)
        root = Path(path.anchor)
        files = [file for file in root.glob(str(path.relative_to(root))) if file.is_file()]
        if files:
            found[name] = max(files, key=lambda file: file.stat().st_mtime)
        else:
            log(f"note: the adapter '{name}' is not there ('{pattern}'), so it is never chosen")
    if not found:
        raise CommandError(
            "none of the router's adapters is there; build them (make adapters), or name yours: "
            "--adapter NAME=FILE",
            MODEL,
        )
    return found


@dataclass(frozen=True)
class _Loaded:
    file: AdapterFile
    handle: Any


@dataclass(frozen=True)
class MemoryUse:
    """What adapters and their conversations take beside the base, in bytes.

    Attributes:
        adapters: Factors of each adapter, by name.
        conversations: By the label of the set: what is cached, those used last at the end.
    """

    adapters: dict[str, int]
    conversations: list[tuple[str, CacheUse]]


class Adapters:
    """Named adapters of one model; one set of them is active at a time, or none.

    Every set has a conversation of its own in the cache, so a switch takes microseconds and nothing is
    read again, and no set ever sees keys and values of another.

    Args:
        model: The loaded base.
        files: LoRA GGUFs by name.

    Raises:
        CommandError: Exit 3; a file is missing, broken, no adapter, or for another base.
    """

    def __init__(self, model: LocalModel, files: dict[str, Path]) -> None:
        self._model, self._active = model, AdapterSet()
        self._loaded: dict[str, _Loaded] = {}
        self._labels = {"": BASE}
        self._told: set[str] = set()
        for name, path in files.items():
            self.load(name, path)

    @property
    def names(self) -> list[str]:
        """Names that can be activated, the plain base first."""
        return [BASE, *self._loaded]

    @property
    def active(self) -> str:
        """What is active now: a name, a set such as ``json:0.5+coding:0.5``, or ``base``."""
        return self._active.label

    def load(self, name: str, path: Path) -> AdapterFile:
        """Load an adapter under a name.

        Raises:
            CommandError: Exit 2; the name is taken or none. Exit 3; see the class.
        """
        if check_name(name) in self._loaded:
            raise CommandError(f"an adapter is called '{name}' already; unload it first")
        file = check_adapter_file(path, self._model.engine.header)
        with self._model.lock:
            handle = self._model.engine.load_adapter(path)
        if handle is None:
            raise CommandError(
                f"adapter '{path}' does not fit the model '{self._model.engine.header.path}' "
                "(llama.cpp refuses it); use the base it was trained on",
                MODEL,
            )
        self._loaded[name] = _Loaded(file, handle)
        return file

    def unload(self, name: str) -> None:
        """Free an adapter and what was cached with it.

        Raises:
            CommandError: Exit 2; no adapter has this name, or it is active.
        """
        if name == BASE or name not in self._loaded:
            parse_set(name, self._loaded)
            raise CommandError(f"'{name}' is no single adapter; name one to unload")
        if name in dict(self._active.parts):
            raise CommandError(f"the adapter '{name}' is active; switch to another one first")
        identity = self._loaded[name].file.identity
        with self._model.lock:
            for key in [key for key in self._labels if identity in key]:
                self._model.engine.cache.forget(key)
                del self._labels[key]
            self._model.engine.free_adapter(self._loaded.pop(name).handle)

    def check(self, text: str) -> str:
        """Give the label of a set that can be used.

        Raises:
            CommandError: Exit 2; an unknown name, a name twice, or a bad weight.
        """
        return parse_set(text, self._loaded).label

    def use(self, text: str) -> None:
        """Make a set of adapters, or the plain base, the active one.

        Raises:
            CommandError: Exit 2; an unknown name, a name twice, or a bad weight.
        """
        chosen = parse_set(text, self._loaded)
        if chosen == self._active:
            return
        if chosen.oddity and chosen.label not in self._told:
            self._told.add(chosen.label)
            log(f"note: {chosen.oddity}")
        loaded = [self._loaded[name] for name, _ in chosen.parts]
        weights = [weight for _, weight in chosen.parts]
        key = self._key(chosen)
        self._labels[key] = chosen.label
        with self._model.lock:
            self._model.engine.set_adapters([one.handle for one in loaded], weights, key)
            self._active = chosen

    def _key(self, chosen: AdapterSet) -> str:
        """Tell a set from any other by files and weights, whatever the names are."""
        parts = [f"{self._loaded[name].file.identity}:{weight!r}" for name, weight in chosen.parts]
        return "+".join(sorted(parts))

    def memory(self) -> MemoryUse:
        """Tell what adapters and their conversations take."""
        with self._model.lock:
            used = self._model.engine.cache.use()
        return MemoryUse(
            {name: one.file.num_bytes for name, one in self._loaded.items()},
            [(self._labels.get(one.adapter_key, BASE), one) for one in used],
        )
