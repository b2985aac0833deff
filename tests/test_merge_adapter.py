"""Merging: the same numbers as PEFT, training's tokenizer, and a refusal for every wrong pair."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from export._cli import MODEL, USAGE, CommandError
from export.base_model import base_fingerprint, read_tensor_index
from export.merge_adapter import main, merge_adapter
from tests.conftest import make_adapter

pytestmark = pytest.mark.model


@pytest.fixture
def adapter_dir(tiny_adapter_dir: Path, tmp_path: Path) -> Path:
    """A copy to be damaged, in a run folder of its own."""
    return Path(shutil.copytree(tiny_adapter_dir, tmp_path / "run/adapter"))


@pytest.fixture
def base_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))


def tensors_of(folder: Path) -> dict:
    from safetensors.torch import load_file

    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def refused(match: str, *args: object, code: int = MODEL, **kwargs: object) -> None:
    with pytest.raises(CommandError, match=match) as caught:
        merge_adapter(*args, **kwargs)
    assert caught.value.exit_code == code


def test_merge_equals_peft_within_one_rounding(
    tiny_adapter_dir: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(model, tiny_adapter_dir).merge_and_unload().state_dict()
    ours = tensors_of(merge_adapter(tiny_adapter_dir, tmp_path / "merged"))
    base = tensors_of(tiny_model_dir)
    changed = {name for name in ours if not ours[name].equal(base[name])}
    assert len(changed) == 6
    assert all(name.split(".")[-2] in ("q_proj", "v_proj", "down_proj") for name in changed)
    for name, tensor in ours.items():
        assert tensor.dtype == base[name].dtype
        # Half a unit in the last place of float16, and float32's own noise.
        torch.testing.assert_close(tensor.float(), theirs[name], rtol=2.0**-11, atol=1e-7)


def write_dora_with_peft(adapter_dir: Path, base_dir: Path, **config: object) -> Path:
    """Let PEFT itself name and write the tensors; B and the magnitudes are moved off their start."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    lora = LoraConfig(
        r=8,
        lora_alpha=4,
        target_modules=["q_proj", "v_proj", "down_proj"],
        task_type="CAUSAL_LM",
        use_dora=True,
        **config,
    )
    adapted = get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
            elif "lora_magnitude_vector" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.3))
    adapted.save_pretrained(adapter_dir)
    return adapter_dir


def merged_by_peft(adapter_dir: Path, base_dir: Path, dtype: object) -> dict:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=dtype)
    return PeftModel.from_pretrained(model, adapter_dir).merge_and_unload().state_dict()


def same_as_peft(ours: dict, theirs: dict, names: set[str]) -> bool:
    """float32: 1e-5 relative. float16: neighbours at most, and those are rare."""
    import torch

    for name in names:
        mine, peft = ours[name], theirs[name]
        assert mine.dtype == peft.dtype
        half = mine.dtype == torch.float16
        rtol, atol = (2.0**-10, 2.0**-24) if half else (1e-5, 1e-7)
        if not mine.float().allclose(peft.float(), rtol=rtol, atol=atol):
            return False
        if half and (mine != peft).float().mean() > 0.001:
            return False
    return True


@pytest.mark.parametrize(
    ("type_name", "use_rslora"), [("float32", False), ("float32", True), ("float16", True)]
)
def test_dora_merge_equals_peft(
    base_dir: Path, tmp_path: Path, type_name: str, use_rslora: bool
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    dtype = getattr(torch, type_name)
    base = {k: v.to(dtype) for k, v in load_file(base_dir / "model.safetensors").items()}
    save_file(base, base_dir / "model.safetensors", {"format": "pt"})
    adapter_dir = write_dora_with_peft(tmp_path / "dora", base_dir, use_rslora=use_rslora)
    theirs = merged_by_peft(adapter_dir, base_dir, dtype)
    ours = tensors_of(merge_adapter(adapter_dir, tmp_path / "merged"))
    changed = {name for name in ours if not ours[name].equal(base[name])}
    assert len(changed) == 6
    assert same_as_peft(ours, theirs, set(ours))

    # The twins: magnitudes ignored, magnitudes slightly off, and rsLoRA mistaken.
    config_path = adapter_dir / "adapter_config.json"
    weights = adapter_dir / "adapter_model.safetensors"
    config, tensors = json.loads(config_path.read_text(encoding="utf-8")), load_file(weights)
    magnitudes = {k for k in tensors if k.endswith(".lora_magnitude_vector")}
    assert len(magnitudes) == 6
    plain = {k: v for k, v in tensors.items() if k not in magnitudes}
    off = {k: v * 1.005 if k in magnitudes else v for k, v in tensors.items()}
    for number, (change, content) in enumerate(
        [({"use_dora": False}, plain), ({}, off), ({"use_rslora": not use_rslora}, tensors)]
    ):
        config_path.write_text(json.dumps({**config, **change}), encoding="utf-8")
        save_file(content, weights)
        twin = tensors_of(merge_adapter(adapter_dir, tmp_path / f"twin{number}"))
        assert not any(same_as_peft(twin, theirs, {name}) for name in changed), (change, number)


@pytest.mark.parametrize("type_name", ["float16", "bfloat16", "float32"])
def test_dora_that_learned_nothing_is_refused(
    base_dir: Path, tmp_path: Path, type_name: str
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    dtype = getattr(torch, type_name)
    base = {k: v.to(dtype) for k, v in load_file(base_dir / "model.safetensors").items()}
    save_file(base, base_dir / "model.safetensors")
    # Magnitudes as they start, and a B @ A below rounding: float32 noise must not pass as change.
    adapter_dir = make_adapter(tmp_path / "a", base_dir, lora_alpha=1e-9, use_dora=True)
    weights = adapter_dir / "adapter_model.safetensors"
    tensors = load_file(weights)
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        module = key.removesuffix(".lora_A.weight")
        weight = base[f"{module.removeprefix('base_model.model.')}.weight"]
        # In float64, so that this norm is not the one of the merge.
        norms = weight.double().norm(dim=1).float()
        tensors[f"{module}.lora_magnitude_vector"] = norms
    save_file(tensors, weights)
    refused("does not change 'model.layers.0", adapter_dir, tmp_path / "m")
    # The twin: one row of each module grows by 1 %.
    for key in [key for key in tensors if key.endswith("lora_magnitude_vector")]:
        tensors[key][0] *= 1.01
    save_file(tensors, weights)
    assert merge_adapter(adapter_dir, tmp_path / "m").is_dir()


def test_merged_folder_loads_and_has_trainings_tokenizer(
    adapter_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (adapter_dir / "chat_template.jinja").write_text("{{ 'trained' }}", encoding="utf-8")
    output = tmp_path / "merged"
    assert main([str(adapter_dir), "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    assert AutoTokenizer.from_pretrained(output).chat_template == "{{ 'trained' }}"
    AutoModelForCausalLM.from_pretrained(output)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_shards_and_index_are_kept(tiny_adapter_dir: Path, base_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(base_dir / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    (base_dir / "model.safetensors").unlink()
    for file_name, keys in halves.items():
        save_file({key: tensors[key] for key in keys}, base_dir / file_name)
    weight_map = {key: file_name for file_name, keys in halves.items() for key in keys}
    index = base_dir / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    sharded = merge_adapter(tiny_adapter_dir, tmp_path / "sharded", base_dir)
    whole = merge_adapter(tiny_adapter_dir, tmp_path / "whole")
    assert {path.name for path in sharded.glob("*.safetensors")} == set(halves)
    ours, expected = tensors_of(sharded), tensors_of(whole)
    assert ours.keys() == expected.keys()
    assert all(ours[name].equal(expected[name]) for name in ours)
    (base_dir / "model-2-of-2.safetensors").unlink()
    refused("lacks model-2-of-2", tiny_adapter_dir, tmp_path / "x", base_dir)


def test_tokenizer_falls_back_to_the_base_and_must_exist(
    adapter_dir: Path, base_dir: Path, tmp_path: Path
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (adapter_dir / name).unlink()
    merged = merge_adapter(adapter_dir, tmp_path / "merged", base_dir)
    assert (merged / "tokenizer.json").is_file()
    assert (merged / "chat_template.jinja").is_file()
    (base_dir / "tokenizer.json").unlink()
    refused("neither .* has a tokenizer", adapter_dir, tmp_path / "none", base_dir)
    assert not (tmp_path / "none").exists()


def test_tokenizer_with_more_tokens_than_rows_is_refused(adapter_dir: Path, tmp_path: Path) -> None:
    path = adapter_dir / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["added_tokens"].append({"id": 49152, "content": "<new>"})
    path.write_text(json.dumps(content), encoding="utf-8")
    refused("knows token 49152, .* has 49152 rows", adapter_dir, tmp_path / "merged")


def test_adapter_for_another_base_is_refused(
    adapter_dir: Path, base_dir: Path, default_model_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    refused(
        r"another base: 'model.layers.0.*\(\d+, \d+\).*expected",
        adapter_dir,
        out,
        default_model_dir,
    )
    provenance = adapter_dir.parent / "provenance.json"
    fingerprint = {"base_model": {"name": "x", "fingerprint": "0" * 64}}
    provenance.write_text(json.dumps(fingerprint), encoding="utf-8")
    refused("provenance.json says fingerprint 000000000000", adapter_dir, out)
    fingerprint["base_model"]["fingerprint"] = base_fingerprint(base_dir)
    provenance.write_text(json.dumps(fingerprint), encoding="utf-8")
    assert merge_adapter(adapter_dir, out, base_dir) == out


def test_module_that_the_base_lacks_is_named(base_dir: Path, tmp_path: Path) -> None:
    adapter_dir = make_adapter(tmp_path / "a", base_dir)
    from safetensors.torch import load_file, save_file

    weights = adapter_dir / "adapter_model.safetensors"
    tensors = {k.replace("layers.1.", "layers.7."): v for k, v in load_file(weights).items()}
    save_file(tensors, weights)
    refused("no tensor 'model.layers.7", adapter_dir, tmp_path / "merged")
    tensors = {
        k.replace("model.model.layers.0.mlp.down_proj", "model.lm_head"): v
        for k, v in tensors.items()
    }
    save_file({k: v for k, v in tensors.items() if "lm_head" in k}, weights)
    refused("shares its lm_head with the embedding", adapter_dir, tmp_path / "merged")


def test_quantized_base_is_refused(tiny_adapter_dir: Path, base_dir: Path, tmp_path: Path) -> None:
    path = base_dir / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    path.write_text(json.dumps(config), encoding="utf-8")
    refused("is quantized: .*bitsandbytes.*--base", tiny_adapter_dir, tmp_path / "m", base_dir)


def test_truncated_base_is_refused(tiny_adapter_dir: Path, base_dir: Path, tmp_path: Path) -> None:
    path = base_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refused("incomplete", tiny_adapter_dir, tmp_path / "m", base_dir)


def test_missing_base_is_one_error(adapter_dir: Path, tmp_path: Path) -> None:
    path = adapter_dir / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name, message in (
        ("/nowhere/base", "'/nowhere/base' does not exist"),
        ("someone/model-unsloth-bnb-4bit", "'someone/model' is no local folder and cannot be had"),
        ("", "names no base_model_name_or_path"),
    ):
        path.write_text(json.dumps({**config, "base_model_name_or_path": name}), encoding="utf-8")
        refused(message, adapter_dir, tmp_path / "m")
    refused("has no config.json", adapter_dir, tmp_path / "m", tmp_path)


def test_existing_output_is_refused_unless_overwritten(
    tiny_adapter_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "merged"
    merge_adapter(tiny_adapter_dir, output)
    refused("exists", tiny_adapter_dir, output, code=USAGE)
    (output / "old.txt").touch()
    merge_adapter(tiny_adapter_dir, output, overwrite=True)
    assert not (output / "old.txt").exists()
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/love.txt").touch()
    refused("no model folder", tiny_adapter_dir, tmp_path / "letters", code=USAGE, overwrite=True)


def test_delta_below_one_rounding_step_is_refused(base_dir: Path, tmp_path: Path) -> None:
    adapter_dir = make_adapter(tmp_path / "a", base_dir, lora_alpha=1e-9)
    refused("does not change 'model.layers.0", adapter_dir, tmp_path / "m")


def test_tensor_index_lists_every_tensor(tiny_model_dir: Path) -> None:
    index = read_tensor_index(tiny_model_dir)
    assert {name: info.shape for name, info in index.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors_of(tiny_model_dir).items()
    }


def test_command_ends_with_one_line_and_code(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "export.merge_adapter", str(tmp_path), "--output", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == MODEL
    assert done.stdout == ""
    assert done.stderr.startswith("error: adapter folder")
    assert done.stderr.count("\n") == 1
