"""What each weight of the merged model is made of, and its values, a few rows at a time.

In: a base, one or more adapters with weights. Out: a `MergedModel`: the plan of every weight, read
and computed only when rows are asked for, in float32 and never rounded here.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from export._cli import MODEL, CommandError
from export.adapter_files import Adapter, LoraModule, TokenRows
from export.base_model import BaseModel
from export.lora_math import ROW_BLOCK, merge_embedding_rows, merge_rows
from export.safetensors_file import FLOAT_BYTES, TensorInfo, read_rows

if TYPE_CHECKING:
    import numpy as np

HEAD = "lm_head.weight"
_EMBEDDING = "embed_tokens.weight"
# Rescaling rows to the length they have is not exact in float32; so much is no training.
_DORA_NOISE = 1e-6
# The same product, computed transposed, differs in the last bit.
_TWIN_NOISE = 1e-6


@dataclass(frozen=True)
class MergedWeight:
    """One weight of the merged model.

    Attributes:
        source: The base's tensor, or the adapter's where it was trained in full.
        parts: What LoRA adds, and how much of it.
        tokens: Rows that training replaced.
    """

    name: str
    source: TensorInfo
    parts: tuple[tuple[LoraModule, float], ...] = ()
    tokens: tuple[TokenRows, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """As transformers has it, (out, in) for a matrix."""
        return self.source.shape

    def rows(self, first: int = 0, count: int | None = None) -> "tuple[np.ndarray, bool]":
        """Compute rows of the merged weight.

        Any multiple of `ROW_BLOCK` rows gives the bits that the whole matrix would have.

        Returns:
            float32, shape (count, *rest), and whether LoRA changed any value of it.
        """
        weight = read_rows(self.source, first, count)
        if not self.parts and not self.tokens:
            return weight, False
        count = len(weight)
        merged = weight
        for module, share in self.parts:
            merged = _add_part(merged, module, share, first, count)
        changed = _differ(merged, weight, any(module.magnitude for module, _ in self.parts))
        if self.tokens:
            merged = merged.copy() if merged is weight else merged
            for rows in self.tokens:
                _replace_rows(merged, rows, first)
        return merged, changed


def _add_part(
    weight: "np.ndarray", module: LoraModule, share: float, first: int, count: int
) -> "np.ndarray":
    import numpy as np

    scale = module.scale * share
    a = read_rows(module.a)
    if module.is_embedding:
        a = np.ascontiguousarray(a[:, first : first + count])
        return merge_embedding_rows(weight, a, read_rows(module.b), scale)
    magnitude = read_rows(module.magnitude, first, count) if module.magnitude else None
    return merge_rows(weight, a, read_rows(module.b, first, count), scale, magnitude)


def _differ(merged: "np.ndarray", weight: "np.ndarray", is_dora: bool) -> bool:
    import numpy as np

    if is_dora:
        return not np.allclose(merged, weight, rtol=_DORA_NOISE, atol=0.0)
    return not np.array_equal(merged, weight)


def _replace_rows(merged: "np.ndarray", rows: TokenRows, first: int) -> None:
    for at, index in enumerate(rows.indices):
        if first <= index < first + len(merged):
            merged[index - first] = read_rows(rows.values, at, 1)[0]


def row_blocks(num_rows: int, per_block: int) -> Iterable[tuple[int, int]]:
    """Cut rows into portions (first, count) whose products have the whole matrix's bits.

    Every portion is a multiple of `ROW_BLOCK`, but the last, which takes the rest and is never
    shorter than that unless the matrix is.
    """
    per_block = max(ROW_BLOCK, per_block // ROW_BLOCK * ROW_BLOCK)
    first = 0
    while num_rows - first >= per_block + ROW_BLOCK:
        yield first, per_block
        first += per_block
    yield first, num_rows - first


@dataclass(frozen=True)
class MergedModel:
    """Every weight of the merged model by name, and the config.json that fits them."""

    weights: Mapping[str, MergedWeight]
    config: Mapping[str, Any]
    adapted: frozenset[str] = field(default_factory=frozenset)

    @property
    def num_embeddings(self) -> int | None:
        """Rows of the input embedding, None if the model has none of the usual name."""
        name = _embedding_name(self.weights)
        return self.weights[name].shape[0] if name else None


def plan_weights(base: BaseModel, adapters: Sequence[tuple[Adapter, float]]) -> MergedModel:
    """Decide what each weight of the merged model is made of.

    Args:
        base: The 16-bit base.
        adapters: Each with its weight, 1.0 for as trained.

    Raises:
        CommandError: Exit 3: a module of an adapter has no place in the base, or adapters
            exclude each other.
    """
    _check_combination(base, adapters)
    weights = {name: MergedWeight(name, info) for name, info in base.tensors.items()}
    tied = bool(base.config.get("tie_word_embeddings", HEAD not in weights))
    embedding = _embedding_name(weights)
    if tied and embedding:
        # A checkpoint may store the twin as well; it is not read when the model is loaded.
        weights[HEAD] = replace(weights[embedding], name=HEAD)
    adapted: set[str] = set()
    for adapter, share in adapters:
        for name in sorted(adapter.weight_names):
            weights[name] = _change(base, weights.get(name), name, adapter, share)
        if tied and embedding:
            _share(weights, adapter, embedding)
        adapted |= adapter.weight_names
    config = dict(base.config)
    if tied and embedding:
        ties = all(adapter.config.ties_weights for adapter, _ in adapters)
        if _stay_twins(weights[embedding], weights[HEAD], ties and HEAD not in adapted):
            del weights[HEAD]
        else:
            config["tie_word_embeddings"] = False
    _fit_vocabulary(base, weights, config, embedding)
    return MergedModel(weights, config, frozenset(adapted & weights.keys()))


def _embedding_name(names: Iterable[str]) -> str | None:
    return next((name for name in names if name.endswith(_EMBEDDING)), None)


def _share(weights: dict[str, MergedWeight], adapter: Adapter, embedding: str) -> None:
    """Give both ends of a tied model what PEFT changes in both, whatever the configuration says.

    That is the weight beneath LoRA, new where the vocabulary grew, and rows of the embedding.
    """
    for name, twin in ((embedding, HEAD), (HEAD, embedding)):
        if name in adapter.beneath and twin not in adapter.saved:
            weights[twin] = replace(weights[twin], source=adapter.saved[name])
    if embedding in adapter.tokens and HEAD not in adapter.tokens:
        tokens = (*weights[HEAD].tokens, adapter.tokens[embedding])
        weights[HEAD] = replace(weights[HEAD], tokens=tokens)


def _check_combination(base: BaseModel, adapters: Sequence[tuple[Adapter, float]]) -> None:
    """Refuse sums that have no meaning: magnitudes and replaced weights do not add up."""
    if len(adapters) == 1 and adapters[0][1] == 1.0:
        return
    for adapter, _ in adapters:
        # Beneath LoRA lies the base's own weight, unless the vocabulary grew.
        copies = {
            name
            for name in adapter.beneath & base.tensors.keys()
            if adapter.saved[name].shape == base.tensors[name].shape
        }
        full = sorted({*adapter.saved, *adapter.tokens} - copies)
        kind = (
            "a DoRA"
            if adapter.config.use_dora
            else "trained in full: " + ", ".join(full[:2])
            if full
            else None
        )
        if kind:
            raise CommandError(
                f"adapter '{adapter.path}' is {kind}; only LoRA matrices can be weighted or "
                "added up. Export it alone, with weight 1",
                MODEL,
            )


def _change(
    base: BaseModel, weight: MergedWeight | None, name: str, adapter: Adapter, share: float
) -> MergedWeight:
    saved, module = adapter.saved.get(name), adapter.modules.get(name)
    tokens = adapter.tokens.get(name)
    if weight is None:
        raise CommandError(
            f"adapter for another base: '{base.path}' has no tensor '{name}'; name the one it was "
            "trained on: --base DIR",
            MODEL,
        )
    if saved is not None:
        _check_shape(base, weight, saved.shape, may_grow=name.endswith((_EMBEDDING, HEAD)))
        weight = replace(weight, source=saved)
    if module is not None:
        _check_shape(base, weight, module.shape)
        weight = replace(weight, parts=(*weight.parts, (module, share)))
    if tokens is not None:
        _check_shape(base, weight, (weight.shape[0], tokens.values.shape[1]))
        if not all(0 <= index < weight.shape[0] for index in tokens.indices):
            raise CommandError(
                f"adapter for another base: it trained token {max(tokens.indices)}, '{name}' has "
                f"{weight.shape[0]} rows; name the one it was trained on: --base DIR",
                MODEL,
            )
        weight = replace(weight, tokens=(*weight.tokens, tokens))
    return weight


def _check_shape(
    base: BaseModel, weight: MergedWeight, shape: tuple[int, ...], may_grow: bool = False
) -> None:
    got = weight.shape
    fits = got == shape or (may_grow and got[1:] == shape[1:])
    if not fits or weight.source.dtype not in FLOAT_BYTES:
        raise CommandError(
            f"adapter for another base: '{weight.name}' is {weight.source.dtype} {got} in "
            f"'{base.path}', expected {shape}; name the one it was trained on: --base DIR",
            MODEL,
        )


def _stay_twins(embedding: MergedWeight, head: MergedWeight, ties: bool) -> bool:
    """Tell whether input embedding and head may go on sharing one tensor.

    PEFT trains a copy of one of them without the other, unless it is told to tie them.

    Args:
        embedding: The merged embedding.
        head: The merged head.
        ties: PEFT was told so, and saved no head.
    """
    import numpy as np

    if ties or replace(head, name=embedding.name) == embedding:
        return True
    if head.shape != embedding.shape:
        return False
    for first, count in row_blocks(embedding.shape[0], (1 << 22) // max(1, embedding.shape[-1])):
        ours, theirs = (weight.rows(first, count)[0] for weight in (embedding, head))
        if not np.allclose(ours, theirs, rtol=_TWIN_NOISE, atol=_TWIN_NOISE * np.abs(ours).max()):
            return False
    return True


def _fit_vocabulary(
    base: BaseModel,
    weights: Mapping[str, MergedWeight],
    config: dict[str, Any],
    embedding: str | None,
) -> None:
    """Make config.json's vocabulary what the embedding has, if training added tokens."""
    if embedding is None:
        return
    rows = weights[embedding].shape[0]
    head = weights.get(HEAD)
    if head is not None and head.shape[0] != rows:
        raise CommandError(
            f"the adapter's embedding has {rows} tokens, its {HEAD} {head.shape[0]}; train again "
            "with both in modules_to_save",
            MODEL,
        )
    if rows == base.tensors[embedding].shape[0]:
        return
    for part in ("text_config", None):
        holder = config.get(part) if part else config
        if isinstance(holder, dict) and "vocab_size" in holder:
            changed = {**holder, "vocab_size": rows}
            config.update({part: changed} if part else changed)
