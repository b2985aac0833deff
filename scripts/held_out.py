"""Held-out loss: mean negative log-likelihood of the answers' tokens."""

from collections.abc import Iterator, Sequence
from typing import Any

from scripts.render import IGNORED, EncodedConversation

# Logits of one forward pass are the largest tensor of an evaluation; this many tokens bound them.
MAX_TOKENS = 1024
# Summed negative log-likelihood of a row in nats, and its scored tokens.
RowLoss = tuple[float, int]


def _batches(rows: Sequence[EncodedConversation]) -> Iterator[list[int]]:
    """Group places of rows of similar length, as many as stay under the bound of padded tokens."""
    batch: list[int] = []
    for at in sorted(range(len(rows)), key=lambda at: len(rows[at].input_ids)):
        if batch and (len(batch) + 1) * len(rows[at].input_ids) > MAX_TOKENS:
            yield batch
            batch = []
        batch.append(at)
    if batch:
        yield batch


def row_losses(model: Any, rows: Sequence[EncodedConversation]) -> list[RowLoss]:
    """Sum the negative log-likelihood of the trained tokens of each row.

    Args:
        model: A causal language model; its logits have shape (B, T, V).
        rows: Encoded conversations.

    Returns:
        For each row the sum in nats, and the number of trained tokens.
    """
    import torch

    from scripts.padding_free import pad_right

    found: dict[int, RowLoss] = {}
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for batch in _batches(rows):
            padded = pad_right(
                [{"input_ids": rows[at].input_ids, "labels": rows[at].labels} for at in batch],
                pad_id=0,
            )
            labels = padded["labels"]
            logits = model(
                input_ids=padded["input_ids"].to(model.device),
                attention_mask=padded["attention_mask"].to(model.device),
                use_cache=False,
            ).logits
            targets = labels[:, 1:].to(logits.device)
            wanted = targets != IGNORED
            losses = torch.zeros(targets.shape, device=logits.device)
            losses[wanted] = torch.nn.functional.cross_entropy(
                logits[:, :-1][wanted].float(), targets[wanted], reduction="none"
            )
            sums, counts = losses.double().sum(-1).tolist(), wanted.sum(-1).tolist()
            found |= dict(zip(batch, zip(sums, counts, strict=True), strict=True))
    model.train(was_training)
    return [found[at] for at in range(len(rows))]


def summed_loss(model: Any, rows: Sequence[EncodedConversation]) -> tuple[float, int]:
    """Sum the negative log-likelihood of the trained tokens, in nats; give their number too."""
    losses = row_losses(model, rows)
    return sum(total for total, _ in losses), sum(tokens for _, tokens in losses)
