"""The call grammar: what it lets through is a valid call, copies are exact."""

import gc
import json
import random

import numpy as np
import pytest

from integration import constraint as constraint_module
from integration.constraint import Constraint, call_grammar
from integration.models import load_gguf
from tools import TOOLS
from tools.protocol import ToolCall, ToolDefinition, parse_tool_call, render_tool_call

pytestmark = pytest.mark.model
REQUEST = 'Wrap "größe\n\\ 😀" to 30 columns, please: {x}.'


@pytest.fixture(scope="module")
def model(embedded_gguf):
    return load_gguf(embedded_gguf, n_ctx=512, n_threads=1)


def accepts(model, text: str, request: str = REQUEST) -> bool:
    """Whether the grammar lets a whole call through, token by token."""
    constraint = Constraint(model.engine, call_grammar(TOOLS, request))
    for token in model.engine.tokenize(text):
        if constraint.finished or not constraint.allowed(model.engine.n_vocab)[token]:
            return False
        constraint.advance(token)
    return constraint.finished


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("text_formatter", {"text": "größe\n\\ 😀", "width": 30}),
        ("text_formatter", {"text": "Wrap"}),
        ("text_formatter", {"text": "please", "width": 400, "indent": 100}),
        ("text_formatter", {"text": "{x}", "indent": 2}),
        ("template_generator", {"template_type": "bug_report"}),
        ("template_generator", {"template_type": "email", "fields": {"subject": "30 columns"}}),
        ("template_generator", {"template_type": "email", "fields": {"body": "x", "sender": "to"}}),
        ("template_generator", {"template_type": "email", "fields": {}}),
        ("content_validator", {"text": "to 30", "rules": ["not_empty", "is_email"]}),
    ],
)
def test_valid_calls_pass(model, name, arguments):
    assert accepts(model, render_tool_call(ToolCall(name, arguments)))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("text_formatter", {"text": "not in the request"}),
        ("text_formatter", {"text": "grösse"}),
        ("text_formatter", {"text": "rap"}),
        ("text_formatter", {"text": "to 30 colum"}),
        ("text_formatter", {"text": "Wrap", "width": 9}),
        ("text_formatter", {"text": "Wrap", "width": 401}),
        ("text_formatter", {"text": "Wrap", "color": "red"}),
        ("text_formatter", {"width": 30}),
        ("template_generator", {"template_type": "poem"}),
        ("template_generator", {"template_type": "email", "fields": {"subject": "Hi"}}),
        ("template_generator", {"template_type": "email", "fields": {"colour": "30"}}),
        ("content_validator", {"text": "Wrap", "rules": []}),
        ("content_validator", {"text": "Wrap", "rules": ["is_nice"]}),
        ("rm", {}),
    ],
)
def test_invalid_calls_are_stopped(model, name, arguments):
    assert not accepts(model, render_tool_call(ToolCall(name, arguments)))


def test_a_model_that_talks_nonsense_still_makes_a_valid_call(model):
    vocabulary = model.engine.n_vocab
    for seed in range(5):
        rng, text = np.random.default_rng(seed), b""
        constraint = Constraint(model.engine, call_grammar(TOOLS, REQUEST))
        for _ in range(400):
            scores = np.where(constraint.allowed(vocabulary), rng.random(vocabulary), -1)
            token = int(scores.argmax())
            text += model.engine.piece(token)
            constraint.advance(token)
            if constraint.finished:
                break
        else:
            continue  # an endless string is the token limit's business
        call = parse_tool_call(text.decode())
        assert call.name in {tool.name for tool in TOOLS}
        if "text" in call.arguments:
            assert call.arguments["text"] in REQUEST
        assert all(value in REQUEST for value in call.arguments.get("fields", {}).values())


def test_long_hostile_requests_compile(model):
    rng = random.Random(3)
    request = "".join(rng.choice('"\\{}[]<>|\n\t😀ж漢a ') for _ in range(5000))
    text = request[request.index("{", 100) : request.index("]", 200)]
    call = ToolCall("text_formatter", {"text": text})
    assert json.loads(render_tool_call(call)[11:-12])["arguments"]["text"] == text
    assert accepts(model, render_tool_call(call), request)


def test_foreign_object_of_spans_may_have_any_names(model):
    members = {"type": "string", "verbatim": True}
    tool = ToolDefinition(
        "note", "", {"properties": {"tags": {"type": "object", "additionalProperties": members}}}
    )
    grammar = call_grammar([tool], REQUEST)

    def passes(tags: dict[str, str]) -> bool:
        constraint = Constraint(model.engine, grammar)
        for token in model.engine.tokenize(render_tool_call(ToolCall("note", {"tags": tags}))):
            if constraint.finished or not constraint.allowed(model.engine.n_vocab)[token]:
                return False
            constraint.advance(token)
        return constraint.finished

    assert passes({"any name": "columns", "other": "30"})
    assert not passes({"any name": "rows"})


def test_tokenizer_goes_with_its_model(embedded_gguf):
    """Another model may get the same address; its vocabulary must not be the old one's."""
    own = load_gguf(embedded_gguf, n_ctx=256, n_threads=1)
    before = len(constraint_module._compilers)
    Constraint(own.engine, call_grammar(TOOLS, REQUEST))
    assert len(constraint_module._compilers) == before + 1
    del own
    gc.collect()
    assert len(constraint_module._compilers) == before
