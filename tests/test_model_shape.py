"""Model shape: exact counts from config.json alone, and None rather than a guess."""

import json

import pytest

from scripts._cli import MODEL, CommandError
from scripts.model_shape import ModelShape, load_model_shape, read_model_shape
from scripts.recipe import ALL_LINEAR


def config(kind: str, *numbers: int, **more) -> dict:
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    keys += ("intermediate_size", "vocab_size")
    return {"model_type": kind, **dict(zip(keys, numbers, strict=True)), **more}


SMOL = config("llama", 576, 30, 9, 3, 1536, 49152, tie_word_embeddings=True)
TINY_LLAMA = config("llama", 2048, 22, 32, 4, 5632, 32000, tie_word_embeddings=False)
MISTRAL = config("mistral", 4096, 32, 32, 8, 14336, 32768, head_dim=None)


def shape_of(content: dict) -> ModelShape:
    shape = read_model_shape(content)
    assert shape is not None
    return shape


# Published parameter counts (SmolLM2, TinyLlama, Mistral v0.3, Qwen2.5-0.5B, Qwen3-0.6B, Gemma-2B).
@pytest.mark.parametrize(
    ("content", "total"),
    [
        (SMOL, 134_515_008),
        (TINY_LLAMA, 1_100_048_384),
        (MISTRAL, 7_248_023_552),
        (config("qwen2", 896, 24, 14, 2, 4864, 151936, tie_word_embeddings=True), 494_032_768),
        (
            config("qwen3", 1024, 28, 16, 8, 3072, 151936, head_dim=128, tie_word_embeddings=True),
            596_049_920,
        ),
        (config("gemma", 2048, 18, 8, 1, 16384, 256000, head_dim=256), 2_506_172_416),
    ],
)
def test_parameters_are_exact(content, total):
    parameters = shape_of(content).parameters
    assert parameters.total == total
    assert 0 < parameters.linear < total
    assert 0 < parameters.embedding < total


def test_parameters_are_those_of_a_real_model():
    transformers = pytest.importorskip("transformers")
    import torch

    for kind in ("Llama", "Qwen2", "Qwen3", "Gemma2"):
        made = getattr(transformers, f"{kind}Config")(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=96,
            vocab_size=128,
            head_dim=16,
        )
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(made)
        real = sum(parameter.numel() for parameter in model.parameters())
        assert shape_of(made.to_dict()).parameters.total == real, kind


# TinyLlama r=32 and Mistral r=16 are what Unsloth's notebooks print as trainable parameters.
@pytest.mark.parametrize(
    ("content", "r", "count"), [(TINY_LLAMA, 32, 25_231_360), (MISTRAL, 16, 41_943_040)]
)
def test_adapter_of_all_linear_layers(content, r, count):
    shape = shape_of(content)
    assert shape.lora_parameters(r, ALL_LINEAR) == count
    # q 2048 -> 2048 in 22 layers: r * (2048 + 2048) * 22, and so for the other widths
    one = r * 2 * shape.hidden * shape.layers
    assert shape.lora_parameters(r, ["q_proj"]) == one
    assert shape.lora_parameters(r, ["q_proj", "lm_head"]) == one + r * (shape.hidden + shape.vocab)


def test_unknown_module_is_named():
    with pytest.raises(CommandError, match=r"got qkv_proj, expected some of: q_proj"):
        shape_of(SMOL).lora_parameters(16, ["q_proj", "qkv_proj"])


@pytest.mark.parametrize(
    "content",
    [
        {},
        {**TINY_LLAMA, "model_type": "mixtral"},
        {**TINY_LLAMA, "hidden_size": None},
        {key: value for key, value in TINY_LLAMA.items() if key != "intermediate_size"},
    ],
)
def test_what_is_not_known_exactly_is_not_guessed(content):
    assert read_model_shape(content) is None


def test_local_folder_is_read_without_transformers(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMOL))
    assert load_model_shape(str(tmp_path)) == read_model_shape(SMOL)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CommandError, match="no JSON object") as caught:
        load_model_shape(str(tmp_path))
    assert caught.value.exit_code == MODEL


def test_hub_name_that_cannot_be_had_is_one_line(monkeypatch):
    transformers = pytest.importorskip("transformers")

    def refuse(name, revision):
        raise OSError(f"{name} at {revision} is not there\nand a long explanation")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(CommandError, match="org/name at v1 is not there; check") as caught:
        load_model_shape("org/name", "v1")
    assert caught.value.exit_code == MODEL


def test_hub_config_is_read(monkeypatch):
    transformers = pytest.importorskip("transformers")
    made = transformers.LlamaConfig(**{k: v for k, v in SMOL.items() if k != "model_type"})
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *a, **k: made)
    assert load_model_shape("org/name") == read_model_shape(SMOL)
