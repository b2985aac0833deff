"""Wrap text to a column width: text, width and indent in, wrapped text out.

Call it as `text_formatter.invoke({"text": "...", "width": 40})`, or `format_text` from code.
"""

import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

from langchain_core.tools import tool
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from tools._errors import answer_errors
from tools._markdown import find_code_blocks, split_lines

__all__ = ["count_columns", "format_text", "text_formatter"]

# White space at which a line may break: all of it but the three no-break spaces.
_BREAKABLE = re.compile(r"[^\S\u00a0\u202f\u2007]+")
# Up to three digits, so that a line of prose that starts with "1984." is no list item.
_ITEM = re.compile(r"([ \t]*)([-*+]|\d{1,3}[.)])(?:[ \t]+|$)")
# Headings, table rows, quotes and rules: joined with their neighbours they would be lost.
_OWN_LINE = re.compile(r"[ \t]*(?:#{1,6}[ \t]|[|>]|[-=*_]{3,}[ \t]*$)")
_FENCE = re.compile(r"[`~]{3}")


class _Block(NamedTuple):
    """A run of lines wrapped as one: a paragraph, a list item (with a marker) or a line alone."""

    words: list[str]
    marker: str = ""
    nesting: int = 0


def count_columns(text: str) -> int:
    """Count terminal columns: 2 for East Asian wide and fullwidth, 0 for combining marks."""
    if text.isascii():
        return len(text)
    return sum(_char_columns(char) for char in text)


def format_text(text: str, width: int = 80, indent: int = 0) -> str:
    """Wrap each paragraph and list item to at most `width` columns.

    Blank lines between paragraphs are kept, those at either end are dropped. White space inside
    a paragraph becomes one space, a word longer than the line is broken. List items start on
    their own line and hang under their text; headings, table rows, quotes and rules are not
    joined with their neighbours.

    Two kinds of line can be wider than `width`: lines of fenced code, which are kept as they are
    (without indent), and a wide character where a single column is left for it.

    Args:
        text: Plain text or Markdown.
        width: Columns of a line, the indent counted.
        indent: Spaces before each line that is not blank.

    Raises:
        ValueError: The indent leaves no column for the text.
    """
    _require_room(width, indent)
    lines = split_lines(text)
    code = {n for block in find_code_blocks(lines) for n in range(block.start, block.stop)}
    result: list[str] = []
    for part in _split_blocks(lines, code):
        if isinstance(part, str):
            result.append(part)
        else:
            result += [" " * indent + line for line in _wrap_block(part, width - indent)]
    return "\n".join(result).strip("\n")


def _char_columns(char: str) -> int:
    if unicodedata.category(char) in {"Mn", "Me", "Cf"}:
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _require_room(width: int, indent: int) -> None:
    if indent >= width:
        raise ValueError(f"indent: got {indent}, expected less than width ({width})")


def _split_blocks(lines: list[str], code: set[int]) -> Iterator[_Block | str]:
    """Yield blocks to wrap and, as strings, lines to keep (code and blank lines)."""
    items = {
        n: item for n, line in enumerate(lines) if n not in code and (item := _ITEM.match(line))
    }
    # Nesting counts from the outermost item, so a second pass does not add the indent again.
    outermost = min((_spaces(item) for item in items.values()), default=0)
    current: _Block | None = None
    for number, line in enumerate(lines):
        keep = number in code or not line.strip()
        alone = _OWN_LINE.match(line) is not None
        item = None if alone else items.get(number)
        if current and (keep or alone or item):
            yield current
            current = None
        if keep:
            yield line if number in code else ""
        elif alone:
            yield _Block(_split_words(line))
        elif item:
            words = _split_words(line[item.end() :])
            current = _Block(words, item[2], _spaces(item) - outermost)
        elif current:
            current.words.extend(_split_words(line))
        else:
            current = _Block(_split_words(line))
    if current:
        yield current


def _spaces(item: re.Match[str]) -> int:
    return len(item[1].expandtabs(4))


def _split_words(line: str) -> list[str]:
    return [word for word in _BREAKABLE.split(line) if word]


def _wrap_block(block: _Block, room: int) -> list[str]:
    """Wrap one block to `room` columns, a list item under its marker."""
    if not block.marker:
        return _wrap_words(block.words, room)
    # Two columns beside the marker, or a wide character would not fit.
    spare = room - len(block.marker) - 1 - 2
    if spare < 0:
        return _wrap_words([block.marker, *block.words], room)
    first = " " * min(block.nesting, room // 2, spare) + block.marker + " "
    lines = _wrap_words(block.words, room - len(first)) or [""]
    hanging = " " * len(first)
    return [(first + lines[0]).rstrip(), *(hanging + line for line in lines[1:])]


def _wrap_words(words: list[str], room: int) -> list[str]:
    """Fill lines greedily; a line never starts with a word that would begin a new block."""
    lines: list[list[str]] = []
    used = room  # no line yet: as if the last one were full
    for word in (piece for whole in words for piece in _break_word(whole, room)):
        size = count_columns(word)
        if used + 1 + size <= room:
            lines[-1].append(word)
            used += 1 + size
            continue
        carried = _carry_words(lines[-1], word, room) if lines and _begins_block(word) else []
        lines.append([*carried, word])
        used = count_columns(" ".join(lines[-1]))
    return [" ".join(line) for line in lines]


def _break_word(word: str, room: int) -> Iterator[str]:
    """Cut a word into pieces of at most `room` columns; marks stay with their letter."""
    if count_columns(word) <= room:
        yield word
        return
    piece, used = "", 0
    for char in word:
        size = _char_columns(char)
        if piece and used + size > room:
            yield piece
            piece, used = "", 0
        piece += char
        used += size
    yield piece


def _begins_block(word: str) -> bool:
    return any(pattern.match(word + " ") for pattern in (_ITEM, _OWN_LINE, _FENCE))


def _carry_words(line: list[str], word: str, room: int) -> list[str]:
    """Take words off the end of a line, so that "5 - 3" never wraps into the list item "- 3"."""
    start = len(line) - 1
    while start > 0 and _begins_block(line[start]):
        start -= 1
    carried = line[start:]
    if start < 1 or count_columns(" ".join([*carried, word])) > room:
        return []
    del line[start:]
    return carried


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, title="text_formatter")

    text: str = Field(
        min_length=1,
        max_length=100_000,
        description="The text to wrap, copied exactly.",
        json_schema_extra={"verbatim": True},
    )
    width: int = Field(80, ge=10, le=400, description="Columns in a line.")
    indent: int = Field(0, ge=0, le=100, description="Spaces before each line.")

    @field_validator("text")
    @classmethod
    def _require_text(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("text: got only white space, expected some text to wrap")
        return text

    @field_validator("indent")
    @classmethod
    def _require_room(cls, indent: int, info: ValidationInfo) -> int:
        if "width" in info.data:  # absent when the width itself is wrong
            _require_room(info.data["width"], indent)
        return indent


@tool(args_schema=_Arguments)
def text_formatter(text: str, width: int = 80, indent: int = 0) -> str:
    """Wrap text to lines of a given width. Use it to wrap or indent a text. Example: width=40."""
    return format_text(text, width, indent)


answer_errors(text_formatter, _Arguments)
