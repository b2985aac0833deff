"""Who answers a request: what it asks for, what the router chooses, and what cannot be."""

from types import SimpleNamespace

import pytest

from integration._cli import USAGE, CommandError
from integration.ask_format import answer_object, from_prompt, parse_request
from integration.decoding import Settings
from integration.options import Session
from tests.chat_stubs import StubAdapters, StubModel, StubRouter


def session(router=None, adapters=None) -> Session:
    return Session(StubModel(), adapters, None, (), None, 7, router=router)


def route_of(request) -> dict:
    reply = SimpleNamespace(
        text="", tool_calls=[], finish_reason="stop", prompt_tokens=0, completion_tokens=0,
        first_token_s=0, tokens_per_second=0, error=None,
    )  # fmt: skip
    return answer_object(request, reply)["route"]


@pytest.mark.parametrize(
    ("text", "adapter"), [("some json please", "json"), ("what is rain?", None)]
)
def test_router_decides_where_auto_is_asked_for(text, adapter):
    request = from_prompt(text, "You are kind.", "auto")
    router = StubRouter()
    session(router, StubAdapters()).choose_adapter(request)
    assert router.asked == [[text]]
    route = route_of(request)
    assert (route["adapter"], route["reason"]) == (adapter, "1 texts")
    assert route["scores"]["json"] == (0.9 if adapter else 0.1)


def test_conversation_is_routed_by_all_of_the_users_turns():
    line = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},'
    request = parse_request(line + '{"role": "user", "content": "c"}]}', None, "auto")
    router = StubRouter()
    session(router, StubAdapters()).choose_adapter(request)
    assert router.asked == [["a", "c"]]


def test_named_adapter_is_not_routed():
    request = from_prompt("some json please", None, "json")
    router = StubRouter()
    session(router, StubAdapters()).choose_adapter(request)
    assert router.asked == []
    assert route_of(request) == {"adapter": "json", "scores": {}, "reason": "asked for"}


@pytest.mark.parametrize(
    ("adapter", "has_adapters", "message"),
    [
        ("auto", True, "'auto' needs the router; start with --route auto"),
        ("jsn", True, "no adapter is called 'jsn'"),
        ("json", False, r"the model 'stub.gguf' takes no adapters"),
    ],
)
def test_what_cannot_be_is_one_line(adapter, has_adapters, message):
    adapters = StubAdapters() if has_adapters else None
    with pytest.raises(CommandError, match=message) as caught:
        session(adapters=adapters).choose_adapter(from_prompt("Hi", None, adapter))
    assert caught.value.exit_code == USAGE


@pytest.mark.parametrize(
    ("asked_for", "adapter", "penalty"),
    [(None, None, 1.1), (None, "base", 1.1), (None, "json", 1.0), (1.3, "json", 1.3)],
)
def test_adapters_are_decoded_without_penalty_unless_asked_for(asked_for, adapter, penalty):
    settings = Settings(repeat_penalty=asked_for or 1.1, seed=3)
    chosen = Session(StubModel(), None, settings, (), None, 7, repeat_penalty=asked_for)
    assert chosen.settings_for(adapter).repeat_penalty == penalty
    assert chosen.settings_for(adapter).seed == 3


def test_base_is_fine_everywhere():
    for adapters in (None, StubAdapters()):
        request = from_prompt("Hi", None, "base")
        session(adapters=adapters).choose_adapter(request)
        assert route_of(request)["adapter"] is None
