"""Files that appear whole or not at all: temporary names, hashes, leftovers of killed runs."""

import contextlib
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ParamSpec

from export._cli import FAILED, CommandError

_P = ParamSpec("_P")


def sha256_of(paths: Iterable[Path]) -> str:
    """Hash the names and contents of files, in the given order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def sha256_file(path: Path) -> str:
    """Give what `sha256sum` prints for a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON atomically."""
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def check_free_space(folder: Path, needed: int, what: str) -> int:
    """Compare the bytes that an output needs with what is free; gives what is free.

    Args:
        folder: On the disk in question.
        needed: Bytes.
        what: Subject and verb, `the merged model needs`.

    Raises:
        CommandError: Exit 1, naming the missing bytes.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CommandError(
            f"not enough space in '{folder}': {what} {needed} bytes, {free} are free, "
            f"{needed - free} are missing ({(needed - free) / 1e9:.2f} GB). Free some, or use "
            "another disk: --output",
            FAILED,
        )
    return free


@contextlib.contextmanager
def working_dir(parent: Path, label: str) -> Iterator[Path]:
    """Give an empty folder `.<label>-<pid>` inside `parent`, removed at the end, come what may.

    A killed run cannot clean up after itself; the next one removes what it left.
    """
    for stale in parent.glob(f".{label}-*"):
        pid = stale.name.rpartition("-")[2]
        if pid.isdigit() and not _is_running(int(pid)):
            shutil.rmtree(stale, ignore_errors=True)
    folder = parent / f".{label}-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def os_errors_told(main: Callable[_P, int]) -> Callable[_P, int]:
    """Make a full disk or a missing permission one line instead of a traceback (exit 1)."""

    @functools.wraps(main)
    def told(*args: _P.args, **kwargs: _P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except BrokenPipeError:
            raise
        except OSError as error:
            place = f"'{error.filename}': " if error.filename else ""
            raise CommandError(f"{place}{error.strerror or error}", FAILED) from error

    return told
