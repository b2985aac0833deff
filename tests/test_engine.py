"""The engine: the same logits whatever was evaluated before or beside, in memory and from disk."""

import itertools
import threading

import numpy as np
import pytest

from integration import hardware
from integration._cli import CONTEXT, CommandError
from integration.backend import Feed
from integration.engine import Engine
from integration.gguf_header import read_header
from integration.hardware import context_size
from integration.prefix_store import PrefixStore, cache_dir

pytestmark = pytest.mark.model
SHARED = list(range(1000, 1100))
QUESTION, OTHER = list(range(2000, 2010)), list(range(3000, 3020))


@pytest.fixture(scope="module")
def header(embedded_gguf):
    return read_header(embedded_gguf)


@pytest.fixture(scope="module")
def engine(header):
    return Engine(header, n_ctx=256, n_threads=1, n_sequences=2)


def prompt(*parts: list[int], continues: bool = False) -> Feed:
    return Feed([*itertools.chain(*parts)], True, len(SHARED), continues)


def logits(engine: Engine, feed: Feed, sequence: int = 0) -> np.ndarray:
    (row,) = engine.evaluate([(sequence, feed)])
    return engine.logits(row).copy()


def count_evaluated(engine, monkeypatch) -> list[int]:
    counts, decode = [], engine._decode

    def count(parts):
        counts.append(sum(len(tokens) for _, tokens in parts))
        return decode(parts)

    monkeypatch.setattr(engine, "_decode", count)
    return counts


def test_shared_prefix_is_not_evaluated_again_and_changes_nothing(engine, monkeypatch):
    """Trap 23: a greedy answer that changes with what is in the cache."""
    engine.clear()
    engine.cache._states.clear()
    cold = logits(engine, prompt(SHARED, QUESTION))
    logits(engine, prompt(SHARED, OTHER))
    counts = count_evaluated(engine, monkeypatch)
    assert np.array_equal(logits(engine, prompt(SHARED, QUESTION)), cold)
    assert sum(counts) == len(QUESTION)
    # Its twin: another prefix is evaluated, and gives something else.
    changed = [SHARED[0] + 1, *SHARED[1:]]
    assert not np.array_equal(logits(engine, prompt(changed, QUESTION)), cold)
    assert sum(counts) == len(QUESTION) + len(SHARED) + len(QUESTION)


def test_conversation_goes_on_where_it_was(engine, monkeypatch):
    engine.clear()
    logits(engine, prompt(SHARED, QUESTION))
    counts = count_evaluated(engine, monkeypatch)
    logits(engine, prompt(SHARED, QUESTION, OTHER, continues=True))
    assert sum(counts) == len(OTHER)
    # A prompt that is cached whole has its last token evaluated, for the logits.
    logits(engine, prompt(SHARED, QUESTION, OTHER, continues=True))
    assert sum(counts) == len(OTHER) + 1


def test_sequences_side_by_side_give_the_logits_of_each_alone(engine):
    engine.clear()
    alone = {}
    for name, ids in {"question": QUESTION, "other": OTHER}.items():
        steps = [logits(engine, prompt(SHARED, ids))]
        steps += [logits(engine, Feed((token,))) for token in (10, 11, 12)]
        alone[name] = steps
        engine.clear()
    together = {
        "question": [logits(engine, prompt(SHARED, QUESTION), 0)],
        "other": [logits(engine, prompt(SHARED, OTHER), 1)],
    }
    for token in (10, 11, 12):
        rows = engine.evaluate([(0, Feed((token,))), (1, Feed((token,)))])
        for steps, row in zip(together.values(), rows, strict=True):
            steps.append(engine.logits(row).copy())
    for name, steps in alone.items():
        # Prompts are evaluated alone: not a bit differs. Steps share a batch: rounding may.
        assert np.array_equal(together[name][0], steps[0])
        for mine, theirs in zip(together[name], steps, strict=True):
            assert np.argmax(mine) == np.argmax(theirs)
            assert np.corrcoef(mine, theirs)[0, 1] > 0.999
    assert np.corrcoef(alone["question"][3], alone["other"][3])[0, 1] < 0.999


def test_prefix_comes_from_disk_in_another_process(header, tmp_path, monkeypatch, capsys):
    store = PrefixStore(tmp_path / "prefixes")
    first = Engine(header, 256, 1, store=store)
    cold = logits(first, prompt(SHARED, QUESTION))
    (file,) = store.folder.iterdir()
    assert file.stat().st_mode & 0o777 & 0o077 == 0 or store.folder.stat().st_mode & 0o077 == 0
    second = Engine(header, 256, 1, store=store)
    counts = count_evaluated(second, monkeypatch)
    assert np.array_equal(logits(second, prompt(SHARED, QUESTION)), cold)
    assert sum(counts) == len(QUESTION)
    # Another adapter, or a damaged file: evaluated anew, never restored.
    second.clear()
    second.cache.adapter_key = "another"
    assert np.array_equal(logits(second, prompt(SHARED, QUESTION)), cold)
    assert sum(counts) == 2 * len(QUESTION) + len(SHARED)
    assert len(list(store.folder.iterdir())) == 2
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    second.clear()
    second.cache.adapter_key = ""
    assert np.array_equal(logits(second, prompt(SHARED, QUESTION)), cold)
    assert sum(counts) == 3 * len(QUESTION) + 2 * len(SHARED)
    assert "is damaged and is evaluated anew" in capsys.readouterr().err


def test_conversation_comes_from_disk_when_it_was_kept(header, tmp_path, monkeypatch):
    store = PrefixStore(tmp_path / "prefixes")
    first = Engine(header, 256, 1, store=store)
    logits(first, prompt(SHARED, QUESTION))
    warm = logits(first, prompt(SHARED, QUESTION, OTHER, continues=True))
    first.cache.remember()
    second = Engine(header, 256, 1, store=store)
    counts = count_evaluated(second, monkeypatch)
    following = prompt(SHARED, QUESTION, OTHER, [7, 8], continues=True)
    here = logits(second, following)
    assert sum(counts) == 2
    assert np.array_equal(here, logits(first, following))
    assert not np.array_equal(here, warm)
    # A new conversation behind the same prefix sees nothing of it, and one that differs reads anew.
    second.clear()
    logits(second, prompt(SHARED, QUESTION))
    assert sum(counts) == 2 + len(QUESTION)
    second.clear()
    logits(second, prompt(SHARED, [5], OTHER, continues=True))
    assert sum(counts) == 2 + len(QUESTION) + 1 + len(OTHER)


def test_store_keeps_the_newest_within_its_size(tmp_path):
    store = PrefixStore(tmp_path, max_bytes=2500)
    for name in ("a", "b", "c"):
        store.save(name, np.zeros(1000, np.uint8))
        (tmp_path / name).touch()
    assert {path.name for path in tmp_path.iterdir()} == {"b", "c"}
    store.save("huge", np.zeros(5000, np.uint8))
    assert store.load("huge") is None
    assert store.load("c").size == 1000


def test_store_that_cannot_be_written_costs_the_answer_nothing(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    PrefixStore(tmp_path / "file").save("a", np.zeros(10, np.uint8))
    assert capsys.readouterr().err.startswith("note: the evaluated prefix is not kept")


def test_cache_folder_can_be_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TOMEFORGE_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("TOMEFORGE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "tomeforge"


def test_context_is_the_files_own_within_memory(header, monkeypatch):
    """Trap 3: n_ctx 512."""
    assert context_size(header, None) == min(8192, header.number("context_length"))
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: 2 * 600 * 23040)
    assert context_size(header, None) == 600
    assert context_size(header, None, n_sequences=2) == 300
    with pytest.raises(CommandError, match="ask for at most 600") as caught:
        context_size(header, 4096)
    assert caught.value.exit_code == CONTEXT


def test_full_context_is_exit_4_and_the_engine_lives_on(engine):
    engine.clear()
    cold = logits(engine, prompt(SHARED, QUESTION))
    with pytest.raises(CommandError, match="could not evaluate") as caught:
        engine.evaluate([(1, Feed(list(range(300)), is_prompt=True))])
    assert caught.value.exit_code == CONTEXT
    assert np.array_equal(logits(engine, prompt(SHARED, QUESTION)), cold)


def test_sequences_are_lent_and_given_back(engine):
    taken = {engine.take_sequence(), engine.take_sequence()}
    assert taken == {0, 1}
    with pytest.raises(RuntimeError, match="busy"):
        engine.take_sequence()
    engine.release_sequence(1)
    assert engine.take_sequence() == 1
    for number in taken:
        engine.release_sequence(number)


def test_tokenizer_round_trip(engine):
    text = "Größe 漢字 😀 <|im_end|>\n\n  x"
    ids = engine.tokenize(text)
    assert b"".join(map(engine.piece, ids)).decode() == text
    end = engine.tokenize("<|im_end|>", special=True)
    assert len(end) == 1
    assert engine.is_end(end[0])
    assert end[0] not in ids
    assert engine.tokenize("") == []


def test_lock_is_one_per_model(engine):
    """Trap 20: three threads in one model abort the process."""
    entered = threading.Event()

    def enter():
        with engine.lock:
            entered.set()

    with engine.lock:
        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.05)
    assert entered.wait(5)
    thread.join()


def test_each_token_is_turned_into_text_once(embedded_gguf, monkeypatch):
    """Trap 25: stock turns the whole answer into text again for every token of it."""
    from integration.backend import run
    from integration.decoding import Settings
    from integration.models import load_gguf

    model, turned = load_gguf(embedded_gguf, n_ctx=256, n_threads=1), []
    piece = model.engine.piece
    monkeypatch.setattr(model.engine, "piece", lambda token: turned.append(token) or piece(token))
    chat = [{"role": "user", "content": "Count."}]
    answer = run(model, model.turn(chat, Settings(max_tokens=20, temperature=0))).answer
    assert len(turned) == answer.completion_tokens == 20
