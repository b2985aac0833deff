"""Checks of encoded rows and batches before the first step: every answer is trained, with its end.

In: encoded rows. Out: nothing, or an error that shows the tokens in question.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scripts.answer_spans import RenderError
from scripts.plain_tokens import PlainTokenizer

IGNORED = -100
_SAMPLE_TOKENS = 40


@dataclass(frozen=True)
class EncodedConversation:
    """One training row.

    Attributes:
        input_ids: Token ids, shape (T,).
        labels: The same ids where the assistant speaks, its end-of-turn token included; -100
            elsewhere. Shape (T,).
        dropped_turns: Turns cut from the end so that the row fits ``max_length``.
    """

    input_ids: list[int]
    labels: list[int]
    dropped_turns: int = 0


def check_encoded(rows: Sequence[EncodedConversation], tokenizer: Any) -> None:
    """Check labels before the first step.

    Raises:
        RenderError: Nothing is trained in a row or at all, an answer is trained without its end, a
            label is no copy of its token, or the token that ends an answer is masked like padding.
    """
    if not any(label != IGNORED for row in rows for label in row.labels):
        sample = f", first row: {_sample(tokenizer, rows[0].input_ids)}" if rows else ""
        raise RenderError(
            f"no token of {len(rows)} rows is trained{sample}; check the chat template"
        )
    plain = PlainTokenizer(tokenizer)
    for number, row in enumerate(rows, 1):
        ids, labels = row.input_ids, row.labels
        if len(ids) != len(labels):
            raise RenderError(f"row {number} has {len(ids)} tokens and {len(labels)} labels")
        runs = _trained_runs(labels)
        if not runs:
            raise RenderError(
                f"row {number} has no trained token: {_sample(tokenizer, ids)}; check the template"
            )
        for start, end in runs:
            if labels[start:end] != ids[start:end]:
                raise RenderError(
                    f"row {number} has labels that are no copy of its tokens: "
                    f"{_sample(tokenizer, ids[start:end])}"
                )
            if plain.is_stop(ids[end - 1]):
                continue
            sample = _sample(tokenizer, ids[start : end + 1])
            masked = end < len(ids) and (
                plain.is_stop(ids[end]) or ids[end] == tokenizer.pad_token_id
            )
            raise RenderError(
                f"row {number}: the token that ends an answer is masked as if it were padding "
                f"(pad is {tokenizer.pad_token!r}, EOS {tokenizer.eos_token!r}): {sample}; mask "
                "padding by position"
                if masked
                else f"row {number} trains an answer without its end: {sample}; check the template"
            )


def check_batch(rows: Sequence[EncodedConversation], batch: dict[str, Any], tokenizer: Any) -> None:
    """Check that a collated batch masks padding by position, not by token id.

    Args:
        rows: The rows in the batch, in order.
        batch: ``input_ids``, ``labels`` and ``attention_mask``, shape (B, T), right-padded or left.
        tokenizer: For the message.

    Raises:
        RenderError: A token of a row is masked, or padding is not.
    """
    columns = {
        name: values.tolist() if hasattr(values, "tolist") else values
        for name, values in batch.items()
        if name in ("input_ids", "labels", "attention_mask")
    }
    masks = columns.get("attention_mask") or [[1] * len(ids) for ids in columns["input_ids"]]
    for number, row in enumerate(rows, 1):
        ids, labels, mask = (
            values[number - 1] for values in (columns["input_ids"], columns["labels"], masks)
        )
        trained = [label for label in row.labels if label != IGNORED]
        seen = [token for token, shown in zip(ids, mask, strict=True) if shown]
        if [label for label in labels if label != IGNORED] != trained or (
            "attention_mask" in columns and seen != row.input_ids
        ):
            raise RenderError(
                f"row {number} of a batch loses tokens to padding (pad is {tokenizer.pad_token!r}, "
                f"EOS {tokenizer.eos_token!r}): {_sample(tokenizer, row.input_ids)}; mask padding "
                "by position, not by token id"
            )


def _trained_runs(labels: Sequence[int]) -> list[tuple[int, int]]:
    edges = [
        position
        for position in range(len(labels) + 1)
        if (position < len(labels) and labels[position] != IGNORED)
        != (position > 0 and labels[position - 1] != IGNORED)
    ]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _sample(tokenizer: Any, ids: Sequence[int]) -> str:
    """Decode the end of some tokens for a message of one line."""
    return repr(tokenizer.decode(list(ids[-_SAMPLE_TOKENS:])))
