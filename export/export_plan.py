"""What an export must do: which files are asked for, which are there, what the rest will cost.

In: an adapter, its base, the folder of an earlier export. Out: a `Plan`, checked before the first
byte is written.
"""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export._cli import FAILED, USAGE, CommandError
from export._files import sha256_file, sha256_of
from export.base_model import BaseModel, load_base, read_json
from export.lora_math import CONFIG_NAME, WEIGHTS_NAME, Adapter, read_adapter
from export.merge_adapter import tokenizer_sources
from export.quantize_gguf import QUANTIZATION_TYPES

# Raise it whenever the same inputs give other files: older exports are then built again.
FORMAT_VERSION = 1
RECORD_NAME = "export.json"
_METADATA_BYTES = 16 << 20


@dataclass(frozen=True)
class Plan:
    """One export.

    Attributes:
        inputs: Hash of everything that decides the files.
        record: What `export.json` says, by file name; grows as files are written.
        wanted: The types asked for.
        missing: Those that must be built.
    """

    name: str
    output_dir: Path
    adapter: Adapter
    base: BaseModel
    tokenizer: dict[str, Path]
    inputs: str
    record: dict[str, Any]
    wanted: list[str]
    missing: list[str] = field(default_factory=list)

    def path_of(self, type_name: str) -> Path:
        """Name the file of one type."""
        return self.output_dir / f"{self.name}-{type_name}.gguf"

    def is_current(self, type_name: str) -> bool:
        """Tell whether a file of these inputs is there, byte for byte as it was written."""
        path = self.path_of(type_name)
        entry = self.record.get(path.name) or {}
        return bool(
            entry.get("inputs") == self.inputs
            and path.is_file()
            and path.stat().st_size == entry.get("bytes")
            and sha256_file(path) == entry.get("sha256")
        )


def make_plan(
    adapter_dir: Path,
    output_dir: Path,
    types: Sequence[str],
    *,
    base_dir: Path | None = None,
    name: str | None = None,
    overwrite: bool = False,
) -> Plan:
    """Read everything, check that it fits together, and compare with what is there.

    Raises:
        CommandError: Exit 2: a bad name, or a file of ours to be is somebody else's. Exit 3:
            adapter or base are unusable or do not belong together.
    """
    adapter = read_adapter(adapter_dir)
    base = load_base(adapter, base_dir)
    tokenizer = tokenizer_sources(adapter_dir, base.path)
    name = name or default_name(adapter_dir)
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise CommandError(
            f"--name '{name}' is no file name; expected letters, digits, '.', '_', '-'", USAGE
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    record_path = output_dir / RECORD_NAME
    record = read_json(record_path).get("files", {}) if record_path.is_file() else {}
    inputs = input_hash(adapter, base, tokenizer)
    plan = Plan(name, output_dir, adapter, base, tokenizer, inputs, record, list(types))
    for type_name in types:
        path = plan.path_of(type_name)
        if path.exists() and path.name not in record and not overwrite:
            raise CommandError(
                f"'{path}' is in the way and was not written by this command; move it, or "
                "replace it: --overwrite",
                USAGE,
            )
        if overwrite or not plan.is_current(type_name):
            plan.missing.append(type_name)
    return plan


def default_name(adapter_dir: Path) -> str:
    """Name an export after the run: the folder around `adapter/`, else the folder itself."""
    folder = adapter_dir.resolve()
    name = folder.parent.name if folder.name == "adapter" and folder.parent.name else folder.name
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def input_hash(adapter: Adapter, base: BaseModel, tokenizer: dict[str, Path]) -> str:
    """Hash everything that decides the files: adapter, base, tokenizer, and our own version."""
    paths = [adapter.path / CONFIG_NAME, adapter.path / WEIGHTS_NAME, base.path / "config.json"]
    paths += [tokenizer[name] for name in sorted(tokenizer)]
    return f"{FORMAT_VERSION}-{base.fingerprint[:16]}-{sha256_of(paths)[:32]}"


def estimate_bytes(base: BaseModel, type_name: str) -> int:
    """Estimate the size of a GGUF before it exists, on the safe side."""
    regular, irregular = QUANTIZATION_TYPES[type_name]
    bits = 0.0
    for tensor in base.tensors.values():
        if len(tensor.shape) < 2:
            bits += 32 * tensor.num_weights
        else:
            bits += (irregular if tensor.shape[-1] % 256 else regular) * tensor.num_weights
    return int(bits / 8) + _METADATA_BYTES


def check_space(plan: Plan) -> None:
    """Price the export before the first byte is written.

    The merged copy is removed once the F16 file is there, so its peak and the quantized files'
    do not add up.

    Raises:
        CommandError: Exit 1, naming the missing bytes.
    """
    quantized = sum(estimate_bytes(plan.base, kind) for kind in plan.missing if kind != "F16")
    needed = quantized
    if "F16" in plan.missing or not plan.is_current("F16"):
        merged = sum(info.end - info.begin for info in plan.base.tensors.values())
        needed = estimate_bytes(plan.base, "F16") + max(merged, quantized)
    free = shutil.disk_usage(plan.output_dir).free
    if free < needed:
        raise CommandError(
            f"not enough space in '{plan.output_dir}': needs {needed} bytes for "
            f"{', '.join(plan.missing)} and what they are made from, {free} are free, "
            f"{needed - free} are missing ({(needed - free) / 1e9:.2f} GB). Free some, or use "
            "another disk: --output",
            FAILED,
        )
