"""The checks of a certificate: each compares the GGUF's answer with the reference's.

Every function gives findings; which exit code follows is decided in export.verify_gguf.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from export.gguf_header import GgufHeader
from export.verify_divergence import KlSummary
from export.verify_limits import kl_limit

# What a certificate should tell a reader; see the GGUF standard (ggml/docs/gguf.md).
_RECOMMENDED = (
    "general.name",
    "general.size_label",
    "general.license",
    "general.base_model.0.name",
    "general.dataset.0.name",
    "general.file_type",
    "general.quantization_version",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.chat_template",
)
# Nothing runs without these.
_REQUIRED = ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.tokens")
_METADATA_OF_CONFIG = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}


@dataclass(frozen=True)
class Check:
    """One finding; a check without a threshold is reported, and passes."""

    name: str
    passed: bool
    value: Any
    threshold: Any = None

    def as_dict(self) -> dict[str, Any]:
        """Give the form of the certificate."""
        return {
            "name": self.name,
            "passed": self.passed,
            "value": self.value,
            "threshold": self.threshold,
        }


def check_architecture(header: GgufHeader, config: Mapping[str, Any]) -> Check:
    """Compare the model's shape and constants with config.json, where both name them."""
    architecture = header.metadata.get("general.architecture")
    rope = config.get("rope_parameters") or {}
    values = {"rope_theta": rope.get("rope_theta"), **config}
    differences = {}
    for key, config_key in _METADATA_OF_CONFIG.items():
        got, expected = header.metadata.get(f"{architecture}.{key}"), values.get(config_key)
        if got is None or not isinstance(expected, int | float):
            continue
        if abs(got - expected) > 1e-6 * abs(expected):
            differences[key] = {"got": got, "expected": expected}
    return Check("architecture", not differences, differences or architecture, "as config.json")


def check_vocabulary(n_vocab: int, config: Mapping[str, Any]) -> Check:
    """Compare the number of tokens with the rows of the embedding."""
    expected = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    return Check("vocabulary", n_vocab == expected, n_vocab, expected)


def check_eos(loaded: Mapping[str, Any], eos_id: int | None, end_ids: Collection[int]) -> Check:
    """Check that the reference's end token is the file's, and that llama.cpp stops at it."""
    stops = loaded["eos_id"] in end_ids
    value = {"id": loaded["eos_id"], "stops": stops}
    return Check("eos_token", loaded["eos_id"] == eos_id and stops, value, {"id": eos_id})


def check_chat_template(header: GgufHeader, template: Any) -> Check:
    """Check that the file carries the reference's chat template, letter for letter."""
    found = header.metadata.get("tokenizer.chat_template")
    if found is None or not template:
        value = "missing in the file" if found is None else "the reference has none"
    else:
        value = "equal" if found == template else "differs from the reference's"
    return Check("chat_template", value == "equal", value, "equal")


def check_token_ids(
    texts: Sequence[str], ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]
) -> Check:
    """Count the strings that the file tokenizes differently; the first one is shown."""
    wrong = [i for i in range(len(texts)) if list(ours[i]) != list(theirs[i])]
    value: dict[str, Any] = {"strings": len(texts), "differ": len(wrong)}
    if wrong:
        first = wrong[0]
        value["first"] = {"text": texts[first][:80], **_difference(ours[first], theirs[first])}
    return Check("token_ids", not wrong, value, {"differ": 0})


def check_chat_prompts(
    ours: Sequence[list[int] | str], theirs: Sequence[list[int] | str], bos_id: int | None
) -> list[Check]:
    """Compare the rendered and tokenized chats, and how many BOS tokens they begin with.

    A conversation that both sides refuse (no system role, say) counts as equal.
    """
    pairs = list(zip(ours, theirs, strict=True))
    refused = sum(isinstance(a, str) and isinstance(b, str) for a, b in pairs)
    wrong = [
        index
        for index, (a, b) in enumerate(pairs)
        if isinstance(a, str) != isinstance(b, str) or (not isinstance(a, str) and a != b)
    ]
    value: dict[str, Any] = {"chats": len(pairs), "differ": len(wrong), "refused_by_both": refused}
    if wrong:
        value["first"] = _difference(*pairs[wrong[0]])
    counts = [
        [_count_leading(ids, bos_id) for ids in pair] for pair in pairs if list in map(type, pair)
    ]
    got_bos, expected_bos = ([pair[side] for pair in counts] for side in (0, 1))
    usable = refused < len(pairs)
    return [
        Check("chat_prompts", not wrong and usable, value, {"differ": 0}),
        Check("bos_count", got_bos == expected_bos and usable, got_bos, expected_bos),
    ]


def _difference(got: Sequence[Any], expected: Sequence[Any]) -> dict[str, Any]:
    """Show two sequences from shortly before the place where they part."""
    at = 0
    while at < min(len(got), len(expected)) and got[at] == expected[at]:
        at += 1
    start = max(0, at - 3)
    return {"at": at, "got": got[start : at + 12], "expected": expected[start : at + 12]}


def _count_leading(ids: list[int] | str, token: int | None) -> int:
    count = 0
    if not isinstance(ids, str):
        while count < len(ids) and ids[count] == token:
            count += 1
    return count


def check_divergence(header: GgufHeader, summary: KlSummary) -> list[Check]:
    """Judge the distance from the reference; the file's type decides the limits."""
    limit = kl_limit(header)
    # NaN compares false, so a broken file cannot pass.
    quantiles = {
        "median": _round(summary.median),
        "p99": _round(summary.p99),
        "p999": _round(summary.p999),
        "max": _round(summary.max),
        "mean_error": _round(summary.error),
    }
    is_finite = all(map(math.isfinite, (summary.median, summary.p99, summary.p999, summary.max)))
    top = {
        "share": _round(summary.same_top),
        "error": _round(summary.same_top_error),
        "positions": summary.positions,
    }
    exact = header.type_name in ("F16", "F32", "BF16")
    equal = {"equal": summary.speaks_equal, "prompts": summary.speaks}
    return [
        Check("mean_kl", summary.mean <= limit, _round(summary.mean), limit),
        Check("kl_quantiles", is_finite, quantiles, "finite"),
        Check("same_top_token", True, top),
        _check_perplexity(summary, limit),
        Check(
            "next_token",
            summary.speaks_equal == summary.speaks or not exact,
            equal,
            summary.speaks if exact else None,
        ),
    ]


def _check_perplexity(summary: KlSummary, limit: float) -> Check:
    """Judge the ratio of perplexities.

    On text that the reference itself might have written, ln PPL(Q)/PPL(ref) is the mean KL
    divergence; so the ratio's limit is exp(KL limit): 1.001 for F16. Answers of a held-out row are
    other text, and few: a ratio fails only where it is above by more than twice its uncertainty.
    """
    most = math.exp(limit)
    value = {
        "ratio": _round(summary.ratio, 6),
        "error": _round(summary.ratio_error),
        "reference": _round(summary.perplexity_reference),
        "gguf": _round(summary.perplexity_gguf),
        "tokens": summary.tokens,
        "over": summary.over,
    }
    passed = summary.ratio - 2 * summary.ratio_error <= most
    return Check("perplexity_ratio", passed, value, _round(most))


def check_stops(
    answer: Mapping[str, Any],
    answer_end: int | None,
    end_ids: Collection[int],
    reference_end: int | None,
    max_new_tokens: int,
) -> Check:
    """Check that answers end.

    Two things make them endless: the token that the template writes behind an answer is none that
    llama.cpp stops at, or the model does not choose it. The first is seen from the vocabulary. For
    the second the file answers a short question greedily; if it does not end, the reference reads
    the same answer, in one pass (it need not generate). Where it would have ended it, the file is
    at fault; else the model is one that does not end by itself (barely trained, say), which is
    told and passes.

    Args:
        answer: `export.llama_probe.Probe.generate`.
        answer_end: The token that the template writes behind an answer, None if it writes none.
        end_ids: The tokens at which llama.cpp stops.
        reference_end: Where the reference would have ended the file's answer, None if nowhere.
        max_new_tokens: How long the answer could become.
    """
    is_end = None if answer_end is None else answer_end in end_ids
    value = {
        "stopped": answer["stopped"],
        "tokens": answer["tokens"],
        "end_token": answer_end,
        "is_end": is_end,
        "reference_stops_at": reference_end,
        "text": answer["text"],
    }
    passed = is_end is not False and (answer["stopped"] or reference_end is None)
    is_note = passed and not answer["stopped"]
    threshold = None if is_note else {"stopped": True, "tokens": max_new_tokens, "is_end": True}
    return Check("stops", passed, value, threshold)


def check_metadata(header: GgufHeader) -> Check:
    """List the keys that are missing; only a file that cannot work without one fails."""
    needed = [*_REQUIRED, f"{header.metadata.get('general.architecture')}.context_length"]
    absent = [key for key in needed if key not in header.metadata]
    missing = [key for key in _RECOMMENDED if key not in header.metadata]
    return Check("metadata", not absent, absent + missing, needed if absent else None)


def _round(value: float, digits: int = 4) -> float | None:
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
