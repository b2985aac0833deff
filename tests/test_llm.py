"""LangChain's LlamaCpp with its traps off, each pinned on the embedded default model.

The other traps of the wrapper are pinned in test_engine, test_local_model, test_agent, test_adapters
and test_chat_model; "Trap N" in a docstring says which.
"""

import numpy as np
import pytest
from langchain_community.llms import LlamaCpp

from integration._cli import MODEL, CommandError
from integration.hardware import cpu_quota, usable_threads
from integration.llm import SafeLlamaCpp

pytestmark = pytest.mark.model
PROMPT = "The capital of France is"
GREEDY = {"max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def model(embedded_gguf):
    return SafeLlamaCpp(model_path=str(embedded_gguf), n_ctx=1024)


@pytest.fixture(scope="module")
def stock(embedded_gguf):
    return LlamaCpp(model_path=str(embedded_gguf), n_ctx=256, n_batch=128, verbose=False)


def test_rope_base_comes_from_the_file(model, stock):
    """Trap 1: stock LlamaCpp sends 10000 over the file's 100000."""
    from integration.backend import Feed

    text = "The history of the city began long before the first stone bridge was built. " * 8
    engine = model.client.engine
    ids = engine.tokenize(text)[:128]
    stock.client.eval(ids)
    (row,) = engine.evaluate([(0, Feed(ids, is_prompt=True))])
    theirs = np.ctypeslib.as_array(
        stock.client._ctx.get_logits_ith(-1), shape=(stock.client.n_vocab(),)
    )
    assert stock.client.context_params.rope_freq_base == 10000.0
    assert engine.params.rope_freq_base == 0.0  # zero means: from the file
    assert np.abs(engine.logits(row) - theirs).max() > 0.5


def test_batch_and_threads(model):
    """Traps 2 and 22: n_batch 8, host core count."""
    assert LlamaCpp.model_fields["n_batch"].default == 8
    assert model.client.engine.params.n_batch == 512
    assert model.client.engine.n_threads == usable_threads()


def test_context_and_defaults_are_our_own(model, embedded_gguf):
    """Trap 3: n_ctx 512, max_tokens 256, the engine's log on stderr."""
    assert model.client.n_ctx == 1024
    assert (model.max_tokens, model.temperature, model.verbose) == (512, 0.2, False)
    assert SafeLlamaCpp(model_path=str(embedded_gguf)).client.n_ctx == 8192


def test_seed_repeats_differs_and_is_reported(model):
    """Trap 4: the same "random" text in every instance."""
    options = {"max_tokens": 24, "temperature": 1.5, "top_k": 0, "top_p": 1.0}
    results = [
        model.generate([PROMPT], seed=seed, **options).generations[0][0] for seed in (1, 1, 2)
    ]
    texts = [result.text for result in results]
    assert texts[0] == texts[1] != texts[2]
    assert [result.generation_info["seed"] for result in results] == [1, 1, 2]
    drawn = [
        model.generate([PROMPT], **options).generations[0][0].generation_info["seed"]
        for _ in range(2)
    ]
    assert drawn[0] != drawn[1]


def test_finish_reason_and_usage_are_kept(model):
    """Trap 6: text only, in invoke and in streams."""
    for chunk in (
        model.generate([PROMPT], **GREEDY).generations[0][0],
        list(model._stream(PROMPT, **GREEDY))[-1],
    ):
        info = chunk.generation_info
        assert (info["finish_reason"], info["completion_tokens"]) == ("length", 8)
        assert info["prompt_tokens"] == model.get_num_tokens(PROMPT)
        assert info["tokens_per_second"] > 1


def test_stop_is_honoured_in_every_path(model):
    """Trap 7: stop dropped in the streaming path, an error where it is given twice."""
    options = {"max_tokens": 24, "temperature": 0}
    whole = model.invoke(PROMPT, **options)
    stop = whole[6:9]
    cut = whole[: whole.index(stop)]
    bound = model.bind(stop=[stop])
    own = model.model_copy(update={"stop": [stop]})
    assert model.invoke(PROMPT, stop=[stop], **options) == cut
    assert bound.invoke(PROMPT, **options) == cut
    assert "".join(bound.stream(PROMPT, **options)) == cut
    assert own.invoke(PROMPT, stop=["never"], **options) == cut


def test_stream_is_the_same_as_invoke(model):
    chunks = list(model.stream(PROMPT, **GREEDY))
    assert "".join(chunks) == model.invoke(PROMPT, **GREEDY)
    assert "Paris" in "".join(chunks)


def test_parameters_are_not_ignored(model):
    free = model.invoke(PROMPT, repeat_penalty=1.0, max_tokens=24, temperature=0)
    assert model.invoke(PROMPT, repeat_penalty=1.9, max_tokens=24, temperature=0) != free
    assert model.invoke(PROMPT, max_tokens=24, temperature=1.5, top_k=1, repeat_penalty=1.0) == free


@pytest.mark.parametrize("option", [{"grammar": "root ::= [a-z]"}, {"suffix": "x"}, {"echo": True}])
def test_what_is_not_decoded_is_refused(model, embedded_gguf, option):
    """Trap 13: stock replaces a grammar that it cannot read by "any JSON"."""
    (name,) = option
    with pytest.raises(ValueError, match=name):
        model.invoke(PROMPT, **option)
    with pytest.raises(ValueError, match=name):
        SafeLlamaCpp(model_path=str(embedded_gguf), n_ctx=256, **option)


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "missing"])
def test_broken_file_is_exit_3(embedded_gguf, tmp_path, kind):
    """Trap 17, and the C library never sees the file."""
    path = tmp_path / "m.gguf"
    whole = embedded_gguf.read_bytes()
    content = {"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"hello"}.get(kind)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CommandError) as caught:
        SafeLlamaCpp(model_path=str(path))
    assert caught.value.exit_code == MODEL


def test_adapter_that_does_not_fit_is_exit_3(embedded_gguf, tmp_path):
    """Traps 18 and 19: stock loads it "fine" and segfaults; and it switches mmap off."""
    with pytest.raises(CommandError) as caught:
        SafeLlamaCpp(model_path=str(embedded_gguf), n_ctx=256, lora_path=str(tmp_path / "no.gguf"))
    assert caught.value.exit_code == MODEL


def test_cgroup_quota_limits_threads(tmp_path):
    """Trap 22: a quota that is not seen costs up to 45 times."""
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert cpu_quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert usable_threads(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpu_quota(tmp_path) is None
