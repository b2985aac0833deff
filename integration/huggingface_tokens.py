"""Messages to token ids, ids to text, and transformers' ``generate`` as a stream of tokens."""

import queue
import threading
from collections.abc import Callable, Generator
from typing import Any

from integration.prompt import ChatTemplate

_END = object()


def plain_template(tokenizer: Any) -> tuple[ChatTemplate, Callable[[str], list[int]]]:
    """Give the tokenizer's chat template, and its tokenizer for plain text."""

    def ids_of(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)

    plain = ids_of("a")
    is_sentencepiece = tokenizer.convert_ids_to_tokens(plain[:1])[0].startswith("▁")
    # SentencePiece writes a space in front of every text, and so does llama.cpp; some fast tokenizers
    # do not where one is there already. Then it is written here.
    swallows_space = is_sentencepiece and plain == ids_of(" a")

    def encode(text: str) -> list[int]:
        if not text:
            return []
        return ids_of(f" {text}" if swallows_space and text.startswith((" ", "▁")) else text)

    control = {
        added.content: token
        for token, added in tokenizer.added_tokens_decoder.items()
        if added.special
    }
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    return ChatTemplate(tokenizer.chat_template, control, bos, eos), encode


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Give the tokens that end an answer: the model's and the tokenizer's, which may differ."""
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    return ends if tokenizer.eos_token_id is None else ends | {tokenizer.eos_token_id}


class TextDecoder:
    """Token ids to text, whole characters at a time."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # Text up to `_shown` is out; tokens from `_start` on are decoded again, for what a tokenizer
        # writes depends on the token before (a space in front of a word, bytes of a character).
        self._start = self._shown = 0

    def _decode(self, ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def push(self, token: int) -> str:
        """Take a token; give the text that is certain now."""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._shown])
        text = self._decode(self._ids[self._start :])
        if text.endswith("�") or len(text) <= len(before):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return text[len(before) :]

    def finish(self) -> str:
        """Give what is left: a character that was never finished."""
        before = self._decode(self._ids[self._start : self._shown])
        return self._decode(self._ids[self._start :])[len(before) :]


def generate_tokens(
    model: Any, ids: list[int], limit: int, ends: list[int], parameters: dict[str, Any]
) -> Generator[int, None, None]:
    """Yield the tokens of transformers' ``generate``, which runs in a thread and ends with this."""
    import torch
    from transformers import StoppingCriteriaList

    tokens: queue.SimpleQueue[Any] = queue.SimpleQueue()
    left = threading.Event()
    parameters = dict(parameters)
    seed = parameters.pop("seed", None)
    prompt = torch.tensor([ids], device=model.device)

    class Streamer:
        def __init__(self) -> None:
            self.is_prompt = True

        def put(self, value: Any) -> None:
            if not self.is_prompt:
                for token in value.reshape(-1).tolist():
                    tokens.put(token)
            self.is_prompt = False

        def end(self) -> None:
            """Everything is out already."""

    def generate() -> None:
        try:
            # Sampling takes torch's global generator; nobody else's numbers shall change.
            with torch.random.fork_rng():
                if seed is not None:
                    torch.manual_seed(seed)
                model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=limit,
                    eos_token_id=ends or None,
                    pad_token_id=ends[0] if ends else 0,
                    streamer=Streamer(),
                    stopping_criteria=StoppingCriteriaList([lambda *_, **__: left.is_set()]),
                    **parameters,
                )
        except Exception as error:
            tokens.put(error)
        else:
            tokens.put(_END)

    thread = threading.Thread(target=generate, name="generate", daemon=True)
    thread.start()
    try:
        while (token := tokens.get()) is not _END:
            if isinstance(token, Exception):
                raise token
            yield token
    finally:
        left.set()
        thread.join()
