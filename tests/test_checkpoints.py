"""Checkpoints: sealed means whole, and every kind of damage is seen before it is gone on from."""

import json
from pathlib import Path

import pytest

from scripts.checkpoints import MANIFEST, defect, newest_whole, seal, step_of

FILES = (
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "trainer_state.json",
    "rng_state.pth",
)


def make_checkpoint(folder: Path, step: int, names: tuple[str, ...] = FILES) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name in names:
        (checkpoint / name).write_bytes(f"{name} of step {step}".encode() * 50)
    return checkpoint


def make_sealed(folder: Path, step: int) -> Path:
    checkpoint = make_checkpoint(folder, step)
    seal(checkpoint)
    return checkpoint


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_sealed_is_whole(tmp_path):
    checkpoint = make_sealed(tmp_path, 20)
    assert defect(checkpoint) is None
    assert set(json.loads((checkpoint / MANIFEST).read_text())) == set(FILES)


def test_sealing_again_keeps_the_manifest_out_of_itself(tmp_path):
    checkpoint = make_sealed(tmp_path, 20)
    seal(checkpoint)
    assert defect(checkpoint) is None


def test_unsealed_is_not_whole(tmp_path):
    assert defect(make_checkpoint(tmp_path, 20)) == "it was not finished"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [cut, flip_bit])
def test_damaged_file_is_named(tmp_path, name, damage):
    checkpoint = make_sealed(tmp_path, 20)
    damage(checkpoint / name)
    assert defect(checkpoint) == f"{name} is damaged"


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_named(tmp_path, name):
    checkpoint = make_sealed(tmp_path, 20)
    (checkpoint / name).unlink()
    assert defect(checkpoint) == f"{name} is missing"


@pytest.mark.parametrize("name", FILES[:4])
def test_sealed_without_a_needed_file_is_not_whole(tmp_path, name):
    checkpoint = make_checkpoint(tmp_path, 20, tuple(file for file in FILES if file != name))
    seal(checkpoint)
    assert defect(checkpoint) == f"{name} is missing"


@pytest.mark.parametrize("content", [b"", b'{"optimizer.pt": "12', b"\xff\xfe", b"[]", b"\0" * 64])
def test_damaged_manifest_is_no_error(tmp_path, content):
    checkpoint = make_sealed(tmp_path, 20)
    (checkpoint / MANIFEST).write_bytes(content)
    assert defect(checkpoint) is not None


def test_newest_whole_counts_steps_as_numbers(tmp_path):
    for step in (9, 100, 20):
        make_sealed(tmp_path, step)
    assert step_of(newest_whole(tmp_path)) == 100


def test_newest_whole_skips_damage_and_says_so(tmp_path, capsys):
    for step in (10, 20, 30):
        make_sealed(tmp_path, step)
    make_checkpoint(tmp_path, 40)
    cut(tmp_path / "checkpoint-30/optimizer.pt")
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-20"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("checkpoint-40 is skipped: it was not finished")
    assert lines[1].endswith("checkpoint-30 is skipped: optimizer.pt is damaged")


def test_newest_whole_is_none_without_a_whole_one(tmp_path):
    assert newest_whole(tmp_path / "nothing") is None
    make_checkpoint(tmp_path, 10)
    (tmp_path / "checkpoint-best").mkdir()  # not one of ours
    assert newest_whole(tmp_path) is None
