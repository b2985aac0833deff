"""What a run was made of: versions, hashes and the identity of its base model."""

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = [
    "torch",
    "transformers",
    "trl",
    "peft",
    "unsloth",
    "unsloth_zoo",
    "bitsandbytes",
    "datasets",
    "accelerate",
]
# Their interfaces change from release to release: another one fails with an unexpected keyword, or worse.
STRICT = ("transformers", "trl", "peft", "unsloth", "unsloth_zoo")
REQUIREMENTS = Path(__file__).parent.parent / "requirements.txt"
_EDGE_BYTES = 1 << 20


def base_fingerprint(model_dir: Path) -> str | None:
    """Identify a model folder's weights without reading all of them.

    SHA-256 over, for each ``*.safetensors`` sorted by name: name, size in decimal, first MiB, last
    MiB. ``export.base_model`` computes the same and refuses an adapter that was trained on another
    base.

    Returns:
        The hex digest, or None when there is no such file (a hub name, other weight formats), or the
        weights are quantized: the adapter is merged into the 16-bit model that they were made from.
    """
    files = sorted(model_dir.glob("*.safetensors")) if model_dir.is_dir() else []
    if not files or _is_quantized(model_dir):
        return None
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(path.name.encode() + str(size).encode())
        with path.open("rb") as weights:
            digest.update(weights.read(_EDGE_BYTES))
            weights.seek(max(0, size - _EDGE_BYTES))
            digest.update(weights.read(_EDGE_BYTES))
    return digest.hexdigest()


def _is_quantized(model_dir: Path) -> bool:
    config = model_dir / "config.json"
    return config.is_file() and "quantization_config" in json.loads(config.read_text("utf-8"))


def versions() -> dict[str, str]:
    """Give the versions that decide a training result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def sha256_file(path: Path) -> str:
    """Hash a file's bytes; give the hex digest."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def commit() -> str | None:
    """Name the commit of this program, with ``-dirty`` after it where files were changed."""
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude", "*"],
            cwd=REQUIREMENTS.parent,
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.stdout.strip() or None


def version_problems(
    installed: dict[str, str], requirements: Path = REQUIREMENTS
) -> dict[str, str]:
    """Find packages outside the tested ranges.

    Args:
        installed: Version by package, from ``versions``.
        requirements: A requirements file.

    Returns:
        By package: what is there and what was tested.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    problems = {}
    for line in requirements.read_text(encoding="utf-8").splitlines():
        try:
            wanted = Requirement(line.partition("#")[0].strip())
        except InvalidRequirement:
            continue
        found = installed.get(wanted.name)
        if found is not None and not wanted.specifier.contains(found, prereleases=True):
            problems[wanted.name] = (
                f"{wanted.name} {found} is outside the tested {wanted.specifier}"
            )
    return problems


def read_provenance(run_dir: Path) -> dict[str, Any]:
    """Read ``provenance.json`` of a run; empty when there is none."""
    path = run_dir / "provenance.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
