"""Conversations to token ids and labels; the trained spans come out of rendering itself.

No marker string is searched for: each assistant turn's span is the difference between the template
rendered up to it (with the generation prompt) and rendered through it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

IGNORED = -100
Message = dict[str, str]


class RenderError(ValueError):
    """The chat template does not show the conversation as it is."""


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


def render(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    """Render messages with the tokenizer's chat template."""
    return tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
    )


def answer_spans(tokenizer: Any, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation and give the character spans of the assistant's turns.

    A span runs from the first character after the generation prompt to the end of the turn's own
    end marker; white space that the template writes after that marker is not trained.

    Raises:
        RenderError: The template drops a turn's content, or renders a prefix of the conversation
            differently from the whole, so that spans cannot be known.
    """
    text = render(tokenizer, messages)
    for message in messages:
        if message["content"].strip() not in text:
            raise RenderError(f"the chat template drops the content of a {message['role']} turn")
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:index], add_generation_prompt=True)
        through = render(tokenizer, messages[: index + 1]).rstrip()
        if not (text.startswith(through) and through.startswith(before)):
            raise RenderError(
                "the chat template renders the start of a conversation differently from the whole"
            )
        spans.append((len(before), len(through)))
    return text, spans


def encode_conversation(
    tokenizer: Any, messages: Sequence[Message], max_length: int
) -> EncodedConversation | None:
    """Tokenize a conversation; cut it at a turn, never inside one, when it is too long.

    Args:
        tokenizer: A fast Hugging Face tokenizer with a chat template.
        messages: Turns with ``role`` and ``content``; the last one is the assistant's.
        max_length: Most tokens a row may have.

    Returns:
        The row, or None when not even its first exchange fits.

    Raises:
        RenderError: See ``answer_spans``.
    """
    kept = list(messages)
    while any(message["role"] == "assistant" for message in kept):
        text, spans = answer_spans(tokenizer, kept)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        input_ids = encoded["input_ids"]
        if len(input_ids) <= max_length:
            labels = [IGNORED] * len(input_ids)
            for position, (start, end) in enumerate(encoded["offset_mapping"]):
                if end > start and any(first <= start < last for first, last in spans):
                    labels[position] = input_ids[position]
            return EncodedConversation(input_ids, labels, len(messages) - len(kept))
        kept.pop()
        while kept and kept[-1]["role"] != "assistant":
            kept.pop()
    return None
