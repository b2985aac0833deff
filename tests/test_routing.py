"""Routing: rules first, then the classifier, else the base; conversations are sticky; nothing crashes."""

from dataclasses import replace

import pytest

from integration.routing import Router
from tests.router_stubs import TOPICS, make_router

CODING, SUPPORT = TOPICS["coding"], TOPICS["support"]
CAPITAL = TOPICS["base"]


@pytest.fixture(scope="module")
def router(tmp_path_factory):
    return make_router(tmp_path_factory.mktemp("router"))


def with_settings(router: Router, **changes) -> Router:
    return Router(
        replace(router.data, settings=replace(router.data.settings, **changes)), router.encoder
    )


@pytest.mark.parametrize("name", ["json", "coding", "support"])
def test_classifier_decides_and_says_why(router, name):
    route = router.decide(TOPICS[name])
    assert route.adapter == name
    assert f"% {name}; like '" in route.reason
    assert list(route.scores) == ["json", "coding", "support", "base"]
    assert sum(route.scores.values()) == pytest.approx(1, abs=1e-3)


def test_rule_beats_the_classifier(router):
    assert router.decide(f"{SUPPORT}").adapter == "support"
    route = router.decide(f"{SUPPORT} JSON!")
    assert (route.adapter, route.reason) == ("json", r"rule /\bjson!/ of json")


def test_rules_of_two_adapters_cancel_each_other(router):
    route = router.decide(f"{SUPPORT} json! coding!")
    assert route.adapter == "support"
    assert "rule" not in route.reason


def test_rule_of_the_base(router):
    assert router.decide("hello").reason == "rule /^(thanks|hello)$/ of base"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"threshold": 1.1}, "unsure: "),
        ({"min_similarity": 1.0}, "like none of the examples (nearest: "),
        ({"scripts": ["GREEK"]}, "no example is written in this script (LATIN)"),
    ],
)
def test_abstains_and_says_why(router, changes, reason):
    route = with_settings(router, **changes).decide(CODING)
    assert route.adapter is None
    assert route.reason.startswith(reason)
    assert router.decide(CODING).adapter == "coding"


@pytest.mark.parametrize(
    "text",
    ["", "  \n\t", "🙂🙂🙂", "\x00\x01\x1b[2J", "\ud800", "word " * 100_000, "你好吗", "؟", "a"],
)
def test_odd_text_never_crashes(router, text):
    route = router.decide(text)
    assert route.reason
    assert set(route.scores) == {"json", "coding", "support", "base"}


def test_empty_request_goes_to_the_base(router):
    assert router.decide(" \n").reason == "the request is empty"
    assert router.route([], router.names).adapter is None


def test_other_script_is_named(router):
    assert router.decide("напиши").reason == "no example is written in this script (CYRILLIC)"


@pytest.mark.parametrize("follow_up", ["and shorter please", "again", "what if it is empty?", ""])
def test_follow_up_goes_on(router, follow_up):
    route = router.route([CODING, follow_up], router.names)
    assert route.adapter == "coding"
    assert route.reason.startswith("goes on with coding")


@pytest.mark.parametrize(("text", "adapter"), [(SUPPORT, "support"), (CAPITAL, None)])
def test_clear_change_is_followed_and_stays(router, text, adapter):
    assert router.route([CODING, text], router.names).adapter == adapter
    assert router.route([CODING, text, "and shorter please"], router.names).adapter == adapter


def test_change_needs_threshold_and_margin(router, monkeypatch):
    careful = with_settings(router, switch_threshold=1.1)
    route = careful.route([CODING, SUPPORT], router.names)
    assert route.adapter == "coding"
    assert "nothing clearly says support" in route.reason
    monkeypatch.setattr("integration.routing.SWITCH_MARGIN", 1.1)
    assert router.route([CODING, SUPPORT], router.names).adapter == "coding"
    monkeypatch.undo()
    assert router.route([CODING, SUPPORT], router.names).adapter == "support"


def test_rule_changes_a_conversation_but_thanks_does_not(router):
    assert router.route([CODING, "json!"], router.names).adapter == "json"
    assert router.route([CODING, "thanks"], router.names).adapter == "coding"
    assert router.route([CODING, "hello"], router.names).adapter is None


def test_adapter_that_is_not_loaded_never_wins(router):
    route = router.route([CODING], ["json"])
    assert (route.adapter, route.reason) == (None, "would be coding, which is not loaded")
    assert router.route(["json!", CODING], ["json"]).adapter is None
    assert router.route(["coding!"], []).adapter is None
    assert router.route([CODING], ["coding"]).adapter == "coding"


def test_turn_costs_one_encoding(router):
    texts = [f"{CODING} {number}" for number in range(4)]
    before = router.encoder.calls
    for size in range(1, 5):
        router.route(texts[:size], router.names)
    assert router.encoder.calls - before == 4
    router.decide("something that was not asked before")
    assert router.encoder.calls - before == 5


def test_nearest_examples_are_sorted(router):
    text = router.data.settings.texts[0]
    found = router.nearest(text)
    assert found[0][0] == pytest.approx(1, abs=1e-3)
    assert found[0][1:] == ("json", text)
    assert [one[0] for one in found] == sorted((one[0] for one in found), reverse=True)
