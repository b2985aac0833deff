"""Generated tool rows: reproducible, mixed as planned, valid, measured, and no text leaks."""

import json
import random
from collections import Counter

import pytest

from scripts._cli import CommandError
from scripts.conversations import to_conversation
from scripts.make_tool_data import (
    BASIC_KINDS,
    KINDS,
    OWN_SYSTEM_SHARE,
    SYSTEM_PROMPTS,
    TALK_BEFORE_SHARE,
    Diversity,
    generate_conversations,
    main,
    measure_diversity,
    sample_conversations,
)
from scripts.tool_conversations import Conversations
from scripts.tool_requests import is_held_out, read_lines
from scripts.tool_texts import Corpus
from tools import TOOLS
from tools.protocol import parse_tool_call, tool_prompt

CORPUS = Corpus.of(sample_conversations())
ROWS = list(generate_conversations(1500, 1, CORPUS))
HELD_OUT_ROWS = list(generate_conversations(500, 1, CORPUS, held_out=True))


def some_rows(seed: int, **options: bool) -> list[dict]:
    return list(generate_conversations(20, seed, CORPUS, **options))


def test_same_seed_same_rows():
    random.seed(1)
    rows = some_rows(5)
    random.seed(2)  # the generator has its own randomness
    assert some_rows(5) == rows
    assert some_rows(6) != rows
    assert some_rows(5, held_out=True) != rows
    assert list(generate_conversations(12, 5, CORPUS)) == rows[:12]


def shares_off(rows: list[dict], kinds: dict[str, float] = KINDS) -> list[str]:
    """Name the kinds whose share is further off than four standard deviations of chance."""
    counts, total = Counter(row["kind"] for row in rows), len(rows)
    return [
        kind
        for kind, share in kinds.items()
        if abs(counts.pop(kind) / total - share) > 4 * (share * (1 - share) / total) ** 0.5
    ] + list(counts)


@pytest.mark.parametrize("rows", [ROWS, HELD_OUT_ROWS], ids=["train", "held out"])
def test_kinds_have_their_shares(rows):
    assert sum(KINDS.values()) == pytest.approx(1)
    assert shares_off(rows) == []
    fewer = [row for row in rows if row["kind"] != "no_tool" or len(row["messages"]) > 3]
    assert "no_tool" in shares_off(fewer)
    assert shares_off([*rows, {"kind": "new"}]) == ["new"]


def row_problems(row: dict) -> list[str]:
    problems = []
    messages = row["messages"]
    read = to_conversation(row)
    # White space at the ends of a turn is not for this test to judge.
    bare = [
        [{**turn, "content": turn["content"].strip()} for turn in some]
        for some in (read.messages, messages)
    ]
    if bare[0] != bare[1] or read.repairs:
        problems.append("no valid conversation")
    own, _, tools = messages[0]["content"].rpartition("Answer in plain text, or call")
    if messages[0]["role"] != "system" or "Answer in plain text, or call" + tools != tool_prompt(
        TOOLS
    ):
        problems.append("no tool list")
    if own and own.removesuffix("\n\n") not in SYSTEM_PROMPTS:
        problems.append("unknown system prompt")
    if set(row) != {"messages", "source", "kind"} or row["source"] != "tomeforge_tools":
        problems.append("fields")
    return problems


def test_rows_are_conversations_under_the_tool_list():
    assert {problem for row in ROWS + HELD_OUT_ROWS for problem in row_problems(row)} == set()
    system, *turns = ROWS[0]["messages"]
    for messages, problem in [
        (turns, "no tool list"),
        ([system, *turns[1:]], "no valid conversation"),
        ([{"role": "system", "content": "Hi.\n\n" + tool_prompt(TOOLS)}, *turns], "unknown system"),
        ([{"role": "system", "content": tool_prompt(TOOLS[:2])}, *turns], "no tool list"),
    ]:
        try:
            found = row_problems({**ROWS[0], "messages": messages})
        except ValueError:  # refused outright
            found = ["no valid conversation"]
        assert problem in "; ".join(found)


def test_a_few_rows_have_a_system_prompt_of_their_own():
    own = Counter(row["messages"][0]["content"].partition("\n\nAnswer")[0] for row in ROWS)
    plain = own.pop(tool_prompt(TOOLS))
    assert own.keys() == set(SYSTEM_PROMPTS)
    assert 0.5 < own.total() / (OWN_SYSTEM_SHARE * len(ROWS)) < 1.6
    assert plain + own.total() == len(ROWS)


def test_a_few_requests_come_in_the_middle_of_a_conversation():
    def talked(rows: list[dict]) -> int:
        """Count rows that call a tool only after another exchange."""
        named = [row for row in rows if row["kind"] in {tool.name for tool in TOOLS}]
        answers = [[m["content"] for m in row["messages"][2::2]] for row in named]
        assert all(any(map(parse_tool_call, said)) for said in answers)
        return sum(parse_tool_call(said[0]) is None for said in answers)

    tool_share = sum(share for kind, share in KINDS.items() if kind in {t.name for t in TOOLS})
    expected = TALK_BEFORE_SHARE * tool_share * len(ROWS)
    assert 0.5 < talked(ROWS) / expected < 1.6


def leaked(texts: list[str], rows: list[dict]) -> list[str]:
    """Give the texts that stand in the turns of rows."""
    made = "\n".join(turn["content"] for row in rows for turn in row["messages"][1:])
    return [text for text in texts if text in made]


def test_no_text_comes_from_outside_the_corpus():
    """Held-out rows must not come back as texts of tool requests."""
    conversations = sample_conversations()
    halves = [Corpus.of(conversations[::2]), Corpus.of(conversations[1::2])]
    rows = list(generate_conversations(400, 2, halves[0]))
    only = set(halves[1].sentences) - set(halves[0].sentences)
    assert len(only) > 500
    assert leaked(sorted(only), rows) == []
    assert len(leaked(halves[0].sentences, rows)) > 60


def test_held_out_rows_are_made_of_held_out_texts_and_phrasings():
    """A phrasing without placeholders is a turn as it stands, a text is part of one."""
    texts = [line["text"] for line in read_lines("texts") if len(line["text"]) > 15]
    names = ("no_tool_near", "no_tool_general", "template_generator", "follow_ups", "ask_back")
    requests = [
        line["request"]
        for name in names
        for line in read_lines(name)
        if "{" not in line["request"] and len(line["request"]) > 30
    ]
    for rows, half in ((ROWS, False), (HELD_OUT_ROWS, True)):
        for known in (texts, requests):
            used = leaked(known, rows)
            assert {is_held_out(text) for text in used} == {half}
            assert len(used) > (10 if half else 200)


def test_phrasings_of_the_two_halves_never_meet(monkeypatch):
    seen: list[Conversations] = []

    class Watched(Conversations):
        def __init__(self, *args):
            super().__init__(*args)
            seen.append(self)

    monkeypatch.setattr("scripts.tool_conversations.Conversations", Watched)
    for half in (False, True, True):
        list(generate_conversations(300, 9, CORPUS, half))
    train, held_out, again = (made.families for made in seen)
    assert not train & held_out
    assert held_out & again == held_out  # a family that came twice would be seen
    assert len(train) > 250


def test_too_small_a_corpus_is_refused():
    with pytest.raises(CommandError, match="tool_rows: the data has 0 plain sentences"):
        next(generate_conversations(3, 1, Corpus([], [])))
    assert list(generate_conversations(0, 1, Corpus([], []))) == []
    enough = Corpus(CORPUS.sentences[:20], [])
    assert len(list(generate_conversations(3, 1, enough))) == 3


def row(kind: str, *requests: str) -> dict:
    turns = [{"role": "user", "content": request} for request in requests]
    answer = {"role": "assistant", "content": "a b c d e"}
    return {"kind": kind, "messages": [{"role": "system", "content": "x y"}, *turns, answer]}


def test_diversity_of_a_few_requests():
    rows = [row("one", "a b A b"), row("two", "a b c", "<tool_response>\na b z\n</tool_response>")]
    rows.append(row("one", "d"))
    assert measure_diversity(rows) == {
        "rows": 3,
        "kinds": {"one": 2, "two": 1},
        "distinct_1": 0.5,  # a b c d of 4 + 3 + 1
        "distinct_2": 0.6,  # ab ba bc of 3 + 2
        "distinct_3": 1.0,  # aba bab abc of 2 + 1
        "request_words": {"min": 1, "median": 3, "p95": 3, "max": 4},
    }
    assert measure_diversity(rows * 2)["distinct_2"] == 0.3


def test_watched_rows_pass_through_and_are_counted():
    rows, diversity = [row("one", "a b"), row("one", "a c")], Diversity()
    watched = diversity.watch(iter(rows))
    assert next(watched) is rows[0]
    assert diversity.to_json()["rows"] == 1
    assert list(watched) == rows[1:]
    assert diversity.to_json() == measure_diversity(rows)
    assert diversity.to_json()["distinct_1"] == 0.75


def test_diversity_of_nothing():
    assert measure_diversity([])["request_words"] == {}
    assert measure_diversity([row("one", "")])["distinct_3"] == 0


def test_generated_requests_are_varied():
    report = measure_diversity(ROWS)
    assert report["rows"] == 1500
    assert report["distinct_2"] > 0.5
    assert report["request_words"]["median"] > 10
    first = Counter(row["messages"][1]["content"] for row in ROWS)
    assert len(first) > 0.85 * len(ROWS)
    assert max(first.values()) <= 8
    assert measure_diversity(ROWS[:10] * 150)["distinct_2"] < 0.05


def printed(capsys, *argv: str) -> list[dict]:
    assert main(["--rows", "15", *argv]) == 0
    out = capsys.readouterr().out
    return [json.loads(out)] if "--report" in argv else [*map(json.loads, out.splitlines())]


def test_command_prints_rows_or_a_report(capsys):
    rows = printed(capsys, "--seed", "4")
    assert rows == list(generate_conversations(15, 4, CORPUS))
    assert rows == printed(capsys, "--seed", "4") != printed(capsys, "--seed", "5")
    held_out = printed(capsys, "--seed", "4", "--held-out")
    assert held_out == list(generate_conversations(15, 4, CORPUS, held_out=True)) != rows
    (report,) = printed(capsys, "--seed", "4", "--report")
    assert report == measure_diversity(rows) != measure_diversity(held_out)
    assert [report] != printed(capsys, "--seed", "4", "--report", "--held-out")


@pytest.mark.parametrize("number", ["0", "-3"])
def test_no_rows_are_refused(number, capsys):
    with pytest.raises(CommandError, match=f"--rows: got {number}, expected at least 1"):
        main(["--rows", number])
    with pytest.raises(SystemExit):
        main(["--rows", "many"])
    assert capsys.readouterr().out == ""


def test_basic_rows_are_single_requests_of_few_kinds(capsys):
    rows = list(generate_conversations(600, 4, CORPUS, basic=True))
    assert sum(BASIC_KINDS.values()) == pytest.approx(1)
    assert shares_off(rows, BASIC_KINDS) == []
    assert shares_off(ROWS, BASIC_KINDS) != []
    assert {row["messages"][0]["content"] for row in rows} == {tool_prompt(TOOLS)}
    assert {len(row["messages"]) for row in rows} == {3, 5}
    assert printed(capsys, "--seed", "4", "--basic") == rows[:15]
    with pytest.raises(CommandError, match="--basic: its phrasings are for training only"):
        main(["--basic", "--held-out"])


def test_basic_phrasings_are_apart_from_all_others():
    def families(basic: bool) -> set[str]:
        made = Conversations(CORPUS, random.Random(0), False, basic)
        for kind in BASIC_KINDS:
            for _ in range(300):
                getattr(made, kind)()
        return made.families

    registers = {
        line["request"]: line.get("register", "")
        for name in ("text_formatter", "template_generator", "content_validator_several")
        for line in [*read_lines(name), *read_lines("no_tool_general")]
    }
    assert {registers[family] for family in families(True)} == {"basic"}
    assert "basic" not in {registers.get(family, "") for family in families(False)}
    assert 60 < len(families(True)) < 90
