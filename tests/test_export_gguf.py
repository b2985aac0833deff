"""Export: right files with true figures, kept when nothing changed, and no half-written ones."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from export import stream_job
from export._cli import FAILED, MODEL, USAGE, CommandError
from export._files import sha256_file
from export.adapter_options import open_inputs
from export.converter import find_converter
from export.export_gguf import main
from export.gguf_header import read_gguf_header
from export.type_plan import QUANTIZATION_TYPES, parse_types
from tests.conftest import export_adapter, make_adapter

pytestmark = pytest.mark.model
TYPES = ["F16", "Q8_0", "Q4_K_M"]
EIGHT = "tiny-run-Q8_0.gguf"
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


@pytest.fixture
def copies(tiny_export_dir: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let files be copies of the finished export, where it is not their content that matters.

    Gives the types asked for, in order; what was not exported is a copy of Q8_0.
    """
    asked: list[str] = []

    def write_files(inputs: object, metadata: object, files: dict, *more: object) -> dict:
        for name, path in files.items():
            source = tiny_export_dir / f"tiny-run-{name}.gguf"
            shutil.copyfile(source if source.exists() else tiny_export_dir / EIGHT, path)
        asked.extend(files)
        return {name: sha256_file(path) for name, path in files.items()}

    monkeypatch.setattr("export.export_gguf.write_files", write_files)
    return asked


@pytest.fixture(scope="module")
def planned(tiny_adapter_dir: Path) -> dict:
    """llama.cpp's plan of every type, asked once."""
    return stream_job.plan_files(open_inputs(tiny_adapter_dir), [], QUANTIZATION_TYPES, False)


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


def test_card_and_modelfile_describe_the_files(tiny_export_dir: Path) -> None:
    card = (tiny_export_dir / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    assert "| `tiny-run-Q8_0.gguf` | Q8_0 | 16." in card
    assert "python -m integration.ask --model" in card
    text = (tiny_export_dir / "Modelfile").read_text(encoding="utf-8")
    assert "FROM ./tiny-run-Q8_0.gguf" in text
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert 'SYSTEM """You are a helpful AI assistant named SmolLM' in text


def test_second_run_keeps_files_and_says_so(
    tiny_adapter_dir: Path, copied_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = mtimes(copied_dir)
    arguments = [str(tiny_adapter_dir), "--output", str(copied_dir), "--quantization"]
    assert main([*arguments, "f16,q8_0,Q4_k_M", "--name", "tiny-run"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [str(copied_dir / f"tiny-run-{kind}.gguf") for kind in TYPES]
    assert err.count("kept tiny-run-") == 3
    assert mtimes(copied_dir) == before


def test_missing_and_damaged_files_are_made_again_and_no_others(
    tiny_adapter_dir: Path, copied_dir: Path
) -> None:
    original = (copied_dir / "tiny-run-Q8_0.gguf").read_bytes()
    damaged = bytearray(original)
    damaged[-1] ^= 0xFF
    (copied_dir / "tiny-run-Q8_0.gguf").write_bytes(damaged)
    before = mtimes(copied_dir)
    # What a killed run left: the number of a process that is gone.
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (copied_dir / f".export-{gone.pid}").mkdir()
    export_adapter(tiny_adapter_dir, copied_dir, ["F16", "Q8_0", "Q4_0"])
    after = mtimes(copied_dir)
    assert not list(copied_dir.glob(".export-*"))
    assert (copied_dir / "tiny-run-Q8_0.gguf").read_bytes() == original
    assert after["tiny-run-F16.gguf"] == before["tiny-run-F16.gguf"]
    assert read_gguf_header(copied_dir / "tiny-run-Q4_0.gguf").type_name == "Q4_0"


def test_changed_adapter_is_built_again(
    tiny_model_dir: Path,
    copied_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    copies: list[str],
) -> None:
    other = make_adapter(tmp_path / "tiny-run/adapter", tiny_model_dir, seed=9)
    before = mtimes(copied_dir)
    export_adapter(other, copied_dir, ["Q8_0"])
    after = mtimes(copied_dir)
    assert after["tiny-run-Q8_0.gguf"] != before["tiny-run-Q8_0.gguf"]
    # Not asked for, so still the earlier adapter's: said, and not in the card.
    assert "tiny-run-F16.gguf was made from other inputs" in capsys.readouterr().err
    assert "tiny-run-F16" not in (copied_dir / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in copied_dir.iterdir()} == EXPORTED


def test_foreign_file_is_not_replaced(tiny_adapter_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "mine-Q8_0.gguf").write_text("mine", encoding="utf-8")
    with pytest.raises(CommandError, match="in the way") as caught:
        export_adapter(tiny_adapter_dir, tmp_path, ["Q8_0"], name="mine")
    assert caught.value.exit_code == USAGE
    assert (tmp_path / "mine-Q8_0.gguf").read_text(encoding="utf-8") == "mine"


def test_failed_export_leaves_nothing_behind(
    tiny_adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import json, pathlib, sys; job = json.loads(pathlib.Path(sys.argv[-1]).read_text()); "
        "pathlib.Path(job['files']['Q8_0']).write_text('half'); "
        "print('first\\nlast words', file=sys.stderr); sys.exit(7)"
    )
    monkeypatch.setattr(stream_job, "CHILD", ["-c", code])
    with pytest.raises(CommandError, match=r"exit code 7: first \| last words") as caught:
        export_adapter(tiny_adapter_dir, tmp_path / "gguf", ["Q8_0"])
    assert caught.value.exit_code == FAILED
    assert list((tmp_path / "gguf").iterdir()) == []


def test_missing_converter_names_the_setup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    with pytest.raises(CommandError, match="LLAMA_CPP_DIR"):
        find_converter()
    monkeypatch.delenv("LLAMA_CPP_DIR")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(CommandError, match=r"scripts/setup\.sh"):
        find_converter()


@pytest.mark.parametrize("text", ["Q4_K_X", "", "Q8_0,nope"])
def test_unknown_types_are_refused_with_the_choices(text: str) -> None:
    with pytest.raises(CommandError, match="choose from: F32, BF16, F16, Q8_0") as caught:
        parse_types(text)
    assert caught.value.exit_code == USAGE


def test_adapter_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CommandError) as caught:
        main([str(tmp_path / "nothing"), "--output", str(tmp_path / "gguf")])
    assert caught.value.exit_code == MODEL
    assert not (tmp_path / "gguf").exists()


@pytest.mark.parametrize(
    "module",
    [
        *("merge_adapter", "export_gguf", "export_lora_gguf", "imatrix", "verify_gguf"),
        *("llama_probe", "stream_gguf"),
    ],
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


def test_menu_tells_sizes_and_writes_nothing(
    tiny_adapter_dir: Path,
    tiny_export_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    planned: dict,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("export.export_gguf.plan_files", lambda *_: planned)
    assert main([str(tiny_adapter_dir), "--list"]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    for kind in TYPES:
        size = (tiny_export_dir / f"tiny-run-{kind}.gguf").stat().st_size
        # Names in the metadata differ by a few bytes.
        assert float(rows[kind][0]) == pytest.approx(size / 1e6, abs=0.1)
    assert rows["IQ2_XS"][2:] == ["needs", "--imatrix"]
    assert list(tmp_path.iterdir()) == []


def test_size_limit_picks_the_best_type_that_fits(
    tiny_adapter_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    planned: dict,
    copies: list[str],
) -> None:
    monkeypatch.setattr("export.export_gguf.plan_files", lambda *_: planned)
    arguments = [str(tiny_adapter_dir), "--output", str(tmp_path), "--name", "m"]
    assert main([*arguments, "--max-size", "16.9MB"]) == 0
    (path,) = capsys.readouterr().out.splitlines()
    assert Path(path).name == "m-Q8_0.gguf"
    assert Path(path).stat().st_size <= 16_900_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a folder: --output"),
        (["--output", "x", "--max-kld", "-1"], "expected a number above 0"),
        (["--output", "x", "--max-size", "big"], "expected a size such as 700M"),
        (["--output", "x", "--imatrix", "nowhere.gguf"], "is no file; or: --imatrix auto"),
        (["--output", "x", "--imatrix", "auto"], r"train\.jsonl' is no file; name rows"),
        (["--output", "x", "--imatrix-data", "r.jsonl"], "needs --imatrix auto"),
        (["--output", "x", "--version", "first"], "expected numbers and dots"),
        (["--output", "x", "--name", "a/b"], "is no file name"),
    ],
)
def test_bad_options_are_one_line(
    tiny_adapter_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = Path(shutil.copytree(tiny_adapter_dir, tmp_path / "alone/adapter"))
    with pytest.raises(CommandError, match=message) as caught:
        main([str(adapter), *arguments])
    assert caught.value.exit_code == USAGE
    assert not (tmp_path / "x").exists()


def test_divergence_limit_keeps_the_smallest_file_that_is_close_enough(
    tiny_adapter_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    planned: dict,
    copies: list[str],
) -> None:
    some = {name: planned[name] for name in ("Q8_0", "Q4_K_M", "Q2_K")}
    monkeypatch.setattr("export.export_gguf.plan_files", lambda *_: some)
    arguments = [str(tiny_adapter_dir), "--output", str(tmp_path), "--name", "m"]
    assert main([*arguments, "--max-kld", "0.0009"]) == 0
    out, err = capsys.readouterr()
    (path,) = map(Path, out.splitlines())
    measured = dict(re.findall(r"^(\w+): .* mean KL divergence (\S+)$", err, re.MULTILINE))
    assert len(measured) >= 2
    assert float(measured[path.stem.removeprefix("m-")]) <= 0.0009
    assert any(float(value) > 0.0009 for value in measured.values())
    assert len(copies) == len(set(copies)) == len(measured)
    # The candidates that were not chosen are gone.
    assert [file.name for file in tmp_path.glob("**/*.gguf")] == [path.name]
