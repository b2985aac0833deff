"""The plain base as GGUF: llama.cpp's own bytes, and the key by which adapters know their base."""

import json
import shutil
from pathlib import Path

import pytest

from export._cli import MODEL, USAGE, CommandError
from export._files import sha256_file
from export.export_base import main
from export.export_lora_gguf import export_lora_gguf
from export.gguf_header import read_gguf_header
from tests.conftest import make_adapter
from tests.stock_chain import convert, differing_tensors, quantize

pytestmark = pytest.mark.model
CARD = "---\nlicense: apache-2.0\nlanguage: en\nbase_model: Example/Tiny-14M-Instruct\n---\n"
PREFIX = "Tiny-14M-Instruct-v1.0"
TYPES = ["F16", "Q8_0", "Q4_K_M"]
CHANGED = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def base_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a card."""
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path_factory.mktemp("plain") / "base"))
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def other_dir(base_dir: Path) -> Path:
    """The same model with a single weight changed."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(base_dir, base_dir.parent / "other"))
    weights = load_file(folder / "model.safetensors")
    weights[CHANGED][3, 5] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def exported_dir(base_dir: Path) -> Path:
    """The base as the command exports it. Copy it before changing it."""
    output_dir = base_dir.parent / "gguf"
    export(base_dir, output_dir, *TYPES)
    return output_dir


@pytest.fixture
def copied_dir(exported_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported_dir, tmp_path / "gguf"))


@pytest.fixture
def copies(exported_dir: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Let files be copies of the finished export, where it is not their content that matters.

    Gives the metadata of each pass.
    """
    told: list[dict] = []

    def write_files(inputs: object, metadata: list, files: dict, *more: object) -> dict:
        for name, path in files.items():
            shutil.copyfile(file_of(exported_dir, name), path)
        told.append(dict(metadata))
        return {name: sha256_file(path) for name, path in files.items()}

    monkeypatch.setattr("export.export_gguf.write_files", write_files)
    return told


def export(base_dir: Path, output_dir: Path, *types: str, more: tuple[str, ...] = ()) -> None:
    arguments = [str(base_dir), "--output", str(output_dir), "--quantization", ",".join(types)]
    assert main([*arguments, *more]) == 0


def file_of(folder: Path, type_name: str) -> Path:
    return folder / f"{PREFIX}-{type_name}.gguf"


def refused(arguments: list[str], message: str, exit_code: int) -> None:
    with pytest.raises(CommandError, match=message) as caught:
        main(arguments)
    assert caught.value.exit_code == exit_code


def test_files_are_those_of_llama_cpps_own_tools(
    base_dir: Path, other_dir: Path, exported_dir: Path, tmp_path: Path
) -> None:
    names = {file_of(exported_dir, kind).name for kind in TYPES}
    assert {path.name for path in exported_dir.iterdir()} == {*names, "export_base.json"}
    stock = convert(base_dir, tmp_path / "F16.gguf")
    f32 = convert(base_dir, tmp_path / "F32.gguf", "f32")
    assert differing_tensors(file_of(exported_dir, "F16"), stock) == []
    for kind in ("Q8_0", "Q4_K_M"):
        theirs = quantize(f32, tmp_path / f"{kind}.gguf", kind)
        assert differing_tensors(file_of(exported_dir, kind), theirs) == []
    # Equal weights give equal logits only with equal settings and tokens.
    ours, theirs = (
        {
            key: value
            for key, value in read_gguf_header(path).metadata.items()
            if "general" not in key
        }
        for path in (file_of(exported_dir, "F16"), stock)
    )
    fingerprint = ours.pop("tomeforge.base.fingerprint")
    assert ours == theirs
    # The twin: one number of one weight is seen, and in the fingerprint too.
    export(other_dir, tmp_path / "other", "F16")
    other = file_of(tmp_path / "other", "F16")
    assert differing_tensors(other, stock) == ["blk.1.ffn_up.weight"]
    assert read_gguf_header(other).metadata["tomeforge.base.fingerprint"] != fingerprint


def test_fingerprint_is_that_of_a_lora_gguf_of_this_base(
    base_dir: Path, other_dir: Path, exported_dir: Path, tmp_path: Path
) -> None:
    from gguf import GGUFReader

    def fingerprint(folder: Path) -> str:
        adapter_dir = make_adapter(tmp_path / folder.name / "adapter", folder)
        export_lora_gguf(adapter_dir, tmp_path / f"{folder.name}.gguf")
        reader = GGUFReader(tmp_path / f"{folder.name}.gguf")
        return reader.fields["tomeforge.base.fingerprint"].contents()

    known = read_gguf_header(file_of(exported_dir, "Q8_0")).metadata["tomeforge.base.fingerprint"]
    assert fingerprint(base_dir) == known
    assert fingerprint(other_dir) != known


def test_metadata_is_the_bases_own(exported_dir: Path) -> None:
    keys = read_gguf_header(file_of(exported_dir, "Q8_0")).metadata
    expected = {
        "general.type": "model",
        "general.name": "Tiny 14M Instruct",
        "general.basename": "Tiny",
        "general.size_label": "14M",
        "general.license": "apache-2.0",
        "general.languages": ["en"],
        "general.base_model.0.repo_url": "https://huggingface.co/Example/Tiny-14M-Instruct",
        "general.tags": ["text-generation", "gguf", "tomeforge"],
    }
    assert {key: keys.get(key) for key in expected} == expected
    assert "fine-tuned" not in keys["general.description"]
    told = [key for key in keys if "lora" in key or "adapter" in key or "finetune" in key]
    assert told == []


def test_second_run_keeps_files_and_damage_is_mended(
    base_dir: Path, copied_dir: Path, capsys: pytest.CaptureFixture[str], copies: list[dict]
) -> None:
    q8_0, f16 = file_of(copied_dir, "Q8_0"), file_of(copied_dir, "F16")
    original, before = q8_0.read_bytes(), q8_0.stat().st_mtime_ns
    export(base_dir, copied_dir, "Q8_0")
    out, err = capsys.readouterr()
    assert out == f"{q8_0}\n"
    assert f"kept {q8_0.name}" in err
    assert q8_0.stat().st_mtime_ns == before
    q8_0.write_bytes(original[:-1] + bytes([original[-1] ^ 0xFF]))
    kept = f16.stat().st_mtime_ns
    export(base_dir, copied_dir, "F16", "Q8_0")
    assert q8_0.read_bytes() == original
    assert f16.stat().st_mtime_ns == kept
    assert len(copies) == 1


def test_changed_base_is_exported_again(
    other_dir: Path, copied_dir: Path, copies: list[dict]
) -> None:
    export(other_dir, copied_dir, "Q8_0")
    assert len(copies) == 1
    record = json.loads((copied_dir / "export_base.json").read_text(encoding="utf-8"))
    assert record["current"] == [file_of(copied_dir, "Q8_0").name]


def test_overwrite_builds_again_and_names_are_the_users(
    base_dir: Path, tmp_path: Path, copies: list[dict]
) -> None:
    path = tmp_path / "mine-Q8_0.gguf"
    path.write_text("mine", encoding="utf-8")
    # A run's own record in the same folder is none of ours.
    (tmp_path / "export.json").write_text('{"name": "a run"}', encoding="utf-8")
    arguments = [str(base_dir), "--output", str(tmp_path), "--name", "mine"]
    refused(arguments, "in the way", USAGE)
    assert path.read_text(encoding="utf-8") == "mine"
    assert main([*arguments, "--overwrite"]) == 0
    assert read_gguf_header(path).type_name == "Q8_0"
    assert [keys["general.name"] for keys in copies] == ["mine"]
    assert (tmp_path / "export.json").read_text(encoding="utf-8") == '{"name": "a run"}'


def test_what_is_no_16_bit_base_is_refused(
    base_dir: Path, tiny_adapter_dir: Path, tmp_path: Path
) -> None:
    output = ["--output", str(tmp_path / "gguf")]
    refused([str(tiny_adapter_dir), *output], "is an adapter, expected a base", MODEL)
    refused(["outputs/nowhere", *output], "does not exist .* or name another place$", MODEL)
    refused(["nobody/nothing", *output], "cannot be had from the hub .* name it$", MODEL)
    (tmp_path / "empty").mkdir()
    refused([str(tmp_path / "empty"), *output], r"config\.json' is missing", MODEL)
    folder = Path(shutil.copytree(base_dir, tmp_path / "quantized"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    refused([str(folder), *output], r"is quantized: quantization_config \(gptq\)", MODEL)
    assert not (tmp_path / "gguf").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quantization", "Q9"], "choose from: F32"),
        (["--name", "a/b"], "is no file name"),
        (["--imatrix", "auto"], "is no file; name rows .*--imatrix-data JSONL"),
        (["--imatrix", "nowhere.gguf"], "is no file; or: --imatrix auto"),
        (["--quantization", "IQ2_XS"], "would be noise"),
    ],
)
def test_bad_options_are_one_line(
    base_dir: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    refused([str(base_dir), "--output", str(tmp_path), *arguments], message, USAGE)
    assert list(tmp_path.glob("*.gguf")) == []
