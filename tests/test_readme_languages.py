"""The Russian README has the commands, figures and links of the English one; so have the samples."""

import json
import re
from collections import Counter

import pytest

from integration._cli import CommandError
from integration.ask_format import parse_request
from tests.command_lines import ROOT
from tests.test_readme import README, RUSSIAN, blocks, code_spans, prose


def numbers(text: str) -> Counter[str]:
    """Count the figures of a text; thousands may be set apart by a comma or a no-break space."""
    text = re.sub(r"\]\([^)]*\)|^\[\w+\]: .*$", "]", prose(text), flags=re.MULTILINE)
    return Counter(re.findall(r"\d+(?:\.\d+)?", re.sub(r"(?<=\d)[,\xa0](?=\d{3}\b)", "", text)))


def sections(text: str) -> list[str]:
    return re.split(r"^## ", text, flags=re.MULTILINE)


def shape(table: str) -> list[int]:
    """Columns of each row."""
    return [row.count("|") for row in table.splitlines() if row.startswith("|")]


def differences(one: str, other: str) -> list[str]:
    """What two texts in different languages do not have in common, though they should."""
    found = [
        f"{language} blocks"
        for language in ("bash", "python", "text")
        if blocks(one, language) != blocks(other, language)
    ]
    demos = [
        re.findall("<!-- demo:start.*demo:end -->", text, flags=re.DOTALL) for text in (one, other)
    ]
    if demos[0] != demos[1]:
        found.append("demo")
    if set(code_spans(one)) != set(code_spans(other)):
        found.append(f"code: {set(code_spans(one)) ^ set(code_spans(other))}")
    links = [re.findall(r"\]\((?!#|README)([^)]+)\)|^(\[\w+\]: \S+)", text, flags=re.MULTILINE)
             for text in (one, other)]  # fmt: skip
    if Counter(links[0]) != Counter(links[1]):
        found.append("links")
    if len(sections(one)) != len(sections(other)):
        return [*found, "sections"]
    for left, right in zip(sections(one), sections(other), strict=True):
        if numbers(left) != numbers(right):
            apart = (numbers(left) - numbers(right)) + (numbers(right) - numbers(left))
            found.append(f"figures of {left.splitlines()[0]}: {dict(apart)}")
        if shape(left) != shape(right):
            found.append(f"table of {left.splitlines()[0]}")
    return found


def test_russian_says_the_same():
    assert differences(README, RUSSIAN) == []


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("--preview 3\n", "--preview 4\n", "bash blocks"),
        ("make check\n", "", "bash blocks"),
        ("TomeforgeChat.from_file(", "TomeforgeChat(", "python blocks"),
        ("  after  2.", "  after  1.", "text blocks"),
        ("| 14.5 ", "| 14.6 ", "figures of Compared with the usual way: {'14.5': 1, '14.6': 1}"),
        ("10\xa0000 из", "1\xa0000 из", "figures of Which recipe for which hardware: {'10000': 1"),
        ("| Q2_K |", "| Q3_K |", "figures of Export, and know what you got: {'2': 1, '3': 1}"),
        ("| обычная цепочка | 71.4 с |", "| обычная цепочка, 71.4 с |", "table of Compared"),
        ("(ARCHITECTURE.md)", "(ARCHITECTUR.md)", "links"),
        ("`--max-kld`", "`--max-kl`", "code: "),
        ("<!-- demo:end -->", "", "demo"),
        ("## Тесты", "Тесты", "sections"),
    ],
)
def test_difference_is_noticed(old, new, found):
    assert old in RUSSIAN
    (wrong,) = differences(README, RUSSIAN.replace(old, new, 1))
    assert wrong.startswith(found)


def sample_requests(name: str) -> list[str]:
    return (ROOT / "scripts/examples" / name).read_bytes().decode("utf-8").splitlines()


def test_sample_requests_are_requests_in_both_languages():
    english, russian = map(sample_requests, ("prompts.jsonl", "prompts_ru.jsonl"))
    for lines in (english, russian):
        assert [list(json.loads(line)) for line in lines] == [["id", "prompt"]] * 10
        requests = [parse_request(line, None) for line in lines]
        assert all(request.messages[-1]["content"] for request in requests)
        assert len({request.id for request in requests}) == 10
    assert [json.loads(line)["id"] for line in english] == [
        json.loads(line)["id"] for line in russian
    ]
    assert all(re.search("[а-яё]{4}", json.loads(line)["prompt"]) for line in russian)
    assert not re.search("[а-яё]", "".join(english))
    with pytest.raises(CommandError, match="has no prompt"):
        parse_request(russian[0].replace('"prompt"', '"promt"'), None)
