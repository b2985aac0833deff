"""text_formatter: wrapping by columns, what is kept as it is, and what a wrong call answers."""

import re
import textwrap
import time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from langchain_core.messages import ToolMessage
from langchain_core.tools import ToolException
from pydantic import ValidationError
from wcwidth import iter_graphemes

from tools.text_formatter import count_columns, format_text, text_formatter

WIDTHS = st.integers(10, 400)
# Half of the lines look like Markdown, or the parser would hardly be reached.
LINES = st.one_of(
    st.text(max_size=60),
    st.builds(
        "".join,
        st.lists(st.sampled_from([*" -*1.`#>|~=\t", "word ", "długi ", "字", "e\u0301", "```"])),
    ),
)
TEXTS = st.lists(LINES, max_size=12).map("\n".join)
# Grapheme clusters and their columns, by hand: what a terminal with Unicode support shows.
CLUSTERS = {
    "a": 1,
    "ß": 1,
    "e\u0301": 1,
    "o\u0302\u0323\u0301": 1,  # three marks on one letter
    "字": 2,
    "한": 2,
    "\u1112\u1161\u11ab": 2,  # the same syllable, as three jamo
    "ｱ": 1,  # halfwidth
    "Ａ": 2,  # fullwidth
    "😀": 2,
    "👍🏽": 2,  # a skin tone
    "👩\u200d👩\u200d👧\u200d👦": 2,  # a family, joined by ZWJ
    "🏳\ufe0f\u200d🌈": 2,
    "🇩🇪": 2,
    "❤\ufe0f": 2,  # emoji presentation, by VS16
    "❤": 1,
    "1\ufe0f\u20e3": 2,  # a keycap
    "กำ": 2,
    "नि": 2,  # a vowel sign that takes space
    "\u05d0\u05b8": 1,
}
# No character that could begin a list item, a fence or another block on a wrapped line.
PROSE_WORDS = st.lists(
    st.lists(st.sampled_from(list(CLUSTERS)), min_size=1, max_size=20), min_size=1, max_size=20
)
PROSE = PROSE_WORDS.map(lambda words: ["".join(word) for word in words])


def call(**args: Any) -> ToolMessage:
    message = text_formatter.invoke(
        {"type": "tool_call", "name": "text_formatter", "id": "1", "args": args}
    )
    assert isinstance(message, ToolMessage)
    return message


def too_wide(result: str, width: int) -> list[str]:
    """Lines that break the promise: outside code, no heading, no table row, no lone cluster."""
    wide, fence = [], ""
    for line in result.split("\n"):
        mark = re.match(r"[ \t]*(`{3,}(?=[^`]*$)|~{3,})", line)
        if fence:
            fence = "" if set(line.strip()) == {fence[0]} and line.strip() >= fence else fence
        elif mark:
            fence = mark[1]
        elif not re.match(r"\s*(#{1,6}\s|\||[-=*_]{3,}\s*$)", line):
            clusters = list(iter_graphemes(line.strip(" ")))
            if count_columns(line) > width and len(clusters) > 1:
                wide.append(line)
    return wide


def split_clusters(text: str) -> list[str]:
    """Cut a text made of `CLUSTERS` and white space; a torn cluster fails."""
    pattern = "|".join(map(re.escape, sorted(CLUSTERS, key=len, reverse=True)))
    found = re.findall(rf"{pattern}|\s|.", text)
    assert [piece for piece in found if not piece.isspace() and piece not in CLUSTERS] == []
    return found


@pytest.mark.parametrize(
    ("text", "width", "indent", "expected"),
    [
        ("short", 80, 0, "short"),
        ("one two three four", 10, 0, "one two\nthree four"),
        ("one two three four", 12, 2, "  one two\n  three four"),
        ("exactly 10", 10, 0, "exactly 10"),
        ("exactly 11!", 10, 0, "exactly\n11!"),
        ("many   spaces\tand\nlines", 80, 0, "many spaces and lines"),
        ("first\r\n\r\nsecond\rthird", 80, 0, "first\n\nsecond third"),
        ("first\n\n\n\nsecond", 80, 4, "    first\n\n\n\n    second"),
        ("\n\n  edges are trimmed \n\n", 80, 0, "edges are trimmed"),
        ("a" * 25, 10, 0, "aaaaaaaaaa\naaaaaaaaaa\naaaaa"),
        ("see " + "b" * 12 + " end", 10, 0, "see\nbbbbbbbbbb\nbb end"),
        ("no\u00a0break here now", 10, 0, "no\u00a0break\nhere now"),
        # Six fullwidth characters are twelve columns; five fit in ten or eleven.
        ("字字字字字字", 10, 0, "字字字字字\n字"),
        ("字字字字字字", 11, 0, "字字字字字\n字"),
        # Six families are twelve columns and 42 code points; none may be torn.
        (
            "👩\u200d👩\u200d👧\u200d👦" * 6,
            10,
            0,
            "👩\u200d👩\u200d👧\u200d👦" * 5 + "\n👩\u200d👩\u200d👧\u200d👦",
        ),
        ("🇩🇪" * 6, 11, 0, "🇩🇪" * 5 + "\n🇩🇪"),
        ("👍🏽" * 6, 10, 0, "👍🏽" * 5 + "\n👍🏽"),
        ("a" * 9 + "❤\ufe0f", 10, 0, "a" * 9 + "\n❤\ufe0f"),
        ("a" * 9 + "❤", 10, 0, "a" * 9 + "❤"),
        ("a\tb\u3000c\u2003d", 10, 0, "a b c d"),
        # Ten letters with a combining accent each are ten columns, although 20 code points.
        ("e\u0301" * 10, 10, 0, "e\u0301" * 10),
        ("e\u0301" * 11, 10, 0, "e\u0301" * 10 + "\ne\u0301"),
        ("字", 10, 9, " " * 9 + "字"),  # the stated exception: one column is left
        ("\u1100" * 6, 10, 0, "\u1100" * 6),  # six leading consonants are one cluster
    ],
)
def test_paragraphs_wrap(text: str, width: int, indent: int, expected: str) -> None:
    assert format_text(text, width, indent) == expected


@pytest.mark.parametrize(
    ("text", "width", "indent", "expected"),
    [
        ("- one two three four", 12, 0, "- one two\n  three four"),
        ("* a\n* b\n+ c", 20, 2, "  * a\n  * b\n  + c"),
        ("10. one two three four", 14, 0, "10. one two\n    three four"),
        ("1) a\n2) b", 20, 0, "1) a\n2) b"),
        ("Intro:\n- a\ncontinued\n- b", 20, 0, "Intro:\n- a continued\n- b"),
        ("- a\n  - b\n    - c", 20, 0, "- a\n  - b\n    - c"),
        ("    - a\n      - b", 20, 0, "- a\n  - b"),
        ("-\n- a", 20, 0, "-\n- a"),
        # Marker and wide character take all four columns: the nesting gives way.
        ("- a\n      - 字字", 10, 6, "      - a\n      - 字\n        字"),
        ("-no item and\n1984. A year", 40, 0, "-no item and 1984. A year"),
        (
            "- one two",
            10,
            8,
            " " * 8 + "-\n" + "\n".join(" " * 8 + w for w in ["on", "e", "tw", "o"]),
        ),
        # A wrapped line must not turn into a list item: the word before it comes along.
        ("the sum 5 - 3 is two", 10, 0, "the sum\n5 - 3 is\ntwo"),
        ("count 5 6 - 3 is two", 10, 0, "count 5\n6 - 3 is\ntwo"),
        ("# Title\ntext\n## Next\ntext", 40, 0, "# Title\ntext\n## Next\ntext"),
        ("| a | b |\n|---|---|\n| 1 | 2 |", 40, 0, "| a | b |\n|---|---|\n| 1 | 2 |"),
        ("Title\n=====\na\nb\n---\n> q\n> r", 40, 0, "Title\n=====\na b\n---\n> q\n> r"),
        # A heading or a table row on two lines would be none.
        ("# A long title\ntext", 10, 2, "  # A long title\n  text"),
        ("| a   | b        |\n|-----|---------:|", 10, 0, "| a   | b        |\n|-----|---------:|"),
        ("> one two three\n> four", 10, 0, "> one two\n> three\n> four"),
        (">> one two three", 10, 1, " >> one\n >> two\n >> three"),
        (">     code   kept", 20, 0, ">     code   kept"),
        ("> > > > > a b", 10, 0, "> > > > >\na b"),  # no room beside the quote marks
        # Later paragraphs of an item hang under its text; one that is not indented ends the list.
        ("- one two three\n\n  four five", 10, 0, "- one two\n  three\n\n  four\n  five"),
        ("1. a\n   - b\n\n     c\n\n   d\n\ne", 20, 0, "1. a\n   - b\n\n     c\n\n   d\n\ne"),
        ("-   a\n\n    b\n\n  c", 20, 0, "- a\n\n  b\n\nc"),
        ("- a\n\n  > b\n\n  | c |", 20, 2, "  - a\n\n    > b\n\n    | c |"),
        ("-\ta\n\n\tb", 20, 0, "- a\n\n  b"),
    ],
)
def test_list_items_and_single_lines_stay_apart(
    text: str, width: int, indent: int, expected: str
) -> None:
    assert format_text(text, width, indent) == expected


@pytest.mark.parametrize("fence", ["```", "````", "~~~"])
def test_code_lines_are_kept_even_when_too_wide(fence: str) -> None:
    code = f"{fence}python\nif  x:\n\n\n\ty = {'1 + ' * 20}1\n- no item\n{fence}"
    assert format_text(f"some text\n{code}\nmore", 10, 2) == f"  some\n  text\n{code}\n  more"


def test_code_twin_without_a_fence_is_wrapped() -> None:
    assert format_text("if  x:\n    y = 1", 80) == "if x: y = 1"
    assert format_text("```not a fence```\n a  b", 80) == "```not a fence``` a b"


def test_unclosed_fence_keeps_the_rest() -> None:
    assert format_text("a\n```\n  b   c\n\nd  e", 10) == "a\n```\n  b   c\n\nd  e"


@pytest.mark.parametrize(("text", "columns"), CLUSTERS.items(), ids=ascii)
def test_count_columns_of_a_cluster(text: str, columns: int) -> None:
    assert count_columns(text) == columns
    assert count_columns(f"x{text} {text}x") == 2 * columns + 3


@pytest.mark.parametrize(
    ("text", "columns"), [("abc", 3), ("", 0), ("\u200b", 0), ("a\x00b", 2), ("\x1b", 0)]
)
def test_count_columns(text: str, columns: int) -> None:
    assert count_columns(text) == columns


@settings(max_examples=200, deadline=None)
@given(PROSE_WORDS, WIDTHS)
def test_clusters_stay_whole_and_lines_fit_by_the_hand_made_table(
    words: list[list[str]], width: int
) -> None:
    lines = format_text(" ".join(map("".join, words)), width).split("\n")
    columns = [sum(CLUSTERS.get(piece, 1) for piece in split_clusters(line)) for line in lines]
    assert max(columns) <= width
    kept = [piece for line in lines for piece in split_clusters(line) if piece != " "]
    assert kept == [cluster for word in words for cluster in word]


def test_cluster_twin_sees_what_textwrap_tears() -> None:
    family = "👩\u200d👩\u200d👧\u200d👦"
    with pytest.raises(AssertionError):
        split_clusters("\n".join(textwrap.wrap(family * 3, 10)))
    assert split_clusters(format_text(family * 3, 10)) == [family] * 3


@settings(max_examples=300, deadline=None)
@given(TEXTS, WIDTHS, st.integers(0, 100))
@example("- 字字\n    - 字", 10, 7)
def test_no_line_is_wider_and_no_character_is_lost(text: str, width: int, indent: int) -> None:
    indent = min(indent, width - 1)
    result = format_text(text, width, indent)
    assert too_wide(result, width) == []
    # Only the mark of a quote may be repeated.
    assert "".join(result.replace(">", "").split()) == "".join(text.replace(">", "").split())
    if ">" not in text:
        assert "".join(result.split()) == "".join(text.split())


def test_too_wide_twin_sees_a_wide_line() -> None:
    assert too_wide("字字字字字字", 10) == ["字字字字字字"]
    assert too_wide("```\n" + "x" * 99 + "\n```\n" + "y" * 11, 10) == ["y" * 11]
    assert too_wide("# a long title\n| row of a table\n# \n字\n> a long quote", 10) == [
        "> a long quote"
    ]


BLOCKS = st.builds(
    lambda opening, words, ending: opening + " ".join(words) + ending,
    st.sampled_from(
        [
            "",
            "  ",
            "    ",
            "- ",
            "*   ",
            "  - ",
            "    1. ",
            "12) ",
            "> ",
            "  > ",
            "# ",
            "| ",
            "```\n x  ",
        ]
    ),
    PROSE,
    st.sampled_from(["", "\n", "\n```\n"]),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(BLOCKS, min_size=1, max_size=6), WIDTHS, st.integers(0, 100))
@example(["- a", "", "  b", "  - c\n", "    d"], 10, 3)
def test_formatting_twice_changes_nothing(blocks: list[str], width: int, indent: int) -> None:
    indent = min(indent, width - 1)
    once = format_text("\n".join(blocks), width, indent)
    assert format_text(once, width, indent) == once


def test_twice_twin_sees_the_stated_exception() -> None:
    once = format_text("aaaaaaaaaa- b cc dd ee ff", 10)
    assert once == "aaaaaaaaaa\n- b cc dd\nee ff"
    assert format_text(once, 10) == "aaaaaaaaaa\n- b cc dd\n  ee ff"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["a b -", "5 - 3 word", "word 1. x", "c word #"])), WIDTHS)
def test_wrapping_makes_no_list_items(pieces: list[str], width: int) -> None:
    lines = format_text(" ".join(["start", *pieces]), width).split("\n")
    assert [line for line in lines if line.split()[0] in ("-", "1.", "#")] == []


def test_list_item_twin_sees_what_textwrap_does() -> None:
    assert "- 3 word" in textwrap.wrap("start a 5 - 3 word", 10)
    assert format_text("start a 5 - 3 word", 10) == "start a\n5 - 3 word"


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ({"text": "a", "width": 9}, ["width: got 9", "from 10 to 400", "a corrected width"]),
        ({"text": "a", "width": 401}, ["width: got 401", "from 10 to 400"]),
        ({"text": "a", "width": True}, ["width: got True", "an integer"]),
        ({"text": "a", "width": "40"}, ["width: got '40'", "an integer"]),
        ({"text": "a", "width": 40.0}, ["width: got 40.0", "an integer"]),
        ({"text": "a", "width": None}, ["width: got None", "an integer"]),
        ({"text": "a", "indent": -1}, ["indent: got -1", "from 0 to 100"]),
        ({"text": "a", "indent": 101, "width": 400}, ["indent: got 101", "from 0 to 100"]),
        ({"text": "a", "indent": 40, "width": 40}, ["indent: got 40", "less than width (40)"]),
        ({"text": "a", "indent": 80}, ["indent: got 80", "less than width (80)"]),
        ({"text": " \n\t"}, ["text: got only white space"]),
        ({"text": ""}, ["text: got ''"]),
        ({"text": 5}, ["text: got 5", "a string"]),
        ({"text": "a" * 100_001}, ["text: got 100001 characters", "at most 100000"]),
        ({"text": "\ud800"}, ["text: got a lone surrogate"]),
        ({}, ["text: got nothing", "call text_formatter again with text"]),
        ({"text": "a", "wide": 1}, ["wide: unknown argument", "only text, width, indent"]),
        ({"text": 1, "width": 1}, ["text: got 1", "width: got 1", "a corrected text, a corrected"]),
    ],
)
def test_wrong_calls_name_the_argument(args: dict[str, Any], parts: list[str]) -> None:
    message = call(**args)
    assert message.status == "error"
    content = str(message.content)
    assert content.startswith("error: ")
    assert "\n" not in content
    assert len(content) < 400
    assert [part for part in parts if part not in content] == []


def test_right_call_is_no_error() -> None:
    message = call(text="one two three four", width=10)
    assert (message.status, message.content) == ("success", "one two\nthree four")
    assert message.tool_call_id == "1"


def test_defaults_may_be_left_out() -> None:
    text = "word " * 40
    assert text_formatter.invoke({"text": text}) == format_text(text, 80, 0)
    assert text_formatter.invoke(text) == format_text(text, 80, 0)
    widest = text_formatter.invoke({"text": text, "width": 400, "indent": 100})
    assert widest.startswith(" " * 100 + "word")


@pytest.mark.parametrize("indent", [10, 11, -1])
def test_pure_function_refuses_an_indent_without_room(indent: int) -> None:
    with pytest.raises(ToolException, match=rf"indent: got {indent}, .* less than width \(10\)"):
        format_text("a", 10, indent)


def test_schema_is_flat_and_marks_the_verbatim_text() -> None:
    schema = text_formatter.args_schema.model_json_schema()
    assert "$defs" not in schema
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["text"]
    assert {name: p["type"] for name, p in schema["properties"].items()} == {
        "text": "string",
        "width": "integer",
        "indent": "integer",
    }
    assert [name for name, p in schema["properties"].items() if p.get("verbatim")] == ["text"]
    with pytest.raises(ValidationError, match="less than width"):
        text_formatter.args_schema(text="a", width=10, indent=10)


@pytest.mark.parametrize(
    "text",
    ["word " * 10_000, "字" * 50_000, "- " * 25_000, "a" * 50_000, "`" * 50_000, "-\n" * 25_000,
     " " * 49_999 + "x", "e" + "\u0301" * 50_000, "```\n" * 12_500, ">" * 50_000, "> a\n" * 12_500,
     "🇩🇪" * 25_000, "👩\u200d" * 25_000, "क\u094d" * 25_000, "\u200b " * 25_000, "- a\n\n  b\n" * 5_000,
     "".join(" " * depth + "- a\n" for depth in range(300))],
    ids=["words", "wide", "dashes", "one word", "backticks", "items", "blank", "marks", "fences",
         "quote marks", "quotes", "flags", "joiners", "conjuncts", "zero width", "paragraphs", "nesting"],
)  # fmt: skip
def test_50_kb_take_well_under_a_second(text: str) -> None:
    start = time.perf_counter()
    for width in (10, 400):
        format_text(text, width)
    assert time.perf_counter() - start < 2
