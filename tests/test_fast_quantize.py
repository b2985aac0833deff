"""Our quantizer gives llama.cpp's bytes, whatever the weights, or it is not used."""

import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export import fast_quantize
from export.fast_quantize import IN_USE, LIBRARY, TYPES, FastQuantizer, awkward_rows
from export.ggml_quantize import GgmlQuantizer

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which(os.environ.get("CC", "cc"))
QUANTIZER = GgmlQuantizer()
all_types = pytest.mark.parametrize("kind", TYPES, ids=[name for name, _ in TYPES.values()])
compiled = pytest.mark.skipif(
    not LIBRARY.is_file(), reason=f"{LIBRARY} was not compiled (scripts/setup.sh does it)"
)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def check_same(kind: int, rows: np.ndarray) -> None:
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    made = QUANTIZER._fast.quantize(kind, rows)
    assert made is not None, QUANTIZER._fast.status()
    np.testing.assert_array_equal(made, QUANTIZER._by_library(kind, rows))


@compiled
def test_every_type_is_in_use():
    status = QUANTIZER._fast.status()
    if "this CPU" in str(status):
        pytest.skip(str(status))
    assert status == dict.fromkeys(("q4_K", "q5_K", "q6_K"), IN_USE)


@compiled
@all_types
@pytest.mark.parametrize("shape", [(1, 256), (7, 256), (5, 768), (64, 2048)], ids=str)
def test_bytes_of_random_weights(kind, shape):
    for seed, scale in enumerate((0.02, 1e-6, 3.0, 1e4)):
        rows = np.random.default_rng(seed).standard_normal(shape) * scale
        check_same(kind, rows)
        check_same(kind, rows - scale)
        check_same(kind, rows.clip(-scale, scale))


@compiled
@all_types
def test_bytes_of_sub_blocks_of_any_size(kind):
    for seed in range(12):
        random = np.random.default_rng(seed)
        sizes = 10.0 ** random.uniform(-44, 37, (40, 16)).repeat(16, axis=1)
        check_same(kind, random.standard_normal((40, 256)) * sizes)
        bits = random.integers(0, 2**32, (40, 256), dtype=np.uint32).view(np.float32)
        check_same(kind, np.where(np.isfinite(bits), bits, 0))
        # A few floats wide, far from zero: sums cancel, and the division is by almost nothing.
        steps = 1 + random.integers(-3, 4, (40, 256)) * 2.0**-23
        check_same(kind, random.standard_normal((40, 8)).repeat(32, axis=1) * steps)


@compiled
@all_types
@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(finite, min_size=1, max_size=48),
    exponent=st.integers(-60, 10),
    width=st.sampled_from([256, 512, 768]),
    count=st.integers(1, 4),
)
def test_bytes_of_any_weights(kind, values, exponent, width, count):
    with np.errstate(over="ignore", under="ignore"):
        few = np.array(values, dtype=np.float32) * np.float32(2.0**exponent)
    check_same(kind, np.resize(few[np.isfinite(few)], (count, width)))
    with np.errstate(over="ignore", under="ignore"):
        check_same(kind, np.random.default_rng(len(values)).choice(few.clip(-1, 1), (count, width)))


@compiled
@all_types
def test_bytes_of_the_rows_of_the_check(kind):
    check_same(kind, awkward_rows())


@compiled
@all_types
def test_quantize_takes_the_fast_way_unless_there_is_importance(kind, monkeypatch):
    quantizer, rows = GgmlQuantizer(), np.ones((2, 512), np.float32)
    importance = np.linspace(1, 2, 512, dtype=np.float32)
    assert quantizer._fast.status()
    calls = []
    by_library = quantizer._by_library
    monkeypatch.setattr(
        quantizer, "_by_library", lambda *arguments: calls.append(kind) or by_library(*arguments)
    )
    assert quantizer.quantize(kind, rows).tobytes() == by_library(kind, rows).tobytes()
    assert calls == []
    weighted = quantizer.quantize(kind, rows, importance)
    assert weighted.tobytes() == by_library(kind, rows, importance).tobytes()
    assert calls == [kind]


@compiled
@all_types
def test_what_a_type_cannot_hold_is_refused(kind):
    assert QUANTIZER.quantize(kind, np.full((1, 256), -1e10, np.float32)) is None


@compiled
def test_threads_get_the_same_bytes():
    quantizer = GgmlQuantizer()
    rows = np.random.default_rng(1).standard_normal((32, 512)).astype(np.float32)
    made: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: made.append(quantizer.quantize(12, rows).tobytes()))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [QUANTIZER._by_library(12, rows).tobytes()] * 8


def falls_back(capsys: pytest.CaptureFixture, reason: str, notes: int) -> None:
    """Check a new quantizer: the library's bytes, the reason, and how often it is told."""
    quantizer, rows = GgmlQuantizer(), np.random.default_rng(2).normal(size=(3, 256))
    rows = rows.astype(np.float32)
    for _ in range(2):
        for kind in TYPES:
            assert quantizer._fast.quantize(kind, rows) is None
            assert (quantizer.quantize(kind, rows) == QUANTIZER._by_library(kind, rows)).all()
    assert all(reason in state for state in quantizer._fast.status().values())
    assert capsys.readouterr().err.count("note: ") == notes


def test_missing_library_is_silent(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fast_quantize, "LIBRARY", tmp_path / "none.so")
    falls_back(capsys, "does not exist", 0)


def test_file_that_is_no_library_is_silent(monkeypatch, tmp_path, capsys):
    (tmp_path / "text.so").write_text("no library")
    monkeypatch.setattr(fast_quantize, "LIBRARY", tmp_path / "text.so")
    falls_back(capsys, "cannot be loaded", 0)


def test_switch_turns_it_off(monkeypatch, capsys):
    monkeypatch.setenv("TOMEFORGE_PLAIN_QUANTS", "1")
    falls_back(capsys, "switched off", 0)


def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, function: Callable) -> None:
    """Put a Python function in the place of all three."""
    (tmp_path / "pretended.so").touch()
    monkeypatch.setattr(fast_quantize, "LIBRARY", tmp_path / "pretended.so")
    prototype = ctypes.CFUNCTYPE(
        ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64
    )
    functions = {f"tf_quantize_{name}": prototype(function) for name, _ in TYPES.values()}
    monkeypatch.setattr(fast_quantize.ctypes, "CDLL", lambda _: SimpleNamespace(**functions))


def test_cpu_without_the_instructions_is_silent(monkeypatch, tmp_path, capsys):
    QUANTIZER._by_library(12, awkward_rows())  # loads the library, which CDLL does too
    monkeypatch.setattr(GgmlQuantizer, "_library", QUANTIZER._library)
    pretend(monkeypatch, tmp_path, lambda *_: 0)
    falls_back(capsys, "this CPU", 0)


@compiled
@pytest.mark.parametrize("place", [0, 9_000, -1])
def test_one_wrong_byte_is_seen_and_told_once(place, monkeypatch, capsys):
    call = FastQuantizer._call

    def corrupt(self: FastQuantizer, kind: int, rows: np.ndarray) -> np.ndarray | None:
        made = call(self, kind, rows)
        if made is not None:
            made[place] ^= 1
        return made

    monkeypatch.setattr(FastQuantizer, "_call", corrupt)
    falls_back(capsys, "other bytes", 3)


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
@pytest.mark.parametrize(
    ("old", "new", "flags", "names"),
    [
        ("0.1f * is", "0.101f * is", ["-O0"], ["q4_K", "q5_K", "q6_K"]),
        ("cur_error < best_error", "cur_error <= best_error", ["-O0"], ["q4_K", "q5_K"]),
        ("", "", ["-O2", "-mfma", "-ffp-contract=fast"], ["q4_K", "q5_K", "q6_K"]),
    ],
    ids=["constant", "comparison", "fused"],
)
def test_other_arithmetic_is_seen(old, new, flags, names, monkeypatch, tmp_path, capsys):
    if "avx2 " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no AVX2")
    text = (ROOT / "export/fast_quants.c").read_text()
    assert old in text
    (tmp_path / "fast_quants.c").write_text(text.replace(old, new))
    command = [COMPILER, "-fPIC", "-shared", "-ffp-contract=off", *flags, "fast_quants.c"]
    subprocess.run([*command, "-o", "other.so"], cwd=tmp_path, check=True)
    monkeypatch.setattr(fast_quantize, "LIBRARY", tmp_path / "other.so")
    status = GgmlQuantizer()._fast.status()
    assert [name for name, state in status.items() if "other bytes" in state] == names
    assert capsys.readouterr().err.count("note: ") == len(names)


def install(folder: Path, compiler: Path) -> subprocess.CompletedProcess:
    """Run set-up's function for the compiled quantizer only."""
    script = (
        'set -euo pipefail; say() { echo "$*" >&2; }; eval "$(sed -n \'/^install_fast_quants()/,'
        "/^}/p' scripts/setup.sh)\"; install_fast_quants"
    )
    environment = {**os.environ, "SHARE_DIR": str(folder), "CC": str(compiler)}
    return subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=True,
    )


def test_setup_compiles_when_there_is_something_new(tmp_path):
    compiler, calls = tmp_path / "compiler", tmp_path / "calls"
    compiler.write_text(
        f'#!/bin/sh\necho "$*" >>{calls}\n[ ! -e {tmp_path}/fails ] || exit 1\n'
        'while [ "$1" != -o ]; do shift; done; echo made >"$2"\n'
    )
    compiler.chmod(0o755)
    made = tmp_path / "tomeforge/fast_quants.so"
    (tmp_path / "fails").touch()
    assert "was not compiled" in install(tmp_path, compiler).stderr
    assert not made.exists()
    (tmp_path / "fails").unlink()
    assert "compiled" in install(tmp_path, compiler).stderr
    assert install(tmp_path, compiler).stderr == ""
    assert made.read_text() == "made\n"
    assert len(calls.read_text().splitlines()) == 2
    assert "-ffp-contract=off" in calls.read_text()
    (tmp_path / "tomeforge/fast_quants.key").write_text("of another source")
    assert "compiled" in install(tmp_path, compiler).stderr
