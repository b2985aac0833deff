"""A Hugging Face model folder, or a PEFT adapter on its base, behind LangChain's HuggingFacePipeline.

The pipeline holds model and tokenizer; the prompt does not go through it. ChatHuggingFace would render
text and tokenize that as a whole, so that `<|im_end|>` in a message becomes a real end of turn and a
BOS that the template writes comes twice. Here token ids go in, made as training and chat make them.
"""

import json
import logging
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models.chat_models import generate_from_stream
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    HumanMessage,
    SystemMessage,
)
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline
from pydantic import PrivateAttr

from integration._cli import MODEL, CommandError
from integration.backend import Tool
from integration.decoding import Settings, answer_room
from integration.hardware import usable_threads
from integration.huggingface_tokens import (
    TextDecoder,
    end_tokens,
    generate_tokens,
    plain_template,
)
from integration.prompt import ChatTemplate, Message
from integration.text_model import TextModel, with_tools

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_ADAPTER, _CONFIG = "adapter_config.json", "config.json"
_ROLES = {SystemMessage: "system", HumanMessage: "user", AIMessage: "assistant"}


class PipelineChat(ChatHuggingFace):
    """ChatHuggingFace that takes its parameters per call and gives counts and finish reasons."""

    _template: ChatTemplate = PrivateAttr()
    _encode_text: Callable[[str], list[int]] = PrivateAttr()
    _busy: threading.Lock = PrivateAttr(default_factory=threading.Lock)

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self._template, self._encode_text = plain_template(self.tokenizer)

    @property
    def n_ctx(self) -> int | None:
        """Context that the model was made for, in tokens."""
        config = self.llm.pipeline.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Give the prompt's token ids, up to the assistant's turn; control tokens in it are text."""
        return self._template.encode(messages, self._encode_text)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        stream: bool | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return generate_from_stream(self._stream(messages, stop, run_manager, **kwargs))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        *,
        stream_usage: bool | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        if stop:
            raise ValueError("stop: not decoded here; integration.text_model finds stop strings")
        ids = self.encode([_to_message(message) for message in messages])
        wanted = kwargs.pop("max_tokens", Settings.max_tokens)
        limit = answer_room(len(ids), wanted, self.n_ctx or len(ids) + Settings.max_tokens)
        with self._busy:
            for chunk in self._decode(ids, limit, kwargs):
                if run_manager:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def _decode(
        self, ids: list[int], limit: int, parameters: dict[str, Any]
    ) -> Iterator[ChatGenerationChunk]:
        ends = end_tokens(self.llm.pipeline.model, self.tokenizer)
        decoder = TextDecoder(self.tokenizer)
        yield _chunk("", prompt_tokens=len(ids))
        reason = "length"
        tokens = generate_tokens(self.llm.pipeline.model, ids, limit, sorted(ends), parameters)
        try:
            for token in tokens:
                if token in ends:
                    reason = "stop"
                    break
                yield _chunk(decoder.push(token), completion_tokens=1)
        finally:
            tokens.close()
        yield _chunk(decoder.finish(), finish_reason=reason)


class HuggingFaceModel(TextModel):
    """A model in this process, run by transformers."""

    waits_for_end = True
    chat: PipelineChat

    def count_tokens(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> int:
        """Count the tokens of the prompt for these messages."""
        return len(self.chat.encode(with_tools(messages, tools)))

    def parameters(
        self, settings: Settings, timeout_s: float, schema: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Give the parameters of transformers' ``generate``."""
        sampling = {
            "do_sample": True,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
            "min_p": settings.min_p,
        }
        return {
            "max_tokens": settings.max_tokens,
            "seed": settings.seed,
            "repetition_penalty": settings.repeat_penalty,
            **(sampling if settings.temperature > 0 else {"do_sample": False}),
        }

    def explain(self, error: Exception) -> CommandError | None:
        """Give one line for what torch says, which is mostly that memory ran out."""
        if isinstance(error, CommandError):
            return error
        if isinstance(error, RuntimeError | MemoryError):
            return CommandError(
                f"model '{self.name}' could not answer: {_first_line(error)}", MODEL
            )
        return None


def load_huggingface(folder: str | Path, n_threads: int | None = None) -> TextModel:
    """Load a model that transformers can run.

    Args:
        folder: A model folder, a PEFT adapter's folder (its base is loaded too), or a hub name.
        n_threads: By default what affinity and cgroup quota allow. It counts for all of torch.

    Raises:
        CommandError: Exit 3; model, tokenizer or chat template is missing or unusable.
    """
    source = str(folder)
    base, adapter = _find_base(source)
    import torch
    from transformers import AutoTokenizer, pipeline
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()

    torch.set_num_threads(n_threads or usable_threads())
    tokenizer_source = adapter if adapter and _has_tokenizer(Path(adapter)) else base
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_source)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        if not Path(tokenizer_source).is_dir():
            raise CommandError(
                f"model '{tokenizer_source}' is no folder here, and could not be loaded from the hub "
                f"({_first_line(error)}); check the name and the connection",
                MODEL,
            ) from error
        raise CommandError(
            f"the tokenizer of '{tokenizer_source}' could not be loaded ({_first_line(error)}); "
            "expected tokenizer.json or tokenizer.model with tokenizer_config.json beside the weights",
            MODEL,
        ) from error
    if not isinstance(tokenizer.chat_template, str):
        raise CommandError(
            f"model '{source}' has no chat template, so its prompt format is unknown; save the "
            "tokenizer that trained it beside the weights (scripts.train_lora does)",
            MODEL,
        )
    model = _load_weights(base, adapter, len(tokenizer))
    llm = HuggingFacePipeline(
        pipeline=pipeline("text-generation", model=model, tokenizer=tokenizer), model_id=source
    )
    chat = PipelineChat(llm=llm, tokenizer=tokenizer)
    return HuggingFaceModel(chat, _name_of(source), chat.n_ctx)


def _find_base(source: str) -> tuple[str, str | None]:
    """Give the model to load and, where the source is one, the adapter on it."""
    path = Path(source)
    if not path.is_dir():
        if path.exists():
            raise CommandError(
                f"model '{source}' is a file, expected the folder of a Hugging Face model", MODEL
            )
        if not _HUB_NAME.fullmatch(source):
            raise CommandError(
                f"model folder '{source}' does not exist; expected a folder, or a hub name such as "
                "HuggingFaceTB/SmolLM2-135M-Instruct",
                MODEL,
            )
        return source, None
    if (path / _ADAPTER).is_file():
        return _base_of(path), source
    if not (path / _CONFIG).is_file():
        raise CommandError(
            f"model folder '{source}' has no {_CONFIG} and no {_ADAPTER}; expected a Hugging Face "
            "model or a PEFT adapter, such as outputs/<run>/adapter",
            MODEL,
        )
    return source, None


def _base_of(adapter_dir: Path) -> str:
    path = adapter_dir / _ADAPTER
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise CommandError(f"'{path}' could not be read: {_first_line(error)}", MODEL) from error
    if not base or not isinstance(base, str):
        raise CommandError(
            f"'{path}' does not name its base; expected base_model_name_or_path", MODEL
        )
    return base


def _load_weights(base: str, adapter: str | None, num_tokens: int) -> Any:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", device_map=device)
        if model.dtype == torch.float16 and device == "cpu":
            # A CPU without float16 arithmetic takes six times as long for a prompt.
            model = model.float()
        if adapter:
            model = _put_on(model, adapter, num_tokens)
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        ImportError,
        SafetensorError,
    ) as error:
        beside = f" with base '{base}'" if adapter else ""
        raise CommandError(
            f"model '{adapter or base}'{beside} could not be loaded ({_first_line(error)}); expected "
            "a folder with config.json and model.safetensors, or a hub name",
            MODEL,
        ) from error
    return model.eval()


def _put_on(model: Any, adapter: str, num_tokens: int) -> Any:
    # peft imports bitsandbytes, which warns of a kernel that nothing here needs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from peft import PeftModel

    if num_tokens > model.get_input_embeddings().num_embeddings:
        # The adapter was trained with tokens that its base does not have.
        model.resize_token_embeddings(num_tokens, mean_resizing=False)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def _name_of(source: str) -> str:
    path = Path(source).resolve()
    if not path.is_dir():
        return source
    # outputs/<run>/adapter and merged say nothing without their run.
    return path.parent.name if path.name in {"adapter", "merged"} else path.name


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _to_message(message: BaseMessage) -> Message:
    role = next((name for kind, name in _ROLES.items() if isinstance(message, kind)), None)
    if role is None:
        raise ValueError(f"a {message.type} message has no place in this model's prompt")
    return {"role": role, "content": str(message.text)}


def _chunk(
    text: str,
    prompt_tokens: int = 0,
    completion_tokens: int = 0,
    finish_reason: str | None = None,
) -> ChatGenerationChunk:
    message = AIMessageChunk(
        content=text,
        usage_metadata={
            "input_tokens": prompt_tokens,
            "output_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    )
    info = {"finish_reason": finish_reason} if finish_reason else None
    return ChatGenerationChunk(message=message, generation_info=info)
