"""Wrap text to a column width: text, width and indent in, wrapped text out.

Call it as `text_formatter.invoke({"text": "...", "width": 40})`, or `format_text` from code.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from langchain_core.tools import ToolException, tool
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from wcwidth import iter_graphemes, wcswidth

from tools._errors import answer_errors
from tools._markdown import find_code_blocks, split_lines

__all__ = ["count_columns", "format_text", "text_formatter"]

# White space at which a line may break: all of it but the three no-break spaces.
_BREAKABLE = re.compile(r"[^\S\u00a0\u202f\u2007]+")
# Up to three digits, so that a line of prose that starts with "1984." is no list item.
_ITEM = re.compile(r"([ \t]*)([-*+]|\d{1,3}[.)])(?:[ \t]+|$)")
# Markdown cannot continue a heading or a table row on another line.
_WHOLE_LINE = re.compile(r"[ \t]*(?:#{1,6}[ \t]|\||[-=*_]{3,}[ \t]*$)")
_QUOTE = re.compile(r"(?:>[ \t]?)+")
_FENCE = re.compile(r"[`~]{3}")
_TAB_COLUMNS = 4
_NEEDED_COLUMNS = 2  # beside a marker; with one, a wide character would not fit


class _Item(NamedTuple):
    """A list item that later lines may belong to."""

    marker: str
    nesting: int
    text_column: int  # in the source


class _Paragraph(NamedTuple):
    """Lines wrapped as one; inside an item they hang under its text."""

    words: list[str]
    item: _Item | None = None
    has_marker: bool = False  # the first paragraph of the item


class _Line(NamedTuple):
    """A line that is not joined with its neighbours: of a quote, a heading or a table row."""

    quote: str
    text: str
    item: _Item | None


def count_columns(text: str) -> int:
    """Count terminal columns, a grapheme cluster at a time.

    An East Asian wide character or an emoji, of however many code points, takes 2; combining
    marks and control characters take none.
    """
    if text.isascii() and text.isprintable():
        return len(text)
    return sum(map(_cluster_columns, iter_graphemes(text)))


def format_text(text: str, width: int = 80, indent: int = 0) -> str:
    """Wrap each paragraph and list item to at most `width` columns.

    Blank lines between paragraphs are kept, those at either end are dropped. White space inside
    a paragraph becomes one space; a word longer than the line is broken between grapheme
    clusters. List items start on their own line and hang under their text, and so do their later
    paragraphs. Lines of a quote are wrapped one by one, the `>` repeated.

    Lines that can be wider than `width`: fenced code, which is kept as it is (without indent);
    headings and table rows, which Markdown cannot continue on another line; and a grapheme
    cluster wider than the room it has.

    Formatting the result again changes nothing, unless a broken line happens to begin like
    another block.

    Args:
        text: Plain text or Markdown.
        width: Columns of a line, the indent counted.
        indent: Spaces before each line that is not blank.

    Raises:
        ToolException: The indent leaves no column for the text.
    """
    if problem := _indent_problem(width, indent):
        raise ToolException(problem)
    lines = split_lines(text)
    result: list[str] = []
    for part in _split_blocks(lines):
        if isinstance(part, _Paragraph):
            result += [" " * indent + line for line in _wrap_paragraph(part, width - indent)]
        elif isinstance(part, _Line):
            result += [" " * indent + line for line in _wrap_line(part, width - indent)]
        else:
            result.append(part)
    return "\n".join(result).strip("\n")


def _cluster_columns(cluster: str) -> int:
    return max(0, wcswidth(cluster))  # -1 stands for a control character


def _word_columns(word: str) -> int:
    """Columns of a word on a line, where a mark at its start sits on the space before it."""
    return max(count_columns(word), count_columns(" " + word) - 1)


def _indent_problem(width: int, indent: int) -> str:
    if 0 <= indent < width:
        return ""
    return f"indent: got {indent}, expected 0 or more and less than width ({width})"


def _split_blocks(lines: list[str]) -> Iterator[_Paragraph | _Line | str]:
    """Yield what to wrap and, as strings, lines to keep (code and blank lines)."""
    code = {n for block in find_code_blocks(lines) for n in range(block.start, block.stop)}
    items = {
        n: item
        for n, line in enumerate(lines)
        if n not in code and not _WHOLE_LINE.match(line) and (item := _ITEM.match(line))
    }
    # Nesting counts from the outermost item, so a second pass does not add the indent again.
    outermost = min((_columns_before(item[1]) for item in items.values()), default=0)
    current: _Paragraph | None = None
    open_items: list[_Item] = []
    for number, line in enumerate(lines):
        text = line.strip()
        quote = _QUOTE.match(text)
        alone = quote or _WHOLE_LINE.match(line)
        item = items.get(number)
        if current and (number in code or not text or alone or item):
            yield current
            current = None
        if number in code or not text:
            yield line if number in code else ""
            continue
        if current:
            current.words.extend(_split_words(line))
            continue
        margin = _columns_before(line)
        while open_items and margin < open_items[-1].text_column:
            open_items.pop()
        if item:
            open_items.append(_Item(item[2], margin - outermost, _text_column(item)))
        parent = open_items[-1] if open_items else None
        if alone:
            prefix = quote[0] if quote else ""
            yield _Line(prefix, text[len(prefix) :], parent)
        else:
            words = _split_words(line[item.end() :] if item else line)
            current = _Paragraph(words, parent, item is not None)
    if current:
        yield current


def _columns_before(line: str) -> int:
    line = line.expandtabs(_TAB_COLUMNS)
    return len(line) - len(line.lstrip(" "))


def _text_column(item: re.Match[str]) -> int:
    """Where the text of an item starts: after an empty marker or a wide gap, one column on."""
    marker_end = len(item[0].rstrip().expandtabs(_TAB_COLUMNS))
    gap = len(item[0].expandtabs(_TAB_COLUMNS)) - marker_end
    return marker_end + (gap if 1 <= gap <= 4 else 1)


def _split_words(line: str) -> list[str]:
    return [word for word in _BREAKABLE.split(line) if word]


def _wrap_paragraph(paragraph: _Paragraph, room: int) -> list[str]:
    """Wrap to `room` columns, a list item under its marker."""
    words, item, has_marker = paragraph
    margin = _text_margin(item, room)
    if not item or not has_marker:
        return [margin + line for line in _wrap_words(words, room - len(margin))]
    if not margin:
        return _wrap_words([item.marker, *words], room)
    first, *rest = _wrap_words(words, room - len(margin)) or [""]
    opening = margin[len(item.marker) + 1 :] + item.marker + " "
    return [(opening + first).rstrip(), *(margin + line for line in rest)]


def _wrap_line(line: _Line, room: int) -> list[str]:
    """Wrap a line of a quote that is too wide; keep all others, the spaces in them too."""
    margin = _text_margin(line.item, room)
    quote, room = line.quote.expandtabs(_TAB_COLUMNS), room - len(margin)
    fits = "\t" not in line.text and len(quote) + _word_columns(line.text) <= room
    if fits or not quote:
        return [margin + (quote + line.text).rstrip()]
    words = _split_words(line.text)
    if len(quote) + _NEEDED_COLUMNS > room:
        return [margin + wrapped for wrapped in _wrap_words([quote.rstrip(), *words], room)]
    return [margin + quote + wrapped for wrapped in _wrap_words(words, room - len(quote))]


def _text_margin(item: _Item | None, room: int) -> str:
    """Spaces under the marker of an item; none where there is no item or no room for its text."""
    spare = room - len(item.marker) - 1 - _NEEDED_COLUMNS if item else -1
    if not item or spare < 0:
        return ""
    return " " * (min(item.nesting, room // 2, spare) + len(item.marker) + 1)


def _wrap_words(words: list[str], room: int) -> list[str]:
    """Fill lines greedily; a line never starts with a word that would begin a new block."""
    lines: list[list[str]] = []
    used = room  # no line yet: as if the last one were full
    for word in (piece for whole in words for piece in _break_word(whole, room)):
        size = _word_columns(word)
        if used + 1 + size <= room:
            lines[-1].append(word)
            used += 1 + size
            continue
        carried = _carry_words(lines[-1], word, room) if lines and _begins_block(word) else []
        lines.append([*carried, word])
        used = _line_columns(lines[-1])
    return [" ".join(line) for line in lines]


def _line_columns(words: list[str]) -> int:
    return sum(map(_word_columns, words)) + len(words) - 1


def _break_word(word: str, room: int) -> Iterator[str]:
    """Cut a word into pieces of at most `room` columns, between grapheme clusters."""
    if _word_columns(word) <= room:
        yield word
        return
    piece: list[str] = []
    used = 0
    for cluster in iter_graphemes(word):
        # Only the first cluster can sit on the space before it.
        size = _cluster_columns(cluster) if piece else _word_columns(cluster)
        if piece and used + size > room:
            yield "".join(piece)
            piece, used = [], 0
            size = _word_columns(cluster)
        piece.append(cluster)
        used += size
    yield "".join(piece)


def _begins_block(word: str) -> bool:
    return any(pattern.match(word + " ") for pattern in (_ITEM, _WHOLE_LINE, _QUOTE, _FENCE))


def _carry_words(line: list[str], word: str, room: int) -> list[str]:
    """Take words off the end of a line, so that "5 - 3" never wraps into the list item "- 3"."""
    start = len(line) - 1
    while start > 0 and _begins_block(line[start]):
        start -= 1
    carried = line[start:]
    if start < 1 or _line_columns([*carried, word]) > room:
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
        width = info.data.get("width")  # None when the width itself is wrong
        if width is not None and (problem := _indent_problem(width, indent)):
            raise ValueError(problem)
        return indent


@tool(args_schema=_Arguments)
def text_formatter(text: str, width: int = 80, indent: int = 0) -> str:
    """Wrap text to lines of a given width. Use it to wrap or indent a text. Example: width=40."""
    return format_text(text, width, indent)


answer_errors(text_formatter, _Arguments)
