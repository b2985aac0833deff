"""How commands of `scripts` end: exit codes, one line for what a user can mend, tracebacks for bugs."""

import os
import signal
import subprocess
import sys

import pytest

CODE = """
import os, signal, sys
from scripts._cli import CommandError, log, run_command
def main():
    {body}
    return 0
run_command(main)
"""


def run(body: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", CODE.format(body=body)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("raise CommandError('what, got, expected', 3)", 3, "error: what, got, expected"),
        ("raise OSError(28, 'No space left on device', 'x')", 1, "free some space"),
        ("raise PermissionError(13, 'Permission denied', 'x')", 1, "--output-root"),
        ("os.kill(os.getpid(), signal.SIGTERM)", 130, "interrupted"),
        ("raise KeyboardInterrupt", 130, "interrupted"),
    ],
)
def test_what_a_user_can_cause_is_one_line(body, code, message):
    done = run(body)
    assert done.returncode == code
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("body", ["raise OSError(5, 'I/O error')", "raise TypeError('bug')"])
def test_bug_keeps_its_traceback(body):
    done = run(body)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_only_the_first_process_speaks():
    assert run("log('hello')", RANK="0").stderr == "hello\n"
    assert run("log('hello')", RANK="1").stderr == ""
    assert "error: wrong" in run("raise CommandError('wrong')", RANK="1").stderr


def test_sigterm_would_kill_without_us():
    done = subprocess.run(
        [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"],
        check=False,
    )
    assert done.returncode == -signal.SIGTERM
