"""Greedy answers of a Hugging Face model: requests side by side, each up to its own end.

An answer that has ended leaves the batch, so that the others go on faster; `model.generate` computes
every row until the longest is done.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Generated:
    """An answer's token ids, without an end token; ``ended`` is False where the room was used up."""

    ids: list[int]
    ended: bool


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Give the tokens that end an answer."""
    own = model.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    return sorted({token for token in [tokenizer.eos_token_id, *listed] if token is not None})


def decode_answer(tokenizer: Any, ids: Sequence[int]) -> str:
    """Give an answer's text, without the clean-up of spaces, which would change copied texts."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def generate_greedy(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    stop: Callable[[list[int]], bool] | None = None,
) -> list[Generated]:
    """Continue the prompts of one batch.

    Args:
        model: A causal language model with a key-value cache.
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt.
        max_new_tokens: Room of each answer.
        stop: Given an answer's tokens after each one, says whether to end it there.
    """
    import torch
    from transformers import DynamicCache

    ends = set(end_tokens(model, tokenizer))
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    device = model.device
    ids = torch.tensor([[pad] * (width - len(one)) + one for one in prompts], device=device)
    mask = torch.tensor(
        [[0] * (width - len(one)) + [1] * len(one) for one in prompts], device=device
    )
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    answers: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    rows = list(range(len(prompts)))
    cache = DynamicCache(config=model.config)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for _ in range(max_new_tokens):
            logits = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            chosen = logits.argmax(-1).tolist()
            kept = []
            for place, (row, token) in enumerate(zip(rows, chosen, strict=True)):
                if token in ends:
                    ended[row] = True
                    continue
                answer = answers[row]
                answer.append(token)
                if len(answer) < max_new_tokens and not (stop and stop(answer)):
                    kept.append(place)
            if not kept:
                break
            if len(kept) < len(rows):
                places = torch.tensor(kept, device=device)
                cache.batch_select_indices(places)
                mask, positions = mask[places], positions[places]
                rows = [rows[place] for place in kept]
            ids = torch.tensor([[answers[row][-1]] for row in rows], device=device)
            mask = torch.cat([mask, mask.new_ones((len(rows), 1))], -1)
            positions = positions[:, -1:] + 1
    model.train(was_training)
    return [Generated(*one) for one in zip(answers, ended, strict=True)]
