"""Training: reproducible, calibrated, thresholds that are earned, files that are checked."""

import numpy as np
import pytest

from integration._cli import MODEL, CommandError
from integration.router_features import HASH_SIZE, features, hash_words, main_script
from integration.router_file import load_router, save_router
from integration.router_training import least_threshold, softmax, train_router
from tests.router_stubs import FakeEncoder, make_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_router(make_config(tmp_path_factory.mktemp("trained")), FakeEncoder())


def test_same_examples_give_the_same_router(tmp_path, trained):
    first, report = trained
    second, again = train_router(make_config(tmp_path), FakeEncoder())
    assert report == again
    assert np.array_equal(first.weights, second.weights)
    assert first.weights.shape == (4, 64 + 2 * HASH_SIZE)


def test_topics_are_learned_and_shuffled_labels_are_not(tmp_path, trained):
    config, report = make_config(tmp_path), trained[1]
    assert report["accuracy"] > 0.9
    text = config.path.read_text()
    lines = text.splitlines()
    at = [number for number, line in enumerate(lines) if " no" in line]
    order = np.random.default_rng(1).permutation(len(at))
    bodies = [lines[number].split("- ", 1)[1] for number in at]
    for number, other in zip(at, order, strict=True):
        lines[number] = lines[number].split("- ", 1)[0] + "- " + bodies[other]
    config.path.write_text("\n".join(lines))
    from integration.router_config import load_config

    _, shuffled = train_router(load_config(config.path), FakeEncoder())
    assert shuffled["accuracy"] < 0.5
    assert shuffled["accepted"] < report["accepted"]


def test_two_classes_are_two_rows(tmp_path):
    path = tmp_path / "two.yaml"
    path.write_text(
        "adapters: [{name: a, file: f, examples: [red one, red two, red sea]}]\n"
        "base: {examples: [blue one, blue two, blue sky]}\n"
    )
    from integration.router_config import load_config

    data, report = train_router(load_config(path), FakeEncoder())
    assert (data.weights.shape[0], report["folds"]) == (2, 3)
    assert data.bias[0] == pytest.approx(-data.bias[1])


def test_single_example_is_refused_and_two_are_not(tmp_path):
    counts = {"json": 1, "coding": 12, "support": 12, "base": 12}
    with pytest.raises(CommandError, match="'json' has 1 example") as caught:
        train_router(make_config(tmp_path, counts), FakeEncoder())
    assert caught.value.exit_code == 2
    _, report = train_router(make_config(tmp_path, counts | {"json": 2}), FakeEncoder())
    assert report["folds"] == 2


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (0.9, 0.7),  # over 0.6 three of four are right
        (0.7, 0.6),
        (0.0, 0.5),
        (1.1, 0.7),  # never enough: the first of the best
    ],
)
def test_least_threshold(wanted, expected):
    confidence = np.array([0.55, 0.6, 0.7, 0.8, 0.9])
    right = np.array([False, False, True, True, True])
    assert least_threshold(confidence, right, wanted, 0.5) == expected


def test_softmax_of_large_logits_is_finite():
    assert softmax(np.array([[1e4, 0.0]])).tolist() == [[1.0, 0.0]]


def test_hashed_words_see_words_and_order():
    assert hash_words("a b") @ hash_words("A  b") == pytest.approx(1)
    assert features("печать", np.zeros(2)) @ features("печати", np.zeros(2)) > 1
    assert features("печь", np.zeros(2)) @ features("печати", np.zeros(2)) < 0.7
    assert hash_words("man bites dog") @ hash_words("dog bites man") < 0.95
    assert np.isfinite(hash_words("\ud800 \x00")).all()


@pytest.mark.parametrize(
    ("text", "script"),
    [("hello", "LATIN"), ("привет you", "CYRILLIC"), ("你好", "CJK"), ("12 + 3 🙂", None)],
)
def test_main_script(text, script):
    assert main_script(text) == script


def test_router_file_comes_back_and_damage_is_named(tmp_path, trained):
    data = trained[0]
    path = tmp_path / "deep/router.npz"
    save_router(data, path)
    save_router(data, path)  # derived: an older one gives way
    back = load_router(path)
    assert back.settings == data.settings
    assert [one.name for one in path.parent.iterdir()] == ["router.npz"]
    whole = path.read_bytes()
    for damaged in (b"", b"text", whole[: len(whole) // 2], b"\x80\x04]."):
        path.write_bytes(damaged)
        with pytest.raises(CommandError, match=r"integration\.router train") as caught:
            load_router(path)
        assert caught.value.exit_code == MODEL


def test_random_damage_of_a_router_is_an_error_or_harmless(tmp_path, trained):
    data = trained[0]
    path = tmp_path / "router.npz"
    save_router(data, path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    caught = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole), 20):
            damaged[at] ^= 0x5A
        path.write_bytes(damaged)
        try:
            load_router(path)
        except CommandError:
            caught += 1
    assert caught > 30


def test_other_version_and_parts_that_do_not_fit(tmp_path, trained):
    from dataclasses import replace

    data = trained[0]
    path = tmp_path / "router.npz"
    save_router(replace(data, settings=replace(data.settings, version=99)), path)
    with pytest.raises(CommandError, match="version 99"):
        load_router(path)
    save_router(replace(data, bias=data.bias[:2]), path)
    with pytest.raises(CommandError, match="do not fit"):
        load_router(path)
    with pytest.raises(CommandError, match="there is no router"):
        load_router(tmp_path / "none.npz")


def test_known_embeddings_are_not_computed_again(tmp_path, trained):
    first, report = trained
    known = dict(zip(first.settings.texts, first.examples, strict=True))
    encoder = FakeEncoder()
    second, again = train_router(make_config(tmp_path), encoder, known)
    assert encoder.calls == 0
    assert again == report
    assert np.array_equal(second.weights, first.weights)
    # Its twin: what is new is computed, and only that.
    del known[first.settings.texts[0]]
    train_router(make_config(tmp_path), encoder, known)
    assert encoder.calls == 1
