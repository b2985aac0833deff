"""Rows laid end to end train exactly as padded rows do, and no row sees another one."""

import itertools
import types

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from scripts import padding_free
from scripts.padding_free import enable_padding_free, lay_end_to_end, pad_right, split_batch
from scripts.render import IGNORED, EncodedConversation

pytestmark = pytest.mark.model

VOCAB = 200
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # two query heads share a key head
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,  # large enough for attention to matter
}


def make_model(dtype: torch.dtype = torch.float32, adapter: bool = False, **config):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **config}))
    if adapter:
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, settings)
    return model.to(dtype)


def make_rows(*lengths: int, seed: int = 0) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(1, VOCAB, (length,), generator=generator).tolist()
        prompt = length // 3
        rows.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    return rows


def encoded(rows: list[dict[str, list[int]]]) -> list[EncodedConversation]:
    return [EncodedConversation(row["input_ids"], row["labels"]) for row in rows]


def summed_gradients(model, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Gradients of the loss over all trained tokens of all batches, and that loss."""
    tokens = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(**batch, use_cache=False, num_items_in_batch=tokens).loss
        loss.backward()
        total += float(loss.detach())
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    gradients = {name: weight.grad.float().clone() for name, weight in weights.items()}
    assert all(gradient.any() for gradient in gradients.values())
    return {"loss": torch.tensor(total)} | gradients


def distance(some: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest relative difference of a gradient (or the loss), by norm."""
    assert some.keys() == other.keys()
    return max(
        float((some[name] - other[name]).norm() / other[name].norm().clamp_min(1e-8))
        for name in some
    )


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "adapter"])
def test_gradients_equal_those_of_padded_rows(adapter):
    model, rows = make_model(adapter=adapter), make_rows(40, 7, 64, 1, 23)
    padded = summed_gradients(model, [pad_right(rows, 0)])
    assert enable_padding_free(model, encoded(rows), 64) is None
    laid = summed_gradients(model, [lay_end_to_end(rows)])
    assert distance(laid, padded) < 1e-5
    # A row more, or rows that see each other, are further away than that by far.
    assert distance(summed_gradients(model, [lay_end_to_end(rows[:-1])]), padded) > 1e-3
    one_row = {"cu_seq_lens_q": torch.tensor([0, 135]), "starts_with": torch.tensor([-1])}
    assert distance(summed_gradients(model, [lay_end_to_end(rows) | one_row]), padded) > 1e-2


def trained_from(row: dict, at: int) -> dict:
    return {**row, "labels": [IGNORED] * at + row["input_ids"][at:]}


def sharing_rows(shared: int, *own: int, seed: int = 0) -> list[dict]:
    """Rows that begin alike, then go on on their own, trained from 4 tokens later."""
    start = make_rows(shared, seed=seed)[0]["input_ids"]
    rows = make_rows(*own, seed=seed + 1)
    for number, row in enumerate(rows):
        row["input_ids"] = [*start, number + 1, *row["input_ids"][1:]]  # they differ at once
    return [trained_from(row, shared + 4) for row in rows]


LONG, SHORT = sharing_rows(50, 20, 9)
SHARING = {  # rows, and how many tokens are left out because they stand elsewhere already
    "two": ([LONG, SHORT], 50),
    "three": (sharing_rows(40, 9, 30, 17), 80),
    "as short as can be": (sharing_rows(32, 20, 9), 32),
    "too short": (sharing_rows(31, 20, 9), 0),
    "among others": ([*make_rows(40, 7, seed=9), LONG, *make_rows(1, 33), SHORT], 50),
    "two starts": ([*sharing_rows(33, 20, 9), *sharing_rows(60, 8, 9, 10, seed=5)], 153),
    "the same row": ([LONG, LONG], 53),  # up to the token before the first trained one
    "trained within the start": ([trained_from(LONG, 45), trained_from(SHORT, 45)], 44),
    "one trained earlier": ([LONG, trained_from(SHORT, 40)], 39),
    "trained too early": ([trained_from(LONG, 32), trained_from(SHORT, 32)], 0),
    "nothing trained in one": ([SHORT, trained_from(LONG, 70)], 50),
    "one within the other": ([LONG, trained_from({"input_ids": LONG["input_ids"][:50]}, 50)], 49),
}


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "adapter"])
@pytest.mark.parametrize(("rows", "saved"), SHARING.values(), ids=SHARING)
def test_shared_start_has_the_gradients_of_padded_rows(rows, saved, adapter):
    model, batch = make_model(adapter=adapter), lay_end_to_end(rows)
    assert batch["input_ids"].numel() == sum(len(row["input_ids"]) for row in rows) - saved
    padded = summed_gradients(model, [pad_right(rows, 0)])
    assert enable_padding_free(model, encoded(rows), 110) is None
    assert distance(summed_gradients(model, [batch]), padded) < 1e-5
    # Without what it starts with, a row is another one.
    alone = {"starts_with": torch.full_like(batch["starts_with"], -1)}
    assert not saved or distance(summed_gradients(model, [batch | alone]), padded) > 1e-3
    # Whole rows are counted, and come back whole.
    whole = sorted(row["input_ids"] for row in rows)
    assert padding_free.num_rows(batch) == len(rows)
    assert padding_free.num_tokens(batch) == sum(map(len, whole))
    assert sorted(row["input_ids"] for row in padding_free._take_apart(batch)) == whole
    parts = split_batch(batch, 2)
    assert [len(rows) // 2, -(-len(rows) // 2)] == sorted(map(padding_free.num_rows, parts))
    assert distance(summed_gradients(model, parts), padded) < 1e-5


def test_nothing_trained_is_shared_and_own_tokens_begin_unlearned():
    batch = lay_end_to_end(rows := sharing_rows(50, 20, 9, 5))
    assert batch["cu_seq_lens_q"].tolist() == [0, 50, 70, 79, 84]
    assert batch["starts_with"].tolist() == [-1, 0, 0, 0]
    labels, positions = batch["labels"][0], batch["position_ids"][0]
    assert (labels[:50] == IGNORED).all()
    assert labels[[50, 70, 79]].tolist() == [IGNORED] * 3
    assert positions.tolist() == [*range(70), *range(50, 59), *range(50, 55)]
    batch = lay_end_to_end(early := [trained_from(row, 40) for row in rows])
    assert batch["cu_seq_lens_q"].tolist() == [0, 39, 70, 90, 106]
    # The first trained token of each row is learned from the token before it, its own.
    kept = batch["labels"][batch["labels"] != IGNORED].tolist()
    assert kept == [label for row in early for label in row["input_ids"][40:]]


HALF_ROWS = {  # both kernels: 350 is beyond the short rows
    "own starts": make_rows(40, 350, 64, 23),
    "short start": sharing_rows(60, 40, 23, 30),
    "long start": sharing_rows(340, 40, 23, 30),
}


@pytest.mark.parametrize("rows", HALF_ROWS.values(), ids=HALF_ROWS)
@pytest.mark.parametrize("heads", [4, 2, 1], ids=["own keys", "shared keys", "one key head"])
def test_gradients_in_bf16_are_as_close_as_bf16_is(heads, rows):
    exact = summed_gradients(make_model(num_key_value_heads=heads), [pad_right(rows, 0)])
    model, batch = make_model(torch.bfloat16, num_key_value_heads=heads), lay_end_to_end(rows)
    padded = distance(summed_gradients(model, [pad_right(rows, 0)]), exact)
    assert enable_padding_free(model, encoded(rows), 400) is None
    assert distance(summed_gradients(model, [batch]), exact) < 1.5 * padded
    mixed = batch | {"starts_with": batch["starts_with"].roll(1)}
    assert len(rows) == 4 or distance(summed_gradients(model, [mixed]), exact) > 3 * padded


def row_loss(model, before: dict[str, list[int]], row: dict[str, list[int]], **changes) -> float:
    silent = {**before, "labels": [IGNORED] * len(before["input_ids"])}
    batch = {**lay_end_to_end([silent, row]), **changes}
    batch = {name: value for name, value in batch.items() if value is not None}
    with torch.no_grad():
        return float(model(**batch, use_cache=False).loss)


def test_row_does_not_see_the_row_in_front():
    model, (row, before, other) = make_model().eval(), make_rows(40, 30, 30)
    plain = {"cu_seq_lens_q": None, "position_ids": None}
    seen = [row_loss(model, front, row, **plain) for front in (before, other)]
    assert abs(seen[0] - seen[1]) > 1e-3  # what plain rows laid end to end would do
    assert enable_padding_free(model, encoded([row, before]), 40) is None
    alone = float(model(**lay_end_to_end([row]), use_cache=False).loss.detach())
    for front in (before, other):
        assert row_loss(model, front, row) == pytest.approx(alone, abs=1e-5)


def test_first_label_of_a_row_is_not_learned_from_the_row_in_front():
    rows = make_rows(5, 4)
    rows[1]["labels"] = rows[1]["input_ids"]
    batch = lay_end_to_end(rows)
    assert batch["labels"][0, 5] == IGNORED
    assert batch["labels"][0, 6:].tolist() == rows[1]["input_ids"][1:]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 5, 9]


def attention_and_gradients(attend, tensors, dropout: float = 0.0) -> list[torch.Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    torch.manual_seed(0)
    out = attend(*leaves, 0.3, dropout)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    (out * weights).sum().backward()
    return [out.detach().float(), *(leaf.grad.float() for leaf in leaves)]


def plain_sdpa(query, key, value, scale, dropout):
    return functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, dropout_p=dropout, enable_gqa=True
    )


@pytest.mark.parametrize("length", [1, 2, 48, 319, 320, 321])
@pytest.mark.parametrize("heads", [(4, 4), (9, 3), (4, 1)], ids=str)
def test_short_rows_kernel_agrees_with_sdpa(length, heads):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads[0], length, 16), (1, heads[1], length, 16), (1, heads[1], length, 16)]
    exact_inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    half_inputs = [tensor.bfloat16() for tensor in exact_inputs]
    exact = attention_and_gradients(plain_sdpa, [tensor.float() for tensor in half_inputs])
    mine = attention_and_gradients(padding_free._attend, half_inputs)
    for got, wanted in zip(mine, exact, strict=True):
        assert (got - wanted).norm() <= 0.02 * wanted.norm() + 1e-5
    if length > 1:  # a key that should not be seen is seen in the result
        swapped = [half_inputs[0], *(tensor.flip(2) for tensor in half_inputs[1:])]
        other = attention_and_gradients(padding_free._attend, swapped)
        assert (other[0] - exact[0]).norm() > 0.2 * exact[0].norm()


def test_only_short_half_precision_rows_take_the_short_kernel(monkeypatch):
    called = []

    def watched(query, *args, **kwargs):
        called.append(query.shape[2])
        return functional.scaled_dot_product_attention(query, *args, **kwargs)

    kernels = types.SimpleNamespace(scaled_dot_product_attention=watched)
    monkeypatch.setattr(padding_free, "functional", kernels)
    for dtype, length, dropout in itertools.product(
        (torch.float32, torch.bfloat16), (320, 321), (0.0, 0.1)
    ):
        called.clear()
        tensors = [torch.randn(1, 2, length, 16).to(dtype) for _ in range(3)]
        padding_free._attend(tensors[0], tensors[1], tensors[2], 0.25, dropout)
        short = dtype is torch.bfloat16 and length <= 320 and not dropout
        assert called == ([] if short else [length])


def test_dropout_drops_and_keeps_the_mean():
    tensors = [torch.randn(1, 8, 200, 16, generator=torch.Generator().manual_seed(0))] * 3
    tensors[2] = torch.ones_like(tensors[2])  # attention over ones gives ones
    tensors = [tensor.bfloat16() for tensor in tensors]
    dropped = attention_and_gradients(padding_free._attend, tensors, dropout=0.5)[0]
    kept = attention_and_gradients(padding_free._attend, tensors)[0]
    assert torch.allclose(kept, torch.ones_like(kept), atol=0.02)
    assert dropped.std() > 0.1
    assert abs(float(dropped.mean()) - 1) < 0.15


def test_attention_dropout_of_a_model_reaches_its_rows():
    model, rows = make_model(attention_dropout=0.5), make_rows(40, 30)
    assert enable_padding_free(model, encoded(rows), 40) is None
    batch = lay_end_to_end(rows)

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return float(model(**batch, use_cache=False).loss.detach())

    assert model.training
    assert loss(0) == loss(0)
    assert loss(0) != loss(1)
    model.eval()
    assert loss(0) == loss(1)


@pytest.mark.parametrize("laid", [True, False], ids=["laid end to end", "padded"])
@pytest.mark.parametrize("pieces", [2, 3, 4, 8])
def test_pieces_sum_to_the_gradient_of_the_whole(laid, pieces):
    model, rows = make_model(), make_rows(40, 7, 64, 3, 23)
    assert enable_padding_free(model, encoded(rows), 64) is None
    batch = lay_end_to_end(rows) if laid else pad_right(rows, 0)
    parts = split_batch(batch, pieces)
    assert 1 < len(parts) <= min(pieces, 5)
    assert sum(padding_free.num_rows(part) for part in parts) == 5
    assert sum(padding_free.num_tokens(part) for part in parts) == 137
    for name in ("input_ids", "labels"):
        joined = torch.cat([part[name] for part in parts], dim=1 if laid else 0)
        assert torch.equal(joined, batch[name])
    whole = summed_gradients(model, [batch])
    assert distance(summed_gradients(model, parts), whole) < 1e-5
    assert distance(summed_gradients(model, parts[:-1]), whole) > 1e-3


def test_padded_batch_counts_its_real_tokens_and_one_piece_is_itself():
    batch = pad_right(make_rows(4, 9), 0)
    assert split_batch(batch, 1)[0] is batch
    assert (padding_free.num_rows(batch), padding_free.num_tokens(batch)) == (2, 13)
    assert batch["input_ids"].numel() == 18


def test_batches_of_others_count_their_own_tokens_and_rows():
    packed = {"input_ids": torch.ones(1, 20), "position_ids": torch.arange(20)[None]}
    assert (padding_free.num_rows(packed), padding_free.num_tokens(packed)) == (1, 20)
    starts = packed | {"cu_seq_lens_q": torch.tensor([0, 5, 20])}
    assert (padding_free.num_rows(starts), padding_free.num_tokens(starts)) == (2, 20)
    masked = packed | {"attention_mask": torch.tensor([[1] * 13 + [0] * 7])}
    assert padding_free.num_tokens(masked) == 13


class _LeakingModel(torch.nn.Module):
    """A model with its own mixing of tokens: every token sees the mean of all before it."""

    def __init__(self, refuses: type[Exception] | None = None) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(_attn_implementation="its own")
        self.embedding = torch.nn.Embedding(VOCAB, 16)
        self.head = torch.nn.Linear(16, VOCAB)
        self.device, self.refuses = torch.device("cpu"), refuses

    def set_attn_implementation(self, name: str) -> None:
        if self.refuses and name != "its own":
            raise self.refuses(name)
        self.config._attn_implementation = name

    def forward(self, input_ids, labels, **kwargs):
        mixed = self.embedding(input_ids).cumsum(1)
        logits = self.head(mixed)[0, :-1]
        return types.SimpleNamespace(loss=functional.cross_entropy(logits, labels[0, 1:]))


def test_model_that_mixes_rows_is_left_as_it_was():
    model = _LeakingModel()
    reason = enable_padding_free(model, encoded(make_rows(20, 30)), 30)
    assert reason == "its attention lets one row see another"
    assert model.config._attn_implementation == "its own"
    assert model.training


@pytest.mark.parametrize("error", [ValueError, TypeError, RuntimeError])
def test_model_that_refuses_another_attention_is_left_as_it_was(error):
    model = _LeakingModel(error).eval()
    reason = enable_padding_free(model, encoded(make_rows(20, 30)), 30)
    assert error.__name__ in str(reason)
    assert model.config._attn_implementation == "its own"
    assert not model.training


@pytest.mark.parametrize(
    ("dropped", "length"),
    [
        (("cu_seq_lens_q", "position_ids"), 20),
        (("starts_with",), 20),
        (("starts_with",), 7),
    ],
)
def test_attention_that_ignores_where_rows_start_is_found(dropped, length, monkeypatch):
    """A Llama whose layers drop what they are told, as layers with a fixed signature do."""
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaModel

    def forgetful(forward):
        def forward_without(self, *args, **kwargs):
            kept = {name: value for name, value in kwargs.items() if name not in dropped}
            return forward(self, *args, **kept)

        return forward_without

    rows = encoded(make_rows(length, length))
    model = make_model()
    former = model.config._attn_implementation
    assert enable_padding_free(model, rows, 30) is None
    model = make_model()
    monkeypatch.setattr(LlamaAttention, "forward", forgetful(LlamaAttention.forward))
    monkeypatch.setattr(LlamaModel, "forward", forgetful(LlamaModel.forward))
    assert enable_padding_free(model, rows, 30) == "its attention lets one row see another"
    assert model.config._attn_implementation == former


def test_rows_longer_than_the_sliding_window_stay_padded():
    config = MistralConfig(**SHAPE, sliding_window=32)
    model = MistralForCausalLM(config)
    former, rows = model.config._attn_implementation, encoded(make_rows(20, 30))
    assert "longer than the sliding window of 32" in str(enable_padding_free(model, rows, 33))
    assert model.config._attn_implementation == former
    assert enable_padding_free(model, rows, 32) is None
    assert model.config._attn_implementation == padding_free.ATTENTION
    config.use_sliding_window = False
    assert enable_padding_free(model, rows, 33) is None


def test_evaluation_of_padded_rows_goes_on_as_before():
    model, rows = make_model().eval(), make_rows(40, 7, 23)
    batch = pad_right(rows, 0)
    with torch.no_grad():
        before = model(**batch, use_cache=False).logits
        assert enable_padding_free(model, encoded(rows), 40) is None
        after = model(**batch, use_cache=False).logits
    assert torch.equal(before, after)
