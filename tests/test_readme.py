"""Every command in the README exists, with every option it shows."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def shell_lines(text: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


LINES = shell_lines(README)


@cache
def help_text(module: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    return done.stdout if done.returncode == 0 else ""


def problems(line: str) -> list[str]:
    """What a command line of the README names that does not exist."""
    found = []
    if match := re.search(r"python -m ([\w.]+)", line):
        text = help_text(match[1])
        if not text:
            found.append(f"no module {match[1]}")
        options = re.findall(r"(?<= )--[a-z-]+", line[match.end() :])
        found += [option for option in options if not re.search(rf"{option}\b", text)]
    for target in re.findall(r"^make (\w+)", line):
        if not re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE):
            found.append(f"make {target}")
    for path in re.findall(r"\bscripts/[\w./-]+", line):
        if not (ROOT / path).exists():
            found.append(path)
    return found


def test_readme_has_commands():
    assert len(LINES) >= 15


@pytest.mark.parametrize("line", LINES)
def test_command_exists(line):
    assert problems(line) == []


@pytest.mark.parametrize(
    "line",
    [
        "python -m integration.ask --modle x",
        "python -m integration.aks",
        "make sandwich",
        "scripts/pipline.sh x",
    ],
)
def test_wrong_command_is_noticed(line):
    assert problems(line)


def test_first_command_is_in_the_first_screen():
    assert "make demo" in "\n".join(README.splitlines()[:20])


def test_files_that_the_readme_names_exist():
    for name in re.findall(r"`([\w.-]+\.yaml)`", README):
        assert (ROOT / "scripts/recipes" / name).is_file()
    for name in re.findall(r"\]\((\w+\.md)\)", README):
        assert (ROOT / name).is_file()
