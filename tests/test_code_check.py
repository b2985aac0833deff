"""Code of answers is run in a limited process: what passes, and what cannot do harm or fake it."""

import os
import subprocess
import sys
import time

import pytest

from scripts import code_check
from scripts._cli import CommandError
from scripts.code_check import run_check

ADD = "def add(a, b):\n    return a + b"


@pytest.mark.parametrize(
    ("code", "check"),
    [
        (ADD, "assert add(1, 2) == 3"),
        (ADD.replace("\n    ", "\n\t"), "assert add(1, 2) == 3"),
        ("def add(a, b):\r\n    return a + b", "assert add(1, 2) == 3"),
        ("def wave():\n    return 'привет'", "assert wave() == 'привет'"),
        ("open('a', 'w').write('x')", "open('b', 'w').write('y'); assert open('a').read() == 'x'"),
        ("if __name__ == '__main__':\n    raise SystemExit", "assert True"),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int' = 1", "assert A().x == 1"),
        ("print('much\\n' * 10**6)", "assert True"),
        ("import atexit, os\natexit.register(os._exit, 1)", "assert True"),
    ],
)  # fmt: skip
def test_what_passes(code, check):
    assert run_check(code, check) is True


@pytest.mark.parametrize(
    ("code", "check"),
    [
        (ADD, "assert add(1, 2) == 4"),
        (ADD, "assert subtract(2, 1) == 1"),
        (ADD, "assert add(1, 2) == 3\nassert add(1, 2) == 4"),
        ("import sys; sys.exit(0)", "assert True"),
        ("import os; os._exit(0)", "assert True"),
        ("def f():\n    raise SystemExit(0)", "assert f() is None"),
        ("exec('import sys; sys.exit()')", "assert True"),
        ("name = input()", "assert True"),
        ("def f():\n    return f()", "f()"),
        ("x = bytearray(2**31)", "assert True"),
        ("open('a', 'w').write('x' * 2**21)", "assert True"),
        ("import numpy", "assert True"),  # no packages: answers are to be plain Python
        ("import os; os.kill(os.getpid(), 9)", "assert True"),
    ],
)
def test_what_does_not_pass(code, check):
    assert run_check(code, check) is False


@pytest.mark.parametrize(
    ("code", "check"),
    [
        ("", "while True: pass"),
        ("while True:\n    try:\n        while True: pass\n    except BaseException: pass", ""),
        ("import time; time.sleep(60)", ""),
    ],
)
def test_an_endless_check_is_ended(code, check):
    started = time.monotonic()
    assert run_check(code, check, timeout_seconds=1.0) is False
    assert time.monotonic() - started < 10


def test_what_the_code_started_ends_with_it(tmp_path):
    sleeper = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = (
        "import resource, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {sleeper!r}])\ntime.sleep(60)"
    )
    assert run_check(code, "", timeout_seconds=2.0) is False
    if not (tmp_path / "pid").is_file():
        return  # this user may not start any process there: the limit holds
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):
        status = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
        ).stdout
        if not status or status.startswith("Z"):
            return
        time.sleep(0.1)
    pytest.fail("the process of the code lives on")


def test_files_and_environment_are_not_ours(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.chdir(tmp_path)
    code = "import os\nopen('left', 'w').close()\nplace, names = os.getcwd(), set(os.environ)"
    check = f"assert place != {str(tmp_path)!r} and 'HF_TOKEN' not in names"
    assert run_check(code, check) is True
    assert run_check(code, "assert 'HF_TOKEN' in names") is False
    assert "HF_TOKEN" in os.environ
    assert list(tmp_path.iterdir()) == []


def test_limits_are_set_before_the_code_runs():
    code = "import resource\nsoft = resource.getrlimit(resource.RLIMIT_FSIZE)[0]"
    assert run_check(code, f"assert 0 < soft <= {code_check.FILE_BYTES}") is True
    assert run_check(code, "assert soft == resource.RLIM_INFINITY") is False


def test_a_python_that_does_not_start_is_no_wrong_answer(monkeypatch):
    monkeypatch.setattr(code_check, "_RUNNER", "import no_such_module")
    with pytest.raises(CommandError, match="exit code 1 before it ran a check") as error:
        run_check(ADD, "assert True")
    assert (error.value.exit_code, sys.executable in str(error.value)) == (1, True)
