"""The little Markdown that two tools share: lines, and which of them are fenced code."""

import re
from typing import NamedTuple

# An info string after backticks holds no backtick: "```x```" on one line is inline code.
_FENCE = re.compile(r"[ \t]*(`{3,}(?=[^`]*$)|~{3,})")


class CodeBlock(NamedTuple):
    """A fenced block: lines [start, stop), both fences counted."""

    start: int
    stop: int
    closed: bool


def split_lines(text: str) -> list[str]:
    """Split at the three line ends that Markdown knows, unlike `str.splitlines`."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def find_code_blocks(lines: list[str]) -> list[CodeBlock]:
    """Find the fenced code blocks; one that is never closed runs to the last line."""
    blocks: list[CodeBlock] = []
    start, fence = 0, ""
    for number, line in enumerate(lines):
        if not fence:
            if opening := _FENCE.match(line):
                start, fence = number, opening[1]
        elif len(mark := line.strip()) >= len(fence) and set(mark) == {fence[0]}:
            blocks.append(CodeBlock(start, number + 1, True))
            fence = ""
    if fence:
        blocks.append(CodeBlock(start, len(lines), False))
    return blocks
