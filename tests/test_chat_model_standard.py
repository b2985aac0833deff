"""LangChain's own tests of chat models, and a few of ours, against the embedded 135M model."""

import inspect
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from integration.chat_model import TomeforgeChat
from integration.models import load_model
from tools import TOOLS

pytestmark = pytest.mark.model

# The suite leaves it to its user to say which tests are coroutines, and refuses those that are overridden.
for _test in vars(ChatModelIntegrationTests).values():
    if inspect.iscoroutinefunction(_test):
        pytest.mark.asyncio(_test)


@pytest.fixture(scope="module")
def backend(embedded_gguf):
    return load_model(embedded_gguf, n_ctx=4096, n_threads=1)


class _OverTheEmbeddedModel:
    """What both suites are told: the model reads text alone (their default), and is one file."""

    backend: Any

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _attach(cls, backend):
        cls.backend = backend

    @property
    def chat_model_class(self):
        return TomeforgeChat

    @property
    def supports_model_override(self):
        return False


class TestUnit(_OverTheEmbeddedModel, ChatModelUnitTests):
    @property
    def chat_model_params(self):
        return {"backend": self.backend}


class TestIntegration(_OverTheEmbeddedModel, ChatModelIntegrationTests):
    @property
    def chat_model_params(self):
        # A few words, or one sentence, are enough.
        stop = [".", "!", "?", "\n"]
        return {"backend": self.backend, "temperature": 0, "max_tokens": 8, "stop": stop}

    @property
    def structured_output_kwargs(self):
        return {"max_tokens": 96}

    @pytest.mark.xfail(reason="left to choose, a model that was not trained on calls just answers")
    @pytest.mark.parametrize("model", [{}, {"output_version": "v1"}], indirect=True)
    def test_agent_loop(self, model):
        super().test_agent_loop(model)


@pytest.fixture
def model(backend):
    return TomeforgeChat(backend=backend, temperature=0, max_tokens=6)


QUESTIONS = ["Name a fruit.", "Count to five.", "What is rain?"]


def test_threads_answer_like_one(model):
    """Trap 20: one llama.cpp context in several threads aborts the process."""
    alone = [model.invoke(question).text for question in QUESTIONS]

    def read(question):
        return "".join(str(chunk.content) for chunk in model.stream(question))

    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        assert list(pool.map(read, QUESTIONS)) == alone
    assert len(set(alone)) == len(QUESTIONS)


def test_streams_that_were_left_do_not_use_up_the_backend(model, backend):
    expected = model.invoke(QUESTIONS[0]).text
    for _ in range(2):  # one sequence: a stream that kept it would leave none
        stream = model.stream(QUESTIONS[0])
        next(stream)
        stream.close()
    assert model.invoke(QUESTIONS[0]).text == expected


def test_tokens_are_counted_as_the_prompt_has_them(model):
    question = HumanMessage(QUESTIONS[0])
    used = model.invoke([question]).usage_metadata["input_tokens"]
    assert model.get_num_tokens_from_messages([question]) == used
    assert model.get_num_tokens("one two three") == 3
    used = model.bind_tools(TOOLS[:1]).invoke([question]).usage_metadata["input_tokens"]
    assert model.get_num_tokens_from_messages([question], tools=TOOLS[:1]) == used


def test_forced_call_quotes_the_request(model):
    """`verbatim` survives LangChain: without it the model makes up a text."""
    bound = model.bind_tools(TOOLS[:1], tool_choice="text_formatter")
    request = "Wrap: The quick brown fox."
    (call,) = bound.invoke(request).tool_calls
    assert call["args"]["text"] in request
