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


def find_place(text: str, position: int) -> str:
    """Say where a character is, `line 2, column 5`, both counted from 1."""
    before = text[:position].replace("\r\n", "\n").replace("\r", "\n")
    return f"line {before.count(chr(10)) + 1}, column {len(before) - before.rfind(chr(10))}"


def remove_code_blocks(lines: list[str]) -> list[str]:
    """Give the lines with those of fenced code, fences too, made empty: numbers stay the same."""
    prose = list(lines)
    for block in find_code_blocks(lines):
        prose[block.start : block.stop] = [""] * (block.stop - block.start)
    return prose


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
