"""The arithmetic of a LoRA merge, against numbers worked out by hand; and what is refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from export._cli import MODEL, CommandError
from export.lora_math import merge_weight, parse_config, read_adapter

PLAIN = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "bias": "none",
    "base_model_name_or_path": "base",
    "target_modules": ["q_proj"],
}
MODULE = "model.layers.0.self_attn.q_proj"


def factors(module: str = MODULE, rank: int = 2) -> dict[str, torch.Tensor]:
    prefix = f"base_model.model.{module}"
    return {
        f"{prefix}.lora_A.weight": torch.ones(rank, 3),
        f"{prefix}.lora_B.weight": torch.ones(4, rank),
    }


def dora_factors(module: str = MODULE) -> dict[str, torch.Tensor]:
    # PEFT writes this key without ".weight".
    return factors(module) | {f"base_model.model.{module}.lora_magnitude_vector": torch.ones(4)}


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**PLAIN, **config}), encoding="utf-8")
    return folder


def test_merge_weight_adds_scaled_product() -> None:
    # B @ A = [[1*1+0*3, 1*2+0*4], [2*1+1*3, 2*2+1*4]] = [[1, 2], [5, 8]]; times 0.5, plus W.
    weight = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [2.0, 1.0]])
    assert merge_weight(weight, a, b, 0.5).tolist() == [[1.5, 2.0], [3.5, 5.0]]


def test_merge_weight_rounds_once() -> None:
    # In float16, 1 + 2^-11 is a tie and gives 1. Product first rounded to float16, the sum of
    # 2^-11 and 2^-20 loses its small part in the tie; in float32 it decides: 1 + 2^-10.
    weight = torch.ones(1, 1, dtype=torch.float16)
    a = torch.tensor([[2.0**-11 + 2.0**-20]])
    merged = merge_weight(weight, a, torch.ones(1, 1), 1.0)
    assert merged.dtype == torch.float16
    assert merged.item() == 1 + 2.0**-10


def test_merge_weight_with_magnitudes_sets_the_length_of_each_row() -> None:
    # W + 0.5 * (B @ A) = [[2, 4], [0, 1]] + [[1, 0], [0, 1]] = [[3, 4], [0, 2]]: rows of length 5
    # and 2 (columns: 3 and sqrt(20)), wanted are 10 and 1.
    weight = torch.tensor([[2.0, 4.0], [0.0, 1.0]])
    a, b = torch.eye(2), 2 * torch.eye(2)
    merged = merge_weight(weight, a, b, 0.5, torch.tensor([10.0, 1.0]))
    assert merged.tolist() == [[6.0, 8.0], [0.0, 1.0]]
    assert weight.tolist() == [[2.0, 4.0], [0.0, 1.0]]


def test_merge_weight_takes_norms_in_float32() -> None:
    # 1003 / sqrt(2) = 709.23, in float16 (steps of 0.5) 709. With the norm rounded to float16,
    # 1.4140625, it would be 709.30 and so 709.5.
    weight = torch.ones(1, 2, dtype=torch.float16)
    zero = torch.zeros(1, 2), torch.zeros(1, 1)
    merged = merge_weight(weight, *zero, 1.0, torch.tensor([1003.0], dtype=torch.float16))
    assert merged.dtype == torch.float16
    assert merged.tolist() == [[709.0, 709.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_merge_weight_keeps_the_type_of_the_base(dtype: torch.dtype) -> None:
    assert (
        merge_weight(torch.ones(2, 2, dtype=dtype), torch.ones(1, 2), torch.ones(2, 1), 1).dtype
        == dtype
    )


def test_scale_is_alpha_over_rank() -> None:
    assert parse_config(PLAIN).scale_of(MODULE) == 4 / 2


def test_scale_with_rslora_is_alpha_over_root_of_rank() -> None:
    config = parse_config({**PLAIN, "r": 16, "lora_alpha": 16, "use_rslora": True})
    assert config.scale_of(MODULE) == 16 / 4


def test_patterns_match_the_end_of_a_name_like_peft() -> None:
    config = parse_config(
        {**PLAIN, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"layers.0.self_attn.q_proj": 2}}
    )
    assert (config.rank_of(MODULE), config.scale_of(MODULE)) == (8, 2 / 8)
    assert config.scale_of("model.layers.1.self_attn.q_proj") == 4 / 8
    assert config.scale_of("model.layers.1.self_attn.my_q_proj") == 4 / 2
    rooted = parse_config({**PLAIN, "rank_pattern": {r"layers\.[01]\..*": 4}, "use_rslora": True})
    assert math.isclose(rooted.scale_of(MODULE), 4 / 2)


def test_patterns_agree_with_peft_itself() -> None:
    from peft.utils.other import get_pattern_key

    patterns = {"q_proj": 3, r"layers\.1\..*": 5, "model.layers.0.mlp.up_proj": 7}
    config = parse_config({**PLAIN, "rank_pattern": patterns})
    for name in (MODULE, "model.layers.1.mlp.up_proj", "model.layers.0.mlp.up_proj", "lm_head"):
        expected = patterns.get(get_pattern_key(list(patterns), name), 2)
        assert config.rank_of(name) == expected


def test_read_adapter_maps_keys_to_weights(tmp_path: Path) -> None:
    adapter = read_adapter(write_adapter(tmp_path / "a", factors()))
    (module,) = adapter.modules.values()
    assert module.weight_name == f"{MODULE}.weight"
    assert (module.shape, module.rank, module.scale) == ((4, 3), 2, 2.0)
    assert module.magnitude_key is None


def test_read_adapter_finds_the_magnitudes_of_a_dora(tmp_path: Path) -> None:
    adapter = read_adapter(write_adapter(tmp_path / "a", dora_factors(), use_dora=True))
    (module,) = adapter.modules.values()
    assert module.magnitude_key == f"base_model.model.{MODULE}.lora_magnitude_vector"
    assert (module.shape, module.rank, module.scale) == ((4, 3), 2, 2.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_qalora", True),
        ("modules_to_save", ["embed_tokens"]),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("peft_type", "IA3"),
        ("init_lora_weights", "pissa_niter_4"),
        ("trainable_token_indices", [1]),
        ("fan_in_fan_out", True),
    ],
)
def test_unsupported_configuration_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(CommandError, match=f"{key}=.*supported: LoRA and DoRA") as caught:
        parse_config({**PLAIN, key: value})
    assert caught.value.exit_code == MODEL


def nan_factors() -> dict[str, torch.Tensor]:
    tensors = factors()
    tensors[f"base_model.model.{MODULE}.lora_A.weight"][0, 0] = float("nan")
    return tensors


def zero_factors() -> dict[str, torch.Tensor]:
    tensors = factors()
    tensors[f"base_model.model.{MODULE}.lora_B.weight"].zero_()
    return tensors


def embedding_factors() -> dict[str, torch.Tensor]:
    return {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 3)}


def lone_factor() -> dict[str, torch.Tensor]:
    tensors = factors()
    del tensors[f"base_model.model.{MODULE}.lora_B.weight"]
    return tensors


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (factors(rank=4), "rank 2"),
        (nan_factors(), "lora_A holds NaN"),
        (zero_factors(), "never trained"),
        (embedding_factors(), "lora_embedding_A"),
        (lone_factor(), "lora_A only"),
        ({}, "no LoRA tensors"),
    ],
    ids=["rank", "nan", "zero", "embedding", "lone", "empty"],
)
def test_bad_factors_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(CommandError, match=message) as caught:
        read_adapter(write_adapter(tmp_path / "a", tensors))
    assert caught.value.exit_code == MODEL


def with_magnitude(values: torch.Tensor, module: str = MODULE) -> dict[str, torch.Tensor]:
    return dora_factors() | {f"base_model.model.{module}.lora_magnitude_vector": values}


def zero_dora_factors() -> dict[str, torch.Tensor]:
    return with_magnitude(torch.full((4,), 2.0)) | zero_factors()


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
            with_magnitude(torch.ones(4), "lm_head"),
            True,
            "'lm_head' has lora_magnitude_vector only",
        ),
        (zero_dora_factors(), True, "never trained"),
    ],
    ids=["none", "one_lacks_it", "unexpected", "short", "matrix", "infinite", "lone", "zero"],
)
def test_bad_magnitudes_are_refused_in_one_line(
    tmp_path: Path, tensors: dict[str, torch.Tensor], use_dora: bool, message: str
) -> None:
    with pytest.raises(CommandError, match=message) as caught:
        read_adapter(write_adapter(tmp_path / "a", tensors, use_dora=use_dora))
    assert caught.value.exit_code == MODEL
    assert "\n" not in str(caught.value)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", factors())
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CommandError, match="damaged"):
        read_adapter(folder)
    weights.unlink()
    with pytest.raises(CommandError, match=r"has no adapter_model\.safetensors"):
        read_adapter(folder)
    (folder / "adapter_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CommandError, match="no valid JSON"):
        read_adapter(folder)
    with pytest.raises(CommandError, match=r"no adapter_config\.json"):
        read_adapter(tmp_path)
