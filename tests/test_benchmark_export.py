"""`scripts.benchmark export`: same product, true figures, targets both ways, nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from scripts import benchmark, benchmark_export
from scripts._cli import CommandError
from scripts.benchmark_export import Workplace, judge_export, working_dir
from scripts.benchmark_export_stock import SIZES, compare, make_model
from scripts.benchmark_usage import Usage, add_up, median_of, run_step
from scripts.machine import Disk

GB = 1e9


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "scripts.benchmark", "export", *arguments]


def usage(wall: float = 10.0, peak: float = GB, written: float = GB) -> Usage:
    return Usage(wall, peak, peak / 2, written, "ru_oublock")


@pytest.mark.model
def test_both_sides_make_the_same_product(tmp_path):
    arguments = ["--size", "tiny", "--rounds", "1", "--json", "--work-dir", str(tmp_path)]
    done = subprocess.run(command(*arguments), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert list(result) == ["benchmark", "metrics", "targets"]
    assert (result["benchmark"], result["targets"]) == ("export", [])
    metrics = result["metrics"]
    # Two layers of seven matrices and two norms; embedding, head and the last norm.
    assert metrics["tensors"] == 2 * 9 + 3
    assert 0.8 < metrics["identical bytes"] <= 1
    steps = [f"stock {step}" for step in ("merge", "convert", "quantize")]
    for figure, of_all in (("wall_s", sum), ("written_gb", sum), ("peak_rss_gb", max)):
        assert metrics[f"ours {figure}"] > 0
        chain = of_all(metrics[f"{step} {figure}"] for step in steps)
        assert metrics[f"stock {figure}"] == pytest.approx(chain, abs=0.003)
    # Merged and F16 have two bytes a weight, the quantized file about a third of that.
    written = SIZES["tiny"].weight_bytes * 2.35 / GB
    assert metrics["stock written_gb"] == pytest.approx(written, rel=0.15)
    assert "same product: 21 tensors" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.model
def test_interrupted_run_leaves_nothing(tmp_path):
    arguments = ["--size", "tiny", "--work-dir", str(tmp_path)]
    with subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("*/ours/tmp")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted"
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
    commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not any(str(tmp_path) in word for command in commands for word in command)


@pytest.mark.model
def test_failed_child_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def break_base(place: Workplace) -> dict[str, Usage]:
        (place.run_dir / "adapter/adapter_config.json").unlink()
        return run_ours(place)

    run_ours = Workplace.run_ours
    monkeypatch.setattr(Workplace, "run_ours", break_base)
    with pytest.raises(CommandError, match=r"our export failed: exit code 3: .*adapter_c") as e:
        benchmark_export.benchmark_export("tiny", 1, tmp_path)
    assert (e.value.exit_code, "\n" in str(e.value)) == (1, False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.model
def test_random_model_is_what_its_configuration_says(tmp_path):
    from safetensors import safe_open

    make_model(SIZES["tiny"], tmp_path)
    index = json.loads((tmp_path / "base/model.safetensors.index.json").read_text())
    shapes = SIZES["tiny"].tensors()
    assert index["weight_map"].keys() == shapes.keys()
    assert len(set(index["weight_map"].values())) == 2
    for name, shard in index["weight_map"].items():
        with safe_open(tmp_path / "base" / shard, framework="pt") as tensors:
            values = tensors.get_tensor(name).float()
        assert tuple(values.shape) == shapes[name]
        assert (values.mean().item(), values.std().item()) == (
            (1, 0) if "norm" in name else pytest.approx((0, 0.02), abs=3e-4)
        )
    files = sum(path.stat().st_size for path in tmp_path.glob("base/*.safetensors"))
    assert files == pytest.approx(SIZES["tiny"].weight_bytes, rel=0.001)
    factors = tmp_path / "adapter/adapter_model.safetensors"
    assert factors.stat().st_size == pytest.approx(SIZES["tiny"].adapter_bytes, rel=0.05)
    with safe_open(factors, framework="pt") as tensors:
        assert len(tensors.keys()) == 2 * 7 * 2
        assert all(tensors.get_tensor(name).any() for name in tensors.keys())  # noqa: SIM118


def test_sizes_are_those_of_the_models():
    # Published: 2.20 and 14.48 GB. The larger vocabulary adds 2 · 17,152 rows of two bytes a value.
    assert SIZES["1.1b"].weight_bytes / GB == pytest.approx(2.20 + 0.14, abs=0.005)
    assert SIZES["7b"].weight_bytes / GB == pytest.approx(14.48 + 0.28, abs=0.01)


@pytest.mark.parametrize(
    ("ours", "missed"),
    [
        (usage(6.0, 0.3 * GB, 0.35 * GB), []),
        (usage(6.1, 0.3 * GB, 0.35 * GB), ["wall time: ours / stock"]),
        (usage(6.0, 0.31 * GB, 0.35 * GB), ["peak memory: ours / stock"]),
        (usage(6.0, 0.3 * GB, 0.36 * GB), ["bytes written: ours / stock"]),
    ],
)
def test_targets_of_the_small_model(ours, missed):
    targets = judge_export("1.1b", {"ours": ours, "stock": usage()})
    assert [target["name"] for target in targets if not target["met"]] == missed
    assert list(targets[0]) == ["name", "value", "target", "met"]


@pytest.mark.parametrize(
    ("ours", "stock", "met"),
    [(2.9, 15.2, [True, True]), (3.1, 15.2, [False, True]), (2.9, 14.0, [True, False])],
)
def test_targets_of_the_large_model(ours, stock, met):
    figures = {"ours": usage(peak=ours * GB), "stock": usage(peak=stock * GB)}
    assert [target["met"] for target in judge_export("7b", figures)] == met
    del figures["stock"]
    assert [target["met"] for target in judge_export("7b", figures)] == met[:1]


def test_steps_add_up_and_rounds_have_medians():
    steps = [usage(1.0, 3 * GB, 2.0), usage(2.0, 1 * GB, 5.0)]
    assert add_up(steps) == Usage(3.0, 3 * GB, 1.5 * GB, 7.0, "ru_oublock")
    mixed = replace(steps[0], written_by="file sizes")
    assert add_up([add_up([*steps, mixed]), mixed]).written_by == "file sizes and ru_oublock"
    rounds = [usage(wall) for wall in (1.0, 9.0, 2.0)]
    assert median_of(rounds) == usage(2.0)


@pytest.fixture
def played(monkeypatch):
    """Contenders that do nothing: gives the order of their turns, and takes their figures."""
    turns: list[str] = []
    figures = {"ours": iter([usage(1.0), usage(5.0), usage(2.0)]), "stock": iter([usage()] * 3)}

    def play(name: str):
        def run(place: Workplace, steps: tuple[str, ...] = ()) -> dict[str, Usage]:
            turns.append(name)
            return {name: next(figures[name])}

        return run

    def make(command: list[str], folder: Path, what: str) -> tuple[Usage, str]:
        (folder / "base").mkdir(parents=True)
        return usage(), ""

    monkeypatch.setattr(benchmark_export, "run_step", make)
    monkeypatch.setattr(Workplace, "run_ours", play("ours"))
    monkeypatch.setattr(Workplace, "run_stock", play("stock"))
    monkeypatch.setattr(Workplace, "compare", lambda place: turns.append("=") or {"tensors": 1})
    monkeypatch.setattr(benchmark_export, "inspect_disk", lambda path: Disk(path, 1 << 50, 0))
    return turns


def test_turns_alternate_and_ratios_are_of_medians(played, tmp_path, capsys):
    arguments = ["export", "--rounds", "3", "--json", "--work-dir", str(tmp_path)]
    assert benchmark.main(arguments) == 1
    assert played == ["ours", "stock", "=", "stock", "ours", "ours", "stock"]
    wall, peak, _ = json.loads(capsys.readouterr().out)["targets"]
    assert (wall["value"], wall["met"]) == (0.2, True)
    assert (peak["value"], peak["met"]) == (1.0, False)


@pytest.mark.parametrize(("available", "stock_runs"), [(15 * GB, False), (17 * GB, True)])
def test_large_model_merges_where_memory_allows(
    played, tmp_path, monkeypatch, available, stock_runs
):
    monkeypatch.setattr(benchmark_export, "available_memory", lambda: int(available))
    result = benchmark_export.benchmark_export("7b", 1, tmp_path)
    assert played == ["ours", "stock"][: 1 + stock_runs]
    left_out = result["metrics"]["stock steps left out"]
    assert ("merging takes 16.0 GB, 15.0 are free" in left_out) is not stock_runs


def test_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_export, "inspect_disk", lambda path: Disk(path, 10**9, 0))
    missing = r"has 1.0 GB free, the benchmark writes 8.\d GB: \d{10} bytes are missing"
    with pytest.raises(CommandError, match=missing):
        benchmark_export.benchmark_export("1.1b", 2, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_large_model_is_measured_once():
    with pytest.raises(CommandError, match="--size 7b is measured once"):
        benchmark.main(["export", "--size", "7b", "--rounds", "2"])


def test_missing_converter_is_told_first(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    with pytest.raises(CommandError, match=r"convert_hf_to_gguf.py' is missing"):
        benchmark_export.benchmark_export("tiny", 1, tmp_path)


def test_folder_of_a_killed_run_is_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getppid()):
        (tmp_path / f".benchmark-export-{pid}").mkdir()
    with working_dir(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [f".benchmark-export-{os.getppid()}"]
    (tmp_path / "file").touch()
    with pytest.raises(CommandError, match="is no folder"), working_dir(tmp_path / "file"):
        pass


GRANDCHILD = (
    "import time, pathlib, sys; held = bytearray(150_000_000); "
    "pathlib.Path(sys.argv[1], 'a').write_bytes(memoryview(held)[:40_000_000]); "
    "pathlib.Path(sys.argv[1], 'hole').open('wb').truncate(300_000_000); time.sleep(0.3)"
)
CHILD = (
    f"import subprocess, sys; subprocess.run([sys.executable, '-c', {GRANDCHILD!r}, sys.argv[1]])"
)


def places() -> list[str]:
    return [place for place in ("/tmp", "/dev/shm") if os.access(place, os.W_OK)]


@pytest.mark.parametrize("place", places())
def test_a_grandchild_counts(place, tmp_path_factory):
    import tempfile

    with tempfile.TemporaryDirectory(dir=place) as name:
        Path(name, "before").write_bytes(b"of an earlier step" * 1_000_000)
        used, _ = run_step([sys.executable, "-c", CHILD, name], Path(name), "writing")
        assert used.written == pytest.approx(40_000_000, rel=0.03), used.written_by
        assert used.peak > 150_000_000
        if Path("/proc/self/status").exists():
            assert used.anonymous == pytest.approx(160_000_000, rel=0.15)
        assert used.wall > 0.3
        assert {path.name for path in Path(name).iterdir()} == {"a", "before", "hole"}
        if place == "/dev/shm":
            assert used.written_by == "file sizes"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; print('so far', file=sys.stderr); sys.exit('error: no luck')", "1: no luck"),
        ("import os; os.kill(os.getpid(), 9)", r"SIGKILL; out of memory\?: no message"),
    ],
)
def test_failure_says_why(tmp_path, code, said):
    with pytest.raises(CommandError, match=f"the step failed: .*{said}"):
        run_step([sys.executable, "-c", code], tmp_path, "the step")


def test_interrupt_while_a_child_starts_ends_the_child(tmp_path, monkeypatch):
    started = []

    def start(*arguments, **options):
        started.append(start_really(*arguments, **options))
        signal.raise_signal(signal.SIGINT)
        return started[0]

    start_really = subprocess.Popen
    monkeypatch.setattr("scripts.benchmark_usage.subprocess.Popen", start)
    with pytest.raises(KeyboardInterrupt):
        run_step([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path, "the step")
    assert started[0].returncode == -signal.SIGKILL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def write_gguf(path: Path, value: float = 1.0, **tensors: str) -> Path:
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    for name, dtype in tensors.items():
        writer.add_tensor(name, np.full((2, 4), value, dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_different_products_are_not_compared(tmp_path, monkeypatch):
    with pytest.raises(CommandError, match="cannot be loaded"):
        compare(write_gguf(tmp_path / "no-vocabulary", a="float32"), tmp_path / "absent")
    monkeypatch.setattr("llama_cpp.Llama", lambda path, **options: None)
    ours = write_gguf(tmp_path / "ours", a="float32", b="float16")
    assert compare(ours, ours) == {"tensors": 2, "identical bytes": 1}
    for difference, tensors in {
        "b: ours F16 [4, 2], stock F32 [4, 2]": {"a": "float32", "b": "float32"},
        "b: ours F16 [4, 2], stock absent": {"a": "float32"},
    }.items():
        with pytest.raises(CommandError) as error:
            compare(ours, write_gguf(tmp_path / "stock", **tensors))
        assert difference in str(error.value)
    stock = write_gguf(tmp_path / "stock", 0.1, a="float32", b="float16")
    with pytest.raises(CommandError, match="0% of the bytes of a are the same, expected 50%"):
        compare(ours, stock)
