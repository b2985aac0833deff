"""Run Python that a model wrote, and asserts about it, in a limited process of its own.

The limits keep an endless loop or a full disk away; they are no sandbox against an attacker: a
network is reachable, and files that this user may read are readable.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts._cli import FAILED, CommandError

TIMEOUT_SECONDS = 5.0
MEMORY_BYTES = 512 * 2**20
FILE_BYTES = 2**20
_READY, _PASSED = "ready", "passed"
# Runs in the child. `passed` is written by the last line only: code that ends the process early, even
# with exit code 0, has passed nothing. `_exit` because threads of the code may never end.
_RUNNER = f"""
import os, resource, sys, types
folder, seconds, memory, file_size = sys.argv[1], *map(int, sys.argv[2:])
limits = [("CPU", seconds), ("AS", memory), ("FSIZE", file_size), ("CORE", 0), ("NPROC", 0)]
def read(name):
    with open(os.path.join(folder, name), encoding="utf-8") as file:
        return file.read()
def say(verdict, path=os.path.join(folder, "verdict"), opener=open):
    with opener(path, "w") as file:
        file.write(verdict)
sources = [(name, read(name)) for name in ("answer.py", "check.py")]
say({_READY!r})
for name, value in limits:
    kind = getattr(resource, "RLIMIT_" + name)
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(kind, (value, value))
    except (ValueError, OSError):
        pass  # a system that does not know this limit; the time limit holds everywhere
sys.argv = ["answer.py"]
module = sys.modules["answer"] = types.ModuleType("answer")
leave = os._exit
for name, source in sources:
    exec(compile(source, name, "exec"), module.__dict__)
say({_PASSED!r})
leave(0)
"""


def run_check(code: str, check: str, timeout_seconds: float = TIMEOUT_SECONDS) -> bool:
    """Run asserts about some code, in a temporary folder and without our environment.

    Args:
        code: What a model wrote; it is run as a module that was imported.
        check: Asserts.
        timeout_seconds: Most seconds, of the clock and of the processor.

    Returns:
        Whether everything ran to its end. No code can make this function fail or wait longer.

    Raises:
        CommandError: Python itself could not be started.
    """
    with tempfile.TemporaryDirectory(prefix="code-check-") as name:
        folder = Path(name)
        work_dir = folder / "work"
        work_dir.mkdir()
        (folder / "answer.py").write_text(code, encoding="utf-8")
        (folder / "check.py").write_text(check, encoding="utf-8")
        limits = [max(1, round(timeout_seconds)), MEMORY_BYTES, FILE_BYTES]
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _RUNNER, name, *map(str, limits)],
            cwd=work_dir,
            env={"PATH": os.defpath, "HOME": str(work_dir)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # so that what it started ends with it
        )
        try:
            child.wait(timeout_seconds)
            timed_out = False
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        verdict_path = folder / "verdict"
        verdict = verdict_path.read_text(encoding="utf-8") if verdict_path.is_file() else ""
    if not verdict and not timed_out:
        raise CommandError(
            f"'{sys.executable} -I -S' ended with exit code {child.returncode} before it ran a check; "
            "expected a Python with the module resource (Linux or macOS)",
            FAILED,
        )
    return verdict == _PASSED and not timed_out
