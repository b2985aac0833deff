"""The smallest training that is a real one: 24 short rows, steps of four rows, a tiny model."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

NUM_ROWS = 28  # 24 to train on: six steps are an epoch
# The first section alone, which does not change: what these runs measure depends on every word.
_WORDS = (
    Path("scripts/data/README.md")
    .read_text(encoding="utf-8")
    .partition("\n# The adapters")[0]
    .split()
)


def write_rows(path: Path, count: int = NUM_ROWS) -> Path:
    rng = random.Random(1)
    rows = []
    for number in range(count):
        words = [rng.choice(_WORDS) + str(rng.randrange(100)) for _ in range(rng.randint(4, 24))]
        turns = [("human", f"Question {number}: {' '.join(words[:3])}?"), ("gpt", " ".join(words))]
        rows.append({"conversations": [{"from": role, "value": text} for role, text in turns]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_recipe(folder: Path, model_dir: Path, **values: Any) -> dict[str, Any]:
    rows = folder / "rows.jsonl"
    return {
        "run_name": "tiny",
        "output_root": str(folder / "outputs"),
        "model_name_or_path": str(model_dir),
        "dataset_name": str(rows if rows.is_file() else write_rows(rows)),
        "near_duplicate_threshold": 1.0,
        "eval_fraction": 0.143,
        "max_length": 256,
        "lora_r": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 2e-3,
        "warmup_steps": 0,
        "max_steps": 4,
        "save_steps": 2,
        **values,
    }


def write_recipe(folder: Path, model_dir: Path, **values: Any) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(folder, model_dir, **values)), encoding="utf-8")
    return path


def train_command(recipe: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "scripts.train_lora", "--config", str(recipe), *flags]


def run_training(recipe: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        train_command(recipe, *flags), capture_output=True, text=True, check=False, timeout=220
    )


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """Whole lines only: the run may be writing one."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses_of(run_dir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in metrics_of(run_dir) if "loss" in row}


def weights_of(adapter_dir: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(adapter_dir / "adapter_model.safetensors")


def same_bits(some: Path, other: Path) -> bool:
    """Whether two adapters are the same, tensor by tensor, bit for bit."""
    import torch

    first, second = weights_of(some), weights_of(other)
    return first.keys() == second.keys() and all(
        torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)) for name in first
    )


def difference(some: Path, other: Path) -> float:
    """Give the relative distance of two adapters' deltas: of all B, which start at zero."""
    first, second = weights_of(some), weights_of(other)
    assert first.keys() == second.keys()
    names = [name for name in first if "lora_B" in name]
    apart = sum(
        float((first[name].float() - second[name].float()).square().sum()) for name in names
    )
    return (apart / sum(float(second[name].float().square().sum()) for name in names)) ** 0.5
