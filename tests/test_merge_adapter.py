"""Merging: the same numbers as PEFT, training's tokenizer, and a refusal for every wrong pair."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from export._cli import FAILED, MODEL, USAGE, CommandError
from export.adapter_options import open_inputs
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


def merge(
    adapter_dir: Path, output_dir: Path, base_dir: Path | None = None, overwrite: bool = False
) -> Path:
    return merge_adapter(open_inputs(adapter_dir, base_dir), output_dir, overwrite)


def tensors_of(folder: Path) -> dict:
    from safetensors.torch import load_file

    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def refused(match: str, *args: Path, code: int = MODEL, overwrite: bool = False) -> None:
    """Expect one line, the exit code, and nothing half-made left behind."""
    with pytest.raises(CommandError, match=match) as caught:
        merge(*args, overwrite=overwrite)
    assert caught.value.exit_code == code
    assert "\n" not in str(caught.value)
    assert not [path for path in args[1].parent.iterdir() if path.name.startswith(".")]


def change_json(path: Path, **keys: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **keys}), encoding="utf-8")


def change_tensors(path: Path, change: Callable[[dict], dict]) -> None:
    from safetensors.torch import load_file, save_file

    save_file(change(load_file(path)), path, {"format": "pt"})


def test_merge_equals_peft_within_one_rounding(
    tiny_adapter_dir: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(model, tiny_adapter_dir).merge_and_unload().state_dict()
    ours = tensors_of(merge(tiny_adapter_dir, tmp_path / "merged"))
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
    ours = tensors_of(merge(adapter_dir, tmp_path / "merged"))
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
        twin = tensors_of(merge(adapter_dir, tmp_path / f"twin{number}"))
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
    assert merge(adapter_dir, tmp_path / "m").is_dir()


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
    sharded = merge(tiny_adapter_dir, tmp_path / "sharded", base_dir)
    whole = merge(tiny_adapter_dir, tmp_path / "whole")
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
    merged = merge(adapter_dir, tmp_path / "merged", base_dir)
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
    assert merge(adapter_dir, out, base_dir) == out


def test_module_that_the_base_lacks_is_named(base_dir: Path, tmp_path: Path) -> None:
    adapter_dir = make_adapter(tmp_path / "a", base_dir)
    from safetensors.torch import load_file, save_file

    weights = adapter_dir / "adapter_model.safetensors"
    tensors = {k.replace("layers.1.", "layers.7."): v for k, v in load_file(weights).items()}
    save_file(tensors, weights)
    refused("no tensor 'model.layers.7", adapter_dir, tmp_path / "merged")


def test_quantized_base_is_refused(tiny_adapter_dir: Path, base_dir: Path, tmp_path: Path) -> None:
    import torch

    change_json(base_dir / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    refused("is quantized: .*bitsandbytes.*--base", tiny_adapter_dir, tmp_path / "m", base_dir)
    change_json(base_dir / "config.json", quantization_config=None)
    name = "model.layers.0.self_attn.q_proj.weight"
    packed = {name: torch.ones(64, 2, dtype=torch.uint8)}
    change_tensors(base_dir / "model.safetensors", lambda tensors: tensors | packed)
    refused(f"is quantized: packed '{name}'.*16-bit", tiny_adapter_dir, tmp_path / "m", base_dir)


def test_damaged_base_is_refused(tiny_adapter_dir: Path, base_dir: Path, tmp_path: Path) -> None:
    path = base_dir / "model.safetensors"
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for damaged, message in (
        (content[:-1000], "incomplete; copy it again"),
        (content[:4], "is no valid safetensors file; copy it again"),
        (content[:8] + b"\0" * 8 + content[16:], "is no valid safetensors file; copy it again"),
        (
            content[:start].replace(b"[512,256]", b"[512,258]", 1) + content[start:],
            r"gate_proj.weight' has 262144 bytes, its shape needs 264192; copy it again",
        ),
    ):
        path.write_bytes(damaged)
        refused(message, tiny_adapter_dir, tmp_path / "m", base_dir)
    path.write_bytes(content)
    merge(tiny_adapter_dir, tmp_path / "m", base_dir)


def test_base_with_a_value_that_is_no_number_is_refused(
    tiny_adapter_dir: Path, base_dir: Path, tmp_path: Path
) -> None:
    def spoil(tensors: dict) -> dict:
        tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("inf")
        return tensors

    change_tensors(base_dir / "model.safetensors", spoil)
    message = "'model.layers.1.mlp.down_proj.weight' holds NaN or infinite .*the merge .F16"
    refused(message, tiny_adapter_dir, tmp_path / "m", base_dir)


def test_head_with_other_rows_than_the_embedding_is_refused(
    tiny_adapter_dir: Path, base_dir: Path, tmp_path: Path
) -> None:
    import torch

    change_json(base_dir / "config.json", tie_word_embeddings=False)
    for rows in (49000, 49152):
        head = {"lm_head.weight": torch.ones(rows, 256, dtype=torch.float16)}
        change_tensors(base_dir / "model.safetensors", lambda t, head=head: t | head)
        if rows == 49000:
            message = "embedding has 49152 tokens, its lm_head.weight 49000"
            refused(message, tiny_adapter_dir, tmp_path / "m", base_dir)
    assert "lm_head.weight" in tensors_of(merge(tiny_adapter_dir, tmp_path / "m", base_dir))


def test_full_disk_is_told_before_anything_is_written(
    tiny_adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = open_inputs(tiny_adapter_dir)
    needed = sum(weight.source.num_bytes for weight in inputs.model.weights.values())
    free = {"bytes": needed - 10_000_000}
    usage = type("Usage", (), {"free": property(lambda _: free["bytes"])})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage())
    message = f"needs {needed} bytes, {needed - 10_000_000} are free, 10000000 are missing .0.01 GB"
    refused(message, tiny_adapter_dir, tmp_path / "m", code=FAILED)
    free["bytes"] = needed
    assert merge(tiny_adapter_dir, tmp_path / "m").is_dir()


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
    merge(tiny_adapter_dir, output)
    refused("exists", tiny_adapter_dir, output, code=USAGE)
    (output / "old.txt").touch()
    merge(tiny_adapter_dir, output, overwrite=True)
    assert not (output / "old.txt").exists()
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/love.txt").touch()
    refused("no model folder", tiny_adapter_dir, tmp_path / "letters", code=USAGE, overwrite=True)


def test_delta_below_one_rounding_step_is_refused(base_dir: Path, tmp_path: Path) -> None:
    adapter_dir = make_adapter(tmp_path / "a", base_dir, lora_alpha=1e-9)
    message = (
        r"does not change 'model.layers.0.*smaller than one rounding step of F16.*Train longer"
    )
    refused(message, adapter_dir, tmp_path / "m")


@pytest.mark.parametrize("type_name", ["float16", "bfloat16", "float32"])
def test_merged_weights_are_rounded_once_to_the_bases_type(
    base_dir: Path, tmp_path: Path, type_name: str
) -> None:
    """1 + 2^-11 + 2^-20 is above the tie of float16, 1 + 2^-8 + 2^-17 above bfloat16's.

    With the product rounded on its own first, its small part would be lost in the tie.
    """
    import torch

    dtype = getattr(torch, type_name)
    name = "model.layers.0.self_attn.q_proj.weight"
    half = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}[type_name]
    change_tensors(
        base_dir / "model.safetensors",
        lambda tensors: {
            k: torch.ones_like(v, dtype=dtype) if k == name else v.to(dtype)
            for k, v in tensors.items()
        },
    )
    adapter_dir = make_adapter(
        tmp_path / "a", base_dir, ("layers.0.self_attn.q_proj",), r=8, lora_alpha=8
    )
    wide = 0.0 if type_name == "float32" else half * 2**-9
    for value, expected in ((half + wide, 1 + 2 * half), (half * 0.5, None)):
        if type_name == "float32" and expected:
            value, expected = 2 * half, 1 + 2 * half  # noqa: PLW2901

        def set_factors(tensors: dict, value: float = value) -> dict:
            # One column of B is 1, and one row of A the value: B @ A is that value everywhere.
            for key, tensor in tensors.items():
                tensor.zero_()
                if "lora_A" in key:
                    tensor[0] = value
                else:
                    tensor[:, 0] = 1
            return tensors

        change_tensors(adapter_dir / "adapter_model.safetensors", set_factors)
        if expected is None:
            refused(f"does not change '{name}'", adapter_dir, tmp_path / "m2")
        else:
            merged = tensors_of(merge(adapter_dir, tmp_path / "m"))[name]
            assert merged.dtype == dtype
            assert merged.float().unique().tolist() == [expected]


def test_trained_head_gets_the_embeddings_type(
    tiny_adapter_dir: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Of a tied base only the head was trained, in float32: both are written as float16."""
    import torch

    adapter_dir = Path(shutil.copytree(tiny_adapter_dir, tmp_path / "a"))
    embedding = tensors_of(tiny_model_dir)["model.embed_tokens.weight"]
    head = embedding.float() * 1.5
    change_tensors(
        adapter_dir / "adapter_model.safetensors",
        lambda tensors: tensors | {"base_model.model.lm_head.weight": head},
    )
    merged = merge(adapter_dir, tmp_path / "m")
    tensors = tensors_of(merged)
    assert tensors["model.embed_tokens.weight"].equal(embedding)
    assert tensors["lm_head.weight"].dtype == torch.float16
    assert tensors["lm_head.weight"].equal(head.half())
    content = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    assert content["tie_word_embeddings"] is False


# One float16 base of 300 MB in three matrices; the child says what a merge of it took, and what it
# takes to read one matrix whole.
CHILD = """
import sys
from pathlib import Path
import numpy, torch
from export.adapter_options import open_inputs
from export.merge_adapter import merge_adapter
from export.safetensors_file import read_rows

def peak():
    # Not ru_maxrss: a new process inherits that from the one that started it.
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024

torch.ones(64, 64) @ torch.ones(64, 64)
before = peak()
inputs = open_inputs(Path(sys.argv[1]))
merge_adapter(inputs, Path(sys.argv[2]))
after = peak()
read_rows(inputs.base.tensors["model.layers.0.self_attn.q_proj.weight"])
print(after - before, peak() - before)
"""


def test_memory_does_not_grow_with_the_model(
    tiny_model_dir: Path, tiny_adapter_dir: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import save_file

    rows, width, rank = 25_000, 2000, 8
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    step = 2 * rows * width
    header = {
        f"{name}.weight": {
            "dtype": "F16",
            "shape": [rows, width],
            "data_offsets": [number * step, (number + 1) * step],
        }
        for number, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    base_dir, adapter_dir = tmp_path / "base", tmp_path / "a"
    base_dir.mkdir()
    adapter_dir.mkdir()
    shutil.copyfile(tiny_model_dir / "config.json", base_dir / "config.json")
    shutil.copyfile(tiny_model_dir / "tokenizer.json", adapter_dir / "tokenizer.json")
    with (base_dir / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + 3 * step)  # zeros that take no space
    factors = {}
    for name in names:
        factors[f"base_model.model.{name}.lora_A.weight"] = torch.ones(rank, width)
        factors[f"base_model.model.{name}.lora_B.weight"] = torch.ones(rows, rank)
    save_file(factors, adapter_dir / "adapter_model.safetensors")
    config = json.loads((tiny_adapter_dir / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = str(base_dir)
    (adapter_dir / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    command = [sys.executable, "-c", CHILD, str(adapter_dir), str(tmp_path / "m")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    merge_mb, whole_mb = map(int, done.stdout.split())
    shutil.rmtree(tmp_path / "m")
    assert merge_mb < 120
    assert whole_mb > 250  # the twin: one matrix as float32 is 200 MB, and its 16 bits 100


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
