"""The checks of a certificate: each compares the GGUF's answer with the reference's.

Every function gives findings; which exit code follows is decided in export.verify_gguf.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from export.gguf_header import GgufHeader

if TYPE_CHECKING:
    import numpy as np

# Mean KL divergence (nats per token) that a type may cost: where rows are multiples of 256, and
# where they are not; those are small models, which rounding hurts more. Measured with these prompts
# on SmolLM2-135M (rows of 576): F16 7e-6, Q8_0 0.008, Q6_K 0.024, Q4_K_M 0.09, Q4_0 0.55.
KL_LIMITS = {
    "F32": (1e-3, 1e-3),
    "F16": (1e-3, 1e-3),
    "BF16": (5e-3, 5e-3),
    "Q8_0": (5e-3, 0.02),
    "Q6_K": (0.01, 0.05),
    "Q5_K_M": (0.02, 0.1),
    "Q5_K_S": (0.03, 0.12),
    "Q4_K_M": (0.05, 0.15),
    "Q4_K_S": (0.08, 0.2),
    "Q4_0": (0.15, 0.25),
}
_OTHER_LIMITS = (0.5, 0.5)
# Two tokens this close (in nats) in the reference are a tie: rounding may choose either.
TIE = 0.02
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
    expected = config.get("vocab_size")
    return Check("vocabulary", n_vocab == expected, n_vocab, expected)


def check_eos(probe: Mapping[str, Any], eos_id: int | None) -> Check:
    """Check that the reference's end token is the file's, and that llama.cpp stops at it."""
    value = {"id": probe["eos_id"], "stops": probe["eos_stops"]}
    return Check(
        "eos_token", probe["eos_id"] == eos_id and probe["eos_stops"], value, {"id": eos_id}
    )


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


def check_logits(
    header: GgufHeader, ours: "Sequence[np.ndarray]", theirs: "Sequence[np.ndarray]"
) -> list[Check]:
    """Compare next-token distributions over all positions of the prompts.

    Args:
        header: Its type decides the limits.
        ours: The file's logits, one array (T, V) per prompt.
        theirs: The reference's, of the same shapes.
    """
    import numpy as np

    kl: list[float] = []
    same: list[bool] = []
    gaps: list[float] = []
    for got, expected in zip(ours, theirs, strict=True):
        width = min(got.shape[1], expected.shape[1])
        q, p = _log_softmax(got[:, :width]), _log_softmax(expected[:, :width])
        kl.extend((np.exp(p) * (p - q)).sum(axis=1).tolist())
        best = q.argmax(axis=1)
        same.extend((best == p.argmax(axis=1)).tolist())
        gaps.append(float(p[-1].max() - p[-1, best[-1]]))
    limit = KL_LIMITS.get(header.type_name, _OTHER_LIMITS)[0 if header.has_full_blocks else 1]
    exact = header.type_name in ("F16", "F32", "BF16")
    mean = float(np.mean(kl))
    equal = sum(gap <= TIE for gap in gaps)
    share = round(sum(same) / len(same), 4)
    # NaN compares false, so a broken file cannot pass.
    return [
        Check("mean_kl", mean <= limit, _round(mean), limit),
        Check("max_kl", bool(np.isfinite(kl).all()), _round(max(kl)), "finite"),
        Check("same_top_token", True, {"share": share, "positions": len(same)}),
        Check(
            "next_token",
            equal == len(gaps) or not exact,
            {"equal": equal, "prompts": len(gaps)},
            len(gaps) if exact else None,
        ),
    ]


def _round(value: float) -> float | None:
    import math

    return float(f"{value:.4g}") if math.isfinite(value) else None


def _log_softmax(logits: "np.ndarray") -> "np.ndarray":
    import numpy as np

    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
