"""Statistics of a certificate, against numbers by hand; rows, and how they are cut."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export._cli import USAGE, CommandError
from export.gguf_header import MEANT_TYPES, GgufHeader, GgufTensor
from export.plain_tokens import PlainTokenizer
from export.verify_checks import check_divergence
from export.verify_divergence import KlSummary, Positions, summarize
from export.verify_limits import KL_LIMITS, kl_limit
from export.verify_rows import (
    Row,
    answer_end,
    find_rows,
    make_rows,
    read_conversations,
    source_name,
)

TYPES = {
    *("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_0", "Q5_1"),
    *("Q4_K_M", "Q4_K_S", "Q4_0", "Q4_1", "IQ4_XS", "IQ4_NL"),
    *("Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS"),
    *("Q2_K", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"),
}
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }} {{ m.content }}<e>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)


def header_of(kind: int, width: int = 256) -> GgufHeader:
    tensor = GgufTensor("blk.0.ffn_up.weight", (width, 4), "Q8_0", width * 4, width * 4)
    return GgufHeader(Path("x.gguf"), 1, {"general.file_type": kind}, (tensor,))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)


def compare(row: Row, reference: np.ndarray, logits: np.ndarray) -> Positions:
    found = Positions.empty()
    found.add(
        row, 0, reference, logits.astype(np.float32), min(reference.shape[1], logits.shape[1])
    )
    return found


def by_name(header: GgufHeader, summary: KlSummary) -> dict[str, Any]:
    return {check.name: check for check in check_divergence(header, summary)}


def test_divergence_against_numbers_by_hand() -> None:
    # p = (3/4, 1/4), q = (1/2, 1/2): KL = 3/4 ln(3/2) + 1/4 ln(1/2) = 0.1308...
    p, q = np.log([[0.75, 0.25]] * 2).astype(np.float32), np.log([[0.5, 0.5]] * 2) + 7
    found = compare(Row([0, 1], [(1, 2)], [0]), p, q)
    assert found.kl == pytest.approx([0.130812] * 2, abs=1e-5)
    # What follows the first token is token 1; nothing follows the second.
    assert found.nll_reference[0] == pytest.approx(math.log(4))
    assert found.nll_gguf[0] == pytest.approx(math.log(2))
    assert math.isnan(found.nll_reference[1])
    assert (found.answer, found.speaks) == ([True, False], [True, False])
    summary = summarize(found)
    assert summary.ratio != summary.ratio  # one token has no uncertainty
    checks = by_name(header_of(1), summary)
    assert checks["mean_kl"].value == pytest.approx(0.1308, abs=1e-4)
    assert not checks["mean_kl"].passed
    broken = by_name(header_of(1), summarize(compare(Row([0, 1], [], [0]), p, q * np.nan)))
    assert not any(broken[name].passed for name in ("mean_kl", "kl_quantiles", "perplexity_ratio"))
    assert broken["mean_kl"].value is None


def test_statistics_against_the_plain_formulas() -> None:
    generator = np.random.default_rng(0)
    length, vocabulary = 300, 40
    p = log_softmax(generator.normal(size=(length, vocabulary)) * 2)
    logits = p + generator.normal(size=p.shape) * 0.1 + 3
    q = log_softmax(logits)
    ids = generator.integers(0, vocabulary, length).tolist()
    summary = summarize(compare(Row(ids, [(50, 300)], []), p, logits))
    kl = (np.exp(p.astype(np.float64)) * (p - q)).sum(axis=1)
    assert summary.mean == pytest.approx(kl.mean(), rel=1e-4)
    assert summary.error == pytest.approx(kl.std(ddof=1) / math.sqrt(length), rel=1e-4)
    assert summary.p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-3)
    same = (p.argmax(axis=1) == q.argmax(axis=1)).mean()
    assert summary.same_top == pytest.approx(same)
    # The ratio's error is that of the mean of differences: pairs cancel what both find hard.
    at = np.arange(49, 299)
    ours, theirs = (-side[at, np.array(ids)[at + 1]].astype(np.float64) for side in (q, p))
    assert (summary.tokens, summary.over) == (250, "answers")
    assert summary.ratio == pytest.approx(math.exp((ours - theirs).mean()), rel=1e-5)
    paired = (ours - theirs).std() / math.sqrt(len(at) - 1)
    assert summary.ratio_error == pytest.approx(summary.ratio * paired, rel=1e-3)
    assert summary.ratio_error < 0.2 * ours.std() / math.sqrt(len(at))


def test_equal_distributions_have_no_divergence() -> None:
    generator = np.random.default_rng(1)
    logits = generator.normal(size=(8, 5000)) * 5
    summary = summarize(compare(Row(list(range(8)), [], [7]), log_softmax(logits), logits))
    assert abs(summary.mean) < 1e-6
    assert (summary.same_top, summary.speaks_equal, summary.over) == (1.0, 1, "all")


def test_missing_tokens_are_left_out_of_both_sides() -> None:
    p = np.log([[0.5, 0.25, 0.25]]).astype(np.float32)
    found = compare(Row([0], [], []), p, np.log([[2.0, 1.0]]))
    assert found.kl == pytest.approx([0.0], abs=1e-6)


def test_perplexity_fails_only_where_that_is_certain() -> None:
    good = KlSummary(9, *[1e-4] * 6, 1.0, 0.0, 1.0005, 1e-4, 9.0, 9.0, 300, "all", 1, 1)
    header = header_of(1)  # F16: 1.001
    for ratio, error, passes in [
        (1.0005, 1e-4, True),
        (1.01, 1e-3, False),
        (1.01, 0.01, True),
        (math.nan, math.nan, False),
    ]:
        check = by_name(header, replace(good, ratio=ratio, ratio_error=error))["perplexity_ratio"]
        assert (check.passed, check.threshold) == (passes, 1.001)
    assert not by_name(header, replace(good, speaks=2))["next_token"].passed
    assert by_name(header_of(7), replace(good, speaks=2))["next_token"].passed


def test_every_type_has_a_limit_and_a_mixture() -> None:
    from gguf.constants import LlamaFileType

    assert set(KL_LIMITS) == TYPES == set(MEANT_TYPES)
    # Fixed by contract.
    assert [KL_LIMITS[kind][0] for kind in ("F16", "Q8_0", "Q4_K_M")] == [1e-3, 5e-3, 0.05]
    assert all(first <= second for first, second in KL_LIMITS.values())
    header = header_of(LlamaFileType.MOSTLY_Q4_K_M)
    assert kl_limit(header) == 0.05
    assert kl_limit(header_of(LlamaFileType.MOSTLY_Q4_K_M, 576)) == 0.15
    # A Q8_0 matrix is none that Q4_K_M means.
    assert header.fallbacks == {"Q8_0": 1}
    assert header_of(LlamaFileType.MOSTLY_Q8_0).fallbacks == {}


@pytest.fixture
def plain() -> PlainTokenizer:
    """Each letter is a token; control tokens are 1 to 3."""
    control = {"<s>": 1, "<e>": 2, "<x>": 3}
    return PlainTokenizer(lambda text: [100 + ord(c) for c in text], control, TEMPLATE, "", "<e>")


def chat(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def test_answers_are_found_in_whole_conversations(plain: PlainTokenizer) -> None:
    (row,) = make_rows(plain, [chat("a", "bc", "d", "e")], 5000)
    spans = ["".join(chr(i - 100) for i in row.ids[a:b] if i > 100) for a, b in row.answers]
    assert spans == ["bc", "e"]
    assert [row.ids[end - 1] for _, end in row.answers] == [2, 2]
    assert row.speaks == [start - 1 for start, _ in row.answers]
    (asked,) = make_rows(plain, [chat("a", "bc", "d")], 5000)
    assert len(asked.answers) == 1
    assert asked.speaks[-1] == len(asked.ids) - 1
    assert answer_end(plain, {1, 2, 3}) == 2
    assert answer_end(plain, set()) is None


def test_rows_are_cut_and_counted(plain: PlainTokenizer) -> None:
    rows = make_rows(plain, [chat("x" * 700, "y"), chat("a", "b"), chat("c", "d")], 5000, 530)
    assert [len(row.ids) for row in rows] == [512, 18]
    assert rows[0].answers == []
    # A row with a token that has no embedding would end llama.cpp: it is left out.
    known = make_rows(plain, [chat("a", "\u0fff"), chat("c", "d")], 4000)
    assert len(known) == 1
    refusing = PlainTokenizer(lambda text: [ord(c) for c in text], {}, None, "", "")
    (text,) = make_rows(refusing, [chat("a", "b")], 5000)
    assert "".join(map(chr, text.ids)) == "a\n\nb"


def test_held_out_rows_of_the_run_are_taken(tmp_path: Path) -> None:
    adapter, gguf = tmp_path / "run/adapter", tmp_path / "run/gguf/m.gguf"
    for folder in (adapter, gguf.parent, tmp_path / "run/data"):
        folder.mkdir(parents=True)
    assert find_rows(adapter, gguf) is None
    assert source_name(None, adapter) == "fixed conversations"
    path = tmp_path / "run/data/eval.jsonl"
    path.write_text(json.dumps({"messages": chat("a", "b")}) + "\n\n", encoding="utf-8")
    assert find_rows(adapter) == path
    assert find_rows(tmp_path / "elsewhere/model", gguf) == path
    assert source_name(path, adapter) == "data/eval.jsonl"
    assert source_name(tmp_path / "run/other.jsonl", adapter) == "other.jsonl"
    assert source_name(tmp_path / "mine.jsonl", adapter) == "mine.jsonl"
    assert list(read_conversations(path)) == [chat("a", "b")]
    for line in ("[]", '{"messages": []}', '{"messages": [{"role": "user"}]}', "{"):
        path.write_text(line + "\n", encoding="utf-8")
        with pytest.raises(CommandError, match="line 1 is no conversation") as caught:
            list(read_conversations(path))
        assert caught.value.exit_code == USAGE
    with pytest.raises(CommandError, match="is no file"):
        list(read_conversations(tmp_path / "none.jsonl"))
