"""Greedy answers of a batch are those of `model.generate` for each prompt alone."""

from types import SimpleNamespace

import pytest

from scripts.generation import (
    LOOP_TOKENS,
    decode_answer,
    end_tokens,
    find_period,
    generate_greedy,
)

ROOM = 40


def test_shortest_period_is_found():
    start = list(range(1000, 1010))
    assert find_period(start + [7] * LOOP_TOKENS) == 1
    assert find_period(start + [1, 2, 3] * 40) == 3
    assert find_period(start + [1, 2, 3] * 40 + [1]) == 3
    assert find_period([*range(60)] * 4) == 60
    assert find_period([*range(60)] * 3) is None
    assert find_period(start + [1, 2, 3] * 40 + [9]) is None
    assert find_period([7] * (LOOP_TOKENS - 1)) is None


@pytest.fixture(scope="module")
def model_and_tokenizer(tiny_model_dir):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(tiny_model_dir)


def alone(model, tokenizer, prompt: list[int], room: int = ROOM) -> list[int]:
    import torch

    ids = torch.tensor([prompt])
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, do_sample=False,
        pad_token_id=tokenizer.pad_token_id, use_cache=True,
    )  # fmt: skip
    return output[0, len(prompt) :].tolist()


@pytest.mark.model
def test_batch_gives_what_each_prompt_gives_alone(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    prompts = [tokenizer(text)["input_ids"] for text in ("Hi", "One two three four " * 9, "Why?")]
    found = generate_greedy(model, tokenizer, prompts, ROOM)
    expected = [alone(model, tokenizer, prompt) for prompt in prompts]
    assert [one.ids for one in found] == expected
    assert expected[0] != expected[2]
    assert not any(one.ended for one in found)


@pytest.mark.model
def test_ended_rows_leave_and_the_others_go_on(model_and_tokenizer, monkeypatch):
    model, tokenizer = model_and_tokenizer
    prompts = [tokenizer(text)["input_ids"] for text in ("Hi", "One two three four " * 9, "Why?")]
    expected = [alone(model, tokenizer, prompt) for prompt in prompts]
    # A token that only the second answer holds ends it.
    end = next(token for token in expected[1] if token not in expected[0] + expected[2])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end])
    assert end in end_tokens(model, tokenizer)
    found = generate_greedy(model, tokenizer, prompts, ROOM)
    assert [one.ended for one in found] == [False, True, False]
    assert found[1].ids == expected[1][: expected[1].index(end)]
    assert [found[0].ids, found[2].ids] == [expected[0], expected[2]]


@pytest.mark.model
def test_stop_ends_one_answer(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    prompts = [tokenizer(text)["input_ids"] for text in ("Hi", "Why?")]
    first = alone(model, tokenizer, prompts[0])
    found = generate_greedy(model, tokenizer, prompts, ROOM, lambda ids: ids == first[:5])
    assert [len(one.ids) for one in found] == [5, ROOM]
    assert not found[0].ended


def successor_model(successors: dict[int, int]):
    """A model whose next token depends on the last one alone; it counts its passes."""
    import torch
    from transformers import LlamaConfig

    class Successor(torch.nn.Module):
        config = LlamaConfig(num_hidden_layers=1)
        generation_config = SimpleNamespace(eos_token_id=99)
        device, passes = torch.device("cpu"), 0

        def forward(self, input_ids, **kwargs):
            self.passes += 1
            following = torch.tensor(
                [[successors[token] for token in row] for row in input_ids.tolist()]
            )
            return SimpleNamespace(logits=torch.nn.functional.one_hot(following, 100).float())

    return Successor()


@pytest.mark.model
def test_a_loop_is_filled_up_as_it_would_go_on():
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=99)
    model = successor_model({1: 2, 2: 3, 3: 4, 4: 5, 5: 3})
    room = 5 * LOOP_TOKENS + 1
    (found,) = generate_greedy(model, tokenizer, [[1]], room)
    assert found.ids == [2, *([3, 4, 5] * room)][:room]
    assert not found.ended
    assert model.passes < 2 * LOOP_TOKENS
    # One that leads out of the loop in time is computed to its end.
    chain = {**{token: token + 1 for token in range(1, 60)}, 60: 99}
    (found,) = generate_greedy(successor_model(chain), tokenizer, [[1]], room)
    assert (found.ids, found.ended) == ([*range(2, 61)], True)


@pytest.mark.model
def test_text_keeps_its_spaces(model_and_tokenizer):
    _, tokenizer = model_and_tokenizer
    text = "a , b  ." + "\n"
    assert decode_answer(tokenizer, tokenizer(text)["input_ids"]) == text
