"""Export: right files with true figures, kept when nothing changed, and no half-written ones."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from export import export_plan
from export._cli import FAILED, MODEL, USAGE, CommandError
from export._process import run_checked
from export.convert_gguf import find_converter
from export.export_gguf import export_gguf, main
from export.export_plan import default_name
from export.gguf_header import read_gguf_header
from export.model_card import ChatFormat, default_system, modelfile, ollama_template
from export.quantize_gguf import parse_types, quantize
from tests.conftest import make_adapter

pytestmark = pytest.mark.model
TYPES = ["F16", "Q8_0", "Q4_K_M"]
EXPORTED = {
    *(f"tiny-run-{kind}.gguf" for kind in TYPES),
    "README.md",
    "Modelfile",
    "export.json",
}


@pytest.fixture
def copied_dir(tiny_export_dir: Path, tmp_path: Path) -> Path:
    """The finished export, in a folder of its own."""
    ignored = shutil.ignore_patterns("certificate.json")
    return Path(shutil.copytree(tiny_export_dir, tmp_path / "gguf", ignore=ignored))


def mtimes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.gguf")}


def test_export_writes_whole_files_and_nothing_else(tiny_export_dir: Path) -> None:
    names = {path.name for path in tiny_export_dir.iterdir()} - {"certificate.json"}
    assert names == EXPORTED
    headers = {kind: read_gguf_header(tiny_export_dir / f"tiny-run-{kind}.gguf") for kind in TYPES}
    assert {kind: header.type_name for kind, header in headers.items()} == {k: k for k in TYPES}
    assert all(not header.fallbacks and header.has_full_blocks for header in headers.values())
    # ggml's blocks: 32 weights in 34 bytes.
    assert headers["Q8_0"].bits_per_weight == pytest.approx(8.5, abs=0.01)
    assert headers["F16"].metadata["general.name"] == "tiny-run"


def test_f16_holds_the_merged_weights_bit_for_bit(
    tiny_adapter_dir: Path, tiny_export_dir: Path, tmp_path: Path
) -> None:
    import numpy as np
    from gguf import GGUFReader
    from safetensors.numpy import load_file

    from export.merge_adapter import merge_adapter

    merged = load_file(merge_adapter(tiny_adapter_dir, tmp_path / "m") / "model.safetensors")
    reader = GGUFReader(tiny_export_dir / "tiny-run-F16.gguf")
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert np.array_equal(
        tensors["blk.1.ffn_down.weight"], merged["model.layers.1.mlp.down_proj.weight"]
    )
    assert np.array_equal(tensors["token_embd.weight"], merged["model.embed_tokens.weight"])


def test_card_and_modelfile_describe_the_files(tiny_export_dir: Path) -> None:
    card = (tiny_export_dir / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    assert "| `tiny-run-Q8_0.gguf` | Q8_0 | 16." in card
    assert "python -m integration.ask --model" in card
    text = (tiny_export_dir / "Modelfile").read_text(encoding="utf-8")
    assert "FROM ./tiny-run-Q8_0.gguf" in text
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert 'SYSTEM """You are a helpful AI assistant named SmolLM' in text


def test_modelfile_of_alpaca_and_of_an_unknown_template() -> None:
    alpaca = ChatFormat("### Instruction:\n{{ m }}\n\n### Response:\n", "</s>")
    template = ollama_template(alpaca)
    assert template is not None
    assert "### Response:\n{{ .Content }}</s>" in template
    unknown = ChatFormat("[INST] {{ m }} [/INST]", "</s>")
    assert ollama_template(unknown) is None
    assert "# TEMPLATE is left out" in modelfile("a.gguf", unknown)
    assert default_system(ChatFormat("{{ broken", None)) is None


def test_second_run_keeps_files_and_says_so(
    tiny_adapter_dir: Path, copied_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = mtimes(copied_dir)
    arguments = [str(tiny_adapter_dir), "--output", str(copied_dir), "--quantization"]
    assert main([*arguments, "f16,q8_0,Q4_k_M"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [str(copied_dir / f"tiny-run-{kind}.gguf") for kind in TYPES]
    assert err.count("kept tiny-run-") == 3
    assert mtimes(copied_dir) == before


def test_missing_and_damaged_files_are_made_from_the_kept_f16(
    tiny_adapter_dir: Path, copied_dir: Path
) -> None:
    original = (copied_dir / "tiny-run-Q8_0.gguf").read_bytes()
    damaged = bytearray(original)
    damaged[-1] ^= 0xFF
    (copied_dir / "tiny-run-Q8_0.gguf").write_bytes(damaged)
    before = mtimes(copied_dir)
    export_gguf(tiny_adapter_dir, copied_dir, ["Q8_0", "Q4_0"], name="tiny-run")
    after = mtimes(copied_dir)
    assert (copied_dir / "tiny-run-Q8_0.gguf").read_bytes() == original
    assert after["tiny-run-F16.gguf"] == before["tiny-run-F16.gguf"]
    assert read_gguf_header(copied_dir / "tiny-run-Q4_0.gguf").type_name == "Q4_0"


def test_changed_adapter_is_built_again(
    tiny_model_dir: Path, copied_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_adapter(tmp_path / "tiny-run/adapter", tiny_model_dir, seed=9)
    before = mtimes(copied_dir)
    export_gguf(other, copied_dir, ["Q8_0"])
    after = mtimes(copied_dir)
    assert after["tiny-run-Q8_0.gguf"] != before["tiny-run-Q8_0.gguf"]
    # Not asked for, so still the earlier adapter's: said, and not in the card.
    assert "tiny-run-F16.gguf was made from other inputs" in capsys.readouterr().err
    assert "tiny-run-F16" not in (copied_dir / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in copied_dir.iterdir()} == EXPORTED


def test_foreign_file_is_not_replaced(tiny_adapter_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "mine-Q8_0.gguf").write_text("mine", encoding="utf-8")
    with pytest.raises(CommandError, match="in the way") as caught:
        export_gguf(tiny_adapter_dir, tmp_path, ["Q8_0"], name="mine")
    assert caught.value.exit_code == USAGE
    assert (tmp_path / "mine-Q8_0.gguf").read_text(encoding="utf-8") == "mine"


def test_full_disk_is_noticed_before_the_first_byte(
    tiny_adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(export_plan.shutil, "disk_usage", lambda _: usage(10**9, 0, 10**6))
    with pytest.raises(
        CommandError, match=r"needs (\d+) bytes.*1000000 are free, \d+ are missing"
    ) as caught:
        export_gguf(tiny_adapter_dir, tmp_path / "gguf", TYPES)
    assert caught.value.exit_code == FAILED
    assert list((tmp_path / "gguf").iterdir()) == []


def test_estimate_covers_the_true_sizes(
    tiny_adapter_dir: Path, tiny_export_dir: Path, default_model_dir: Path
) -> None:
    plan = export_plan.make_plan(tiny_adapter_dir, tiny_export_dir, TYPES)
    assert plan.missing == []
    for kind in TYPES:
        true = plan.path_of(kind).stat().st_size
        assert true <= export_plan.estimate_bytes(plan.base, kind) <= true * 1.3 + (17 << 20)


def test_failed_conversion_leaves_nothing_behind(
    tiny_adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "llama.cpp"
    fake.mkdir()
    script = "import sys; print('first\\nlast words', file=sys.stderr); sys.exit(7)"
    (fake / "convert_hf_to_gguf.py").write_text(script, encoding="utf-8")
    monkeypatch.setenv("LLAMA_CPP_DIR", str(fake))
    with pytest.raises(CommandError, match=r"exit code 7: .*convert_hf_to_gguf.py.*last words"):
        export_gguf(tiny_adapter_dir, tmp_path / "gguf", ["Q8_0"])
    assert list((tmp_path / "gguf").iterdir()) == []


def test_missing_converter_names_the_setup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    with pytest.raises(CommandError, match="LLAMA_CPP_DIR"):
        find_converter()
    monkeypatch.delenv("LLAMA_CPP_DIR")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(CommandError, match=r"scripts/setup\.sh"):
        find_converter()


def test_leftovers_of_a_killed_run_are_removed(tiny_adapter_dir: Path, copied_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        capture_output=True,
        text=True,
        check=True,
    )
    stale = copied_dir / f".export-{done.stdout.strip()}"
    (stale / "merged").mkdir(parents=True)
    (copied_dir / "tiny-run-Q4_K_M.gguf").unlink()
    export_gguf(tiny_adapter_dir, copied_dir, TYPES)
    assert not stale.exists()


@pytest.mark.parametrize("text", ["Q4_K_X", "", "Q8_0,nope"])
def test_unknown_types_are_refused_with_the_choices(text: str) -> None:
    with pytest.raises(CommandError, match="choose from: F16, Q8_0") as caught:
        parse_types(text)
    assert caught.value.exit_code == USAGE


def test_quantizing_a_quantized_file_is_an_error(tiny_export_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="quantization to Q8_0 failed") as caught:
        quantize(tiny_export_dir / "tiny-run-Q4_K_M.gguf", tmp_path / "x.gguf", "Q8_0")
    assert caught.value.exit_code == FAILED
    assert list(tmp_path.iterdir()) == []


def test_adapter_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CommandError) as caught:
        main([str(tmp_path / "nothing"), "--output", str(tmp_path / "gguf")])
    assert caught.value.exit_code == MODEL
    assert not (tmp_path / "gguf").exists()


def test_names(tmp_path: Path) -> None:
    assert default_name(Path("outputs/smollm2-cpu/adapter")) == "smollm2-cpu"
    assert default_name(Path("outputs/x/checkpoints/checkpoint-20")) == "checkpoint-20"
    assert default_name(tmp_path / "my run/adapter") == "my-run"


def test_subprocess_errors_carry_the_last_lines() -> None:
    code = "import sys; sys.stderr.write('\\n'.join(map(str, range(50)))); sys.exit(3)"
    with pytest.raises(CommandError, match=r"exit code 3: .* 30 \| .* 49") as caught:
        run_checked([sys.executable, "-c", code], "counting")
    assert " 29 |" not in str(caught.value)


@pytest.mark.parametrize(
    "module",
    ["merge_adapter", "convert_gguf", "quantize_gguf", "export_gguf", "verify_gguf", "llama_probe"],
)
def test_help_imports_nothing_heavy(module: str) -> None:
    code = (
        f"import sys, export.{module} as m; m.build_parser().format_help(); "
        "print([n for n in ('torch', 'transformers', 'llama_cpp', 'numpy') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_record_names_what_was_written(tiny_export_dir: Path) -> None:
    record = json.loads((tiny_export_dir / "export.json").read_text(encoding="utf-8"))
    for name, entry in record["files"].items():
        assert entry["bytes"] == (tiny_export_dir / name).stat().st_size
        assert len(entry["sha256"]) == 64
