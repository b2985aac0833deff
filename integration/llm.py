"""A GGUF behind LangChain's `LlamaCpp`, with the traps of that wrapper off.

What stock LlamaCpp does and this class does not: override the file's RoPE base with 10000, feed the
prompt 8 tokens at a time, stop at 512 tokens of context, repeat the same "random" text, drop the
finish reason and the token counts, lose the last characters of a stream, compile every chat template
of the file, and crash on an adapter that does not fit.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from integration.adapters import Adapters
from integration.backend import Turn
from integration.decoding import Settings
from integration.models import load_gguf

with warnings.catch_warnings():
    # The package announces its sunset on import; it is the wrapper this project is to use.
    warnings.simplefilter("ignore", DeprecationWarning)
    from langchain_community.llms.llamacpp import LlamaCpp
from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from langchain_core.utils import pre_init

_NOT_DECODED = (
    "grammar",
    "grammar_path",
    "suffix",
    "logprobs",
    "echo",
    "n_gpu_layers",
    "model_kwargs",
)
_ADAPTER = "lora_path"


class SafeLlamaCpp(LlamaCpp):
    """LangChain's LlamaCpp with safe defaults and honest endings.

    ``SafeLlamaCpp(model_path="m.gguf")`` is all it needs: context, threads and RoPE come from the file
    and the machine. ``client`` is a ``LocalModel``. For chats and tools there is
    ``integration.chat_model``.

    Raises:
        CommandError: Exit 3 for an unusable file or adapter, 4 for a context that does not fit.
        ValueError: An option that is not decoded here (grammars, suffix, log-probabilities).
    """

    rope_freq_base: float = 0.0  # zero means: from the file
    rope_freq_scale: float = 0.0
    n_ctx: int = 0
    n_batch: int | None = 512
    temperature: float | None = 0.2
    top_p: float | None = 0.9
    max_tokens: int | None = 512
    verbose: bool = False

    @pre_init
    def validate_environment(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Load the model."""
        _refuse_undecoded(values)
        client = load_gguf(Path(values["model_path"]), values["n_ctx"] or None, values["n_threads"])
        if values.get(_ADAPTER):
            Adapters(client, {_ADAPTER: Path(values[_ADAPTER])}).use(_ADAPTER)
        values["client"] = client
        return values

    def _turn(self, prompt: str, stop: list[str] | None, options: dict[str, Any]) -> Any:
        _refuse_undecoded(options)
        defaults = Settings()
        chosen = {name: options.get(name, getattr(self, name)) for name in _SAMPLING}
        settings = Settings(
            **{name: value for name, value in chosen.items() if value is not None},
            max_tokens=options.get("max_tokens", self.max_tokens) or defaults.max_tokens,
            stop=[*(self.stop or []), *(stop or [])],
            seed=_seed(options.get("seed", self.seed)),
        )
        return self.client.stream(self.client.complete(prompt, settings))

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        turn = yield from _chunks(self._turn(prompt, stop, kwargs), run_manager)
        yield GenerationChunk(text="", generation_info=_info(turn))

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        answers = [list(self._stream(prompt, stop, run_manager, **kwargs)) for prompt in prompts]
        return LLMResult(
            generations=[
                [
                    Generation(
                        text="".join(c.text for c in chunks),
                        generation_info=chunks[-1].generation_info,
                    )
                ]
                for chunks in answers
            ]
        )

    def get_num_tokens(self, text: str) -> int:
        """Count the tokens of a text, control tokens counted as such, without a BOS."""
        return len(self.client.engine.tokenize(text, special=True))


_SAMPLING = ("temperature", "top_p", "top_k", "repeat_penalty")


def _refuse_undecoded(options: dict[str, Any]) -> None:
    for name in _NOT_DECODED:
        if options.get(name):
            raise ValueError(
                f"{name}: not decoded here; for JSON and tools use integration.chat_model"
            )


def _seed(value: int | None) -> int | None:
    return None if value is None or value < 0 else value


def _chunks(stream: Any, run_manager: CallbackManagerForLLMRun | None) -> Any:
    try:
        while True:
            text = next(stream)
            if run_manager:
                run_manager.on_llm_new_token(text)
            yield GenerationChunk(text=text)
    except StopIteration as end:
        return end.value
    finally:
        stream.close()


def _info(turn: Turn) -> dict[str, Any]:
    answer = turn.answer
    return {
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "seed": answer.seed,
        "tokens_per_second": round(answer.tokens_per_second, 1),
    }
