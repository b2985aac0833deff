"""LoRA GGUFs over one base: checked first, switched without a trace of the former."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from integration._cli import CommandError
from integration.adapters import Adapters, parse_adapter_options
from integration.llm import load_model

pytestmark = pytest.mark.model
IDS = list(range(100, 140))


@pytest.fixture(scope="module")
def files(tiny_model_dir, tiny_adapter_dir, tmp_path_factory) -> dict[str, Path]:
    """A base GGUF and its adapter as a LoRA GGUF, by llama.cpp's own converters."""
    from export.convert_gguf import convert_to_gguf, find_converter

    folder = tmp_path_factory.mktemp("lora")
    base, lora = folder / "base.gguf", folder / "lora.gguf"
    convert_to_gguf(tiny_model_dir, base, "tiny", {})
    converter = find_converter().with_name("convert_lora_to_gguf.py")
    subprocess.run(
        [sys.executable, str(converter), str(tiny_adapter_dir), "--base", str(tiny_model_dir),
         "--outfile", str(lora), "--outtype", "f32"],
        check=True, capture_output=True,
    )  # fmt: skip
    return {"base": base, "lora": lora}


def logits(model) -> np.ndarray:
    model.prefill(IDS)
    return model.next_logits().copy()


def test_switching_back_and_forth_leaves_no_trace(files):
    model = load_model(files["base"], n_ctx=256, n_threads=1)
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
    adapters = Adapters(load_model(files["base"], n_ctx=256), {"coding": files["lora"]})
    with pytest.raises(CommandError, match="did you mean 'coding'"):
        adapters.use("codeing")


def test_adapter_for_another_base_is_exit_3(files, embedded_gguf):
    """Stock LlamaCpp loads it and segfaults (trap 18)."""
    model = load_model(embedded_gguf, n_ctx=256)
    with pytest.raises(CommandError, match="does not fit the model") as caught:
        Adapters(model, {"foreign": files["lora"]})
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
        Adapters(load_model(files["base"], n_ctx=256), {"x": path})
    assert caught.value.exit_code == 3


def test_adapter_given_as_the_model_is_exit_3(files):
    with pytest.raises(CommandError, match="is a LoRA adapter, expected a whole model"):
        load_model(files["lora"])


@pytest.mark.parametrize("options", [["x"], ["=y"], ["x="], ["a=1", "a=2"], ["base=1"]])
def test_bad_options(options):
    with pytest.raises(CommandError):
        parse_adapter_options(options)
