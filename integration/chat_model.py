"""A LangChain chat model over any chat backend, on langchain-core alone.

``TomeforgeChat.from_file("model.gguf")`` answers, streams, calls tools and gives structured output
with every GGUF that has a chat template, whether or not that template knows tools.
"""

import contextlib
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, Self

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.language_models.model_profile import ModelProfile
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    HumanMessage,
    ToolMessage,
    message_chunk_to_message,
)
from langchain_core.messages.utils import count_tokens_approximately
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig, RunnableMap, RunnablePassthrough
from langchain_core.runnables.config import get_config_list
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import ConfigDict, Field, field_validator, model_validator

from integration._cli import CommandError
from integration.backend import EXACT, RESULT_STOPS, Steps, Turn, run
from integration.chat_model_messages import (
    StructuredParser,
    check_history,
    to_definitions,
    to_message,
    to_openai_tools,
    to_schema,
    to_tool_choice,
    to_turns,
)
from integration.chat_model_turns import (
    Decoding,
    langchain_errors,
    run_ahead,
    take_turn,
    wanted_schema,
)
from integration.prompt import Message

# Parameters of every LangChain model that mean nothing to a local one.
_NOT_OURS = ("api_key", "max_retries", "base_url")
_CALL_OPTIONS = (
    *("tools", "tool_choice", "response_format", "strict", "parallel_tool_calls", "stream"),
    "ls_structured_output_format",
)


class TomeforgeChat(Decoding, BaseChatModel):
    """A chat model over a backend; one turn at a time, whatever the number of threads.

    Every field of ``Decoding`` can be given per call too (``invoke(…, temperature=0)`` or ``bind``),
    and then replaces the model's own. An answer right behind a tool's result copies it: temperature 0 and
    no repeat penalty, unless one is given.

    Attributes:
        backend: A ``ChatBackend``.
        streaming: True decodes ``invoke`` as a stream as well, so that callbacks see tokens; False, if
            given, turns ``stream`` into one piece.
    """

    model_config = ConfigDict(extra="forbid")

    backend: Any = Field(exclude=True, repr=False)
    streaming: bool = False

    @model_validator(mode="before")
    @classmethod
    def _drop_what_is_not_ours(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if name not in _NOT_OURS}

    @field_validator("backend")
    @classmethod
    def _is_a_backend(cls, value: Any) -> Any:
        if not hasattr(value, "turn"):
            raise ValueError(
                f"got {value!r}, expected a chat backend; load a file: TomeforgeChat.from_file(…)"
            )
        return value

    @classmethod
    def from_file(
        cls,
        spec: str | Path,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        template: str | None = None,
        **fields: Any,
    ) -> Self:
        """Load a model and make a chat model of it; see ``integration.models.load_model``.

        Args:
            spec: A GGUF file, a Hugging Face folder or hub name, or a server's URL.
            n_ctx: Context in tokens; by default the file's, as far as memory allows.
            n_threads: By default what this process may use.
            template: Name or file of a chat template in place of the model's own.
            **fields: Fields of this class.

        Raises:
            CommandError: The model cannot be loaded; the message says why.
        """
        from integration.models import load_model

        backend = load_model(spec, n_ctx=n_ctx, n_threads=n_threads, template=template)
        return cls(backend=backend, **fields)

    @property
    def model_name(self) -> str:
        """The backend's name."""
        return str(self.backend.name)

    @property
    def _llm_type(self) -> str:
        return "tomeforge"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in Decoding.model_fields}
        return {"model_name": self.model_name, **fields}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return super()._get_ls_params(stop=stop or self.stop, **kwargs)

    def _resolve_model_profile(self) -> ModelProfile:
        profile = ModelProfile(
            text_inputs=True,
            image_inputs=False,
            audio_inputs=False,
            text_outputs=True,
            tool_calling=True,
            tool_choice=True,
            structured_output=True,
        )
        if self.backend.n_ctx is not None:
            profile["max_input_tokens"] = self.backend.n_ctx
        return profile

    def get_num_tokens(self, text: str) -> int:
        """Count a text's tokens, by the backend where it can, else by the number of characters."""
        whole, frame = (
            self._count([{"role": "user", "content": content}], ()) for content in (text, "")
        )
        if whole is None or frame is None:
            return count_tokens_approximately([HumanMessage(text)], extra_tokens_per_message=0)
        return whole - frame

    def get_num_tokens_from_messages(
        self, messages: list[BaseMessage], tools: Sequence[Any] | None = None
    ) -> int:
        """Count the tokens of the prompt for these messages, chat template and tools included."""
        definitions = to_definitions(to_openai_tools(tools or ()))
        count = self._count(to_turns(messages), definitions)
        return count_tokens_approximately(messages) if count is None else count

    def _count(self, turns: list[Message], tools: Sequence[Any]) -> int | None:
        # Part of a conversation, as trimming counts it, may be something that a template refuses.
        with contextlib.suppress(CommandError):
            count: int | None = self.backend.count_tokens(turns, tools)
            return count
        return None

    def bind_tools(
        self, tools: Sequence[Any], *, tool_choice: Any = None, **kwargs: Any
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Let the model call tools.

        Args:
            tools: Tools, pydantic classes, functions or schemas.
            tool_choice: ``auto`` (also None and False), ``none``, ``any`` (also ``required`` and True),
                a tool's name, or a provider's dict that says one of these.
            **kwargs: Options of a call.

        Raises:
            ValueError: ``tool_choice`` is none of these; the message lists them.
        """
        converted = to_openai_tools(tools)
        names = [tool["function"]["name"] for tool in converted]
        choice = to_tool_choice(tool_choice, names)
        return self.bind(tools=converted, tool_choice=choice, **kwargs)

    def with_structured_output(
        self,
        schema: Any,
        *,
        include_raw: bool = False,
        method: str = "json_schema",
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Answer with a value of a schema: decoding allows nothing else, and what it misses raises.

        Args:
            schema: A pydantic class, a TypedDict or a JSON schema; the last two give dicts.
            include_raw: Give ``{"raw", "parsed", "parsing_error"}`` instead of raising.
            method: ``json_schema`` (``json_mode`` means the same here), or ``function_calling``.
            strict: Always on; taken because other models take it.
            **kwargs: Options of a call.

        Raises:
            ValueError: The method or the kind of schema is unknown.
        """
        json_schema = to_schema(schema)
        traced = {"kwargs": {"method": method}, "schema": schema}
        if method in ("json_schema", "json_mode"):
            wanted = {"type": "json_schema", "json_schema": {"schema": json_schema}}
            llm: Runnable[LanguageModelInput, AIMessage] = self.bind(
                response_format=wanted, ls_structured_output_format=traced, **kwargs
            )
        elif method == "function_calling":
            name = convert_to_openai_tool(schema)["function"]["name"]
            llm = self.bind_tools(
                [schema], tool_choice=name, ls_structured_output_format=traced, **kwargs
            )
        else:
            raise ValueError(
                f"method '{method}': expected one of json_schema, function_calling, json_mode"
            )
        is_class = isinstance(schema, type) and is_basemodel_subclass(schema)
        parser = StructuredParser(
            target=schema if is_class else None, required=json_schema.get("required", ())
        )
        if not include_raw:
            return llm | parser
        parsed = RunnablePassthrough.assign(
            parsed=itemgetter("raw") | parser, parsing_error=lambda _: None
        )
        failed = RunnablePassthrough.assign(parsed=lambda _: None)
        return RunnableMap(raw=llm) | parsed.with_fallbacks([failed], exception_key="parsing_error")

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """Answer inputs in their order: threads would only wait for each other."""
        return super().batch(inputs, _one_at_a_time(config, len(inputs)), **kwargs)

    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """Answer inputs in their order, as ``batch`` does."""
        return await super().abatch(inputs, _one_at_a_time(config, len(inputs)), **kwargs)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        steps = self._steps(messages, stop, kwargs)
        with self.backend.lock, langchain_errors():
            turn = run(self.backend, steps)
        message = message_chunk_to_message(to_message(turn, self._metadata(turn)))
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        steps = self._steps(messages, stop, kwargs)
        shown = 0
        with langchain_errors():
            for piece in run_ahead(self.backend, steps):
                if isinstance(piece, str):
                    shown += len(piece)
                    message = AIMessageChunk(content=piece)
                else:
                    message = to_message(piece, self._metadata(piece), shown)
                chunk = ChatGenerationChunk(message=message)
                if run_manager:
                    run_manager.on_llm_new_token(str(message.content), chunk=chunk)
                yield chunk

    def _steps(
        self, messages: list[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any]
    ) -> Steps[Turn]:
        known = [*Decoding.model_fields, *_CALL_OPTIONS]
        if unknown := [name for name in kwargs if name not in known]:
            raise ValueError(
                f"unknown option {', '.join(unknown)}; expected one of {', '.join(known)}"
            )
        check_history(messages)
        after_result = isinstance(messages[-1], ToolMessage)
        own = {name: getattr(self, name) for name in Decoding.model_fields}
        if after_result:
            own |= {
                name: exact for name, exact in EXACT.items() if name not in self.model_fields_set
            }
        given = {
            name: value for name, value in {"stop": stop, **kwargs}.items() if value is not None
        }
        values = {name: given.get(name, default) for name, default in own.items()}
        settings = Decoding.model_validate(values).settings()
        if after_result:
            settings.stop = [*settings.stop, *RESULT_STOPS]
        openai_tools = to_openai_tools(kwargs.get("tools") or ())
        tools = to_definitions(openai_tools)
        choice = to_tool_choice(kwargs.get("tool_choice"), [tool.name for tool in tools])
        schema = wanted_schema(kwargs.get("response_format"))
        return take_turn(self.backend, to_turns(messages), settings, tools, choice, schema)

    def _metadata(self, turn: Turn) -> dict[str, Any]:
        return {
            "model_name": self.model_name,
            "seed": turn.answer.seed,
            "first_token_s": round(turn.answer.first_token_s, 4),
            "tokens_per_second": round(turn.answer.tokens_per_second, 2),
        }


def _one_at_a_time(
    config: RunnableConfig | list[RunnableConfig] | None, length: int
) -> list[RunnableConfig]:
    return [{**each, "max_concurrency": 1} for each in get_config_list(config, length)]
