"""Preflight: what cannot finish is refused, and the knob that is named really makes it fit."""

import dataclasses
import datetime
import json
from pathlib import Path

import pytest

from scripts._cli import FAILED, CommandError
from scripts.estimates import Workload, estimate_disk, estimate_memory
from scripts.machine import Disk, Machine
from scripts.model_shape import ModelShape
from scripts.preflight import Check, find_knobs, gigabytes, run_checks
from scripts.preflight_report import make_report
from scripts.recipe import TrainingRecipe, parse_recipe
from scripts.time_plan import PlanInputs, plan_time

TINY_LLAMA = ModelShape(2048, 22, 32, 4, 64, 5632, 32000, False, 45 * 2048)
MISTRAL = ModelShape(4096, 32, 32, 8, 128, 14336, 32768, False, 65 * 4096)
RECIPE = TrainingRecipe(run_name="t", model_name_or_path="org/tiny", max_length=1024)
ROWS = Workload([300, 500, 800, 1000, 200, 250, 900, 400] * 20)
GB = 1_000_000_000


def disks(run=100 * GB, checkpoints=100 * GB, downloads=100 * GB, shared=False):
    sizes = {"run": run, "checkpoints": checkpoints, "downloads": downloads}
    return {
        name: Disk(Path("/disk") / name, free, 1 if shared else number)
        for number, (name, free) in enumerate(sizes.items())
    }


def cpu(ram=64 * GB, **some) -> Machine:
    return Machine("cpu", "CPU", ram, ram, 2, cpu_bf16=True, disks=disks(**some))


def t4(ram=12 * GB) -> Machine:
    gpu = {
        "capability": (7, 5),
        "gpu_total_bytes": 15_800_000_000,
        "gpu_free_bytes": 15_500_000_000,
    }
    return Machine("cuda", "Tesla T4", ram, ram, 2, **gpu, disks=disks())


def check_of(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name.startswith(name))


def test_a_big_machine_passes():
    checks = run_checks(RECIPE, TINY_LLAMA, cpu(), ROWS)
    assert [check.line() for check in checks if not check.ok] == []
    assert check_of(checks, "memory").verdict == "PASS"
    assert {check.advice for check in checks} == {""}


def test_whatever_is_lacking_comes_with_advice():
    machine = cpu(ram=GB // 2, run=1, checkpoints=1, downloads=1)
    checks = run_checks(RECIPE, TINY_LLAMA, machine, ROWS)
    assert [check.name for check in checks if check.ok or not check.advice] == []


def test_little_memory_is_refused_in_one_line_that_names_the_knob():
    check = check_of(run_checks(RECIPE, TINY_LLAMA, cpu(ram=5 * GB), ROWS), "memory")
    assert check.verdict == "FAIL"
    assert "\n" not in check.line()
    assert check.line().startswith("memory: about ")
    assert "needed, 5.0 GB RAM free; set use_gradient_checkpointing: true (about" in check.line()


@pytest.mark.parametrize("gigabytes_free", [9, 7, 5, 4, 3.4, 3.0, 2.8])
def test_suggested_knobs_make_it_fit_when_applied(gigabytes_free):
    machine = cpu(ram=int(gigabytes_free * GB))
    assert not check_of(run_checks(RECIPE, TINY_LLAMA, machine, ROWS), "memory").ok
    knobs = find_knobs(TINY_LLAMA, RECIPE, machine, ROWS)
    assert knobs is not None
    changed = dataclasses.replace(RECIPE, **knobs.changes)
    assert check_of(run_checks(changed, TINY_LLAMA, machine, ROWS), "memory").ok
    fresh = estimate_memory(TINY_LLAMA, changed, machine, ROWS.biggest(changed))
    assert knobs.estimate == fresh
    before = RECIPE.per_device_train_batch_size * RECIPE.gradient_accumulation_steps
    after = changed.per_device_train_batch_size * changed.gradient_accumulation_steps
    assert before == after  # the optimizer step stays the same


@pytest.mark.parametrize("left_out", range(2))
def test_no_suggested_knob_is_superfluous(left_out):
    machine = cpu(ram=int(2.75 * GB))
    knobs = find_knobs(TINY_LLAMA, RECIPE, machine, ROWS)
    assert knobs is not None
    changes = dict(knobs.changes)
    keys = [key for key in changes if key != "gradient_accumulation_steps"]
    assert len(keys) >= 2
    del changes[keys[left_out]]
    changed = dataclasses.replace(RECIPE, **changes)
    need = estimate_memory(TINY_LLAMA, changed, machine, ROWS.biggest(changed)).total
    assert need > machine.ram_available_bytes


def test_knobs_that_change_nothing_but_memory_come_first():
    knobs = find_knobs(TINY_LLAMA, RECIPE, cpu(ram=5 * GB), ROWS)
    assert knobs is not None
    assert list(knobs.changes) == ["use_gradient_checkpointing"]
    already = dataclasses.replace(RECIPE, use_gradient_checkpointing=True)
    assert find_knobs(TINY_LLAMA, already, cpu(ram=int(3.0 * GB)), ROWS) is not None


def test_sixteen_bits_are_turned_into_four_where_only_that_helps():
    recipe = dataclasses.replace(
        RECIPE,
        load_in_4bit=False,
        use_gradient_checkpointing=True,
        per_device_train_batch_size=1,
    )
    knobs = find_knobs(MISTRAL, recipe, t4(), Workload([512] * 8))
    assert knobs is not None
    assert knobs.changes == {"load_in_4bit": True}


def test_nothing_fits():
    machine = cpu(ram=1 * GB)
    assert find_knobs(TINY_LLAMA, RECIPE, machine, ROWS) is None
    line = check_of(run_checks(RECIPE, TINY_LLAMA, machine, ROWS), "memory").line()
    assert line.endswith("no recipe key makes it fit: take a smaller model")


def test_gpu_memory_decides_with_a_gpu_and_host_memory_too():
    recipe = dataclasses.replace(RECIPE, use_gradient_checkpointing=True)
    assert check_of(run_checks(recipe, MISTRAL, t4(), ROWS), "memory").ok
    starved = run_checks(recipe, MISTRAL, t4(ram=2 * GB), ROWS)
    assert check_of(starved, "memory").ok
    assert check_of(starved, "RAM for training").verdict == "FAIL"
    assert check_of(starved, "RAM for export").verdict == "PASS"  # whatever the model's size


def test_an_export_on_very_many_cores_may_lack_memory():
    few, many = (dataclasses.replace(cpu(ram=2 * GB), cpu_threads=threads) for threads in (2, 128))
    assert check_of(run_checks(RECIPE, TINY_LLAMA, few, ROWS), "RAM for export").ok
    check = check_of(run_checks(RECIPE, TINY_LLAMA, many, ROWS), "RAM for export")
    assert check.verdict == "FAIL"
    assert check.line().endswith("give it fewer cores: each takes 13 MB")


def test_a_free_t4_verifies_a_7b():
    check = check_of(run_checks(RECIPE, MISTRAL, t4(), ROWS), "RAM for verification")
    assert check.verdict == "PASS"
    assert check.need == "about 5.3 GB needed"  # llama.cpp's copy of the Q4_K_M


def test_verification_without_ram_is_a_warning_because_the_files_are_made_all_the_same():
    recipe = dataclasses.replace(RECIPE, use_gradient_checkpointing=True)
    starved = run_checks(recipe, MISTRAL, t4(ram=5 * GB), ROWS)
    check = check_of(starved, "RAM for verification")
    assert check.verdict == "WARN"
    assert "verify on a machine with more RAM" in check.line()
    assert [check.name for check in starved if check.verdict == "FAIL"] == []
    mapped = run_checks(recipe, MISTRAL, t4(ram=5 * GB), ROWS, quantizations=["Q8_0"])
    assert check_of(mapped, "RAM for verification").verdict == "PASS"


@pytest.mark.parametrize("full", ["run", "checkpoints", "downloads"])
def test_each_disk_is_checked_apart(full):
    checks = run_checks(RECIPE, TINY_LLAMA, cpu(**{full: GB // 5}), ROWS)
    failed = [check for check in checks if not check.ok]
    assert [check.name for check in failed] == [f"disk for {full}"]
    assert f"free at /disk/{full}" in failed[0].line()


def test_folders_on_one_disk_share_its_space():
    # run 4.7 GB and download 2.2 GB: each would fit into 6 GB, both do not
    apart = run_checks(RECIPE, TINY_LLAMA, cpu(run=6 * GB, downloads=6 * GB), ROWS)
    assert all(check.ok for check in apart)
    six = {"run": 6 * GB, "checkpoints": 6 * GB, "downloads": 6 * GB}
    shared = run_checks(RECIPE, TINY_LLAMA, cpu(**six, shared=True), ROWS)
    failed = [check for check in shared if not check.ok]
    assert [check.name for check in failed] == ["disk for run + checkpoints + downloads"]
    assert "set output_root or checkpoint_dir or HF_HOME to another disk" in failed[0].line()
    cached = run_checks(RECIPE, TINY_LLAMA, cpu(**six, shared=True), ROWS, cached=["org/tiny"])
    assert all(check.ok for check in cached)


def test_fewer_checkpoints_are_suggested_where_that_is_enough():
    recipe = dataclasses.replace(RECIPE, save_total_limit=9)
    machine = cpu(checkpoints=GB)
    check = check_of(run_checks(recipe, TINY_LLAMA, machine, ROWS), "disk for checkpoints")
    assert not check.ok
    assert check.advice.startswith("set save_total_limit: 1 (about")
    fewer = dataclasses.replace(recipe, save_total_limit=1)
    assert check_of(run_checks(fewer, TINY_LLAMA, machine, ROWS), "disk for checkpoints").ok


def test_a_disk_for_the_files_alone_is_too_small_for_their_verification():
    disk = estimate_disk(TINY_LLAMA, RECIPE, ["Q4_K_M"])

    def check(free):
        checks = run_checks(RECIPE, TINY_LLAMA, cpu(run=free), ROWS, quantizations=["Q4_K_M"])
        return check_of(checks, "disk for run")

    enough = disk.adapter + disk.export_peak + disk.verification
    assert check(enough).ok
    assert not check(enough - 1).ok


def test_training_alone_needs_no_room_for_an_export():
    machine = cpu(run=GB // 5)
    names = [c.name for c in run_checks(RECIPE, TINY_LLAMA, machine, ROWS, quantizations=())]
    assert not any("export" in name or "verification" in name for name in names)
    checks = run_checks(RECIPE, TINY_LLAMA, machine, ROWS, quantizations=())
    assert all(check.ok for check in checks)


def test_unknown_architecture_is_not_estimated_and_not_refused():
    (check,) = run_checks(RECIPE, None, cpu(ram=1), ROWS)
    assert (check.verdict, check.need) == ("WARN", "not estimated")
    report = make_report(RECIPE, None, cpu(), ROWS, {})
    report.require_ok()
    assert report.to_json()["memory"] is None


@pytest.mark.parametrize("name", ["mistral-7b-colab", "tinyllama-1.1b-colab"])
def test_shipped_colab_recipes_fit_a_free_t4(name):
    recipe, _ = parse_recipe("", ["--config", f"scripts/recipes/{name}.yaml"])
    shape = MISTRAL if name.startswith("mistral") else TINY_LLAMA
    checks = run_checks(recipe, shape, t4(), Workload([]))
    assert [check.line() for check in checks if check.verdict == "FAIL"] == []


def planned_report(machine=None, now=datetime.datetime(2026, 1, 1, 12, 0)):
    plan = plan_time(
        PlanInputs(RECIPE, ROWS, 1_100_048_384, 12_615_680, seconds_per_token=0.02), rows=80
    )
    versions = {"python": "3.11", "torch": "2"}
    report = make_report(
        RECIPE, TINY_LLAMA, machine or cpu(), ROWS, versions, plan=plan, budget_seconds=3600
    )
    return dataclasses.replace(report, now=now)


def test_report_reads_as_a_table():
    report = planned_report()
    lines = report.to_text().splitlines()
    labels = [line.split("  ")[0] for line in lines]
    wanted = ["versions", "device", "precision", "memory is", "disk is", "rows", "steps"]
    assert labels[: len(wanted)] == wanted
    column = {
        len(line) - len(line[len(label) :].lstrip())
        for line, label in zip(lines, labels, strict=True)
    }
    assert len(column) == 1  # all values start in one column
    text = report.to_text()
    assert "bf16 (this CPU has bf16 instructions)" in text
    assert "rows         80 of 160" in text
    assert "done at about 12:" in text or "done at about 13:" in text
    assert "(budget 1 h 00 min, 10% of it in reserve)" in text
    assert text.count("PASS") == len(report.checks)
    assert "Q4_K_M 0.7 GB, verification 0.3 GB" in text
    assert "merged" not in text


def test_report_names_the_day_when_it_is_another():
    late = planned_report(now=datetime.datetime(2026, 1, 1, 23, 50))
    assert " tomorrow (budget" in late.to_text()


def test_report_is_json():
    content = json.loads(json.dumps(planned_report(t4()).to_json()))
    assert content["ok"]
    assert content["precision"]["training_arguments"] == {"bf16": False, "fp16": True}
    assert content["plan"]["total_seconds"] > 0
    assert content["plan"]["finish"].startswith("2026-01-01T")
    assert content["memory"]["total"] > 0
    disk = content["disk"]
    assert set(disk["quantized"]) == {"F16", "Q8_0", "Q4_K_M"}
    assert disk["export_peak"] == sum(disk["quantized"].values())
    assert disk["verification_peak"] == disk["export_peak"] + disk["verification"]
    assert not {"merged", "f16"} & set(disk)
    assert {check["verdict"] for check in content["checks"]} == {"PASS"}


def test_report_refuses_with_every_unmet_check_in_one_line():
    report = planned_report(cpu(ram=2 * GB, run=GB))
    assert not report.ok
    with pytest.raises(CommandError, match="this run cannot finish: memory: about") as caught:
        report.require_ok()
    assert "disk for run" in str(caught.value)
    assert caught.value.exit_code == FAILED
    assert "FAIL" in report.to_text()
    planned_report().require_ok()


@pytest.mark.parametrize(("size", "text"), [(9.84e9, "9.8 GB"), (60e6, "0.1 GB"), (12e6, "12 MB")])
def test_sizes_are_written_in_gb(size, text):
    assert gigabytes(size) == text
