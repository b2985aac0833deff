"""Batches without padding: rows are laid end to end, and each attends to itself only.

Unsloth packs on a GPU with FlashAttention and switches packing off on a CPU. There, and with the
`peft` back end, the attention registered here runs every row by itself: no padding is computed, and
no block mask over the whole batch either.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from scripts.render import IGNORED, EncodedConversation

ATTENTION = "tomeforge_rows"
# Up to here plain matrix products beat PyTorch's CPU flash kernel in bf16, whose backward pass is slow:
# 2.4 ms against 5.1 ms at 190 tokens, 18 against 17 at 512 (SmolLM2's heads, two cores).
_SHORT_ROW = 320
_CHECK_TOKENS = 48
Batch = dict[str, torch.Tensor]


def lay_end_to_end(rows: Sequence[dict[str, Any]]) -> Batch:
    """Make one row of tokens out of several.

    Args:
        rows: Each with ``input_ids`` and ``labels`` of its own length.

    Returns:
        ``input_ids``, ``labels`` and ``position_ids`` of shape (1, T), positions starting anew with
        each row, and ``cu_seq_lens_q`` of shape (rows + 1,): where each row starts, and the end.
        A row's first label is -100, because nothing of its own comes before it.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    ids = [token for row in rows for token in row["input_ids"]]
    labels = [label for row in rows for label in (IGNORED, *row["labels"][1:])]
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
    }


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
    bounds = batch["cu_seq_lens_q"].tolist()
    num_rows = len(bounds) - 1
    pieces = min(pieces, num_rows)
    cuts = [round(at * num_rows / pieces) for at in range(pieces + 1)]
    parts_of = []
    for first, last in itertools.pairwise(cuts):
        start, end = bounds[first], bounds[last]
        part = {name: batch[name][:, start:end] for name in ("input_ids", "labels", "position_ids")}
        part["cu_seq_lens_q"] = batch["cu_seq_lens_q"][first : last + 1] - start
        parts_of.append(part)
    return parts_of


def num_rows(batch: Batch) -> int:
    """Give the rows of a micro-batch, padded or laid end to end."""
    starts = batch.get("cu_seq_lens_q")
    return len(batch["input_ids"]) if starts is None else len(starts) - 1


def num_tokens(batch: Batch) -> int:
    """Give the real tokens of a micro-batch."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


@functools.lru_cache(maxsize=64)
def _causal_mask(length: int, heads: int, dtype: torch.dtype) -> torch.Tensor:
    """Mask of shape (1, heads * length, length), repeated for the query heads of one key head."""
    mask = torch.full((length, length), float("-inf"), dtype=dtype).triu(1)
    return mask.repeat(heads, 1)[None]


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, dropout: float
) -> torch.Tensor:
    """Causal attention of one row; query (1, H, T, D), key and value (1, G, T, D)."""
    _, num_heads, length, width = query.shape
    groups = key.shape[1]
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.device.type != "cpu" or not half or length > _SHORT_ROW or dropout:
        return functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, dropout_p=dropout, enable_gqa=True
        )
    heads = num_heads // groups
    mask = _causal_mask(length, heads, query.dtype)
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
    bounds = cu_seq_lens_q.tolist()
    parts = [
        _attend(
            query[:, :, start:end], key[:, :, start:end], value[:, :, start:end], scale, dropout
        )
        for start, end in itertools.pairwise(bounds)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _mask_of_padding(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
    """Build SDPA's mask for padded batches only; rows end to end need none, causal ones neither."""
    if attention_mask is None:
        return None
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


def _loss_beside(model: Any, before: dict[str, Any] | None, row: dict[str, Any]) -> float:
    """Measure a row's loss with another row in front of it, whose own loss does not count."""
    rows = [row]
    if before is not None:
        silent = {
            "input_ids": before["input_ids"],
            "labels": [IGNORED] * len(before["input_ids"]),
        }
        rows = [silent, row]
    batch = {name: value.to(model.device) for name, value in lay_end_to_end(rows).items()}
    return float(model(**batch, use_cache=False).loss)


def enable_padding_free(
    model: Any, rows: Sequence[EncodedConversation], max_length: int
) -> str | None:
    """Switch a model to rows laid end to end, if it provably keeps them apart.

    The proof is run on the model itself: a row's loss must be that of the row alone, whatever row
    stands in front of it.

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
        ids = [row.input_ids[:_CHECK_TOKENS] for row in (rows[0], rows[-1])]
        row = {"input_ids": ids[0], "labels": ids[0]}
        other = {"input_ids": ids[1], "labels": ids[1]}
        reverse = {"input_ids": ids[1][::-1], "labels": ids[1]}
        model.eval()
        with torch.no_grad():
            alone = _loss_beside(model, None, row)
            beside = [_loss_beside(model, before, row) for before in (other, reverse)]
        reason = None
        if abs(beside[0] - beside[1]) > 1e-3 or abs(beside[0] - alone) > 2e-2:
            reason = "its attention lets one row see another"
    except (ValueError, TypeError, RuntimeError) as error:
        reason = f"it does not take another attention ({type(error).__name__})"
    model.train(was_training)
    if reason:
        model.set_attn_implementation(former)
    return reason
