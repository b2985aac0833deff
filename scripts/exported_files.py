"""The GGUF files that a run has exported."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts._cli import MODEL, CommandError

NO_FILES = "none"


@dataclass(frozen=True)
class GgufFile:
    """A file to ask: ``name`` is its type, or what the user calls it; ``tuned`` is one of the run."""

    name: str
    path: Path
    tuned: bool = True


def read_export(run_dir: Path) -> dict[str, Any]:
    """Read ``export.json``; empty where nothing is exported."""
    path = run_dir / "gguf" / "export.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def has_current_export(run_dir: Path) -> bool:
    """Whether there is an export, and no adapter that is newer."""
    path = run_dir / "gguf" / "export.json"
    weights = run_dir / "adapter" / "adapter_model.safetensors"
    return path.is_file() and path.stat().st_mtime >= weights.stat().st_mtime


def exported_types(run_dir: Path, wanted: str | None) -> list[GgufFile]:
    """Find the files of the run's adapter, by type.

    Args:
        run_dir: The run.
        wanted: Types with commas between, ``none``, or None for every one that is no LoRA GGUF.

    Raises:
        CommandError: There is no export, or a type is not there.
    """
    if wanted == NO_FILES:
        return []
    folder = run_dir / "gguf"
    record = read_export(run_dir)
    if not record:
        raise CommandError(
            f"'{folder}' has no export.json; export the adapter (python -m export.export_gguf …), or "
            f"ask no file of the run (--files {NO_FILES})",
            MODEL,
        )
    found = {
        record["files"][name]["type"].upper(): folder / name
        for name in record["current"]
        if not name.endswith("-LoRA.gguf")
    }
    # From the finest to the coarsest, whatever they were exported in.
    found = dict(sorted(found.items(), key=lambda item: -record["files"][item[1].name]["bytes"]))
    names = list(found) if wanted is None else [name.strip().upper() for name in wanted.split(",")]
    names = list(dict.fromkeys(names))
    if missing := [name for name in names if name not in found]:
        raise CommandError(
            f"--files: no {', '.join(missing)} in '{folder}', expected some of {', '.join(found)}; "
            "export the others first"
        )
    return [GgufFile(name, found[name]) for name in names]
