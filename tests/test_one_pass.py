"""The single pass gives the bytes of the stock chain, whatever the type, and reads the base once."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest

from export import stream_rows
from export._cli import FAILED, MODEL, USAGE, CommandError
from export.adapter_options import Inputs, open_inputs
from export.ggml_quantize import GgmlQuantizer
from export.lazy_convert import Converted, PlannedTensor
from export.stream_job import write_files
from tests.conftest import make_adapter, make_tiny_model
from tests.stock_chain import differing_tensors, read_tensors, stock_chain

pytestmark = pytest.mark.model
MORE_TYPES = ["Q6_K", "Q5_K_M", "Q5_0", "Q4_0", "IQ4_XS", "Q3_K_M", "BF16"]
# IQ1 to IQ3 are left out: ggml builds tables for them that take ten seconds.
WEIGHTED_TYPES = ["Q4_K_M", "Q4_0", "IQ4_XS", "Q2_K"]


def write(
    inputs: Inputs, folder: Path, types: Sequence[str], imatrix: Path | None = None
) -> dict[str, Path]:
    files = {name: folder / f"ours-{name}.gguf" for name in types}
    write_files(inputs, [("general.name", "x")], files, imatrix, 2)
    return files


def same_bytes(ours: dict[str, Path], theirs: dict[str, Path]) -> dict[str, list[str]]:
    return {name: differing_tensors(path, theirs[name]) for name, path in ours.items()}


@pytest.fixture(scope="module")
def stock(
    tiny_adapter_dir: Path, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    types = ["F16", "Q8_0", "Q4_K_M", *MORE_TYPES]
    folder = tmp_path_factory.mktemp("stock")
    return stock_chain(tiny_adapter_dir, tiny_model_dir, folder, types)


def test_default_types_are_those_of_the_stock_chain(
    tiny_export_dir: Path, stock: dict[str, Path]
) -> None:
    ours = {name: tiny_export_dir / f"tiny-run-{name}.gguf" for name in ("F16", "Q8_0", "Q4_K_M")}
    assert same_bytes(ours, stock) == {name: [] for name in ours}


def test_other_types_are_those_of_the_stock_chain(
    tiny_adapter_dir: Path, stock: dict[str, Path], tmp_path: Path
) -> None:
    ours = write(open_inputs(tiny_adapter_dir), tmp_path, MORE_TYPES)
    assert same_bytes(ours, stock) == {name: [] for name in MORE_TYPES}
    # The twin: another adapter is seen, in the tensors that it changes and in no other.
    other = write(open_inputs(tiny_adapter_dir, weight=1.01), tmp_path, ["Q6_K"])
    found = differing_tensors(other["Q6_K"], stock["Q6_K"])
    assert {name.split(".")[2] for name in found} == {"attn_q", "attn_v", "ffn_down"}


def test_importance_matrix_counts_as_in_the_stock_chain(
    tiny_adapter_dir: Path, stock: dict[str, Path], tmp_path: Path
) -> None:
    from export.imatrix_file import read_imatrix, write_imatrix
    from tests.stock_chain import quantize

    generator = np.random.default_rng(5)
    sums = {}
    for layer in range(2):
        for part, width in {"attn_q": 256, "attn_k": 256, "attn_v": 256, "attn_output": 256,
                            "ffn_gate": 256, "ffn_up": 256, "ffn_down": 512}.items():  # fmt: skip
            name = f"blk.{layer}.{part}.weight"
            sums[f"{name}.in_sum2"] = generator.random((1, width), dtype=np.float32) * 50
            sums[f"{name}.counts"] = np.full((1, 1), 50, dtype=np.float32)
    origin = {"data_sha256": "ab" * 32, "model": "m.gguf", "tokens": 50, "rows": 1}
    path = tmp_path / "tiny.imatrix"
    write_imatrix(path, sums, ["train.jsonl"], 512, origin)
    ours = write(open_inputs(tiny_adapter_dir), tmp_path, WEIGHTED_TYPES, path)
    f32 = stock["Q8_0"].with_name("F32.gguf")
    values = read_imatrix(path).values
    theirs = {
        name: quantize(f32, tmp_path / f"stock-{name}.gguf", name, values)
        for name in WEIGHTED_TYPES
    }
    assert same_bytes(ours, theirs) == {name: [] for name in WEIGHTED_TYPES}
    # The twin: without the matrix the bytes are others.
    assert differing_tensors(ours["Q4_K_M"], stock["Q4_K_M"])
    assert differing_tensors(ours["Q4_0"], stock["Q4_0"])


def test_rows_that_are_no_multiples_of_256_fall_back_as_in_the_stock_chain(
    default_model_dir: Path, tmp_path: Path
) -> None:
    base = make_tiny_model(
        tmp_path / "base", default_model_dir, hidden_size=96, tie_word_embeddings=False
    )
    adapter = make_adapter(
        tmp_path / "a", base, ("q_proj", "k_proj", "up_proj", "lm_head"), use_rslora=True
    )
    theirs = stock_chain(adapter, base, tmp_path / "stock", ["Q8_0", "Q4_K_M"])
    inputs = open_inputs(adapter)
    ours = write(inputs, tmp_path, ["Q8_0", "Q4_K_M"])
    assert same_bytes(ours, theirs) == {"Q8_0": [], "Q4_K_M": []}
    kinds = {name: kind for name, (kind, _) in read_tensors(ours["Q4_K_M"]).items()}
    assert kinds["blk.0.attn_q.weight"] == "Q5_0"
    assert kinds["output.weight"] == "Q8_0"


def test_low_bit_types_need_an_importance_matrix() -> None:
    tensor = PlannedTensor("blk.0.ffn_up.weight", (512, 256), None, None)
    kinds = gguf.GGMLQuantizationType
    with pytest.raises(CommandError, match=r"IQ2_XS would be noise.*--imatrix auto") as caught:
        stream_rows._importance(None, tensor, [kinds.Q4_K, kinds.IQ2_XS])
    assert caught.value.exit_code == USAGE
    assert stream_rows._importance(None, tensor, [kinds.Q4_K, kinds.IQ4_XS]) is None
    embedding = PlannedTensor("token_embd.weight", (512, 256), None, None)
    assert stream_rows._importance(None, embedding, [kinds.IQ2_XS]) is None


def test_value_too_large_for_the_type_is_named() -> None:
    rows = np.zeros((2, 256), dtype=np.float32)
    rows[1, 5] = 1e6
    converted = Converted("llama", {}, [PlannedTensor("blk.1.ffn_up.weight", (2, 256), None, None)])
    kinds = gguf.GGMLQuantizationType

    def portion(kind: int) -> stream_rows._Portion:
        return stream_rows._Portion(converted, GgmlQuantizer(), 0, 0, 2, True, (kind,), rows, None)

    with pytest.raises(CommandError, match=r"'blk.1.ffn_up.weight'.*too large for F16") as caught:
        portion(int(kinds.F16)).make()
    assert caught.value.exit_code == MODEL
    assert len(portion(int(kinds.BF16)).make()[int(kinds.BF16)]) == 2 * 256 * 2
    rows[0, 0] = np.nan
    with pytest.raises(CommandError, match=r"'blk.1.ffn_up.weight' holds NaN"):
        portion(int(kinds.BF16)).make()


def test_full_disk_and_lack_of_memory_are_told_before_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    import psutil

    from export import stream_gguf

    monkeypatch.setattr(stream_gguf, "say", lambda **content: None)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(CommandError, match=r"a.gguf, b.gguf need 1800 bytes, .* 800 are missing"):
        stream_gguf._check_space({tmp_path / "a.gguf": 1100, tmp_path / "b.gguf": 700})
    stream_gguf._check_space({tmp_path / "a.gguf": 1000})
    small = SimpleNamespace(tensors=[SimpleNamespace(shape=(8, 8), weight=None)])
    large = SimpleNamespace(tensors=[SimpleNamespace(shape=(40_000, 40_000), weight=None)])
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * 10**9))
    stream_gguf._check_memory(small, 2)
    with pytest.raises(CommandError, match=r"about 13.* GB, 2\.0 GB are available") as caught:
        stream_gguf._check_memory(large, 2)
    assert caught.value.exit_code == FAILED


def test_killed_child_is_one_line(tiny_adapter_dir: Path, tmp_path: Path) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.stream_job.CHILD", ["-c", code])
        with pytest.raises(CommandError, match=r"killed by signal 9.*out of memory") as caught:
            write(open_inputs(tiny_adapter_dir), tmp_path, ["Q8_0"])
    assert caught.value.exit_code == FAILED


def test_architecture_without_a_gguf_form_is_named(
    tiny_adapter_dir: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["architectures"] = ["NobodyForCausalLM"]
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CommandError, match=r"NobodyForCausalLM.*cannot become a GGUF") as caught:
        write(open_inputs(tiny_adapter_dir, base), tmp_path, ["Q8_0"])
    assert caught.value.exit_code == MODEL
