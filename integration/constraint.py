"""What a tool call may look like: a grammar from the tools' schemas, as token masks (llguidance).

The model decides whether to call and which tool; the grammar keeps a call well-formed, and copies of
the user's text exact: what is marked ``verbatim`` in its schema must be a span of the request, from
one end of a word to another.
"""

import json
import re
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from integration.backend import Tool
from integration.engine import Engine
from tools.protocol import CALL_END, CALL_START, ToolDefinition, tool_schema

_MAX_SPAN_SOURCE = 20_000
_MAX_COMPILED = 32
# A copy begins and ends between these: a word is never cut in two.
_WHOLE = re.compile(r"\w+|\s|[^\w\s]")
# Spacing of json.dumps, which wrote the calls in the training data. What llguidance does not know of a
# foreign schema is left to the validation behind it.
_JSON_STYLE = {
    "x-guidance": {
        "whitespace_flexible": False,
        "item_separator": ", ",
        "key_separator": ": ",
        "lenient": True,
    }
}
_SPAN = '"\\"" SPAN "\\""'
_ANY_STRING = '%json {"type": "string"}'
# What shapes JSON. Lengths are left out: long ones make grammars of megabytes.
_KEPT_KEYWORDS = (
    "type", "enum", "const", "pattern", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
    "minItems", "maxItems", "required", "$ref",
)  # fmt: skip
_SCHEMAS = ("items", "additionalProperties")
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMA_MAPS = ("properties", "$defs", "definitions")


def _plain_schema(schema: Any) -> Any:
    """Reduce a JSON schema to what shapes the JSON; optional types lose their null."""
    if not isinstance(schema, dict):
        return schema
    kept = {key: schema[key] for key in _KEPT_KEYWORDS if key in schema}
    for key in _SCHEMAS:
        if key in schema:
            kept[key] = _plain_schema(schema[key])
    for key in _SCHEMA_LISTS:
        if key in schema:
            kept[key] = [_plain_schema(part) for part in schema[key]]
    for key in _SCHEMA_MAPS:
        if key in schema:
            kept[key] = {name: _plain_schema(value) for name, value in schema[key].items()}
    if "anyOf" in kept:
        variants = [part for part in kept["anyOf"] if part.get("type") != "null"]
        if len(variants) == 1:
            return variants[0]
        kept["anyOf"] = variants or kept["anyOf"]
    return kept


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escaped_words(text: str) -> list[str]:
    return [_quoted(word)[1:-1] for word in _WHOLE.findall(text)]


def call_grammar(tools: Sequence[Tool], request: str) -> str:
    """Write the Lark grammar of one tool call.

    Args:
        tools: Tools that may be called.
        request: What the user wrote; ``verbatim`` arguments are spans of it.

    Returns:
        A grammar in llguidance's Lark dialect.
    """
    names = [f"tool_{number}" for number in range(len(tools))]
    rules = [f"start: {_quoted(CALL_START)} ({' | '.join(names)}) {_quoted(CALL_END)}"]
    chunks = _escaped_words(request[-_MAX_SPAN_SOURCE:])
    rules.append(f"SPAN: %regex {json.dumps({'substring_chunks': chunks or ['']})}")
    for rule, tool in zip(names, tools, strict=True):
        schema = tool.schema if isinstance(tool, ToolDefinition) else tool_schema(tool)
        head = f'{{"name": {_quoted(tool.name)}, "arguments": {{'
        rules.append(f"{rule}: {_quoted(head)} {_arguments(schema)} {_quoted('}}')}")
    return "\n".join(rules)


def _arguments(schema: dict[str, Any]) -> str:
    """Write the members of an object, in the order of the schema, optional ones left out or not."""
    required = set(schema.get("required", ()))
    # Where a comma goes depends on what was written before, so there is one form of each tail for
    # "nothing yet" and one for "go on".
    first, rest = '""', '""'
    for name, value in reversed(list(schema.get("properties", {}).items())):
        key, body = _quoted(f"{_quoted(name)}: "), _value(value, schema)
        again = f"({_quoted(', ')} {key} {body})"
        if name in required:
            first, rest = f"{key} {body} {rest}", f"{again} {rest}"
        else:
            first, rest = f"({key} {body} {rest} | {first})", f"{again}? {rest}"
    return first


def _value(value: dict[str, Any], schema: dict[str, Any]) -> str:
    if value.get("verbatim"):
        return _SPAN
    if (values := _verbatim_values(value)) is not None:
        return values
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    return f"%json {json.dumps({**_plain_schema({**value, **shared}), **_JSON_STYLE})}"


def _verbatim_values(value: dict[str, Any]) -> str | None:
    """Write an object of any names whose values are all spans; None for another schema."""
    for variant in (value, *value.get("anyOf", ())):
        members = variant.get("additionalProperties")
        if isinstance(members, dict) and members.get("verbatim"):
            names = value.get("propertyNames", {}).get("enum")
            key = " | ".join(_quoted(_quoted(name)) for name in names) if names else _ANY_STRING
            member = f'({key}) ": " {_SPAN}'
            return f'"{{" ({member} (", " {member})*)? "}}"'
    return None


def json_grammar(schema: dict[str, Any]) -> str:
    """Write the grammar of an answer that is JSON of a schema."""
    return f"start: %json {json.dumps({**_plain_schema(schema), **_JSON_STYLE})}"


class _Compiler:
    """An engine's tokenizer as llguidance wants it, and the grammars compiled for it."""

    def __init__(self, engine: Engine) -> None:
        from llguidance.llamacpp import lltokenizer_from_vocab

        self.tokenizer = lltokenizer_from_vocab(engine.vocab)
        self._matchers: OrderedDict[str, Any] = OrderedDict()

    def matcher(self, grammar: str) -> Any:
        """Give a fresh matcher; compiling is done once for a grammar."""
        import llguidance

        if grammar not in self._matchers:
            self._matchers[grammar] = llguidance.LLMatcher(self.tokenizer, grammar)
            if len(self._matchers) > _MAX_COMPILED:
                self._matchers.popitem(last=False)
        return self._matchers[grammar].deep_copy()


# A tokenizer points into its model's vocabulary, so it must not outlive the model.
_compilers: weakref.WeakKeyDictionary[Engine, _Compiler] = weakref.WeakKeyDictionary()


class Constraint:
    """Walks text of a grammar token by token.

    Args:
        engine: Whose tokens they are.
        grammar: A grammar of ``call_grammar`` or ``json_grammar``; compiled once.

    Raises:
        ValueError: The grammar cannot be compiled.
    """

    def __init__(self, engine: Engine, grammar: str) -> None:
        from llguidance.numpy import allocate_token_bitmask

        if engine not in _compilers:
            _compilers[engine] = _Compiler(engine)
        self._matcher = _compilers[engine].matcher(grammar)
        if self._matcher.is_error():
            raise ValueError(f"grammar: {self._matcher.get_error()}")
        self._mask = allocate_token_bitmask(1, _compilers[engine].tokenizer.vocab_size)

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

    def next_tokens(self, logits: np.ndarray, pick: Callable[[np.ndarray], int]) -> list[int]:
        """Take a token that is allowed, and those to which there is no alternative then.

        Args:
            logits: Shape (vocabulary,), float32; those of forbidden tokens may become -inf.
            pick: Draws a token from the logits.

        Returns:
            One token or more, as the tokenizer would cut the text.
        """
        token = pick(logits)
        # A model that was trained on calls mostly wants what is allowed: then no mask is needed.
        if not self._matcher.validate_tokens([token]):
            logits[~self.allowed(len(logits))] = -np.inf
            token = pick(logits)
        self.advance(token)
        forced = [] if self.finished else self._matcher.compute_ff_tokens()
        for token_without_choice in forced:
            self.advance(token_without_choice)
        return [token, *forced]

    @property
    def finished(self) -> bool:
        """Whether the text is complete."""
        return bool(self._matcher.is_stopped())
