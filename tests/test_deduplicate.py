"""Copies: exact and near ones are found, distinct rows are not, in every process alike."""

import hashlib
import random
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.deduplicate import (
    NearDuplicateIndex,
    RowStore,
    StoredRow,
    content_key,
    estimate_overlap,
    make_signature,
    prompt_key,
    spoken_text,
    values_per_band,
)

ROOT = Path(__file__).parent.parent
WORDS = [f"word{number}" for number in range(5000)]


def text_of(seed: int, num_words: int = 100) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))


def with_changes(text: str, num_changes: int, seed: int = 0) -> str:
    words = text.split()
    for place in random.Random(seed).sample(range(len(words)), num_changes):
        words[place] = f"other{place}"
    return " ".join(words)


def overlap(first: str, second: str) -> float:
    """The exact Jaccard index of the word shingles."""
    sets = [
        set(zip(*(text.split()[i:] for i in range(3)), strict=False)) for text in (first, second)
    ]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def talk(question: str, answer: str, system: str = "") -> list[dict]:
    turns = [("system", system)] if system else []
    turns += [("user", question), ("assistant", answer)]
    return [{"role": role, "content": text} for role, text in turns]


def make_store(tmp_path: Path, rows: list[list[dict]], threshold: float = 0.85, **keep) -> tuple:
    folder = tmp_path / f"store{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    store = RowStore(folder, 1, threshold)
    for number, messages in enumerate(rows):
        store.add(StoredRow(f"row {number}", repr(messages).encode(), b"raw"), messages)
    left_out = list(store.keep_unique(**keep))
    return store, left_out


@pytest.mark.parametrize("changes", [0, 1, 2, 4, 10])
def test_signature_estimates_the_overlap(changes):
    first, second = text_of(1, 400), with_changes(text_of(1, 400), changes)
    estimate = estimate_overlap(make_signature(first), make_signature(second))
    # Six standard errors of 256 values at the worst place, 0.5.
    assert estimate == pytest.approx(overlap(first, second), abs=0.19)
    assert (estimate == 1) == (changes == 0)
    assert estimate_overlap(make_signature(first), make_signature(text_of(2))) < 0.1


def test_signatures_are_the_same_in_every_process():
    code = (
        "import hashlib; from scripts.deduplicate import make_signature\n"
        "print(hashlib.sha256(make_signature('one two three four five six seven eight')).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed},
        ).stdout.strip()
        for seed in ("1", "2")
    }
    mine = make_signature("one two three four five six seven eight")
    assert found == {hashlib.sha256(mine).hexdigest()}
    assert make_signature("one two three four five six seven nine") != mine


def test_short_texts_have_no_signature_and_scripts_without_spaces_do():
    assert make_signature("one two three four five six seven") is None
    assert make_signature("one two three four five six seven eight") is not None
    assert make_signature("今日はとても良い天気です") is not None


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99])
def test_bands_find_pairs_at_the_threshold(threshold):
    width = values_per_band(threshold)
    assert 1 - (1 - threshold**width) ** (128 // width) >= 0.99


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.85, 0.95])
def test_index_finds_near_texts_and_only_those(tmp_path, threshold):
    store, _ = make_store(tmp_path, [])
    index = NearDuplicateIndex(store.database, "x", threshold)
    texts = [text_of(seed, 300) for seed in range(50)]
    for number, text in enumerate(texts):
        index.add(number, make_signature(text))
    found = [index.find(make_signature(with_changes(text, 1))) for text in texts]
    assert found == list(range(50))
    # So many changes that the overlap is six standard errors below the threshold.
    error = (threshold * (1 - threshold) / 256) ** 0.5
    changes = next(
        count
        for count in range(1, 300)
        if max(overlap(text, with_changes(text, count)) for text in texts)
        < threshold - 6 * error - 0.02
    )
    far = [with_changes(text, changes) for text in texts]
    assert [index.find(make_signature(text)) for text in far] == [None] * 50


def test_threshold_one_never_finds(tmp_path):
    store, _ = make_store(tmp_path, [])
    index = NearDuplicateIndex(store.database, "x", 1.0)
    index.add(0, make_signature(text_of(1)))
    assert index.find(make_signature(text_of(1))) is None


def test_keys_ignore_white_space_and_prompt_key_case():
    assert content_key(talk("a  b", "c")) == content_key(talk("a\nb", "c"))
    assert content_key(talk("a b", "c")) != content_key(talk("a B", "c"))
    assert content_key(talk("a b", "c")) != content_key(talk("a", "b c"))
    assert content_key(talk("a", "b", "s")) != content_key(talk("a", "b"))
    assert prompt_key(talk("A b", "c"), 1) == prompt_key(talk("a  B", "d", "s"), 1)
    assert prompt_key(talk("a", "c"), 1) != prompt_key(talk("a", "c"), 2)


def test_shared_system_prompt_does_not_make_rows_near(tmp_path):
    system = text_of(9, 400)
    rows = [talk(f"Name {seed}", text_of(seed, 20), system) for seed in range(10)]
    assert overlap(system + " " + spoken_text(rows[0]), system + " " + spoken_text(rows[1])) > 0.85
    _, left_out = make_store(tmp_path, rows)
    assert left_out == []


def test_copies_are_left_out_with_the_place_of_the_row_that_stays(tmp_path):
    base = [talk(f"Question {seed}", text_of(seed)) for seed in range(5)]
    near = talk("Question 2", with_changes(text_of(2), 1))
    store, left_out = make_store(tmp_path, [*base, base[3], near])
    found = {item.reason: {item.row.where, item.copy_of} for item in left_out}
    assert found == {"exact duplicate": {"row 3", "row 5"}, "near duplicate": {"row 2", "row 6"}}
    assert left_out[0].row.raw == b"raw"
    assert store.count_kept() == 5
    _, left_out = make_store(tmp_path, [*base, base[3], near], threshold=1)
    assert [item.reason for item in left_out] == ["exact duplicate"]


def test_short_rows_are_only_compared_exactly(tmp_path):
    rows = [talk("Two plus two is", f"{number}.") for number in range(4)]
    _, left_out = make_store(tmp_path, [*rows, rows[0]])
    assert [item.reason for item in left_out] == ["exact duplicate"]


@pytest.mark.parametrize("seed", range(3))
def test_what_stays_does_not_depend_on_the_order(tmp_path, seed):
    """Chains of near copies: which of them stay depends on who comes first, so on the keys only."""
    rows = []
    for family in range(20):
        text = text_of(family, 200)
        for member in range(5):
            text = with_changes(text, 4, member)
            rows.append(talk(f"Family {family}", text))
    first, left_out = make_store(tmp_path, rows)
    assert {item.reason for item in left_out} == {"near duplicate"}
    assert 20 <= first.count_kept() < 100
    shuffled = random.Random(seed).sample(rows, len(rows))
    second, _ = make_store(tmp_path, shuffled)
    first.hold_out(10)
    second.hold_out(10)
    for held_out in (True, False):
        lines = [row.line for row in first.kept_rows(held_out)]
        assert lines == [row.line for row in second.kept_rows(held_out)]
        assert lines


def test_which_of_two_copies_stays_does_not_depend_on_the_order(tmp_path):
    """Copies may differ in what is no text, such as their source."""
    kept = set()
    for lines in ([b"a", b"b", b"c"], [b"c", b"b", b"a"], [b"b", b"a", b"c"]):
        folder = tmp_path / b"".join(lines).decode()
        folder.mkdir()
        store = RowStore(folder, 1, 0.85)
        for line in lines:
            store.add(StoredRow("x", line, b""), talk("Same", "text"))
        assert len(list(store.keep_unique())) == 2
        kept |= {row.line for row in store.kept_rows(held_out=False)}
    assert len(kept) == 1


def test_max_rows_counts_rows_that_survive(tmp_path):
    rows = [talk(f"Question {seed}", text_of(seed)) for seed in range(10)]
    store, left_out = make_store(tmp_path, [*rows, *rows], max_rows=6)
    assert store.count_kept() == 6
    assert (
        sorted(item.reason for item in left_out) == ["exact duplicate"] * 10 + ["over max_rows"] * 4
    )


def test_groups_that_ask_the_same_are_never_split(tmp_path):
    rows = [talk(f"Question {n // 3}", text_of(n)) for n in range(60)]
    store, _ = make_store(tmp_path, rows)
    held = store.hold_out(7)
    assert held == 9
    sides = [
        {row.line.split(b"'assistant'")[0] for row in store.kept_rows(side)}
        for side in (True, False)
    ]
    assert len(sides[0]) == 3
    assert len(sides[1]) == 17
    assert not sides[0] & sides[1]


def test_a_huge_group_stays_in_training(tmp_path):
    rows = [talk("Continue.", text_of(n)) for n in range(50)]
    rows += [talk(f"Question {n}", text_of(100 + n)) for n in range(10)]
    store, _ = make_store(tmp_path, rows)
    assert store.hold_out(5) == 5
    assert not any(b"Continue." in row.line for row in store.kept_rows(held_out=True))
    store, _ = make_store(tmp_path, rows[:50])
    assert store.hold_out(5) == 0
