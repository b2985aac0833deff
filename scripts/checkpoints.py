"""Checkpoints that are known to be whole: each carries a manifest of its files, written last."""

import json
from pathlib import Path

from scripts._cli import log
from scripts.provenance import sha256_file
from scripts.recipe import write_atomically

MANIFEST = "complete.json"
_FINISHED, _STATE = "finished.json", "trainer_state.json"
_NEEDED = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", _STATE)


def seal(checkpoint: Path) -> None:
    """Write the manifest of a checkpoint whose files are all there."""
    files = sorted(path for path in checkpoint.iterdir() if path.name != MANIFEST)
    sums = {path.name: sha256_file(path) for path in files if path.is_file()}
    write_atomically(checkpoint / MANIFEST, json.dumps(sums, indent=2) + "\n")


def defect(checkpoint: Path) -> str | None:
    """Say why a checkpoint cannot be gone on from; None when it is whole."""
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return "it was not finished"
    try:
        sums = json.loads(manifest.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        sums = None
    if not isinstance(sums, dict):
        return f"{MANIFEST} is damaged"
    for name in _NEEDED:
        if name not in sums:
            return f"{name} is missing"
    for name, expected in sums.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256_file(path) != expected:
            return f"{name} is damaged"
    return None


def step_of(checkpoint: Path) -> int:
    """Give the optimizer step of a ``checkpoint-<step>`` folder."""
    return int(checkpoint.name.rpartition("-")[2])


def newest_whole(folder: Path) -> Path | None:
    """Give the newest whole checkpoint; say which newer ones are not and why."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]
    for path in sorted(found, key=step_of, reverse=True):
        reason = defect(path)
        if reason is None:
            return path
        log(f"train: {path} is skipped: {reason}")
    return None


def mark_finished(folder: Path) -> None:
    """Note that training came to its end, so that a lost adapter is not trained for again."""
    write_atomically(folder / _FINISHED, "{}\n")


def is_finished(checkpoint: Path) -> bool:
    """Whether nothing is left to train after this checkpoint."""
    state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    return state["global_step"] >= state["max_steps"] or (checkpoint.parent / _FINISHED).is_file()


def adopt(checkpoint: Path) -> None:
    """Correct the place of the best checkpoint, which is stored as a path, after a move."""
    path = checkpoint / _STATE
    state = json.loads(path.read_text(encoding="utf-8"))
    best = state.get("best_model_checkpoint")
    here = str(checkpoint.parent / Path(best).name) if best else None
    if best != here:
        write_atomically(path, json.dumps(state | {"best_model_checkpoint": here}, indent=2) + "\n")
        seal(checkpoint)
