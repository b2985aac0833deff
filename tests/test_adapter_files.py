"""Reading an adapter folder: what its tensors become, and what is refused, in one line each."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from export._cli import MODEL, CommandError
from export.adapter_files import read_adapter
from export.lora_config import parse_config
from export.safetensors_file import read_rows

PLAIN = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "bias": "none",
    "base_model_name_or_path": "base",
    "target_modules": ["q_proj"],
}
MODULE = "model.layers.0.self_attn.q_proj"
EMBEDDING = "model.embed_tokens"
Tensors = dict[str, torch.Tensor]


def keyed(**tensors: torch.Tensor) -> Tensors:
    """Name tensors below the prefix that PEFT writes; `__` stands for a dot."""
    return {f"base_model.model.{k.replace('__', '.')}": v for k, v in tensors.items()}


def below(module: str, **tensors: torch.Tensor) -> Tensors:
    return keyed(**{f"{module}.{name}": values for name, values in tensors.items()})


def factors(module: str = MODULE, rank: int = 2) -> Tensors:
    return below(module, lora_A__weight=torch.ones(rank, 3), lora_B__weight=torch.ones(4, rank))


def dora_factors(module: str = MODULE) -> Tensors:
    # PEFT writes this key without ".weight".
    return factors(module) | with_magnitude(torch.ones(4), module)


def with_magnitude(values: torch.Tensor, module: str = MODULE) -> Tensors:
    return factors(module) | below(module, lora_magnitude_vector=values)


def filled(part: str, value: float) -> Tensors:
    tensors = factors()
    tensors[f"base_model.model.{MODULE}.{part}.weight"][-1, -1] = value
    return tensors


def zero_factors() -> Tensors:
    return factors() | below(MODULE, lora_B__weight=torch.zeros(4, 2))


def lone_factor(part: str) -> Tensors:
    return {k: v for k, v in factors().items() if part in k}


def embedding_factors() -> Tensors:
    return below(EMBEDDING, lora_embedding_A=torch.ones(2, 5), lora_embedding_B=torch.ones(3, 2))


def write_adapter(folder: Path, tensors: Tensors, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**PLAIN, **config}), encoding="utf-8")
    return folder


def refused(folder: Path, match: str) -> None:
    with pytest.raises(CommandError, match=match) as caught:
        read_adapter(folder)
    assert caught.value.exit_code == MODEL
    assert "\n" not in str(caught.value)


def test_keys_become_weights_of_the_base(tmp_path: Path) -> None:
    adapter = read_adapter(write_adapter(tmp_path / "a", factors()))
    (module,) = adapter.modules.values()
    assert module.weight_name == f"{MODULE}.weight"
    assert (module.shape, module.rank, module.scale) == ((4, 3), 2, 2.0)
    assert (module.magnitude, module.is_embedding) == (None, False)
    assert read_rows(module.a).shape == (2, 3)
    assert read_rows(module.b, 1, 2).tolist() == [[1, 1], [1, 1]]
    assert adapter.weight_names == {f"{MODULE}.weight"}


def test_magnitudes_of_a_dora_are_found(tmp_path: Path) -> None:
    adapter = read_adapter(write_adapter(tmp_path / "a", dora_factors(), use_dora=True))
    (module,) = adapter.modules.values()
    assert module.magnitude is not None
    assert read_rows(module.magnitude).tolist() == [1, 1, 1, 1]
    assert (module.shape, module.rank, module.scale) == ((4, 3), 2, 2.0)


def test_lora_of_an_embedding_has_tokens_first(tmp_path: Path) -> None:
    own = below(EMBEDDING, base_layer__weight=torch.zeros(5, 3))
    adapter = read_adapter(write_adapter(tmp_path / "a", embedding_factors() | own))
    module = adapter.modules[f"{EMBEDDING}.weight"]
    assert (module.is_embedding, module.shape, module.rank) == (True, (5, 3), 2)
    assert adapter.saved[f"{EMBEDDING}.weight"].shape == (5, 3)
    assert adapter.beneath == {f"{EMBEDDING}.weight"}


def test_saved_weights_and_biases_are_found(tmp_path: Path) -> None:
    saved = keyed(
        lm_head__weight=torch.ones(5, 3),
        model__norm__weight=torch.ones(3),
        model__layers__0__q_proj__base_layer__bias=torch.zeros(4),
    )
    adapter = read_adapter(write_adapter(tmp_path / "a", factors() | saved))
    assert {name: info.shape for name, info in adapter.saved.items()} == {
        "lm_head.weight": (5, 3),
        "model.norm.weight": (3,),
        "model.layers.0.q_proj.bias": (4,),
    }


def test_wrappers_of_a_vocabulary_that_grew_are_undone(tmp_path: Path) -> None:
    # As PEFT saves modules_to_save with a resized embedding: trained copy twice, and the original.
    names = ("weight", "modules_to_save__weight", "original_module__weight")
    values = (torch.ones(5, 3), torch.ones(5, 3), torch.zeros(5, 3))
    tensors = below("lm_head", **dict(zip(names, values, strict=True)))
    tokens = below(EMBEDDING, token_adapter__base_layer__weight=torch.full((5, 3), 2.0)) | below(
        EMBEDDING, token_adapter__trainable_tokens_delta=torch.ones(2, 3)
    )
    tensors |= factors() | tokens
    adapter = read_adapter(write_adapter(tmp_path / "a", tensors, trainable_token_indices=[1, 4]))
    assert set(adapter.saved) == {"lm_head.weight", f"{EMBEDDING}.weight"}
    assert read_rows(adapter.saved["lm_head.weight"]).min() == 1
    assert adapter.tokens[f"{EMBEDDING}.weight"].indices == (1, 4)
    assert adapter.beneath == {f"{EMBEDDING}.weight"}


@pytest.mark.parametrize(
    ("indices", "expected"),
    [([7, 1], (7, 1)), ({"embed_tokens": [7, 1]}, (7, 1)), ({EMBEDDING: [0, 2]}, (0, 2))],
    ids=["list", "short", "full"],
)
def test_token_rows_are_named_by_the_configuration(
    tmp_path: Path, indices: object, expected: tuple[int, ...]
) -> None:
    rows = below(EMBEDDING, token_adapter__trainable_tokens_delta=torch.ones(2, 3))
    folder = write_adapter(tmp_path / "a", factors() | rows, trainable_token_indices=indices)
    assert read_adapter(folder).tokens[f"{EMBEDDING}.weight"].indices == expected
    write_adapter(folder, factors() | rows, trainable_token_indices=[1, 2, 3])
    refused(folder, r"has \(2, 3\) trained token rows, adapter_config.json names 3 tokens")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_qalora", True),
        ("lora_bias", True),
        ("peft_type", "IA3"),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "loftq"),
        ("fan_in_fan_out", True),
        ("target_parameters", ["mlp.experts"]),
        ("layer_replication", [[0, 2]]),
    ],
)
def test_unsupported_configuration_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(CommandError, match=f"{key}=.*supported: LoRA and DoRA") as caught:
        parse_config({**PLAIN, key: value})
    assert caught.value.exit_code == MODEL
    assert "Train again" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("modules_to_save", ["embed_tokens"]),
        ("bias", "lora_only"),
        ("trainable_token_indices", [1]),
        ("init_lora_weights", "gaussian"),
        ("init_lora_weights", True),
    ],
)
def test_what_a_merge_keeps_is_not_refused(key: str, value: object) -> None:
    assert parse_config({**PLAIN, key: value}).rank == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 0}, r"has ranks \[0\]; expected whole numbers > 0"),
        ({"r": None}, r"has ranks \[None\]"),
        ({"rank_pattern": {"q": 1.5}}, r"has ranks \[2, 1\.5\]"),
        ({"lora_alpha": "4"}, "lora_alpha='4'.*expected finite numbers"),
        ({"alpha_pattern": {"q": None}}, "alpha_pattern={'q': None}"),
        ({"trainable_token_indices": ["x"]}, r"trainable_token_indices=\['x'\]; expected token"),
        ({"trainable_token_indices": {"embed_tokens": 3}}, "expected token ids"),
    ],
    ids=str,
)
def test_values_that_are_no_numbers_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(CommandError, match=message) as caught:
        parse_config({**PLAIN, **config})
    assert caught.value.exit_code == MODEL


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (factors(rank=4), r"A \(4, 3\), B \(4, 4\); .* says rank 2.*of different runs"),
        (filled("lora_A", float("nan")), "lora_A holds NaN.*train again"),
        (filled("lora_B", float("inf")), "lora_B holds NaN or infinite"),
        (
            factors() | keyed(model__norm__weight=torch.tensor([1, float("nan")])),
            "'model.norm.weight': the saved weight holds NaN",
        ),
        (zero_factors(), "never trained: B @ A is zero in 1 of 1 modules, first '.*q_proj'"),
        (factors("lm_head") | zero_factors(), "zero in 1 of 2 modules"),
        (lone_factor("lora_A"), "q_proj' has lora_A only"),
        (lone_factor("lora_B"), "q_proj' has lora_B only"),
        (below(EMBEDDING, lora_embedding_A=torch.ones(2, 3)), "has lora_embedding_A only"),
        ({}, "no LoRA tensors; train again"),
        (
            factors() | below(MODULE, lora_B__bias=torch.ones(4)),
            "holds 1 tensors that cannot be merged, such as '.*lora_B.bias'; supported",
        ),
        (factors() | {"strange": torch.ones(1)}, "such as 'strange'"),
        (
            factors() | {"base_model.model.x.ia3_l.weight": torch.ones(1)},
            "such as 'base_model.model.x.ia3_l.weight'",
        ),
        (
            factors() | keyed(x__weight=torch.ones(1, dtype=torch.uint8)),
            "such as 'base_model.model.x.weight'",
        ),
        (
            below("c", lora_A__weight=torch.ones(2, 3, 1, 1), lora_B__weight=torch.ones(4, 2)),
            r"'c' has A \(2, 3, 1, 1\), B \(4, 2\); expected two matrices",
        ),
    ],
    ids=[
        "rank",
        "nanA",
        "infB",
        "nan0",
        "zero",
        "zero1",
        "loneA",
        "loneB",
        "emb",
        "none",
        "lora_bias",
        "strange",
        "ia3",
        "u8",
        "conv",
    ],
)
def test_bad_tensors_are_refused_in_one_line(
    tmp_path: Path, tensors: Tensors, message: str
) -> None:
    refused(write_adapter(tmp_path / "a", tensors), message)


@pytest.mark.parametrize(
    ("tensors", "use_dora", "message"),
    [
        (factors(), True, "use_dora=True, but 1 of 1 modules .* have no lora_magnitude_vector"),
        (
            dora_factors() | factors("model.layers.1.self_attn.q_proj"),
            True,
            r"1 of 2 .* have no lora_magnitude_vector, first 'model\.layers\.1",
        ),
        (dora_factors(), False, "use_dora=False, but 1 of 1 .* have a lora_magnitude_vector"),
        (with_magnitude(torch.ones(3)), True, r"lora_magnitude_vector \(3,\), expected \(4,\)"),
        (with_magnitude(torch.ones(1, 4)), True, r"\(1, 4\), expected \(4,\)"),
        (with_magnitude(torch.full((4,), float("inf"))), True, "lora_magnitude_vector holds NaN"),
        (
            dora_factors() | below("lm_head", lora_magnitude_vector=torch.ones(4)),
            True,
            "'lm_head' has lora_magnitude_vector only",
        ),
        (with_magnitude(torch.full((4,), 2.0)) | zero_factors(), True, "never trained"),
        (
            embedding_factors() | below(EMBEDDING, lora_magnitude_vector=torch.ones(5)),
            True,
            "'model.embed_tokens' is an embedding with DoRA; supported",
        ),
    ],
    ids=[
        "none",
        "one_lacks_it",
        "unexpected",
        "short",
        "matrix",
        "infinite",
        "lone",
        "zero",
        "embedding",
    ],
)
def test_bad_magnitudes_are_refused_in_one_line(
    tmp_path: Path, tensors: Tensors, use_dora: bool, message: str
) -> None:
    refused(write_adapter(tmp_path / "a", tensors, use_dora=use_dora), message)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", factors())
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    refused(folder, "incomplete.*it is damaged; train again")
    weights.unlink()
    refused(folder, r"has no adapter_model\.safetensors$")
    (folder / "adapter_model.bin").touch()
    refused(folder, r"but an adapter_model\.bin: save it again as safetensors")
    for content, message in (("{", "no valid JSON"), ("[]", "holds a list, expected keys")):
        (folder / "adapter_config.json").write_text(content, encoding="utf-8")
        refused(folder, message)
    refused(tmp_path, r"no adapter_config\.json; expected a PEFT adapter. Train one")
