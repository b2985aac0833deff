"""A LangChain chat model as a backend: calls are whole or none, text is shown as it becomes certain."""

import json
import math
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from pydantic import Field

from integration._cli import MODEL, CommandError
from integration.backend import NONE, REQUIRED, Turn, run
from integration.decoding import Settings
from integration.text_model import TextModel
from tools import TOOLS
from tools.protocol import ToolCall, render_tool_call, system_with_tools

HELLO = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello?"}]
CALL = ToolCall("text_formatter", {"text": "one </tool_call> two", "width": 20})
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}


class ScriptedChat(BaseChatModel):
    """Streams what a test says; an exception in the script is raised, a number is waited for."""

    script: list[Any]
    reason: str = "stop"
    usage: dict[str, int] | None = None
    seen: list[Any] = Field(default_factory=list)
    events: list[str] = Field(default_factory=list)

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def _generate(self, *args: Any, **kwargs: Any) -> ChatResult:
        raise NotImplementedError

    def _stream(
        self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> Iterator[ChatGenerationChunk]:
        self.seen.append((messages, stop, kwargs))
        try:
            for part in self.script:
                if isinstance(part, Exception):
                    raise part
                if isinstance(part, float):
                    time.sleep(part)
                else:
                    yield ChatGenerationChunk(message=AIMessageChunk(content=part))
            last = AIMessageChunk(content="", usage_metadata=self.usage)
            yield ChatGenerationChunk(message=last, generation_info={"finish_reason": self.reason})
        finally:
            self.events.append("closed")


def model_of(*script: Any, **fields: Any) -> TextModel:
    return TextModel(ScriptedChat(script=list(script), **fields), "scripted")


def letters(text: str) -> list[str]:
    return list(text)


def watch(model: TextModel, *args: Any, **kwargs: Any) -> tuple[list[str], Turn]:
    """Give what was shown, piece by piece, and the turn."""
    stream = model.stream(model.turn(HELLO, *args, **kwargs))
    shown = []
    while True:
        try:
            shown.append(next(stream))
        except StopIteration as end:
            return shown, end.value


def test_plain_answer_streams_and_is_recorded():
    model = model_of("Hel", "lo", usage={"input_tokens": 7, "output_tokens": 3, "total_tokens": 10})
    shown, turn = watch(model, Settings(seed=5), TOOLS)
    assert shown == ["Hel", "lo"]
    assert (turn.text, turn.call, turn.error) == ("Hello", None, None)
    answer = turn.answer
    assert (answer.text, answer.finish_reason, answer.seed) == ("Hello", "stop", 5)
    assert (answer.prompt_tokens, answer.completion_tokens) == (7, 3)


def test_pieces_are_counted_where_nobody_counts_tokens_and_a_seed_is_drawn():
    first, second = (watch(model_of("a", "b"), Settings())[1].answer for _ in range(2))
    assert (first.completion_tokens, first.prompt_tokens) == (2, 0)
    assert first.seed != second.seed


def test_time_to_the_first_token_and_of_decoding_is_measured():
    answer = watch(model_of(0.05, "a", 0.1, "b"), Settings())[1].answer
    assert answer.first_token_s >= 0.05
    assert answer.decode_s > 0.05
    assert answer.first_token_s + answer.decode_s >= 0.15


def test_settings_and_tool_list_reach_the_chat_model():
    model = model_of("a")
    watch(model, Settings(max_tokens=9, temperature=0.5, top_p=0.7, seed=3, stop=["#"]), TOOLS)
    ((messages, stop, parameters),) = model.chat.seen
    assert [message.type for message in messages] == ["system", "human"]
    assert messages[0].content == system_with_tools("Be kind.", TOOLS)
    assert messages[1].content == "Hello?"
    wanted = {"max_tokens": 9, "temperature": 0.5, "top_p": 0.7, "seed": 3}
    assert wanted.items() <= parameters.items()
    assert stop is None  # a stop string may be text of an argument
    watch(model, Settings(stop=["#"]), TOOLS, NONE)
    assert model.chat.seen[-1][1] == ["#"]


@pytest.mark.parametrize(
    "pieces", [letters, lambda text: [text], lambda text: [text[:5], text[5:]]]
)
@pytest.mark.parametrize("before", ["", "\n "])
def test_call_is_taken_whole_and_never_shown(pieces, before):
    script = pieces(before + render_tool_call(CALL) + "\n<tool_response>made up")
    shown, turn = watch(model_of(*script), Settings(stop=["two"]), TOOLS)
    assert shown == []
    assert turn.call == CALL
    assert (turn.error, turn.text) == (None, render_tool_call(CALL))


def test_stream_is_closed_at_the_end_of_a_call():
    model = model_of(render_tool_call(CALL), *["more"] * 1000)
    _, turn = watch(model, Settings(), TOOLS)
    assert turn.call == CALL
    wait_for(lambda: model.chat.events == ["closed"])
    assert turn.answer.completion_tokens == 1
    assert turn.answer.finish_reason == "stop"


@pytest.mark.parametrize(
    ("text", "reason", "error"),
    [
        (
            '<tool_call>{"name": "text_for',
            "length",
            "cut off .the token limit was met after 29 tok",
        ),
        ('<tool_call>{"name": "a"}</tool_c', "stop", "no end: it was cut off$"),
        ('<tool_call>{"name": oops}</tool_call>', "stop", "no JSON"),
        ('<tool_call>{"arguments": {}}</tool_call>', "stop", "no name"),
        ('<tool_call>{"name": "a", "arguments": []}</tool_call>', "stop", "no object"),
        ('<tool_call>{"name": "a', "stop", "no end"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "stop", "nested too deeply"),
    ],
)
def test_bad_or_cut_call_is_an_error_and_never_a_call(text, reason, error):
    pieces = letters(text) if len(text) < 100 else [text]
    shown, turn = watch(model_of(*pieces, reason=reason), Settings(), TOOLS)
    assert (shown, turn.call) == ([], None)
    assert turn.text == text
    assert re.search(error, turn.error)


@pytest.mark.parametrize(
    "text", ["<tool_ca", "<tool box>", "<", "  \n", "a <tool_call>{}</tool_call>"]
)
def test_text_that_only_resembles_a_call_is_shown_whole(text):
    shown, turn = watch(model_of(*letters(text)), Settings(), TOOLS)
    assert "".join(shown) == turn.text == text
    assert (turn.call, turn.error) == (None, None)


def test_without_tools_and_with_none_a_call_is_text():
    text = render_tool_call(CALL)
    for arguments in [(), (TOOLS, NONE)]:
        model = model_of(*letters(text))
        shown, turn = watch(model, Settings(), *arguments)
        assert "".join(shown) == turn.text == text
        assert (turn.call, turn.error) == (None, None)
    system = model.chat.seen[0][0][0].content
    # The list stays in front, so that the server's cached prompt fits.
    assert system.startswith(system_with_tools("Be kind.", TOOLS))
    assert "call no tool" in system


@pytest.mark.parametrize(
    ("choice", "text", "error"),
    [
        (REQUIRED, render_tool_call(CALL), None),
        ("text_formatter", render_tool_call(CALL), None),
        ("content_validator", render_tool_call(CALL), "'content_validator' and called 'text_form"),
        (REQUIRED, "Sure!", "a tool and answered in plain text"),
        (REQUIRED, "<tool_call>{", "no end"),
    ],
)
def test_required_call_that_was_not_made_is_an_error(choice, text, error):
    model = model_of(text)
    shown, turn = watch(model, Settings(temperature=1.0), TOOLS, choice)
    assert shown == []
    assert turn.text == text
    assert (turn.call == CALL) == (error is None)
    assert (turn.error is None) if error is None else (error in turn.error)
    messages, _, parameters = model.chat.seen[0]
    assert parameters["temperature"] == 0
    assert "Now call" in messages[0].content


@pytest.mark.parametrize("pieces", [letters, lambda text: [text]])
def test_stop_string_ends_the_answer_and_is_not_shown(pieces):
    model = model_of(*pieces("one two END three END"), reason="length")
    shown, turn = watch(model, Settings(stop=["END", "never"]))
    assert "".join(shown) == turn.text == turn.answer.text == "one two "
    assert turn.answer.finish_reason == "stop"
    shown, turn = watch(model_of(*letters("one EN"), reason="length"), Settings(stop=["END"]))
    assert "".join(shown) == turn.text == "one EN"
    assert turn.answer.finish_reason == "length"


@pytest.mark.parametrize("by_deadline", [True, False])
def test_time_limit_ends_a_wait_and_keeps_what_came(by_deadline):
    started = time.monotonic()
    limit = {"deadline": started + 0.1} if by_deadline else {}
    settings = Settings(timeout_s=0.0 if by_deadline else 0.1)
    shown, turn = watch(model_of("a", 3.0, "b"), settings, **limit)
    assert time.monotonic() - started < 2.0
    assert shown == ["a"]
    assert (turn.text, turn.answer.finish_reason) == ("a", "timeout")


def test_call_that_ran_out_of_time_is_an_error():
    settings = Settings(timeout_s=0.1)
    _, turn = watch(model_of('<tool_call>{"name"', 0.3, ": 1}"), settings, TOOLS)
    assert turn.call is None
    assert "the time limit" in turn.error


def test_stream_that_is_left_is_closed_and_waited_for_where_it_must_be():
    model = model_of(*["a", 0.02] * 500)
    model.waits_for_end = True
    before = set(threading.enumerate())
    stream = model.stream(model.turn(HELLO, Settings()))
    next(stream)
    assert model.chat.events == []
    stream.close()
    assert model.chat.events == ["closed"]
    assert set(threading.enumerate()) <= before
    hasty = model_of(*["a", 0.02] * 500)
    stream = hasty.stream(hasty.turn(HELLO, Settings()))
    next(stream)
    stream.close()
    assert hasty.chat.events == []
    wait_for(lambda: hasty.chat.events == ["closed"])


def test_errors_are_explained_or_passed_on(monkeypatch):
    model = model_of("a", RuntimeError("boom"))
    with pytest.raises(RuntimeError, match="boom"):
        watch(model, Settings())
    monkeypatch.setattr(model, "explain", lambda error: CommandError(f"it said {error}", MODEL))
    with pytest.raises(CommandError, match="it said boom") as caught:
        watch(model, Settings())
    assert caught.value.exit_code == MODEL


@pytest.mark.parametrize(
    "text", ['{"city": "Rome"}', ' \n{"city": "Rome"}\n', '```json\n{"city": "Rome"}\n```\n']
)
def test_json_turn_gives_the_json(text):
    model = model_of(*letters(text))
    turn = run(model, model.json_turn(HELLO, Settings(temperature=1.0), SCHEMA))
    assert json.loads(turn.text) == {"city": "Rome"}
    assert turn.error is None
    messages, _, parameters = model.chat.seen[0]
    assert json.dumps(SCHEMA) in messages[0].content
    assert parameters["temperature"] == 0


@pytest.mark.parametrize(
    ("text", "reason", "error"),
    [
        ("Rome", "stop", "no JSON"),
        ('{"city": "Ro', "length", "no JSON.*the token limit was met"),
        ("", "stop", "no JSON"),
        ('{"n": NaN}', "stop", "NaN"),
        ("[" * 100_000, "stop", "nested"),
    ],
)
def test_json_turn_without_json_is_an_error(text, reason, error):
    model = model_of(text, reason=reason)
    stream = model.stream(model.json_turn(HELLO, Settings(), SCHEMA))
    with pytest.raises(StopIteration) as end:
        next(stream)
    assert re.search(error, end.value.value.error)


def test_nothing_is_known_of_the_prompt():
    model = model_of("a")
    assert (model.name, model.n_ctx, model.count_tokens(HELLO, TOOLS)) == ("scripted", None, None)


def wait_for(condition: Any, seconds: float = 2.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_deadline_without_limit_is_infinite():
    shown, _ = watch(model_of("a"), Settings(timeout_s=0.0), deadline=math.inf)
    assert shown == ["a"]
