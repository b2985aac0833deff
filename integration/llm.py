"""The model behind LangChain: `langchain_community`'s LlamaCpp with its traps off.

What stock LlamaCpp does and this class does not: override the file's RoPE base with 10000, feed the
prompt 8 tokens at a time, stop at 512 tokens of context, repeat the same "random" text, drop the
finish reason and the token counts, lose the last characters of a stream.
"""

import codecs
import itertools
import random
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from integration._cli import CONTEXT, MODEL, CommandError
from integration.decoding import Answer, Settings, StopScanner
from integration.gguf_header import GgufHeader, read_header
from integration.hardware import available_memory_bytes, usable_threads
from integration.prompt import ChatTemplate, Message

with warnings.catch_warnings():
    # The package announces its sunset on import; it is the wrapper this project is to use.
    warnings.simplefilter("ignore", DeprecationWarning)
    from langchain_community.llms.llamacpp import LlamaCpp
from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.outputs import GenerationChunk
from pydantic import PrivateAttr

N_BATCH = 512
_MAX_DEFAULT_CONTEXT = 8192
_MEMORY_SHARE = 0.5
_MIN_ANSWER_TOKENS = 16


def context_size(header: GgufHeader, wanted: int | None) -> int:
    """Give the context in tokens: the file's own, capped by memory and 8192 unless asked for.

    A token's keys and values take 2 x layers x KV heads x head size x 2 bytes.
    """
    trained = header.number("context_length", 2048)
    layers, heads = header.number("block_count", 32), header.number("attention.head_count", 32)
    kv_heads = header.number("attention.head_count_kv", heads)
    head_size = header.number(
        "attention.key_length", header.number("embedding_length", 4096) // heads
    )
    token_bytes = 2 * layers * kv_heads * head_size * 2
    fits = int(available_memory_bytes() * _MEMORY_SHARE) // max(1, token_bytes)
    if wanted is not None:
        if wanted > fits:
            raise CommandError(
                f"a context of {wanted} tokens needs {wanted * token_bytes >> 20} MiB, more than half "
                f"of the free memory; ask for at most {fits}",
                CONTEXT,
            )
        return wanted
    return max(256, min(trained, _MAX_DEFAULT_CONTEXT, fits))


class SafeLlamaCpp(LlamaCpp):
    """LangChain's LlamaCpp with safe defaults and honest endings; made by ``load_model``."""

    rope_freq_base: float = 0.0  # zero means: from the file
    rope_freq_scale: float = 0.0
    n_batch: int | None = N_BATCH
    temperature: float | None = 0.2
    max_tokens: int | None = 512
    verbose: bool = False

    _lock: threading.RLock = PrivateAttr(default_factory=threading.RLock)
    _template: ChatTemplate | None = PrivateAttr(default=None)
    _header: GgufHeader | None = PrivateAttr(default=None)
    _last: Answer | None = PrivateAttr(default=None)

    @property
    def lock(self) -> threading.RLock:
        """One model decodes one thing at a time: llama.cpp aborts otherwise."""
        return self._lock

    @property
    def last_answer(self) -> Answer | None:
        """The record of the newest answer: counts, timings, finish reason."""
        return self._last

    @property
    def header(self) -> GgufHeader:
        """The file's header."""
        if self._header is None:
            self._header = read_header(Path(self.model_path))
        return self._header

    @property
    def template(self) -> ChatTemplate:
        """The file's chat template.

        Raises:
            CommandError: Exit 3; the file has none.
        """
        if self._template is None:
            self._template = _make_template(self.client, self.header)
        return self._template

    def tokenize_plain(self, text: str) -> list[int]:
        """Tokenize text with special tokens off and no BOS."""
        if not text:
            return []
        data = text.encode("utf-8", errors="replace")
        return list(self.client.tokenize(data, add_bos=False, special=False))

    def encode_messages(self, messages: Sequence[Message]) -> list[int]:
        """Give the prompt's token ids for a conversation, up to the assistant's turn."""
        return self.template.encode(messages, self.tokenize_plain)

    def set_seed(self, seed: int | None) -> int:
        """Seed the sampler; draw a seed when none is given. Returns the seed in use."""
        chosen = random.SystemRandom().randrange(1, 2**31) if seed is None else seed
        self.client.set_seed(chosen)
        return chosen

    def check_room(self, prompt_tokens: int, max_tokens: int) -> int:
        """Give the tokens an answer may have.

        Raises:
            CommandError: Exit 4; the prompt does not fit into the context.
        """
        room = self.client.n_ctx() - prompt_tokens
        if room < _MIN_ANSWER_TOKENS:
            raise CommandError(
                f"the prompt has {prompt_tokens} tokens, the context {self.client.n_ctx()} and an "
                f"answer needs at least {_MIN_ANSWER_TOKENS}; shorten the prompt or the history",
                CONTEXT,
            )
        return min(max_tokens, room)

    def stream_ids(
        self, prompt_ids: Sequence[int], settings: Settings, opening: Sequence[int] = ()
    ) -> Iterator[str]:
        """Decode an answer to a tokenized prompt; the record is in ``last_answer``.

        Args:
            prompt_ids: The prompt.
            settings: How to decode.
            opening: First tokens of the answer, when they are decided already.

        Yields:
            Text as it becomes certain: whole characters, no start of a stop string.

        Raises:
            CommandError: Exit 4; the prompt does not fit into the context.
        """
        limit = self.check_room(len(prompt_ids), settings.max_tokens)
        with self._lock:
            answer = self._last = Answer(prompt_tokens=len(prompt_ids), finish_reason="length")
            if limit < 1:
                return
            yield from self._decode(list(prompt_ids), list(opening), settings, limit, answer)

    def _decode(
        self,
        prompt_ids: list[int],
        opening: list[int],
        settings: Settings,
        limit: int,
        answer: Answer,
    ) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        scanner = StopScanner(settings.stop)
        started, first = time.monotonic(), 0.0
        tokens = self.client.generate(
            prompt_ids + opening,
            temp=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            min_p=settings.min_p,
            repeat_penalty=settings.repeat_penalty,
        )
        stopped = False
        try:
            for token in itertools.chain(opening, tokens):
                now = time.monotonic()
                if not first:
                    first = now
                    answer.first_token_s = now - started
                answer.decode_s = now - first
                if self.is_end(token):
                    answer.finish_reason = "stop"
                    break
                answer.completion_tokens += 1
                shown, stopped = scanner.push(decoder.decode(self.piece(token)))
                if shown:
                    answer.text += shown
                    yield shown
                if stopped:
                    answer.finish_reason = "stop"
                    break
                if settings.timeout_s and now - started > settings.timeout_s:
                    answer.finish_reason = "timeout"
                    break
                if answer.completion_tokens >= limit:
                    break
        finally:
            tokens.close()
        if not stopped:
            rest, hit = scanner.push(decoder.decode(b"", final=True))
            rest += "" if hit else scanner.pending
            if rest:
                answer.text += rest
                yield rest

    def prefill(self, prompt_ids: Sequence[int]) -> None:
        """Evaluate a prompt, reusing the prefix that is in the cache already."""
        client = self.client
        shared = 0
        for cached, wanted in zip(client._input_ids, prompt_ids, strict=False):
            if cached != wanted:
                break
            shared += 1
        # The last token is always evaluated again: its logits are what the caller wants.
        shared = min(shared, len(prompt_ids) - 1)
        if not client._ctx.kv_cache_seq_rm(-1, shared, -1):
            client.reset()
            shared = 0
        client.n_tokens = shared
        client.eval(list(prompt_ids[shared:]))

    def next_logits(self) -> Any:
        """Give the logits after the last evaluated token, shape (vocabulary,), float32."""
        import numpy as np

        pointer = self.client._ctx.get_logits_ith(-1)
        return np.ctypeslib.as_array(pointer, shape=(self.client.n_vocab(),))

    def is_end(self, token: int) -> bool:
        """Whether a token ends the generation (EOS, end of turn)."""
        import llama_cpp

        return bool(llama_cpp.llama_vocab_is_eog(self.client._model.vocab, token))

    def piece(self, token: int) -> bytes:
        """Give a token's bytes; control tokens are empty."""
        return bytes(self.client.detokenize([token], special=False))

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        if self.grammar or kwargs.get("grammar"):
            raise ValueError("grammar: not decoded here; integration.agent constrains tool calls")
        defaults = Settings()
        settings = Settings(
            max_tokens=kwargs.get("max_tokens", self.max_tokens) or defaults.max_tokens,
            temperature=kwargs.get("temperature", self.temperature) or 0.0,
            top_p=kwargs.get("top_p", self.top_p) or defaults.top_p,
            top_k=kwargs.get("top_k", self.top_k) or 0,
            repeat_penalty=kwargs.get("repeat_penalty", self.repeat_penalty) or 1.0,
            stop=[*(self.stop or []), *(stop or [])],
        )
        # Raw text, as LangChain's string interface means it: BOS where the model wants one.
        ids = list(self.client.tokenize(prompt.encode("utf-8"), add_bos=True, special=True))
        for text in self.stream_ids(ids, settings):
            if run_manager:
                run_manager.on_llm_new_token(text, verbose=self.verbose)
            yield GenerationChunk(text=text)
        answer = self._last or Answer()
        yield GenerationChunk(
            text="",
            generation_info={
                "finish_reason": answer.finish_reason,
                "prompt_tokens": answer.prompt_tokens,
                "completion_tokens": answer.completion_tokens,
            },
        )


def _make_template(client: Any, header: GgufHeader) -> ChatTemplate:
    import llama_cpp

    vocab = client._model.vocab
    control = {}
    for token in range(client.n_vocab()):
        attributes = llama_cpp.llama_vocab_get_attr(vocab, token)
        if attributes & llama_cpp.LLAMA_TOKEN_ATTR_CONTROL:
            control[llama_cpp.llama_vocab_get_text(vocab, token).decode("utf-8", "replace")] = token
    names = {token: text for text, token in control.items()}
    bos = names.get(llama_cpp.llama_vocab_bos(vocab), "")
    eos = names.get(llama_cpp.llama_vocab_eos(vocab), "")
    return ChatTemplate(header.chat_template, control, bos, eos)


def load_model(
    path: str | Path, n_ctx: int | None = None, n_threads: int | None = None
) -> SafeLlamaCpp:
    """Load a GGUF behind LangChain.

    Args:
        path: A GGUF file.
        n_ctx: Context in tokens; by default the file's, capped at 8192 and by memory.
        n_threads: By default what affinity and cgroup quota allow.

    Raises:
        CommandError: Exit 3 for an unusable file, 4 for a context that does not fit into memory.
    """
    header = read_header(Path(path))
    if header.is_adapter:
        raise CommandError(
            f"model '{path}' is a LoRA adapter, expected a whole model; give it with --adapter "
            "NAME=FILE beside its base",
            MODEL,
        )
    if not header.architecture or not header.tensor_names:
        raise CommandError(f"model '{path}' holds no model weights; export it again", MODEL)
    threads = n_threads or usable_threads()
    try:
        model = SafeLlamaCpp(  # type: ignore[call-arg]
            model_path=str(path),
            n_ctx=context_size(header, n_ctx),
            n_threads=threads,
            seed=random.SystemRandom().randrange(1, 2**31),
            model_kwargs={"n_threads_batch": threads},
        )
    except ValueError as error:  # pydantic wraps the loader's error in one of these
        reason = str(error).splitlines()[-1] if "\n" not in str(error) else "llama.cpp refused it"
        raise CommandError(
            f"model '{path}' could not be loaded ({reason}); check it with export.verify_gguf",
            MODEL,
        ) from error
    model._header = header
    return model
