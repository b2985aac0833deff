"""One request to one answer: calls are validated, run, repaired once, never run when cut off."""

import pytest

from integration import agent
from integration.agent import CallRecord, begins_call, choose, respond, run_call, with_tool_list
from integration.decoding import Answer, Settings
from integration.llm import load_model
from tools import TOOLS
from tools.protocol import ToolCall, render_tool_call, tool_prompt

pytestmark = pytest.mark.model
REQUEST = [{"role": "user", "content": "Wrap this to 20 columns: one two three four five six"}]
GOOD = ToolCall("text_formatter", {"text": "one two three four five six", "width": 20})
BAD = ToolCall("text_formatter", {"text": "one", "width": 20, "indent": 20})


@pytest.fixture(scope="module")
def model(embedded_gguf):
    return load_model(embedded_gguf, n_ctx=2048, n_threads=1)


@pytest.fixture
def script(monkeypatch):
    """Let the model 'decide' what a test says: calls in order, then plain text."""

    def install(*calls: ToolCall, reason: str = "stop") -> None:
        left = list(calls)

        def decide(model, ids, may_call=True):
            wanted = may_call and left
            return model.tokenize_plain("<tool_call>")[0] if wanted else choose(model, ids, False)

        monkeypatch.setattr(agent, "choose", decide)

        def decode(model, ids, constraint, limit, deadline):
            text = render_tool_call(left.pop(0))
            return text, Answer(text, reason, len(ids), 9)

        monkeypatch.setattr(agent, "decode_call", decode)

    return install


def ask(model, **settings):
    return respond(model, REQUEST, Settings(max_tokens=24, temperature=0, **settings), TOOLS)


def test_call_is_run_and_its_result_goes_back_to_the_model(model, script):
    script(GOOD)
    reply = ask(model)
    (call,) = reply.tool_calls
    assert call.result == "one two three four\nfive six"
    assert call.arguments == GOOD.arguments
    assert reply.error is None
    assert reply.completion_tokens > 9


def test_result_is_in_the_prompt_of_the_answer(model, script, monkeypatch):
    script(GOOD)
    prompts = []
    original = type(model).encode_messages
    monkeypatch.setattr(
        type(model),
        "encode_messages",
        lambda self, messages: prompts.append(list(messages)) or original(self, messages),
    )
    ask(model)
    assert prompts[-1][-1]["content"] == (
        "<tool_response>\none two three four\nfive six\n</tool_response>"
    )
    assert prompts[-1][-2]["content"] == render_tool_call(GOOD)


def test_invalid_arguments_are_repaired_once(model, script):
    script(BAD, GOOD)
    reply = ask(model)
    assert [call.error is None for call in reply.tool_calls] == [False, True]
    assert "indent" in reply.tool_calls[0].error
    assert reply.error is None


def test_second_failure_is_reported(model, script):
    script(BAD, ToolCall("text_formatter", {"text": "two", "width": 20, "indent": 30}))
    reply = ask(model)
    assert len(reply.tool_calls) == 2
    assert reply.error == reply.tool_calls[1].error
    assert reply.text == ""


def test_call_that_was_cut_off_is_never_run(model, script):
    script(GOOD, reason="length")
    reply = ask(model)
    assert reply.tool_calls[0].result is None
    assert "cut off" in reply.error


def test_call_that_takes_too_long_is_cut_off(model, monkeypatch):
    call_start = model.tokenize_plain("<tool_call>")[0]
    monkeypatch.setattr(agent, "choose", lambda model, ids: model.prefill(ids) or call_start)
    reply = ask(model, timeout_s=1e-6)
    assert reply.finish_reason == "timeout"
    assert reply.tool_calls[0].result is None


def test_answer_after_the_last_call_is_no_call(model, script):
    script(*(ToolCall("text_formatter", {"text": "one", "width": 20 + n}) for n in range(20)))
    call_start = model.tokenize_plain(render_tool_call(GOOD))[0]
    assert not ask(model).text.startswith(model.piece(call_start).decode())


def test_repeated_call_ends_the_loop(model, script):
    script(GOOD, GOOD, GOOD)
    assert len(ask(model).tool_calls) == 1


def test_chain_has_an_end(model, script):
    script(*(ToolCall("text_formatter", {"text": "one", "width": 20 + n}) for n in range(20)))
    assert len(ask(model).tool_calls) == agent.MAX_CALLS


def test_untrained_model_forced_to_call_still_makes_a_valid_one(model, monkeypatch):
    """Not the choice, but the form: the real decoder under the real grammar."""
    turns = []

    def force(model, ids, may_call=True):
        turns.append(ids)
        first = choose(model, ids, may_call=False)
        return model.tokenize_plain("<tool_call>")[0] if len(turns) == 1 else first

    monkeypatch.setattr(agent, "choose", force)
    reply = ask(model)
    (call,) = reply.tool_calls
    assert call.name in {tool.name for tool in TOOLS}
    assert call.error is None or call.error.startswith("error: ")


def test_plain_model_answers_small_talk_without_a_call(model):
    prompt = with_tool_list([{"role": "user", "content": "Say hello."}], TOOLS)
    assert not begins_call(model, choose(model, model.encode_messages(prompt)))


def test_call_start_is_recognised(model):
    first = model.tokenize_plain(render_tool_call(GOOD))[0]
    assert begins_call(model, first)


def test_plain_answer_begins_with_the_token_that_was_chosen(model):
    """Sampling again could open a call that no grammar guards."""
    ids = model.encode_messages(REQUEST)
    first = choose(model, ids)
    texts = "".join(model.stream_ids(ids, Settings(max_tokens=5, temperature=2.0), [first]))
    assert texts.startswith(model.piece(first).decode())
    assert model.last_answer.completion_tokens == 5


def test_without_tools_there_is_no_tool_list(model, monkeypatch):
    seen = []
    original = type(model).encode_messages
    monkeypatch.setattr(
        type(model),
        "encode_messages",
        lambda self, messages: seen.append(str(messages)) or original(self, messages),
    )
    respond(model, REQUEST, Settings(max_tokens=4))
    assert tool_prompt(TOOLS) not in seen[0]


def test_unknown_tool_names_the_choices():
    record = run_call(ToolCall("rm", {}), TOOLS)
    assert record.error == (
        "error: no tool 'rm'; expected one of text_formatter, template_generator, content_validator"
    )


def test_record_has_the_fields_of_the_contract():
    record = CallRecord("a", {"x": 1}, "done")
    assert record.to_json() == {"name": "a", "args": {"x": 1}, "result": "done", "error": None}
