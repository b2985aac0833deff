"""Whether an answer follows the four parts: labels, order, words, copies and figures."""

import json
from pathlib import Path

import pytest

from scripts.prompt_scores import (
    MEASURES,
    PARTS,
    Verdict,
    compare_answers,
    judge_answers,
    read_parts,
)

LABELS = list(PARTS)
QUESTIONS = Path(__file__).parent.parent / "scripts/data/prompt_questions.jsonl"
GOOD = """Anchor: A cache is like the desk beside a library's shelves.
Essence: It keeps close what was used last.
Mechanics: The program looks there first; what is missing is fetched and left there.
Breakthrough: Many people think it makes memory larger. It makes the way shorter."""


def judge(text: str) -> Verdict:
    return judge_answers([text])[0]


def test_answer_that_follows_the_prompt_has_everything():
    verdict = judge(GOOD)
    assert verdict.parts == tuple(PARTS)
    assert verdict.all_four
    assert verdict.in_order
    assert verdict.analogy
    assert verdict.contrast
    assert not verdict.banned
    # Its twin: the same text without its labels has no part.
    plain = "\n".join(line.partition(": ")[2] for line in GOOD.split("\n"))
    assert judge(plain).parts == ()
    assert not judge(plain).all_four


def test_russian_answer_counts_as_well():
    text = (
        "Якорь: Кэш похож на письменный стол.\n**Суть:** Он хранит недавнее.\n"
        "3. Механика — сначала ищут в нём.\nПрорыв: Ошибка — думать, что он увеличивает память."
    )
    assert judge(text) == Verdict(tuple(PARTS), (), True, True, False)


@pytest.mark.parametrize(
    "label",
    [
        "Anchor: x", "ANCHOR: x", "  anchor : x", "**Anchor:** x", "**Anchor**: x", "1. Anchor: x",
        "1) **Anchor:** x", "(1) Anchor: x", "- Anchor: x", "- **Anchor**: x", "## Anchor\nx",
        "### 1. Anchor: x", "**1. Anchor:** x", "**Anchor**\n\nx", "> Anchor: x", "Anchor – x",
        "Anchor - x", "Anchor：x", "Sure!\nAnchor: x", "_Anchor:_ x", "Anchor:\n- x", "• Anchor: x",
    ],
)  # fmt: skip
def test_label_in_many_dresses(label):
    assert read_parts(label) == {"anchor": "x"}


@pytest.mark.parametrize(
    "text",
    [
        "Anchor points are: x", "An Anchor: x", "The Anchor: x", "Anchors: x", "Anchor-based: x",
        "Say so. Anchor: x", "Anchor:", "Anchor: **", "Anchor x", "Anchor", "Reanchor: x", "",
    ],
)  # fmt: skip
def test_what_is_no_part(text):
    assert read_parts(text) == {}


def test_part_without_text_of_its_own_is_none():
    assert list(read_parts("Anchor:\nEssence: e\nMechanics:\n\nBreakthrough:")) == ["essence"]


def test_order_is_that_of_the_first_labels():
    lines = GOOD.split("\n")
    swapped = judge("\n".join([lines[1], lines[0], *lines[2:], "Anchor: again"]))
    assert swapped.parts == ("essence", "anchor", "mechanics", "breakthrough")
    assert (swapped.all_four, swapped.in_order) == (True, False)
    three = judge("\n".join(lines[:3]))
    assert (three.all_four, three.in_order) == (False, False)


def test_part_that_two_answers_share_is_a_copy():
    other = GOOD.replace("a cache", "x").replace("Essence: It keeps", "Essence: Another keeps")
    first, second = judge_answers([GOOD, other.replace("**", "")])
    assert first.copied == ("anchor", "mechanics", "breakthrough")
    assert first.parts == second.parts == ("essence",)
    # Its twin: alone nothing of it is a copy, and dress alone makes no difference.
    assert judge(GOOD).copied == ()
    dressed = judge_answers(["Anchor: Like a desk.", "**Anchor:** like a *desk*"])
    assert [one.copied for one in dressed] == [("anchor",)] * 2


@pytest.mark.parametrize(
    ("text", "has"),
    [
        ("It is like a river.", True), ("Imagine a river.", True), ("Think of a queue.", True),
        ("as if it were water", True), ("similar to a lock", True), ("Представьте реку", True),
        ("Picture a lock.", True), ("I would like to explain.", False), ("If you like tea", False),
        ("It is likely.", False), ("I'd like tea", False), ("A river flows.", False),
        ("Ask a lender (like a bank).", False),
    ],
)  # fmt: skip
def test_analogy_words(text, has):
    assert judge(text).analogy is has


@pytest.mark.parametrize(
    ("text", "has"),
    [
        ("A common mistake is to wait.", True), ("That is wrong.", True), ("a misconception", True),
        ("It is not heat but motion.", True), ("Many people think it is heat.", True),
        ("Многие думают, что это тепло.", True), ("Это не тепло, а движение.", True),
        ("not only heat, but also light", False),
        ("It is not heat. But it moves.", False), ("It moves.", False), ("mistaking", False),
    ],
)  # fmt: skip
def test_contrast_with_a_mistake(text, has):
    assert judge(text).contrast is has


@pytest.mark.parametrize(
    ("text", "has"),
    [
        ("As everyone knows, it rains.", True), ("Obviously it rains.", True), ("Как известно", True),
        ("It simply rains.", True), ("Это просто дождь.", True), ("A simple rain.", False),
        ("Everyone knows rain.", False), ("Это непросто.", False),
    ],
)  # fmt: skip
def test_banned_phrases(text, has):
    assert judge(text).banned is has


def test_figures_of_a_comparison():
    good, bad = Verdict(tuple(PARTS), (), True, True, False), Verdict((), (), False, False, True)
    compared = compare_answers([bad] * 9 + [good], [good] * 9 + [bad])
    assert tuple(compared) == MEASURES
    four = compared["all_four"].to_json()
    assert (four["without"]["hits"], four["with"]["hits"]) == (1, 9)
    assert (four["only_without"], four["only_with"]) == (1, 9)
    # Ten coins, one or fewer (or nine or more) heads: 2 (1 + 10) / 1024.
    assert four["mcnemar_p"] == pytest.approx(22 / 1024, abs=1e-6)
    assert four["with"]["interval_95"] == pytest.approx([0.595850, 0.982124], abs=1e-5)
    assert compared["banned"].to_json()["only_without"] == 9
    # Its twin: with nothing changed there is nothing to see.
    assert compare_answers([bad], [bad])["all_four"].p == 1
    with pytest.raises(ValueError, match="zip"):
        compare_answers([bad], [])


def test_shipped_questions_are_24_of_their_own():
    rows = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 24
    assert all(set(row) == {"prompt"} for row in rows)
    prompts = [row["prompt"].casefold() for row in rows]
    assert len(set(prompts)) == 24
    assert not any(word in prompt for prompt in prompts for word in [*LABELS, "vaccine"])
