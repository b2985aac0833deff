"""A server that speaks OpenAI's chat completions: llama-server, vLLM, Ollama, or one on the internet.

What LangChain's ChatOpenAI does and this does not: call the token limit `max_completion_tokens`, which
several local servers do not know, leave out `top_k`, `min_p` and the repetition penalty, ask a proxy
for a server on this machine, and start over after an error.
"""

import math
import os
from collections.abc import Generator, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import openai
from langchain_core.messages import BaseMessage
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from integration._cli import CONTEXT, MODEL, TIMEOUT, CommandError, log
from integration.decoding import Settings
from integration.prompt import Message
from integration.server_url import check_url, is_server_url, is_this_machine
from integration.text_model import TextModel

CONNECT_TIMEOUT_S = 10.0
# How long a server may be silent when nobody gave a time limit: a long prompt on a CPU takes minutes.
SILENCE_TIMEOUT_S = 600.0
_OPENAI_HOST = "api.openai.com"
_MAX_REASON = 300
_CONTEXT_MARKS = (
    "context_length_exceeded",
    "exceed_context_size",
    "maximum context length",
    "context size",
    "context window",
)
__all__ = ["ServerModel", "connect_server", "is_server_url"]
# What a reply of another shape raises inside openai and LangChain.
_GARBAGE = (ValueError, TypeError, KeyError, AttributeError, IndexError)


class ServerModel(TextModel):
    """A model behind a server.

    Args:
        chat: The client.
        url: Base URL, for messages.
        key: Hidden from all messages.
        n_ctx: Context in tokens, if the server says.
    """

    chat: ChatOpenAI

    def __init__(self, chat: ChatOpenAI, url: str, key: str, n_ctx: int | None) -> None:
        name = chat.model_name
        # Local servers call a model by its path.
        super().__init__(chat, name.rsplit("/", 1)[-1] if name.startswith("/") else name, n_ctx)
        self.url, self._key = url, key
        self._is_strict = urlsplit(url).hostname == _OPENAI_HOST

    def parameters(
        self, settings: Settings, timeout_s: float, schema: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Give the request's fields; those that OpenAI does not have are in ``extra_body``."""
        extra: dict[str, Any] = {}
        if schema is not None:
            # As ChatOpenAI's own parameter it would switch to another client, which checks the answer.
            answer = {"name": "answer", "schema": schema}
            extra["response_format"] = {"type": "json_schema", "json_schema": answer}
        fields = {
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "seed": settings.seed,
            # OpenAI takes four; the reader finds them all.
            **({"stop": list(settings.stop)[:4]} if settings.stop else {}),
            # The deadline itself is kept by the reader; this ends a connection that nobody reads.
            "timeout": SILENCE_TIMEOUT_S if math.isinf(timeout_s) else max(0.0, timeout_s) + 1.0,
            "extra_body": extra,
        }
        if self._is_strict:
            return {**fields, "max_tokens": settings.max_tokens}
        extra |= {
            "max_tokens": settings.max_tokens,
            "top_k": settings.top_k,
            "min_p": settings.min_p,
            # llama-server's name, and vLLM's.
            "repeat_penalty": settings.repeat_penalty,
            "repetition_penalty": settings.repeat_penalty,
        }
        return fields

    def chunks(
        self, messages: Sequence[Message], parameters: dict[str, Any]
    ) -> Generator[BaseMessage, None, None]:
        """Stream one answer, with a second try for servers that know less than llama-server.

        One that refuses fields beyond OpenAI's is asked without them, and one that cannot stream for
        the whole answer.
        """
        begun = ended = False
        plainer: Iterator[BaseMessage]
        try:
            for chunk in self.chat.stream(list(messages), **parameters):
                begun = True
                ended |= "finish_reason" in chunk.response_metadata
                yield chunk
            if not ended:
                raise CommandError(f"server {self.url}: the answer broke off; try again", MODEL)
            return
        except openai.APIStatusError as error:
            extra = parameters["extra_body"]
            # llama-cpp-python's server calls it its own failure when it does not know `json_schema`.
            refusals = {400, 422, 500} if "response_format" in extra else {400, 422}
            if not extra or error.status_code not in refusals or _is_about_context(error):
                raise
            log(
                f"note: the server refused the request ({self._reason(error)}); asking again with "
                "OpenAI's own fields only"
            )
            kept = {name: extra[name] for name in ("max_tokens",) if name in extra}
            plainer = self.chat.stream(list(messages), **{**parameters, "extra_body": kept})
        except ValueError:
            if begun:
                raise
            plainer = iter([self.chat.invoke(list(messages), **parameters)])
        yield from plainer

    def explain(self, error: Exception) -> CommandError | None:
        """Give one line for what went wrong on the way, or at the server."""
        if isinstance(error, CommandError):
            return error
        line = self._line(error)
        return CommandError(f"server {self.url}: {line[0]}", line[1]) if line else None

    def _line(self, error: Exception) -> tuple[str, int] | None:
        status = getattr(error, "status_code", None)
        reason = (f"HTTP {status}: " if status else "") + self._reason(error)
        if isinstance(error, openai.APIError) and _is_about_context(error):
            return f"{reason}; shorten the prompt or the history", CONTEXT
        lines: list[tuple[tuple[type[Exception], ...], str, int]] = [
            ((openai.APITimeoutError,), "it did not answer in time; raise --timeout", TIMEOUT),
            ((openai.APIConnectionError,), f"no connection ({reason}); is it running?", MODEL),
            (
                (openai.AuthenticationError, openai.PermissionDeniedError),
                f"it refused the key ({reason}); set OPENAI_API_KEY",
                MODEL,
            ),
            (
                (openai.NotFoundError,),
                f"no such path or model ({reason}); expected a base URL, most end in /v1",
                MODEL,
            ),
            ((openai.APIError,), f"it failed ({reason})", MODEL),
            (
                _GARBAGE,
                f"it sent no chat completion ({reason}); expected an OpenAI-compatible server",
                MODEL,
            ),
        ]
        return next((line[1:] for line in lines if isinstance(error, line[0])), None)

    def _reason(self, error: Exception) -> str:
        """Give what an error says, in one line that is fit for a terminal and without the key."""
        body = getattr(error, "body", None)
        said = body.get("message") if isinstance(body, dict) else None
        while isinstance(error, openai.APIConnectionError) and isinstance(
            error.__cause__, Exception
        ):
            error = error.__cause__
        text = str(said or error or type(error).__name__)
        if self._key:
            text = text.replace(self._key, "***")
        text = "".join(letter if letter.isprintable() else " " for letter in text)
        text = " ".join(text.split())
        return text if len(text) <= _MAX_REASON else f"{text[:_MAX_REASON]}…"


def connect_server(url: str, model: str | None = None, api_key: str | None = None) -> TextModel:
    """Connect to a server.

    Args:
        url: Base URL, such as ``http://127.0.0.1:8080/v1``; a URL without a path gets ``/v1``.
        model: Name of the model; by default the first that the server lists.
        api_key: By default the environment's OPENAI_API_KEY; a local server mostly needs none.

    Raises:
        CommandError: Exit 2 for a malformed URL, 3 for a server that is not usable, 6 for one that
            does not answer in time.
    """
    url, host = check_url(url)
    key = api_key or os.environ.get("OPENAI_API_KEY") or ""
    is_here = is_this_machine(host)
    is_encrypted = url.lower().startswith("https://")
    if not is_encrypted and not is_here:
        log(f"warning: {url} is another machine and no https: text and key travel unencrypted")
    local: dict[str, Any] = {}
    if is_here:
        # What stays on this machine goes through no proxy; without https, no certificates are read.
        client = openai.DefaultHttpxClient(trust_env=False, verify=is_encrypted)
        local = {"http_client": client, "openai_proxy": ""}
    chat = ChatOpenAI(
        base_url=url,
        api_key=SecretStr(key or "none"),
        model=model or "default",
        max_retries=0,
        stream_usage=True,
        use_responses_api=False,
        **local,
    )
    server = ServerModel(chat, url, key, None)
    if model:
        return server
    try:
        found = list(chat.root_client.models.list(timeout=CONNECT_TIMEOUT_S).data)
        name, n_ctx = found[0].id, _context_of(found[0])
    except (openai.APIError, *_GARBAGE) as error:
        line = server.explain(error)
        assert line is not None
        raise line from error
    if len(found) > 1:
        log(f"note: the server has {len(found)} models; using '{name}'")
    chat.model_name = name
    return ServerModel(chat, url, key, n_ctx)


def _context_of(model: Any) -> int | None:
    """Read the context that vLLM (``max_model_len``) or llama-server (``meta.n_ctx``) tells."""
    extra = model.model_extra or {}
    meta = extra.get("meta")
    size = extra.get("max_model_len") or (meta.get("n_ctx") if isinstance(meta, dict) else None)
    return size if isinstance(size, int) else None


def _is_about_context(error: openai.APIError) -> bool:
    text = f"{error} {error.body}".lower()
    return any(mark in text for mark in _CONTEXT_MARKS)
