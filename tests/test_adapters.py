"""LoRA GGUFs over one base: checked first, switched without a trace of the former."""

from pathlib import Path

import numpy as np
import pytest

from integration._cli import CommandError
from integration.adapters import Adapters, parse_adapter_options
from integration.backend import Feed
from integration.models import load_gguf

pytestmark = pytest.mark.model
IDS = list(range(100, 140))


@pytest.fixture(scope="module")
def files(tiny_model_dir, tiny_adapter_dir, tmp_path_factory) -> dict[str, Path]:
    """A base GGUF, and its adapter as we export it."""
    from export.export_lora_gguf import main
    from tests.stock_chain import convert

    folder = tmp_path_factory.mktemp("lora")
    base, lora = folder / "base.gguf", folder / "lora.gguf"
    convert(tiny_model_dir, base)
    assert main([str(tiny_adapter_dir), "--output", str(lora), "--type", "F32"]) == 0
    return {"base": base, "lora": lora}


def logits(model) -> np.ndarray:
    (row,) = model.engine.evaluate([(0, Feed(IDS, is_prompt=True, continues=True))])
    return model.engine.logits(row).copy()


def test_switching_back_and_forth_leaves_no_trace(files):
    """Case 2: an old prefix under a new adapter."""
    model = load_gguf(files["base"], n_ctx=256, n_threads=1)
    adapters = Adapters(model, {"mine": files["lora"]})
    assert adapters.names == ["base", "mine"]
    cold = logits(model)
    adapters.use("mine")
    tuned = logits(model)
    assert np.abs(tuned - cold).max() > 0.01
    adapters.use("base")
    assert np.array_equal(logits(model), cold)
    adapters.use("mine")
    assert np.array_equal(logits(model), tuned)


def test_unknown_name_gives_the_nearest(files):
    adapters = Adapters(load_gguf(files["base"], n_ctx=256), {"coding": files["lora"]})
    with pytest.raises(CommandError, match="did you mean 'coding'"):
        adapters.use("codeing")


def test_adapter_for_another_base_is_exit_3(files, embedded_gguf):
    """Case 1: stock LlamaCpp loads it and segfaults (trap 18)."""
    model = load_gguf(embedded_gguf, n_ctx=256)
    with pytest.raises(CommandError, match="does not fit the model") as caught:
        Adapters(model, {"foreign": files["lora"]})
    assert caught.value.exit_code == 3


def test_embedding_factors_over_a_tied_head_are_exit_3(files, tmp_path):
    """llama.cpp loads such a file and aborts the process at the first token."""
    from gguf import GGUFReader, GGUFWriter

    path = tmp_path / "embedding.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    width = {t.name: t.shape for t in GGUFReader(files["base"]).tensors}["token_embd.weight"]
    writer.add_tensor("token_embd.weight.lora_a", np.ones((4, int(width[1])), np.float32))
    writer.add_tensor("token_embd.weight.lora_b", np.ones((int(width[0]), 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CommandError, match=r"changes the embedding.*merge it instead") as caught:
        Adapters(load_gguf(files["base"], n_ctx=256), {"x": path})
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("content", [b"", b"some text", "base", "truncated"])
def test_file_that_is_no_adapter_is_exit_3(files, tmp_path, content):
    path = tmp_path / "x.gguf"
    if content == "base":
        path = files["base"]
    else:
        whole = files["lora"].read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if content == "truncated" else content)
    with pytest.raises(CommandError) as caught:
        Adapters(load_gguf(files["base"], n_ctx=256), {"x": path})
    assert caught.value.exit_code == 3


def test_adapter_given_as_the_model_is_exit_3(files):
    with pytest.raises(CommandError, match="is a LoRA adapter, expected a whole model"):
        load_gguf(files["lora"])


@pytest.mark.parametrize("options", [["x"], ["=y"], ["x="], ["a=1", "a=2"], ["base=1"]])
def test_bad_options(options):
    with pytest.raises(CommandError):
        parse_adapter_options(options)
