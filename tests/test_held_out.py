"""Held-out loss is what a plain computation over single rows gives, every token weighing the same."""

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from scripts import held_out
from scripts.held_out import row_losses, summed_loss
from scripts.render import IGNORED, EncodedConversation

pytestmark = pytest.mark.model

VOCAB = 200


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        attention_dropout=0.3,  # seen unless the model is in evaluation mode
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def rows() -> list[EncodedConversation]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in (300, 12, 650, 45, 30, 700, 13, 400):
        ids = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
        labels = [IGNORED] * 5 + ids[5 : length // 2] + [IGNORED] * 3 + ids[length // 2 + 3 :]
        found.append(EncodedConversation(ids, labels))
    return found


def plain_losses(model, rows) -> list[tuple[float, int]]:
    """Sum and count of each row, computed token by token from its own logits."""
    model.eval()
    results = []
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0]
            chances = functional.log_softmax(logits.double(), -1)
            wanted = [
                (at, label) for at, label in enumerate(row.labels) if label != IGNORED and at > 0
            ]
            total = sum(-float(chances[at - 1, label]) for at, label in wanted)
            results.append((total, len(wanted)))
    return results


def test_loss_is_that_of_single_rows_by_token(model, rows):
    expected = plain_losses(model, rows)
    tokens = sum(count for _, count in expected)
    found = row_losses(model, rows)
    assert found == [(pytest.approx(total, abs=2e-3), count) for total, count in expected]
    result = summed_loss(model, rows)
    assert result[1] == tokens
    by_token = sum(total for total, _ in expected) / tokens
    by_row = sum(total / count for total, count in expected) / len(rows)
    assert result[0] / tokens == pytest.approx(by_token, abs=1e-5)
    assert abs(by_row - by_token) > 1e-3  # weighing rows instead would be seen


def test_order_and_company_of_a_row_do_not_matter(model, rows, monkeypatch):
    total, tokens = summed_loss(model, rows)
    assert summed_loss(model, rows[::-1]) == (pytest.approx(total, abs=1e-3), tokens)
    monkeypatch.setattr(held_out, "MAX_TOKENS", 1)  # every row by itself
    assert summed_loss(model, rows) == (pytest.approx(total, abs=1e-3), tokens)


def test_shares_of_devices_sum_to_the_whole(model, rows):
    whole = summed_loss(model, rows)
    shares = [summed_loss(model, rows[rank::3]) for rank in range(3)]
    assert sum(total for total, _ in shares) == pytest.approx(whole[0], abs=1e-3)
    assert sum(tokens for _, tokens in shares) == whole[1]


def test_changed_label_is_seen(model, rows):
    first = rows[0]
    changed = EncodedConversation(first.input_ids, [*first.labels[:-1], IGNORED])
    assert summed_loss(model, [changed])[1] == summed_loss(model, [first])[1] - 1
    assert summed_loss(model, [changed])[0] < summed_loss(model, [first])[0]


def test_batches_hold_every_row_and_keep_the_bound(rows):
    places = list(held_out._batches(rows))
    assert sorted(at for batch in places for at in batch) == list(range(len(rows)))
    batches = [[rows[at] for at in batch] for batch in places]
    sizes = [len(batch) * max(len(row.input_ids) for row in batch) for batch in batches]
    assert all(
        size <= held_out.MAX_TOKENS or len(batch) == 1
        for size, batch in zip(sizes, batches, strict=True)
    )
    assert len(batches) < len(rows)


@pytest.mark.parametrize("training", [True, False])
def test_model_stays_in_the_mode_it_was_in(model, rows, training):
    model.train(training)
    first = row_losses(model, rows[1:3])
    assert model.training is training
    assert all(weight.grad is None for weight in model.parameters())
    # Dropout would make two measurements differ.
    assert row_losses(model, rows[1:3]) == first
