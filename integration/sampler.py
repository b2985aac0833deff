"""Draws tokens with llama.cpp's own samplers, in the order in which llama-cpp-python chains them."""

from types import TracebackType
from typing import Any

from integration.decoding import Settings

_PENALIZED_TOKENS = 64


class Sampler:
    """A chain of samplers for one answer; a context manager, since it is freed by hand.

    Args:
        n_vocab: Size of the vocabulary.
        settings: Temperature 0 always takes the likeliest token.
        seed: The same seed draws the same tokens from the same logits.
    """

    def __init__(self, n_vocab: int, settings: Settings, seed: int) -> None:
        import llama_cpp

        self._lib = llama_cpp
        self._chain = llama_cpp.llama_sampler_chain_init(
            llama_cpp.llama_sampler_chain_default_params()
        )
        add, chain = llama_cpp.llama_sampler_chain_add, self._chain
        if settings.repeat_penalty != 1.0:
            penalties = llama_cpp.llama_sampler_init_penalties
            add(chain, penalties(n_vocab, _PENALIZED_TOKENS, settings.repeat_penalty, 0.0, 0.0))
        if settings.temperature <= 0:
            add(chain, llama_cpp.llama_sampler_init_greedy())
            return
        add(chain, llama_cpp.llama_sampler_init_top_k(settings.top_k))
        add(chain, llama_cpp.llama_sampler_init_top_p(settings.top_p, 1))
        add(chain, llama_cpp.llama_sampler_init_min_p(settings.min_p, 1))
        add(chain, llama_cpp.llama_sampler_init_temp(settings.temperature))
        add(chain, llama_cpp.llama_sampler_init_dist(seed & 0xFFFFFFFF))

    def __enter__(self) -> "Sampler":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lib.llama_sampler_free(self._chain)

    def sample(self, context: Any, row: int) -> int:
        """Draw a token from a row of the newest evaluation."""
        return int(self._lib.llama_sampler_sample(self._chain, context, row))
