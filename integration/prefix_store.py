"""Evaluated prefixes on disk, so that a system prompt costs milliseconds on the second start.

A file is a magic, the xxh3-128 of what follows, and llama.cpp's state of one sequence. llama.cpp does
not check a state that it is given, so a file that does not match its hash never reaches it.
"""

import contextlib
import hashlib
import os
from pathlib import Path

import numpy as np

from integration._cli import log

_MAGIC = b"tomeforge prefix 1\n\0"
_HEAD = len(_MAGIC) + 16
_SAMPLE = 1 << 16
MAX_BYTES = 1 << 30


def cache_dir() -> Path:
    """Give the folder of caches: ``$TOMEFORGE_CACHE``, or ``tomeforge`` in the user's cache."""
    named = os.environ.get("TOMEFORGE_CACHE")
    if named:
        return Path(named)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "tomeforge"


def file_identity(path: Path) -> str:
    """Tell a model file from others without reading it whole: size, time and both ends."""
    found = path.stat()
    digest = hashlib.sha256(f"{found.st_size} {found.st_mtime_ns} ".encode())
    with path.open("rb") as file:
        digest.update(file.read(_SAMPLE))
        file.seek(max(0, found.st_size - _SAMPLE))
        digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


class PrefixStore:
    """States of evaluated prefixes by key; the oldest give way beyond ``max_bytes``."""

    def __init__(self, folder: Path | None = None, max_bytes: int = MAX_BYTES) -> None:
        self.folder = folder or cache_dir() / "prefixes"
        self.max_bytes = max_bytes

    @staticmethod
    def key(*parts: str | bytes) -> str:
        """Give the key of what a state depends on: library, model, adapters, tokens."""
        digest = hashlib.sha256()
        for part in parts:
            data = part.encode() if isinstance(part, str) else part
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()

    def load(self, key: str) -> np.ndarray | None:
        """Give a state, shape (bytes,), uint8; None when there is none or it is damaged."""
        import xxhash

        path = self.folder / key
        try:
            data: np.ndarray = np.memmap(path, np.uint8, mode="r")
            os.utime(path)  # the newest use, by which the oldest gives way
        except FileNotFoundError:  # not saved yet, or pruned by another process
            return None
        except (OSError, ValueError):  # unreadable, or empty
            data = np.empty(0, np.uint8)
        state = data[_HEAD:]
        head = _MAGIC + xxhash.xxh3_128_digest(state.data)
        if data[:_HEAD].tobytes() != head:
            log(f"note: the cached prefix {path} is damaged and is evaluated anew")
            path.unlink(missing_ok=True)
            return None
        return state

    def save(self, key: str, state: np.ndarray) -> None:
        """Keep a state; a folder that cannot be written to costs time, not the answer."""
        import xxhash

        if state.size > self.max_bytes:
            return
        path = self.folder / key
        temporary = path.with_name(f".{key}.{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with temporary.open("wb") as file:
                file.write(_MAGIC + xxhash.xxh3_128_digest(state.data))
                state.tofile(file)
            temporary.replace(path)
            self._prune()
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            log(f"note: the evaluated prefix is not kept ({self.folder}: {error.strerror})")

    def _prune(self) -> None:
        found = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process prunes as well
                stat = path.stat()
                found.append((stat.st_mtime, stat.st_size, path))
        total = 0
        for _, size, path in sorted(found, reverse=True):
            total += size
            if total > self.max_bytes:
                path.unlink(missing_ok=True)
