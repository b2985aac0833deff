"""Every command in the README exists, with every option it shows."""

import re

import pytest

from tests.command_lines import ROOT, problems

README = (ROOT / "README.md").read_text(encoding="utf-8")


def shell_lines(text: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


LINES = shell_lines(README)


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
        "python -m integration.router trian",
        "python -m integration.router train --encodre x",
        "printf x | python -m integration.ask --jsonl | python -m integration.router explane",
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
