"""Held-out loss: mean negative log-likelihood of the answers' tokens."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from scripts.render import IGNORED, EncodedConversation

# Logits of one forward pass are the largest tensor of an evaluation; this many tokens bound them.
MAX_TOKENS = 1024


@dataclasses.dataclass(frozen=True)
class HeldOutLoss:
    """Mean negative log-likelihood of the trained tokens, in nats per token."""

    loss: float
    tokens: int
    rows: int

    def to_json(self) -> dict[str, float]:
        """Give the numbers, with the perplexity."""
        return {
            "loss": round(self.loss, 4),
            "perplexity": round(math.exp(min(self.loss, 700)), 3),
            "tokens": self.tokens,
            "rows": self.rows,
        }


def _batches(rows: Sequence[EncodedConversation]) -> Iterator[list[EncodedConversation]]:
    """Group rows of similar length, as many as stay under the bound of padded tokens."""
    batch: list[EncodedConversation] = []
    for row in sorted(rows, key=lambda row: len(row.input_ids)):
        if batch and (len(batch) + 1) * len(row.input_ids) > MAX_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def summed_loss(model: Any, rows: Sequence[EncodedConversation]) -> tuple[float, int]:
    """Sum the negative log-likelihood of the trained tokens.

    Args:
        model: A causal language model; its logits have shape (B, T, V).
        rows: Encoded conversations.

    Returns:
        The sum in nats, and the number of trained tokens.
    """
    import torch

    from scripts.padding_free import pad_right

    total, tokens = 0.0, 0
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for batch in _batches(rows):
            padded = pad_right(
                [{"input_ids": row.input_ids, "labels": row.labels} for row in batch], pad_id=0
            )
            labels = padded["labels"]
            logits = model(
                input_ids=padded["input_ids"].to(model.device),
                attention_mask=padded["attention_mask"].to(model.device),
                use_cache=False,
            ).logits
            targets = labels[:, 1:].to(logits.device)
            wanted = targets != IGNORED
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1][wanted].float(), targets[wanted], reduction="sum"
            )
            total, tokens = total + float(loss), tokens + int(wanted.sum())
    model.train(was_training)
    return total, tokens


def held_out_loss(model: Any, rows: Sequence[EncodedConversation]) -> HeldOutLoss:
    """Measure the loss on answers; every trained token weighs the same."""
    total, tokens = summed_loss(model, rows)
    return HeldOutLoss(total / tokens, tokens, len(rows))
