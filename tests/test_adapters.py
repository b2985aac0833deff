"""LoRA GGUFs over one base: switched without a trace of the former, nothing read twice."""

from pathlib import Path

import numpy as np
import pytest

from integration._cli import CommandError
from integration.adapters import Adapters, parse_adapter_options
from integration.backend import Feed
from integration.models import load_gguf
from tests.conftest import make_adapter

pytestmark = pytest.mark.model
IDS = list(range(100, 200))


@pytest.fixture(scope="module")
def files(tiny_model_dir, tiny_adapter_dir, tmp_path_factory) -> dict[str, Path]:
    """The tiny base as F16 and Q4_K_M, and two adapters of it as we export them."""
    from export.export_lora_gguf import main
    from tests.stock_chain import convert, quantize

    folder = tmp_path_factory.mktemp("lora")
    other = make_adapter(folder / "other-run/adapter", tiny_model_dir, seed=5)
    found = {"F16": folder / "base.gguf", "Q4_K_M": folder / "base-q4.gguf"}
    convert(tiny_model_dir, found["F16"], "f16")
    quantize(found["F16"], found["Q4_K_M"], "Q4_K_M")
    for name, adapter in {"mine": tiny_adapter_dir, "other": other}.items():
        found[name] = folder / f"{name}.gguf"
        assert main([str(adapter), "--output", str(found[name])]) == 0
    return found


def logits(model, ids=IDS, feed: Feed | None = None) -> np.ndarray:
    """Evaluate a prompt as a conversation does that goes on; logits after its last token."""
    number = model.engine.take_sequence()
    feed = feed or Feed(ids, is_prompt=True, continues=True)
    (row,) = model.engine.evaluate([(number, feed)])
    values = model.engine.logits(row).copy()
    model.engine.release_sequence(number)
    return values


def open_model(files, kind: str = "F16", n_sequences: int = 3):
    return load_gguf(files[kind], n_ctx=256, n_threads=1, n_sequences=n_sequences)


def count_evaluated(model, monkeypatch) -> list[int]:
    counts, decode = [], model.engine._decode

    def count(parts):
        counts.append(sum(len(tokens) for _, tokens in parts))
        return decode(parts)

    monkeypatch.setattr(model.engine, "_decode", count)
    return counts


@pytest.mark.parametrize("kind", ["F16", "Q4_K_M"])
@pytest.mark.parametrize("n_sequences", [3, 1])
def test_switching_leaves_no_trace_and_reads_nothing_again(files, kind, n_sequences, monkeypatch):
    """Case 2: an old prefix under a new adapter; with one sequence, conversations are set aside."""
    cold = {}
    for name in ("base", "mine", "other"):
        model = open_model(files, kind, n_sequences)
        Adapters(model, {n: files[n] for n in ("mine", "other")}).use(name)
        first = logits(model)
        cold[name] = (first, logits(model, [*IDS, 7, 8]))
    assert np.abs(cold["mine"][0] - cold["base"][0]).max() > 0.01
    assert np.abs(cold["mine"][0] - cold["other"][0]).max() > 0.01

    model = open_model(files, kind, n_sequences)
    adapters = Adapters(model, {n: files[n] for n in ("mine", "other")})
    for name in ("base", "mine", "other"):
        adapters.use(name)
        assert np.array_equal(logits(model), cold[name][0]), name
    counts = count_evaluated(model, monkeypatch)
    for name in ("mine", "base", "other"):
        adapters.use(name)
        # Two tokens are new, and nothing else is evaluated.
        assert np.array_equal(logits(model, [*IDS, 7, 8]), cold[name][1]), name
    assert counts == [2, 2, 2]


def test_stale_cache_would_be_seen(files):
    """The twin: the same cells under another adapter give other logits, silently."""
    model = open_model(files, n_sequences=1)
    adapters = Adapters(model, {"mine": files["mine"]})
    logits(model)
    adapters.use("mine")
    model.engine.cache.sequences[0].adapter_key = model.engine.cache.adapter_key
    stale = logits(model, [*IDS, 7, 8])
    model.engine.clear()
    assert np.abs(logits(model, [*IDS, 7, 8]) - stale).max() > 0.01


def test_sequence_of_other_adapters_is_emptied_before_it_is_used(files):
    model = open_model(files, n_sequences=1)
    adapters = Adapters(model, {"mine": files["mine"]})
    adapters.use("mine")
    cold = logits(model)
    adapters.use("base")
    number = model.engine.take_sequence()
    model.engine.evaluate([(number, Feed(IDS, is_prompt=True))])
    adapters.use("mine")
    (row,) = model.engine.evaluate([(number, Feed(IDS, is_prompt=True, continues=True))])
    assert np.array_equal(model.engine.logits(row), cold)


def test_weights_scale_and_stack(files):
    model = open_model(files)
    adapters = Adapters(model, {n: files[n] for n in ("mine", "other")})
    base = logits(model)
    distances = []
    for text in ("mine:0.25", "mine:0.5", "mine"):
        adapters.use(text)
        distances.append(float(np.abs(logits(model) - base).max()))
    assert distances == sorted(distances)
    assert distances[0] > 0
    adapters.use("mine:0.5+other:0.5")
    mixed = logits(model)
    adapters.use("other:0.5 + mine:0.5")
    assert adapters.active == "mine:0.5+other:0.5"
    assert np.array_equal(logits(model), mixed)
    adapters.use("mine")
    assert not np.array_equal(logits(model), mixed)


def test_odd_weights_are_told_once(files, capsys):
    adapters = Adapters(open_model(files), {n: files[n] for n in ("mine", "other")})
    adapters.use("mine:0.5+other:0.5")
    assert capsys.readouterr().err == ""
    for _ in range(2):
        adapters.use("mine+other")
        adapters.use("base")
    told = capsys.readouterr().err
    assert told.count("note: the weights of 'mine+other' sum to 2; stacked adapters") == 1


def test_oldest_conversation_gives_way_and_comes_back(files, monkeypatch):
    model = open_model(files, n_sequences=2)
    adapters = Adapters(model, {n: files[n] for n in ("mine", "other")})
    for name in ("base", "mine", "other"):
        adapters.use(name)
        logits(model)
    use = adapters.memory().conversations
    assert [(label, one.tokens, one.is_parked) for label, one in use] == [
        ("base", 100, True), ("mine", 100, False), ("other", 100, False),
    ]  # fmt: skip
    counts = count_evaluated(model, monkeypatch)
    adapters.use("base")
    logits(model, [*IDS, 9])
    assert counts == [1]
    assert [label for label, one in adapters.memory().conversations if one.is_parked] == ["mine"]
    # Its twin: without room aside, what gave way is read again.
    monkeypatch.setattr("integration.kv_cache._MAX_PARKED_BYTES", 0)
    adapters.use("mine")
    logits(model, [*IDS, 9])
    adapters.use("other")
    logits(model, [*IDS, 9])
    adapters.use("base")
    counts.clear()
    logits(model, [*IDS, 9])
    assert sum(counts) in (1, 101)
    adapters.use("mine")
    logits(model, [*IDS, 9])
    assert sum(counts) > 100


def test_memory_is_told(files):
    adapters = Adapters(open_model(files), {n: files[n] for n in ("mine", "other")})
    used = adapters.memory()
    assert used.conversations == []
    size = files["mine"].stat().st_size
    assert 0.8 * size < used.adapters["mine"] <= size
    adapters.use("mine")
    logits(adapters._model)
    ((label, use),) = adapters.memory().conversations
    # Two layers, two heads of 64 keys and values in F16: 1 KiB a token.
    assert label == "mine"
    assert 100 * 1024 <= use.num_bytes < 110 * 1024


def test_unloading_frees_the_name_and_the_cache(files):
    model = open_model(files)
    adapters = Adapters(model, {"mine": files["mine"]})
    adapters.use("mine")
    logits(model)
    with pytest.raises(CommandError, match="'mine' is active; switch to another one first"):
        adapters.unload("mine")
    adapters.use("base")
    adapters.unload("mine")
    assert adapters.names == ["base"]
    assert adapters.memory().conversations == []
    with pytest.raises(CommandError, match="no adapter is called 'mine'"):
        adapters.use("mine")
    with pytest.raises(CommandError, match="no adapter is called 'mine'"):
        adapters.unload("mine")
    adapters.load("mine", files["other"])
    adapters.use("mine")
    fresh = logits(model)
    again = open_model(files)
    Adapters(again, {"x": files["other"]}).use("x")
    assert np.array_equal(fresh, logits(again))


def test_name_twice_is_refused(files):
    adapters = Adapters(open_model(files), {"mine": files["mine"]})
    with pytest.raises(CommandError, match="called 'mine' already"):
        adapters.load("mine", files["other"])


def test_unknown_name_gives_the_nearest(files):
    adapters = Adapters(open_model(files), {"coding": files["mine"]})
    with pytest.raises(CommandError, match="did you mean 'coding'"):
        adapters.use("codeing")


def test_adapter_given_as_the_model_is_exit_3(files):
    with pytest.raises(CommandError, match="is a LoRA adapter, expected a whole model"):
        load_gguf(files["mine"])


@pytest.mark.parametrize("options", [["x"], ["=y"], ["x="], ["a=1", "a=2"], ["base=1"], ["a+b=1"]])
def test_bad_options(options):
    with pytest.raises(CommandError):
        parse_adapter_options(options)
