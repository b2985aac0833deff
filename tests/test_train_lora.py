"""Training through the real command on a tiny random model: stop, resume, keep, refuse."""

import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts._cli import CommandError
from scripts.batching import LengthMixedSampler, batch_order
from scripts.model_loading import resolve_model
from scripts.provenance import base_fingerprint
from scripts.recipe import TrainingRecipe
from scripts.train_lora import _newest_checkpoint, encode_rows

pytestmark = pytest.mark.model


def write_recipe(folder: Path, model_dir: Path, **values) -> Path:
    settings = {
        "model_name_or_path": str(model_dir),
        "output_root": str(folder / "outputs"),
        "dataset_name": "scripts/data/finetome_sample.jsonl",
        "max_rows": 40,
        "max_length": 640,
        "lora_r": 4,
        "per_device_train_batch_size": 2,
        "save_steps": 2,
        **values,
    }
    path = folder / "tiny.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    return path


def command(module: str, recipe: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, "--config", str(recipe), *arguments]


def run(module: str, recipe: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(module, recipe, *arguments), capture_output=True, text=True, check=False
    )


@pytest.mark.timeout(1500)  # four starts of Unsloth, a minute here, much more on a busy machine
def test_stopped_training_goes_on_and_finishes(tiny_model_dir, tmp_path):
    recipe = write_recipe(tmp_path, tiny_model_dir, learning_rate="2e-3")
    run_dir = tmp_path / "outputs/tiny"
    metrics = run_dir / "metrics.jsonl"
    process = subprocess.Popen(
        command("scripts.train_lora", recipe),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 600
    while time.monotonic() < end and not (metrics.is_file() and '"loss"' in metrics.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert "the same command goes on from there" in stderr
    assert list(run_dir.glob("checkpoints/*/checkpoint-*"))
    assert not (run_dir / "adapter").exists()

    done = run("scripts.train_lora", recipe)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{run_dir}/adapter\n"
    assert "going on from step" in done.stderr
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == sorted(set(steps))
    provenance = json.loads((run_dir / "provenance.json").read_text())
    assert steps[-1] == provenance["training"]["steps"]
    assert provenance["base_model"]["fingerprint"] == base_fingerprint(tiny_model_dir)
    assert (run_dir / "loss.png").read_bytes()[:4] == b"\x89PNG"
    names = {path.name for path in (run_dir / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= names

    evaluated = run("scripts.evaluate_model", recipe)
    assert evaluated.returncode == 0, evaluated.stderr
    result = json.loads((run_dir / "evaluation.json").read_text())
    assert result["tuned"]["loss"] < result["base"]["loss"]

    before = (run_dir / "adapter/adapter_model.safetensors").stat().st_mtime_ns
    again = run("scripts.train_lora", run_dir / "recipe.yaml")
    assert "is up to date" in again.stderr
    assert (run_dir / "adapter/adapter_model.safetensors").stat().st_mtime_ns == before


def test_folder_without_tokenizer_is_exit_3(tiny_model_dir, tmp_path):
    model_dir = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model_dir)
    for path in model_dir.glob("tokenizer*"):
        path.unlink()
    done = run("scripts.train_lora", write_recipe(tmp_path, model_dir))
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].startswith(f"error: model '{model_dir}' has no tokenizer")
    assert done.stdout == ""


def test_unknown_recipe_key_is_exit_2(tiny_model_dir, tmp_path):
    done = run("scripts.train_lora", write_recipe(tmp_path, tiny_model_dir, lora_rank=4))
    assert done.returncode == 2
    assert "unknown key 'lora_rank', did you mean" in done.stderr


def test_missing_data_set_is_exit_2(tiny_model_dir, tmp_path):
    done = run(
        "scripts.train_lora", write_recipe(tmp_path, tiny_model_dir, dataset_name="nowhere.jsonl")
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_evaluation_before_training_says_what_to_do(tiny_model_dir, tmp_path):
    done = run("scripts.evaluate_model", write_recipe(tmp_path, tiny_model_dir))
    assert done.returncode == 3
    assert "train one: python -m scripts.train_lora" in done.stderr


def test_folder_that_is_no_model(tmp_path):
    with pytest.raises(CommandError, match=r"has no config\.json"):
        resolve_model(TrainingRecipe(model_name_or_path=str(tmp_path)))


def test_hub_name_is_left_to_the_hub():
    name = "mistralai/Mistral-7B-v0.3"
    assert resolve_model(TrainingRecipe(model_name_or_path=name)) == name


def test_half_written_checkpoint_is_skipped(tmp_path):
    for step, names in {10: 4, 20: 3, 9: 4}.items():
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        files = ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"]
        for name in files[:names]:
            (folder / name).touch()
    assert _newest_checkpoint(tmp_path).name == "checkpoint-10"
    assert _newest_checkpoint(tmp_path / "nothing") is None


def padding_share(lengths: list[int], order: list[int], size: int) -> float:
    batches = [
        [lengths[index] for index in order[at : at + size]] for at in range(0, len(order), size)
    ]
    computed = sum(max(batch) * len(batch) for batch in batches)
    return 1 - sum(lengths) / computed


def test_batches_are_even_in_length():
    import torch

    rng = random.Random(1)
    lengths = [rng.randint(100, 600) for _ in range(300)]
    order = batch_order(lengths, 4, torch.Generator().manual_seed(1))
    assert sorted(order) == list(range(300))
    assert padding_share(lengths, order, 4) < 0.05
    assert padding_share(lengths, list(range(300)), 4) > 0.15  # the order of the file


def test_kinds_of_rows_alternate():
    import torch

    lengths = [50] * 64 + [500] * 64
    order = batch_order(lengths, 4, torch.Generator().manual_seed(1))
    kinds = [lengths[index] for index in order[::4]]
    assert sum(a != b for a, b in itertools.pairwise(kinds)) > 8  # sorting would give 1


def test_sampler_repeats_an_epoch_and_changes_between_epochs():
    sampler = LengthMixedSampler(range(100), 4, seed=3)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_row_without_a_trained_token_is_refused(default_model_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(default_model_dir)
    rows = [{"messages": [{"role": "user", "content": "x " * 900}]}]
    with pytest.raises(CommandError, match="raise max_length"):
        encode_rows(tokenizer, rows, 100, "train")


def test_fingerprint_sees_a_changed_weight(tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    assert base_fingerprint(tmp_path / "model") == base_fingerprint(tiny_model_dir)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert base_fingerprint(tmp_path / "model") != base_fingerprint(tiny_model_dir)
    assert base_fingerprint(Path("mlabonne/nothing")) is None


def test_training_and_export_agree_on_the_fingerprint(tiny_model_dir):
    from export.base_model import base_fingerprint as theirs

    assert theirs(tiny_model_dir) == base_fingerprint(tiny_model_dir)
