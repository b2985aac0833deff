"""Greedy answers of a batch are those of `model.generate` for each prompt alone."""

import pytest

from scripts.generation import (
    decode_answer,
    end_tokens,
    generate_greedy,
)

ROOM = 40


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


@pytest.mark.model
def test_text_keeps_its_spaces(model_and_tokenizer):
    _, tokenizer = model_and_tokenizer
    text = "a , b  ." + "\n"
    assert decode_answer(tokenizer, tokenizer(text)["input_ids"]) == text
