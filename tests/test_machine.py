"""Machine: precision by capability, cgroup limits of both versions, disks of folders to come."""

import dataclasses
import os
from pathlib import Path

import pytest

from scripts import machine
from scripts.machine import cgroup_memory, choose_precision, inspect_disk, usable_threads

NOWHERE = Path("/nonexistent")


def write(root: Path, **files: str) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / name.replace("__", ".")).write_text(text)


def test_a_t4_trains_in_fp16_whatever_torch_says(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)
    chosen = choose_precision((7, 5), cpu_bf16=True)
    assert chosen.name == "fp16"
    assert chosen.training_arguments == {"bf16": False, "fp16": True}
    assert chosen.reason == "compute capability 7.5 < 8.0: bf16 would be emulated"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_newer_gpus_train_in_bf16(capability):
    chosen = choose_precision(capability, cpu_bf16=False)
    assert chosen.training_arguments == {"bf16": True, "fp16": False}


@pytest.mark.parametrize(("native", "name"), [(True, "bf16"), (False, "fp32")])
def test_a_cpu_trains_in_bf16_only_if_it_has_it(native, name):
    chosen = choose_precision(None, native)
    assert chosen.name == name
    assert chosen.training_arguments == {"bf16": native, "fp16": False}


def test_cpu_flags_decide_and_the_variable_overrides(tmp_path, monkeypatch):
    monkeypatch.delenv("UNSLOTH_CPU_BF16", raising=False)
    new, old = tmp_path / "new", tmp_path / "old"
    new.write_text("model name\t: A CPU\nflags\t\t: fpu avx512_bf16 sse\n")
    old.write_text("flags\t\t: fpu avx2\n")
    assert (machine.has_cpu_bf16(new), machine.has_cpu_bf16(old)) == (True, False)
    assert not machine.has_cpu_bf16(NOWHERE)
    assert (machine.cpu_name(new), machine.cpu_name(old)) == ("A CPU", "CPU")
    monkeypatch.setenv("UNSLOTH_CPU_BF16", "0")
    assert not machine.has_cpu_bf16(new)


def test_cgroup_v2_memory_leaves_droppable_pages_out(tmp_path):
    write(tmp_path, memory__max="4000\n", memory__current="3000\n")
    write(tmp_path, memory__stat="anon 1800\ninactive_file 1000\n")
    assert cgroup_memory(tmp_path, NOWHERE) == (4000, 2000)


def test_cgroup_without_a_limit(tmp_path):
    write(tmp_path, memory__max="max\n", memory__current="3000\n")
    assert cgroup_memory(tmp_path, NOWHERE) == (None, 0)
    write(tmp_path / "memory", memory__limit_in_bytes="9223372036854771712\n")
    assert cgroup_memory(tmp_path, NOWHERE) == (None, 0)


def test_cgroup_v1_memory(tmp_path):
    write(tmp_path / "memory", memory__limit_in_bytes="5000", memory__usage_in_bytes="1500")
    write(tmp_path / "memory", memory__stat="inactive_file 1\ntotal_inactive_file 500\n")
    assert cgroup_memory(tmp_path, NOWHERE) == (5000, 1000)


def test_a_parent_group_binds_as_well(tmp_path):
    proc = tmp_path / "self"
    proc.write_text("0::/slice/unit\n")
    write(tmp_path / "slice", memory__max="2000", memory__current="100", cpu__max="100000 100000")
    write(tmp_path / "slice/unit", memory__max="9000", memory__current="50", cpu__max="max 100000")
    assert cgroup_memory(tmp_path, proc) == (2000, 100)
    assert usable_threads(tmp_path, proc) == 1


def test_a_path_of_the_host_is_passed_over(tmp_path):
    proc = tmp_path / "self"
    proc.write_text("4:memory:/docker/abc\n0::/\nbroken line\n")
    write(tmp_path / "memory", memory__limit_in_bytes="700", memory__usage_in_bytes="0")
    assert cgroup_memory(tmp_path, proc) == (700, 0)


def test_cpu_quota_of_both_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert usable_threads(tmp_path, NOWHERE) == 8
    write(tmp_path, cpu__max="300000 100000\n")
    assert usable_threads(tmp_path, NOWHERE) == 3
    write(tmp_path / "cpu", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000")
    assert usable_threads(tmp_path, NOWHERE) == 1
    write(tmp_path / "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert usable_threads(tmp_path, NOWHERE) == 3


def test_disk_of_a_folder_to_come_is_that_of_its_parent(tmp_path):
    disk = inspect_disk(tmp_path / "outputs" / "run" / "checkpoints")
    assert disk.path == tmp_path
    assert disk.free_bytes > 0
    parent = inspect_disk(tmp_path)
    # Other programs write meanwhile.
    assert disk == dataclasses.replace(parent, free_bytes=disk.free_bytes)
    assert disk.free_bytes == pytest.approx(parent.free_bytes, rel=0.2)


def test_download_counts_only_when_weights_are_there(tmp_path):
    folder = tmp_path / "models--org--name" / "snapshots" / "abc"
    write(folder, config__json="{}")
    assert not machine.is_cached("org/name", tmp_path)
    write(folder, model__safetensors="weights")
    assert machine.is_cached("org/name", tmp_path)


def test_limits_of_the_cgroup_reach_the_machine(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(machine, "cgroup_memory", lambda: (5000, 4000))
    found = machine.inspect_machine({"run": tmp_path / "new"}, cpu_bf16=True)
    assert (found.ram_total_bytes, found.ram_available_bytes) == (5000, 1000)
    assert found.cpu_bf16
    assert found.disks["run"].path == tmp_path
    assert found.to_json()["disks"]["run"]["path"] == str(tmp_path)
    if found.device == "cpu":
        assert (found.capability, found.training_bytes) == (None, 1000)
