"""An adapter as a LoRA GGUF: over its base it gives the merged model's logits, or it is refused."""

import hashlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from export._cli import FAILED, MODEL, USAGE, CommandError
from export._files import sha256_file
from export._process import run_checked
from export.adapter_files import read_adapter
from export.base_model import base_fingerprint, load_base
from export.converter import find_converter
from export.export_lora_gguf import export_lora_gguf, main
from export.gguf_header import read_gguf_header
from export.merged_weights import plan_weights
from tests.conftest import make_adapter, make_tiny_model

pytestmark = pytest.mark.model
ROOT = Path(__file__).parent.parent
IDS = list(range(100, 140))
CARD = "---\nlicense: apache-2.0\nbase_model: Example/Tiny-14M\n---\n"
LAYER = "model.layers.0.self_attn.v_proj"
CASES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    # Also with LoRA on the embedding and on a head of its own.
    "patterns": {
        "use_rslora": True,
        "alpha_pattern": {"q_proj": 64, "layers.1.mlp.down_proj": 4, "embed_tokens": 3},
        "rank_pattern": {"v_proj": 3},
    },
}


def change_tensors(adapter_dir: Path, change) -> Path:
    """Let `change(tensors)` edit the adapter's tensors, by name without PEFT's prefix."""
    from safetensors.torch import load_file, save_file

    path, prefix = adapter_dir / "adapter_model.safetensors", "base_model.model."
    tensors = {key.removeprefix(prefix): value for key, value in load_file(path).items()}
    change(tensors)
    save_file({prefix + key: value.clone().contiguous() for key, value in tensors.items()}, path)
    return adapter_dir


def add_embedding(tensors, rows=49152, width=256) -> None:
    import torch

    draw = torch.Generator().manual_seed(3)
    tensors["model.embed_tokens.lora_embedding_A"] = torch.randn(8, rows, generator=draw) / 16
    tensors["model.embed_tokens.lora_embedding_B"] = torch.randn(width, 8, generator=draw) / 16


def add_head(tensors) -> None:
    import torch

    draw = torch.Generator().manual_seed(4)
    tensors["lm_head.lora_A.weight"] = torch.randn(8, 256, generator=draw) / 16
    tensors["lm_head.lora_B.weight"] = torch.randn(49152, 8, generator=draw) / 16


def make_case(folder: Path, base_dir: Path, case: str) -> Path:
    """Write the adapter of one of CASES."""
    from safetensors.torch import load_file

    def change(tensors):
        for key in [key for key in tensors if "v_proj" in key]:
            tensors[key] = tensors[key][:3] if "lora_A" in key else tensors[key][:, :3]
        add_embedding(tensors)
        add_head(tensors)
        # As PEFT saves it: the base's own weights come along.
        weights = load_file(base_dir / "model.safetensors")
        tensors["model.embed_tokens.base_layer.weight"] = weights["model.embed_tokens.weight"]
        tensors["lm_head.base_layer.weight"] = weights["lm_head.weight"].float()

    adapter_dir = make_adapter(folder / case / "adapter", base_dir, **CASES[case])
    return change_tensors(adapter_dir, change) if case == "patterns" else adapter_dir


@pytest.fixture(scope="module")
def untied_dir(default_model_dir, tmp_path_factory) -> Path:
    """A tiny base with a head of its own, and a card."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = make_tiny_model(tmp_path_factory.mktemp("untied") / "base", default_model_dir)
    weights = load_file(folder / "model.safetensors")
    draw = torch.Generator().manual_seed(2)
    weights["lm_head.weight"] = (torch.randn(49152, 256, generator=draw) * 0.06).half()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture(scope="module")
def files(untied_dir, tmp_path_factory) -> dict[str, Path]:
    """The base as GGUF (F32), each case as LoRA GGUF, and one as llama.cpp alone makes it.

    `plain` and `patterns` are F32; `rslora` is made by the command as users give it.
    """
    root = tmp_path_factory.mktemp("lora")
    adapters = {case: make_case(root, untied_dir, case) for case in CASES}

    def convert(script: str, source: Path, output: Path, *more: str) -> Path:
        command = [sys.executable, str(find_converter(script)), str(source), "--outtype", "f32"]
        run_checked([*command, *more, "--outfile", str(output)], script)
        return output

    def export(case: str) -> Path:
        output = root / case / "out/lora.gguf"
        export_lora_gguf(adapters[case], output, type_name="F32")
        return output

    def command() -> Path:
        output = root / "rslora/out/lora.gguf"
        output.parent.mkdir()
        output.write_bytes(b"old")
        (root / "there.gguf").touch()
        arguments = [str(adapters["rslora"]), "--output", str(output), "--overwrite"]
        done = subprocess.run(
            [sys.executable, "-m", "export.export_lora_gguf", *arguments, "--base",
             str(untied_dir), "--name", "Mine", "--modelfile", str(root / "there.gguf")],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        told = [done.returncode, done.stdout, done.stderr]
        (root / "rslora/told.json").write_text(json.dumps(told))
        return output

    with ThreadPoolExecutor(2) as pool:
        jobs = {case: pool.submit(export, case) for case in ("plain", "patterns")}
        jobs["rslora"] = pool.submit(command)
        jobs["base"] = pool.submit(convert, "convert_hf_to_gguf.py", untied_dir, root / "base.gguf")
        jobs["stock"] = pool.submit(
            convert, "convert_lora_to_gguf.py", adapters["rslora"], root / "stock.gguf",
            "--base", str(untied_dir),
        )  # fmt: skip
        return {name: job.result() for name, job in jobs.items()}


def adapter_of(file: Path) -> Path:
    return file.parent.parent / "adapter"


def logits_with(base: Path, lora: Path) -> np.ndarray:
    """Logits after IDS, by the way chat loads adapters, with a float32 KV cache."""
    from integration.adapters import Adapters
    from integration.backend import Feed
    from integration.engine import Engine
    from integration.gguf_header import read_header
    from integration.local_model import LocalModel

    engine = Engine(read_header(base), n_ctx=256, n_threads=1, kv_type=0)
    Adapters(LocalModel(engine), {"mine": lora}).use("mine")
    (row,) = engine.evaluate([(0, Feed(IDS, is_prompt=True))])
    return engine.logits(row).copy()


def merged_logits(adapter_dir: Path, merge: bool = True) -> np.ndarray:
    """The same by transformers, from the merged weights in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    adapter = read_adapter(adapter_dir)
    base = load_base(adapter)
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    merged = plan_weights(base, [(adapter, 1.0)]).weights
    for name in adapter.modules if merge else ():
        model.state_dict()[name].copy_(torch.from_numpy(merged[name].rows()[0]))
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0, -1].numpy()


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def metadata(path: Path) -> dict:
    from gguf import GGUFReader

    return {field.name: field.contents() for field in GGUFReader(path).fields.values()}


# Measured: 1.3e-6 in F32, 3e-4 in F16, where llama.cpp's own 16-bit KV cache would cost 6e-4.
@pytest.mark.parametrize(
    ("case", "tolerance"), [("plain", 5e-6), ("patterns", 5e-6), ("rslora", 6e-4)]
)
def test_base_with_adapter_equals_the_merged_model(files, case, tolerance):
    merged = merged_logits(adapter_of(files[case]))
    assert distance(merged_logits(adapter_of(files[case]), merge=False), merged) > 0.1
    assert distance(logits_with(files["base"], files[case]), merged) < tolerance


def test_converter_alone_gets_rslora_wrong(files):
    merged = merged_logits(adapter_of(files["rslora"]))
    assert distance(logits_with(files["base"], files["stock"]), merged) > 0.1


@pytest.mark.parametrize(("case", "kind"), [("plain", np.float32), ("rslora", np.float16)])
def test_uniform_scale_leaves_every_bit_of_the_factors(files, case, kind):
    from gguf import GGUFReader
    from safetensors.numpy import load_file

    factors = load_file(adapter_of(files[case]) / "adapter_model.safetensors")
    found = {tensor.name: tensor.data for tensor in GGUFReader(files[case]).tensors}
    assert len(found) == len(factors) == 12
    for side in "AB":  # llama.cpp permutes q and k; v is as trained
        ours = found[f"blk.0.attn_v.weight.lora_{side.lower()}"]
        theirs = factors[f"base_model.model.{LAYER}.lora_{side}.weight"]
        assert ours.dtype == kind
        assert np.array_equal(ours, theirs.astype(kind))
    keys = metadata(files[case])
    # alpha / rank, or alpha / sqrt(rank): 16 / 8 or 16 / sqrt(8), times the rank.
    alpha = 16 if case == "plain" else 16 * 8**0.5
    assert keys["adapter.lora.alpha"] == pytest.approx(alpha, rel=1e-7)
    assert keys["tomeforge.lora.alpha"] == 16


def test_command_replaces_a_file_and_tells_its_path_and_size(files):
    output = files["rslora"]
    code, stdout, stderr = json.loads((output.parent.parent / "told.json").read_text())
    assert (code, stdout) == (0, f"{output}\n"), stderr
    assert stderr == "LoRA GGUF: 0.06 MB, rank 8, 6 modules, F16\n"
    assert {path.name for path in output.parent.iterdir()} == {"lora.gguf", "Modelfile"}
    text = (output.parent / "Modelfile").read_text(encoding="utf-8")
    assert text.startswith("FROM ./../../there.gguf\nADAPTER ./lora.gguf\n")


def test_metadata_tells_where_the_file_comes_from(files, untied_dir):
    keys = metadata(files["rslora"])
    # What chat compares: the adapter's template against the text in the base's file.
    template = read_gguf_header(files["base"]).metadata["tokenizer.chat_template"]
    weights = adapter_of(files["rslora"]) / "adapter_model.safetensors"
    expected = {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.name": "Mine",
        "general.license": "apache-2.0",
        "general.base_model.count": 1,
        "general.base_model.0.name": "Tiny 14M",
        "general.base_model.0.repo_url": "https://huggingface.co/Example/Tiny-14M",
        "adapter.type": "lora",
        "tomeforge.lora.rank": 8,
        "tomeforge.lora.rslora": True,
        "tomeforge.base.fingerprint": base_fingerprint(untied_dir),
        "tomeforge.adapter.sha256": sha256_file(weights),
        "tomeforge.chat_template.sha256": hashlib.sha256(template.encode()).hexdigest(),
    }
    assert {key: keys.get(key) for key in expected} == expected
    assert not any(key.startswith("general.sampling") for key in keys)


def dora(tensors):
    for key in [key for key in tensors if "lora_B" in key]:
        name = key.replace("lora_B.weight", "lora_magnitude_vector")
        tensors[name] = tensors[key][:, 0] + 1


def saved(tensors):
    tensors["model.norm.weight"] = tensors[f"{LAYER}.lora_A.weight"][0]


def tokens(tensors):
    rows = tensors[f"{LAYER}.lora_A.weight"][:2]
    tensors["model.embed_tokens.token_adapter.trainable_tokens_delta"] = rows


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (dora, {"use_dora": True}, "is a DoRA"),
        (saved, {"modules_to_save": ["norm"]}, "trained 1 weights in full .*'model.norm.weight'"),
        (tokens, {"trainable_token_indices": [5, 6]}, "single token rows of 'model.embed_tokens"),
        (add_embedding, {}, "LoRA on 'model.embed_tokens.weight', and 'base' has one tensor"),
        (add_head, {}, "LoRA on 'lm_head.weight', and 'base' has one tensor"),
    ],
)
def test_what_only_a_merge_can_hold_is_refused(tiny_model_dir, tmp_path, change, config, message):
    adapter_dir = make_adapter(tmp_path / "run/adapter", tiny_model_dir, **config)
    change_tensors(adapter_dir, change)
    with pytest.raises(CommandError, match=message) as caught:
        main([str(adapter_dir), "--output", str(tmp_path / "o/lora.gguf")])
    assert caught.value.exit_code == MODEL
    way_out = f"Merge instead: python -m export.export_gguf {adapter_dir} --output DIR"
    assert way_out in str(caught.value)
    assert not (tmp_path / "o").exists()


def other_fingerprint(adapter_dir: Path, base_dir: Path) -> None:
    content = {"base_model": {"name": "x", "fingerprint": "0" * 64}}
    (adapter_dir.parent / "provenance.json").write_text(json.dumps(content))


def other_shape(adapter_dir: Path, base_dir: Path) -> None:
    def shorten(tensors):
        tensors[f"{LAYER}.lora_B.weight"] = tensors[f"{LAYER}.lora_B.weight"][:64]

    change_tensors(adapter_dir, shorten)


def other_layers(adapter_dir: Path, base_dir: Path) -> None:
    def rename(tensors):
        for key in [key for key in tensors if "layers.1." in key]:
            tensors[key.replace("layers.1.", "layers.7.")] = tensors.pop(key)

    change_tensors(adapter_dir, rename)


def no_scale(adapter_dir: Path, base_dir: Path) -> None:
    path = adapter_dir / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 0}))


def lost_base(adapter_dir: Path, base_dir: Path) -> None:
    path = adapter_dir / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": "/content/base"}))


def too_large(adapter_dir: Path, base_dir: Path) -> None:
    def enlarge(tensors):
        tensors[f"{LAYER}.lora_A.weight"] *= 1e6

    change_tensors(adapter_dir, enlarge)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_fingerprint, "another base: provenance.json .*--base DIR"),
        (other_shape, "another base: .*v_proj.*--base DIR"),
        (other_layers, "another base: .*has no tensor .*layers.7.*--base DIR"),
        (lost_base, "'/content/base' does not exist .*--base DIR"),
        (no_scale, "changes nothing: 6 LoRA modules, lora_alpha 0"),
        (too_large, "v_proj.weight' has LoRA values up to .*use --type F32"),
    ],
)
def test_unusable_adapter_is_exit_3_and_leaves_nothing(tiny_model_dir, tmp_path, spoil, message):
    adapter_dir = make_adapter(tmp_path / "run/adapter", tiny_model_dir)
    spoil(adapter_dir, tiny_model_dir)
    (tmp_path / "o").mkdir()
    with pytest.raises(CommandError, match=message) as caught:
        main([str(adapter_dir), "--output", str(tmp_path / "o/lora.gguf")])
    assert caught.value.exit_code == MODEL
    assert list((tmp_path / "o").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("there.gguf", "exists; replace it: --overwrite"),
        ("folder.gguf", "is a folder; expected a file to write: NAME.gguf"),
        ("adapter.bin", "does not end in .gguf"),
    ],
)
def test_bad_output_is_exit_2_before_anything_is_read(tmp_path, name, message):
    (tmp_path / "there.gguf").write_bytes(b"old")
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(CommandError, match=message) as caught:
        main([str(tmp_path / "no-adapter"), "--output", str(tmp_path / name)])
    assert caught.value.exit_code == USAGE
    assert (tmp_path / "there.gguf").read_bytes() == b"old"


FAILS = "import sys\nsys.exit('no such architecture')\n"
LEAVES_OUT = """
import sys, numpy, gguf
writer = gguf.GGUFWriter(sys.argv[sys.argv.index("--outfile") + 1], "llama")
writer.add_tensor("blk.0.attn_v.weight.lora_a", numpy.ones((8, 256), numpy.float32))
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file()
"""


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (FAILS, "failed with exit code 1: .*no such architecture"),
        (LEAVES_OUT, "wrote 2048 of the adapter's .* numbers; it left out some modules. Merge"),
        (None, "convert_lora_to_gguf.py is not in .*LLAMA_CPP_DIR"),
    ],
)
def test_failed_conversion_keeps_the_old_file(
    tiny_adapter_dir, tmp_path, monkeypatch, script, message
):
    (tmp_path / "tools").mkdir()
    if script:
        (tmp_path / "tools/convert_lora_to_gguf.py").write_text(script)
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path / "tools"))
    output = tmp_path / "o/lora.gguf"
    output.parent.mkdir()
    output.write_bytes(b"old")
    with pytest.raises(CommandError, match=message) as caught:
        main([str(tiny_adapter_dir), "--output", str(output), "--overwrite"])
    assert caught.value.exit_code == FAILED
    assert output.read_bytes() == b"old"
    assert [path.name for path in output.parent.iterdir()] == ["lora.gguf"]
