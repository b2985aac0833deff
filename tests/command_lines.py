"""Command lines in texts, held against the commands that there are; for tests of README and notebooks."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent


@cache
def help_text(module: str, *words: str) -> str:
    """What ``--help`` prints; empty where there is no such command."""
    done = subprocess.run(
        [sys.executable, "-m", module, *words, "--help"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    return done.stdout if done.returncode == 0 else ""


def problems(line: str) -> list[str]:
    """What a command line names that does not exist: module, subcommand, option, target, script."""
    found = []
    for command in re.finditer(r"python -m ([\w.]+)([^|;`]*)", line):
        found += _problems_of(command[1], command[2])
    for target in re.findall(r"^make (\w+)", line):
        if not re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE):
            found.append(f"make {target}")
    for path in re.findall(r"\bscripts/[\w./-]+", line):
        if not (ROOT / path).exists():
            found.append(path)
    return found


def _problems_of(module: str, arguments: str) -> list[str]:
    text = help_text(module)
    if not text:
        return [f"no module {module}"]
    if re.search(r"\bCOMMAND\b", text):
        word = re.match(r" ([a-z]+)\b", arguments)
        if not (word and (text := help_text(module, word[1]))):
            return [f"no such subcommand: {module}{arguments}"]
    options = re.findall(r"(?<= )--[a-z-]+", arguments)
    return [option for option in options if not re.search(rf"{option}(?![\w-])", text)]
