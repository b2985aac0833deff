"""How big a model is, from its ``config.json`` alone: parameters, and those of an adapter.

Exact for Llama, Mistral, Qwen 2 and 3, and Gemma 1 and 2. Any other architecture gives None: no
number is better than a guess.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts._cli import MODEL, CommandError


@dataclass(frozen=True)
class _Family:
    """What a config does not say: it follows from the model type."""

    norms: int = 2  # of hidden width, in a layer
    qkv_bias: bool = False
    head_norms: bool = False  # of q and k
    tied: bool = False  # where the config is silent


_FAMILIES = {
    "llama": _Family(),
    "mistral": _Family(),
    "qwen2": _Family(qkv_bias=True),
    "qwen3": _Family(head_norms=True),
    "gemma": _Family(tied=True),
    "gemma2": _Family(norms=4, tied=True),
}


@dataclass(frozen=True)
class Parameters:
    """Counts: all, those of embedding and output matrix, and those of the layers' matrices."""

    total: int
    embedding: int
    linear: int


@dataclass(frozen=True)
class ModelShape:
    """Widths and counts of a decoder; ``other`` is what is neither matrix nor embedding."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    other: int = 0

    @property
    def q_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads together."""
        return self.kv_heads * self.head_dim

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of one layer's projections."""
        return {
            "q_proj": (self.hidden, self.q_width),
            "k_proj": (self.hidden, self.kv_width),
            "v_proj": (self.hidden, self.kv_width),
            "o_proj": (self.q_width, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def parameters(self) -> Parameters:
        """Count the parameters."""
        embedding = self.vocab * self.hidden * (1 if self.tied else 2)
        linear = self.layers * sum(rows * columns for rows, columns in self.matrices.values())
        return Parameters(embedding + linear + self.other, embedding, linear)

    def lora_parameters(self, r: int, target_modules: Sequence[str]) -> int:
        """Count an adapter's parameters: ``r`` times inputs plus outputs of every adapted matrix.

        Raises:
            CommandError: A module that such a model does not have.
        """
        whole = dict.fromkeys(("embed_tokens", "lm_head"), (self.vocab, self.hidden))
        unknown = [name for name in target_modules if name not in self.matrices | whole]
        if unknown:
            raise CommandError(
                f"lora_target_modules: got {', '.join(unknown)}, expected some of: "
                f"{', '.join(self.matrices | whole)}"
            )
        names = dict.fromkeys(target_modules)
        in_layers = sum(sum(self.matrices[name]) for name in names if name in self.matrices)
        return r * (self.layers * in_layers + sum(sum(whole[n]) for n in names if n in whole))


def read_model_shape(config: Mapping[str, Any]) -> ModelShape | None:
    """Read the content of a ``config.json``; None for an architecture that is not known exactly."""
    family = _FAMILIES.get(str(config.get("model_type")))
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    numbers = [config.get(key) for key in (*keys, "vocab_size")]
    if family is None or not all(isinstance(number, int) and number > 0 for number in numbers):
        return None
    hidden, layers, heads, intermediate, vocab = (int(number or 0) for number in numbers)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or hidden // heads)
    tied = config.get("tie_word_embeddings")
    q_width, kv_width = heads * head_dim, kv_heads * head_dim
    other = family.norms * hidden
    other += 2 * head_dim if family.head_norms else 0
    if config.get("attention_bias"):
        other += q_width + 2 * kv_width + hidden
    elif family.qkv_bias:
        other += q_width + 2 * kv_width
    other += 2 * intermediate + hidden if config.get("mlp_bias") else 0
    return ModelShape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=intermediate,
        vocab=vocab,
        tied=family.tied if tied is None else bool(tied),
        other=layers * other + hidden,  # and the norm after the last layer
    )


def load_model_shape(name: str, revision: str | None = None) -> ModelShape | None:
    """Read the shape of a local model folder, or of a hub name (which fetches its config only).

    Raises:
        CommandError: Exit 3: there is no config, or it cannot be had.
    """
    path = Path(name) / "config.json"
    if path.is_file():
        try:
            return read_model_shape(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, AttributeError) as error:
            raise CommandError(f"'{path}' is no JSON object: {error}", MODEL) from error
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, revision=revision or "main").to_dict()
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CommandError(
            f"model '{name}' (revision {revision or 'main'}) has no readable config: {reason}; "
            "check the name and the connection",
            MODEL,
        ) from error
    return read_model_shape(config)
