"""One request to one answer: calls are validated, run, repaired once, never run when cut off."""

import time
from threading import RLock

import pytest

from integration import agent
from integration.agent import CallRecord, respond, run_call
from integration.backend import AUTO, NONE, Turn
from integration.decoding import Answer, Settings
from tools import TOOLS
from tools.protocol import ToolCall, render_tool_call

REQUEST = [{"role": "user", "content": "Wrap this to 20 columns: one two three four five six"}]
GOOD = ToolCall("text_formatter", {"text": "one two three four five six", "width": 20})
BAD = ToolCall("text_formatter", {"text": "one", "width": 20, "indent": 20})


def other_call(number: int) -> ToolCall:
    return ToolCall("text_formatter", {"text": "one", "width": 20 + number})


class Scripted:
    """A backend that does what a test says: turns in order, plain text when they are over."""

    name, n_ctx = "scripted", None

    def __init__(self, *turns: ToolCall | Turn) -> None:
        self.lock = RLock()
        self.left = list(turns)
        self.asked: list[dict] = []

    def turn(self, messages, settings, tools=(), tool_choice=AUTO, deadline=float("inf")):
        asked = {"messages": list(messages), "settings": settings, "tools": tools}
        self.asked.append({**asked, "choice": tool_choice, "deadline": deadline})
        if self.left and tool_choice == AUTO:
            turn = self.left.pop(0)
            if isinstance(turn, ToolCall):
                turn = Turn(render_tool_call(turn), turn, answer=Answer("", "stop", 50, 9))
            return turn
        yield "the "
        yield "answer"
        return Turn("the answer", answer=Answer("the answer", "stop", 70, 2, 0.1, 0.5, seed=7))

    def stream(self, steps):
        return (yield from steps)


def ask(backend, **options):
    return respond(backend, REQUEST, Settings(), TOOLS, **options)


def test_call_is_run_and_its_result_goes_back_to_the_model():
    backend, calls, texts = Scripted(GOOD), [], []
    reply = ask(backend, on_call=calls.append, on_text=texts.append)
    (call,) = reply.tool_calls
    assert call is calls[0]
    assert (call.result, call.arguments) == ("one two three four\nfive six", GOOD.arguments)
    assert (reply.text, texts, reply.error) == ("the answer", ["the ", "answer"], None)
    assert (reply.prompt_tokens, reply.completion_tokens, reply.seed) == (120, 11, 7)
    assert backend.asked[-1]["messages"] == [
        *REQUEST,
        {"role": "assistant", "content": render_tool_call(GOOD)},
        {
            "role": "user",
            "content": "<tool_response>\none two three four\nfive six\n</tool_response>",
        },
    ]
    assert [*REQUEST, *reply.turns] == [
        *backend.asked[-1]["messages"],
        {"role": "assistant", "content": "the answer"},
    ]


def test_result_is_copied_without_sampling():
    backend = Scripted(GOOD)
    ask(backend)
    before, after = (asked["settings"] for asked in backend.asked)
    assert (before.temperature, before.repeat_penalty, before.stop) == (0.2, 1.1, ())
    assert (after.temperature, after.repeat_penalty) == (0.0, 1.0)
    assert "</tool_response>" in after.stop


def test_invalid_arguments_are_repaired_once():
    """Case 7: the typed error goes back to the model."""
    backend = Scripted(BAD, GOOD)
    reply = ask(backend)
    assert [call.error is None for call in reply.tool_calls] == [False, True]
    assert "indent" in reply.tool_calls[0].error
    assert reply.tool_calls[0].error in backend.asked[1]["messages"][-1]["content"]
    assert reply.error is None


def test_second_failure_is_reported():
    worse = ToolCall("text_formatter", {"text": "two", "width": 20, "indent": 30})
    reply = ask(Scripted(BAD, worse, GOOD))
    assert len(reply.tool_calls) == 2
    assert reply.error == reply.tool_calls[1].error
    assert reply.text == ""


@pytest.mark.parametrize("reason", ["length", "timeout"])
def test_call_that_was_cut_off_is_never_run(reason, monkeypatch):
    """Trap 12, case 5: stock streams a valid-looking truncated call."""
    monkeypatch.setattr(agent, "run_call", lambda *_: pytest.fail("the call was run"))
    cut = Turn('<tool_call>{"name"', None, "cut off after 3 tokens", Answer("", reason, 50, 3))
    reply = ask(Scripted(cut, GOOD))
    assert (reply.finish_reason, len(reply.tool_calls)) == (reason, 1)
    assert (reply.tool_calls[0].result, "cut off" in reply.error) == (None, True)


def test_call_that_is_no_json_is_shown_to_the_model_once():
    broken = Turn("<tool_call>{", None, "the call is no JSON", Answer("", "stop", 50, 3))
    backend = Scripted(broken, GOOD)
    reply = ask(backend)
    assert (reply.error, reply.text) == (None, "the answer")
    assert "is no JSON" in backend.asked[1]["messages"][-1]["content"]
    assert backend.asked[1]["messages"][-2]["content"] == "<tool_call>{"


def test_repeated_call_ends_the_loop():
    backend = Scripted(GOOD, GOOD, GOOD)
    reply = ask(backend)
    assert len(reply.tool_calls) == 1
    assert [asked["choice"] for asked in backend.asked] == [AUTO, AUTO, NONE]
    assert reply.text == "the answer"


def test_chain_has_an_end():
    """Case 9: an endless tool loop."""
    backend = Scripted(*map(other_call, range(20)))
    reply = ask(backend)
    assert len(reply.tool_calls) == agent.MAX_CALLS
    assert backend.asked[-1]["choice"] == NONE
    assert reply.text == "the answer"


def test_without_tools_there_is_one_turn():
    backend = Scripted()
    assert respond(backend, REQUEST, Settings()).text == "the answer"
    assert [asked["tools"] for asked in backend.asked] == [()]


@pytest.mark.parametrize("approved", [True, False])
def test_each_call_is_approved_first(approved, monkeypatch):
    ran, seen = [], []
    monkeypatch.setattr(
        agent, "run_call", lambda call, _: ran.append(call) or run_call(call, TOOLS)
    )
    reply = ask(Scripted(GOOD), approve=lambda call: seen.append(call) or approved)
    assert (seen, ran) == ([GOOD], [GOOD] if approved else [])
    assert (reply.tool_calls[0].error is None) is approved
    assert reply.text == "the answer"


def test_dry_run_shows_the_call_and_runs_none(monkeypatch):
    ran = []
    monkeypatch.setattr(
        agent, "run_call", lambda call, _: ran.append(call) or run_call(call, TOOLS)
    )
    reply = ask(Scripted(GOOD), dry_run=True)
    assert [(call.name, call.arguments) for call in reply.tool_calls] == [
        (GOOD.name, GOOD.arguments)
    ]
    assert (reply.tool_calls[0].result, reply.error, reply.text, ran) == (None, None, "", [])
    assert ask(Scripted(), dry_run=True).text == "the answer"
    ask(Scripted(GOOD))
    assert ran == [GOOD]


def test_dry_run_tells_of_a_call_that_is_none():
    backend = Scripted(Turn("<tool_call>{", error="the call has no end"), GOOD)
    reply = ask(backend, dry_run=True)
    assert [call.name for call in reply.tool_calls] == [""]
    assert "the call has no end" in reply.error
    assert len(backend.asked) == 1


def test_time_limit_is_that_of_the_whole_reply():
    backend = Scripted(GOOD)
    started = time.monotonic()
    respond(backend, REQUEST, Settings(timeout_s=60), TOOLS)
    first, second = (asked["deadline"] for asked in backend.asked)
    assert first == second == pytest.approx(started + 60, abs=5)


def test_stream_that_is_left_early_is_closed():
    """Case 14: whoever stops listening stops the answer."""
    closed = []

    class Watched(Scripted):
        def stream(self, steps):
            try:
                return (yield from steps)
            finally:
                closed.append(True)

    def leave(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(Watched(), on_text=leave)
    assert closed == [True]


def test_unknown_tool_names_the_choices():
    record = run_call(ToolCall("rm", {}), TOOLS)
    assert record.error == (
        "error: no tool 'rm'; expected one of text_formatter, template_generator, content_validator"
    )


def test_record_has_the_fields_of_the_contract():
    record = CallRecord("a", {"x": 1}, "done")
    assert record.to_json() == {"name": "a", "args": {"x": 1}, "result": "done", "error": None}
