"""Batches without padding: rows are laid end to end, and each attends to itself only.

Unsloth packs on a GPU with FlashAttention and switches packing off on a CPU. There, and with the
`peft` back end, the attention registered here runs every row by itself: no padding is computed, and
no block mask over the whole batch either. What rows of a batch have in common at their start, such
as the list of tools, is computed once for all of them; the gradient is the same.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from scripts.render import IGNORED, EncodedConversation

ATTENTION = "tomeforge_rows"
# Up to here plain matrix products beat PyTorch's CPU flash kernel in bf16, whose backward pass is slow:
# 2.4 ms against 5.1 ms at 190 tokens, 18 against 17 at 512 (SmolLM2's heads, two cores).
_SHORT_ROW = 320
_CHECK_TOKENS = 48
# A shorter common start is not worth a part of its own.
_MIN_SHARED = 32
_NONE = -1
Batch = dict[str, torch.Tensor]
Row = dict[str, Any]


def _common_start(ids: Sequence[Sequence[int]]) -> int:
    differing = (at for at, tokens in enumerate(zip(*ids, strict=False)) if len(set(tokens)) > 1)
    return next(differing, min(map(len, ids)))


def _same_start(rows: Sequence[Row]) -> Iterator[tuple[int, list[Row]]]:
    """Group rows that begin alike; give how many tokens they share, and the rows.

    Nothing trained is shared, nor the token before it: each row has to learn its own.
    """
    groups: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row["input_ids"][:_MIN_SHARED]), []).append(row)
    for group in groups.values():
        shared = _common_start([row["input_ids"] for row in group])
        for row in group:
            labels = row["labels"]
            trained = next((at for at, label in enumerate(labels) if label != IGNORED), len(labels))
            shared = min(shared, trained - 1, len(labels) - 1)
        yield (shared if len(group) > 1 and shared >= _MIN_SHARED else 0), group


def lay_end_to_end(rows: Sequence[Row]) -> Batch:
    """Make one row of tokens out of several; a start that rows have in common stands there once.

    Args:
        rows: Each with ``input_ids`` and ``labels`` of its own length.

    Returns:
        ``input_ids``, ``labels`` and ``position_ids`` of shape (1, T), positions starting anew with
        each row; ``cu_seq_lens_q`` of shape (parts + 1,): where each part starts, and the end; and
        ``starts_with`` of shape (parts,): the part that a row's own tokens continue, or -1.
        A part's first label is -100: what comes before it is not its own.
    """
    parts: list[tuple[Row, int, int]] = []  # a row, and its tokens from and to
    starts_with = []
    for shared, group in _same_start(rows):
        start = _NONE
        if shared:
            start = len(parts)
            parts.append((group[0], 0, shared))
            starts_with.append(_NONE)
        parts += [(row, shared, len(row["input_ids"])) for row in group]
        starts_with += [start] * len(group)
    ids = [token for row, start, end in parts for token in row["input_ids"][start:end]]
    labels = [
        label for row, start, end in parts for label in (IGNORED, *row["labels"][start + 1 : end])
    ]
    lengths = [end - start for _, start, end in parts]
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.cat([torch.arange(start, end) for _, start, end in parts])[None],
        "cu_seq_lens_q": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        "starts_with": torch.tensor(starts_with),
    }


def _own_parts(batch: Batch) -> list[tuple[slice, slice]]:
    """Give each row of a batch laid end to end: the tokens it starts with, and its own."""
    bounds = batch["cu_seq_lens_q"].tolist()
    parts = [slice(start, end) for start, end in itertools.pairwise(bounds)]
    starts_with = _starts_with(batch.get("starts_with"), len(parts))
    shared = set(starts_with)
    return [
        (slice(0) if start == _NONE else parts[start], part)
        for at, (start, part) in enumerate(zip(starts_with, parts, strict=True))
        if at not in shared
    ]


def _starts_with(given: torch.Tensor | None, num_parts: int) -> list[int]:
    """Read which part each one continues; a batch that others laid end to end shares nothing."""
    return [_NONE] * num_parts if given is None else given.tolist()


def _take_apart(batch: Batch) -> list[Row]:
    """Give the rows that were laid end to end."""
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    return [
        {"input_ids": ids[start] + ids[own], "labels": labels[start] + labels[own]}
        for start, own in _own_parts(batch)
    ]


def pad_right(rows: Sequence[dict[str, Any]], pad_id: int) -> Batch:
    """Pad rows to the longest; padding is masked by position, never by its token id."""
    longest = max(len(row["input_ids"]) for row in rows)
    shape = (len(rows), longest)
    batch = {
        "input_ids": torch.full(shape, pad_id),
        "labels": torch.full(shape, IGNORED),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
    }
    for at, row in enumerate(rows):
        length = len(row["input_ids"])
        batch["input_ids"][at, :length] = torch.tensor(row["input_ids"])
        batch["labels"][at, :length] = torch.tensor(row["labels"])
        batch["attention_mask"][at, :length] = 1
    return batch


def split_batch(batch: Batch, pieces: int) -> list[Batch]:
    """Cut a micro-batch into at most ``pieces`` of whole rows, for less memory at a time."""
    if pieces == 1:
        return [batch]
    if "cu_seq_lens_q" not in batch:
        chunks = {name: value.chunk(pieces) for name, value in batch.items()}
        parts = len(chunks["input_ids"])
        return [{name: value[at] for name, value in chunks.items()} for at in range(parts)]
    rows = _take_apart(batch)
    pieces = min(pieces, len(rows))
    cuts = [round(at * len(rows) / pieces) for at in range(pieces + 1)]
    device = batch["input_ids"].device
    return [
        {name: value.to(device) for name, value in lay_end_to_end(rows[first:last]).items()}
        for first, last in itertools.pairwise(cuts)
    ]


def num_rows(batch: Batch) -> int:
    """Give the rows of a micro-batch, padded or laid end to end."""
    return len(_own_parts(batch)) if "cu_seq_lens_q" in batch else len(batch["input_ids"])


def num_tokens(batch: Batch) -> int:
    """Give the real tokens of a micro-batch's rows; a shared start counts for each of them."""
    if "cu_seq_lens_q" in batch:
        return sum(part.stop - (part.start or 0) for row in _own_parts(batch) for part in row)
    mask = batch.get("attention_mask")  # packed rows have none
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


def token_shares(real: float, computed: float) -> dict[str, float]:
    """Give what part of the computed tokens is padding, and what part of the real ones was shared."""
    return {
        "padding": round(max(0.0, 1 - real / max(1, computed)), 4),
        "shared": round(max(0.0, 1 - computed / max(1, real)), 4),
    }


@functools.lru_cache(maxsize=64)
def _causal_mask(length: int, before: int, heads: int, dtype: torch.dtype) -> torch.Tensor:
    """Mask of shape (1, heads * length, before + length), repeated for each query head."""
    mask = torch.full((length, before + length), float("-inf"), dtype=dtype)
    return mask.triu(before + 1).repeat(heads, 1)[None]


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, dropout: float
) -> torch.Tensor:
    """Causal attention of one row, or of the last T of its S tokens.

    Query has shape (1, H, T, D), key and value (1, G, S, D).
    """
    _, num_heads, length, width = query.shape
    groups, before = key.shape[1], key.shape[2] - length
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.device.type != "cpu" or not half or before + length > _SHORT_ROW or dropout:
        mask = causal_lower_right(length, before + length) if before else None
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale,
            dropout_p=dropout, enable_gqa=True,
        )  # fmt: skip
    heads = num_heads // groups
    mask = _causal_mask(length, before, heads, query.dtype)
    scores = torch.baddbmm(
        mask, query.reshape(groups, heads * length, width), key[0].transpose(1, 2), alpha=scale
    )
    return torch.bmm(scores.softmax(-1), value[0]).view(1, num_heads, length, width)


def rows_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    starts_with: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each row of a batch that was laid end to end; SDPA for every other batch.

    The signature is that of ``transformers.AttentionInterface``. Query has shape (1, H, T, D), the
    result (1, T, H, D).
    """
    if cu_seq_lens_q is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    cuts = cu_seq_lens_q.diff().tolist()
    queries, keys, values = (whole.split(cuts, dim=2) for whole in (query, key, value))
    parts = []
    for at, start in enumerate(_starts_with(starts_with, len(cuts))):
        own_keys, own_values = keys[at], values[at]
        if start != _NONE:
            own_keys = torch.cat((keys[start], own_keys), dim=2)
            own_values = torch.cat((values[start], own_values), dim=2)
        parts.append(_attend(queries[at], own_keys, own_values, scale, dropout))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _mask_of_padding(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
    """Build SDPA's mask for padded batches only; rows end to end need none, causal ones neither."""
    if attention_mask is None:
        return None
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


def _loss(model: Any, *rows: Row) -> float:
    """Measure the loss of rows laid end to end, in the order given."""
    batch = {name: value.to(model.device) for name, value in lay_end_to_end(rows).items()}
    return float(model(**batch, use_cache=False).loss)


def _rows_stay_apart(model: Any, some: list[int], other: list[int]) -> bool:
    """Whether rows have the losses they have alone: after another row, and after a shared start."""
    row = {"input_ids": some, "labels": some}
    beside = [
        _loss(model, {"input_ids": ids, "labels": [IGNORED] * len(ids)}, row)
        for ids in (other, other[::-1])
    ]
    # As often as it takes to have enough to share; the tails differ and have one length.
    start = (some + other) * _MIN_SHARED
    start = start[: max(_MIN_SHARED, len(some) + len(other))]
    tails = [
        {"input_ids": start + tail, "labels": [IGNORED] * (len(start) + 1) + tail[1:]}
        for tail in (some, some[::-1])
    ]
    sharing, apart = _loss(model, *tails), sum(_loss(model, tail) for tail in tails) / 2
    return (
        abs(beside[0] - beside[1]) <= 1e-3
        and abs(beside[0] - _loss(model, row)) <= 2e-2
        and abs(sharing - apart) <= 2e-2
    )


def enable_padding_free(
    model: Any, rows: Sequence[EncodedConversation], max_length: int
) -> str | None:
    """Switch a model to rows laid end to end, if it provably keeps them apart.

    The proof is run on the model itself: a row's loss must be that of the row alone, whatever row
    stands in front of it, and whether or not its start is shared.

    Args:
        model: The loaded model, on the device it trains on.
        rows: Training rows; two of them are measured.
        max_length: Longest row.

    Returns:
        None when the model is switched, else why it was left with padded batches.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    window = getattr(model.config, "sliding_window", None)
    if window and getattr(model.config, "use_sliding_window", True) and max_length > window:
        return f"rows of {max_length} tokens are longer than the sliding window of {window}"
    AttentionInterface.register(ATTENTION, rows_attention)
    AttentionMaskInterface.register(ATTENTION, _mask_of_padding)
    former = model.config._attn_implementation
    was_training = model.training
    try:
        model.set_attn_implementation(ATTENTION)
        # Everything counts in the check: the first tokens of a row need not be trained ones.
        some, other = (row.input_ids[:_CHECK_TOKENS] for row in (rows[0], rows[-1]))
        model.eval()
        with torch.no_grad():
            apart = _rows_stay_apart(model, some, other)
        reason = None if apart else "its attention lets one row see another"
    except (ValueError, TypeError, RuntimeError) as error:
        reason = f"it does not take another attention ({type(error).__name__})"
    model.train(was_training)
    if reason:
        model.set_attn_implementation(former)
    return reason
