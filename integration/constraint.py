"""What a tool call may look like: a grammar from the tools' schemas, as token masks (llguidance).

The model decides whether to call and which tool; the grammar keeps a call well-formed, and copies of
the user's text exact: an argument marked ``verbatim`` in its schema must be a span of the request.
"""

import json
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from langchain_core.tools import BaseTool

from tools.protocol import CALL_END, CALL_START, tool_schema

_MAX_SPAN_SOURCE = 20_000
# Spacing of json.dumps, which wrote the calls in the training data.
_JSON_STYLE = {
    "x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
}
_KEPT_KEYWORDS = [
    "type",
    "enum",
    "minimum",
    "maximum",
    "items",
    "minItems",
    "maxItems",
    "properties",
    "additionalProperties",
    "required",
]


def _plain_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Reduce a pydantic schema to what shapes the JSON; optional types lose their null."""
    variants = [part for part in schema.get("anyOf", ()) if part.get("type") != "null"]
    if variants:
        return _plain_schema(variants[0])
    kept = {key: schema[key] for key in _KEPT_KEYWORDS if key in schema}
    for key in ("items", "additionalProperties"):
        if isinstance(kept.get(key), dict):
            kept[key] = _plain_schema(kept[key])
    return kept


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escaped_characters(text: str) -> list[str]:
    return [_quoted(character)[1:-1] for character in text]


def call_grammar(tools: Sequence[BaseTool], request: str) -> str:
    """Write the Lark grammar of one tool call.

    Args:
        tools: Tools that may be called.
        request: What the user wrote; ``verbatim`` arguments are spans of it.

    Returns:
        A grammar in llguidance's Lark dialect.
    """
    rules = [
        f"start: {_quoted(CALL_START)} ({' | '.join(tool.name for tool in tools)}) {_quoted(CALL_END)}"
    ]
    chunks = _escaped_characters(request[-_MAX_SPAN_SOURCE:])
    rules.append(f"SPAN: %regex {json.dumps({'substring_chunks': chunks or ['']})}")
    for tool in tools:
        schema = tool_schema(tool)
        required = set(schema.get("required", ()))
        head = f'{{"name": {_quoted(tool.name)}, "arguments": {{'
        parts = [_quoted(head)]
        for position, (name, value) in enumerate(schema["properties"].items()):
            key = _quoted(("" if position == 0 else ", ") + f"{_quoted(name)}: ")
            if value.get("verbatim"):
                part = f'{key} "\\"" SPAN "\\""'
            else:
                part = f"{key} %json {json.dumps({**_plain_schema(value), **_JSON_STYLE})}"
            parts.append(part if name in required else f"({part})?")
        parts.append(_quoted("}}"))
        rules.append(f"{tool.name}: {' '.join(parts)}")
    return "\n".join(rules)


# A tokenizer points into its model's vocabulary, so it must not outlive the model.
_tokenizers: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _tokenizer_for(client: Any) -> Any:
    if client not in _tokenizers:
        from llguidance.llamacpp import lltokenizer_from_vocab

        _tokenizers[client] = lltokenizer_from_vocab(client._model.vocab)
    return _tokenizers[client]


class CallConstraint:
    """Walks one tool call token by token.

    Args:
        client: The loaded ``llama_cpp.Llama``.
        grammar: A grammar of ``call_grammar``.

    Raises:
        ValueError: The grammar cannot be compiled.
    """

    def __init__(self, client: Any, grammar: str) -> None:
        import llguidance
        from llguidance.numpy import allocate_token_bitmask

        self._tokenizer = _tokenizer_for(client)
        self._matcher = llguidance.LLMatcher(self._tokenizer, grammar)
        if self._matcher.is_error():
            raise ValueError(f"grammar: {self._matcher.get_error()}")
        self._mask = allocate_token_bitmask(1, self._tokenizer.vocab_size)

    def allowed(self, num_tokens: int) -> np.ndarray:
        """Give which tokens may come next, shape (num_tokens,), bool."""
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._mask)
        bits = np.unpackbits(self._mask[0].view(np.uint8), bitorder="little")
        return bits[:num_tokens].astype(bool)

    def advance(self, token: int) -> None:
        """Take the token that was chosen."""
        if not self._matcher.consume_token(token):
            raise ValueError(f"token {token} does not fit the grammar: {self._matcher.get_error()}")

    @property
    def finished(self) -> bool:
        """Whether the call is complete."""
        return bool(self._matcher.is_stopped())
