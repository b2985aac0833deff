"""What a child process takes: wall time, peak memory, bytes written.

Peak memory is resident memory of the largest process, file pages that it has mapped included: that
is what fills a Colab. The kernel can drop such pages, so the memory that it cannot drop (anonymous)
is given as well: that of all processes of a step together, sampled 20 times a second, where there is
a /proc. A child's peak begins at that of its parent: import nothing large where this is used.

Bytes written are the kernel's count of pages made dirty (``ru_oublock``); temporary files, memory
maps and grandchildren are in it. A file system in memory counts nothing; then the files seen in the
step's folder are added up, by the samples.
"""

import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from scripts._cli import FAILED, CommandError

_SAMPLE_SECONDS = 0.05


@dataclass(frozen=True)
class Usage:
    """What one or several processes took; memory and files in bytes, ``anonymous`` 0 if unknown."""

    wall: float
    peak: float
    anonymous: float
    written: float
    written_by: str

    def metrics(self, name: str) -> dict[str, float]:
        """Give the figures under names that carry their units."""
        figures = {
            f"{name} wall_s": self.wall,
            f"{name} peak_rss_gb": self.peak / 1e9,
            f"{name} peak_anonymous_gb": self.anonymous / 1e9,
            f"{name} written_gb": self.written / 1e9,
        }
        if not self.anonymous:
            del figures[f"{name} peak_anonymous_gb"]
        return {key: round(value, 3) for key, value in figures.items()}

    def __str__(self) -> str:
        return (
            f"{self.wall:.1f} s, {self.peak / 1e9:.2f} GB at the peak, "
            f"{self.written / 1e9:.2f} GB written"
        )


class _Watch:
    """Samples a running child: anonymous memory of its processes, files in its folder."""

    def __init__(self, pid: int, folder: Path) -> None:
        self.anonymous = 0
        self._pid = pid
        self._folder = folder
        self._file_bytes: dict[int, int] = {}
        self._look_at_files()
        self._bytes_before = sum(self._file_bytes.values())
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "_Watch":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        self._look_at_files()

    @property
    def file_bytes(self) -> int:
        """Bytes that files grew by, deleted ones included."""
        return sum(self._file_bytes.values()) - self._bytes_before

    def _sample(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            self.anonymous = max(self.anonymous, _anonymous_bytes(self._pid))
            self._look_at_files()

    def _look_at_files(self) -> None:
        # By inode, so that a renamed file counts once; in blocks, since a file may have holes.
        for folder, _, names in os.walk(self._folder):
            for name in names:
                with contextlib.suppress(OSError):
                    found = os.stat(os.path.join(folder, name))
                    known = self._file_bytes.get(found.st_ino, 0)
                    self._file_bytes[found.st_ino] = max(known, found.st_blocks * 512)


def _anonymous_bytes(pid: int) -> int:
    """Add up the anonymous memory of a process and its descendants."""
    total = 0
    with contextlib.suppress(OSError):  # it has ended, or there is no /proc
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                total = int(line.split()[1]) * 1024
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                children = Path(f"/proc/{pid}/task/{thread}/children").read_text().split()
                total += sum(_anonymous_bytes(int(child)) for child in children)
    return total


def run_step(command: list[str], folder: Path, what: str) -> tuple[Usage, str]:
    """Run a command to its end and measure it, with the children that it waited for.

    Args:
        command: Writes into ``folder``.
        folder: Made if it is missing; temporary files go there as well.
        what: What to call it if it fails.

    Returns:
        What it took, and its standard output.

    Raises:
        CommandError: Exit 1, with the last line that the command said.
    """
    temporary = folder / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    # Everything is local: looking names up on a hub shall be nobody's time.
    env = {**os.environ, "TMPDIR": str(temporary), "HF_HUB_OFFLINE": "1"}
    with (temporary / "out").open("w+b") as out, (temporary / "err").open("w+b") as err:
        started = time.monotonic()
        child = None
        try:
            with _interrupt_later():
                # In a session of its own, so that the whole family can be ended.
                child = subprocess.Popen(
                    command, stdout=out, stderr=err, env=env, start_new_session=True
                )
            with _Watch(child.pid, folder) as watch:
                _, status, usage = os.wait4(child.pid, 0)
                wall = time.monotonic() - started
                child.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if child is not None and child.returncode != 0:
                _end_family(child)
        output, errors = (_text(stream) for stream in (out, err))
    if child.returncode:
        raise CommandError(f"{what} failed: {_reason(child.returncode, errors or output)}", FAILED)
    shutil.rmtree(temporary)
    counted = usage.ru_oublock * 512
    is_counted = counted >= watch.file_bytes / 2
    return Usage(
        wall,
        usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        watch.anonymous,
        counted if is_counted else watch.file_bytes,
        "ru_oublock" if is_counted else "file sizes",
    ), output


@contextlib.contextmanager
def _interrupt_later() -> Iterator[None]:
    """Hold Ctrl-C back: inside Popen it would lose a child that has started already."""
    arrived: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: arrived.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if arrived:
        raise KeyboardInterrupt


def _end_family(child: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a child's session, so that its folder can be deleted."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        for _ in range(50):
            os.killpg(child.pid, signal.SIGKILL)
            child.poll()
            time.sleep(0.02)  # grandchildren are not ours to wait for
    child.wait()


def _text(stream: Any) -> str:
    stream.seek(0)
    return stream.read().decode(errors="replace").strip()


def _reason(code: int, said: str) -> str:
    last = said.splitlines()[-1].removeprefix("error: ") if said else "no message"
    if code > 0:
        return f"exit code {code}: {last}"
    advice = "; out of memory?" if -code == signal.SIGKILL else ""
    return f"{signal.Signals(-code).name}{advice}: {last}"


def add_up(steps: list[Usage]) -> Usage:
    """Make one of steps that ran one after the other."""
    return Usage(
        sum(step.wall for step in steps),
        max(step.peak for step in steps),
        max(step.anonymous for step in steps),
        sum(step.written for step in steps),
        " and ".join(sorted({way for step in steps for way in step.written_by.split(" and ")})),
    )


def median_of(rounds: list[Usage]) -> Usage:
    """Give the median of every figure."""
    rows = [asdict(one) for one in rounds]
    numbers = {
        key: statistics.median(row[key] for row in rows) for key in rows[0] if key != "written_by"
    }
    return Usage(**numbers, written_by=add_up(rounds).written_by)
