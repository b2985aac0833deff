"""Find a 16-bit base model, and prove that an adapter belongs to it.

In: the base's name or folder, perhaps an adapter. Out: a `BaseModel`: folder, tensor index, fingerprint.
"""

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export._cli import MODEL, CommandError, log
from export.adapter_files import Adapter
from export.base_card import public_name, read_card
from export.safetensors_file import TensorInfo, read_header

_HEAD_BYTES = 1 << 20
_BNB_SUFFIX = re.compile(r"(-unsloth)?-bnb-4bit$")
_HUB_NAME = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "README.md"]
_HUB_IGNORED = ["consolidated*", "original/*", "onnx/*"]
# How a command that reads an adapter is told of another base.
_OPTION = ": --base DIR"
_BIT_TYPES = {"U8", "I8", "F8_E4M3", "F8_E5M2"}


@dataclass(frozen=True)
class BaseModel:
    """A checked base: `name` as users know it, `tensors` by name in the order of the file."""

    path: Path
    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    fingerprint: str


def base_fingerprint(model_dir: Path) -> str:
    """Identify a model folder's weights without reading them all.

    The sha256 is updated with, in order, for each `*.safetensors` file sorted by name: its name
    (UTF-8), its size (decimal ASCII), its first 1 MiB, its last 1 MiB. The training stage writes
    the same value into `provenance.json`; keep both in step.
    """
    digest = hashlib.sha256()
    for path in sorted(model_dir.glob("*.safetensors"), key=lambda path: path.name):
        size = path.stat().st_size
        digest.update(path.name.encode("utf-8"))
        digest.update(str(size).encode("ascii"))
        with path.open("rb") as file:
            digest.update(file.read(_HEAD_BYTES))
            file.seek(max(0, size - _HEAD_BYTES))
            digest.update(file.read(_HEAD_BYTES))
    return digest.hexdigest()


def load_base(adapter: Adapter, override: Path | None = None) -> BaseModel:
    """Resolve the base of an adapter, and compare it with what training recorded.

    Raises:
        CommandError: Exit 3: the base is missing, quantized, damaged, or another one.
    """
    name = adapter.config.base_name
    base = _read_base(_resolve_dir(name, adapter.config.base_revision, override), name)
    check_provenance(adapter, base)
    return base


def open_base(name: str) -> BaseModel:
    """Read a base without an adapter: a folder, or a model of the hub.

    Raises:
        CommandError: Exit 3: the base is missing, quantized, damaged, or an adapter.
    """
    if (Path(name) / "adapter_config.json").is_file():
        raise CommandError(
            f"'{name}' is an adapter, expected a base model; merge it into its base: python -m "
            f"export.export_gguf {name} --output DIR",
            MODEL,
        )
    return _read_base(_resolve_dir(name, None, None, option=""), name, option="")


def _read_base(model_dir: Path, name: str, option: str = _OPTION) -> BaseModel:
    config = read_json(model_dir / "config.json")
    tensors = read_tensor_index(model_dir)
    _refuse_quantized(model_dir, config, tensors, option)
    return BaseModel(
        model_dir,
        public_name(model_dir, _BNB_SUFFIX.sub("", name), read_card(model_dir)),
        config,
        tensors,
        base_fingerprint(model_dir),
    )


def _resolve_dir(
    name: str, revision: str | None, override: Path | None, option: str = _OPTION
) -> Path:
    if override is not None:
        if not (override / "config.json").is_file():
            raise CommandError(f"--base '{override}' has no config.json; expected a model", MODEL)
        return override
    if not name:
        raise CommandError(
            "adapter_config.json names no base_model_name_or_path; name the base: --base DIR", MODEL
        )
    if Path(name).is_dir():
        return Path(name)
    if not _HUB_NAME.match(name) or name.startswith("outputs/"):
        hint = "; write it: python -m scripts.default_model" if "SmolLM2-135M" in name else ""
        raise CommandError(
            f"base model '{name}' does not exist (seen from {Path.cwd()}){hint}; "
            f"or name another place{option}",
            MODEL,
        )
    hub_name = _BNB_SUFFIX.sub("", name)
    if hub_name != name:
        log(f"base: '{name}' is quantized, taking the 16-bit weights of '{hub_name}'")
        revision = None
    return _download(hub_name, revision, option)


def _download(hub_name: str, revision: str | None, option: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        folder = huggingface_hub.snapshot_download(
            hub_name,
            revision=revision,
            allow_patterns=_HUB_PATTERNS,
            ignore_patterns=_HUB_IGNORED,
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CommandError(
            f"base model '{hub_name}' is no local folder and cannot be had from the hub "
            f"({reason}); put the 16-bit weights in a folder and name it{option}",
            MODEL,
        ) from error
    return Path(folder)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a model folder.

    Raises:
        CommandError: Exit 3: missing or no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CommandError(f"'{path}' is missing; expected a model folder", MODEL) from None
    except ValueError as error:
        raise CommandError(f"'{path}' is no valid JSON: {error}", MODEL) from error
    if not isinstance(content, dict):
        raise CommandError(f"'{path}' holds a {type(content).__name__}, expected keys", MODEL)
    return content


def read_tensor_index(model_dir: Path) -> dict[str, TensorInfo]:
    """List a model folder's tensors from the headers of its safetensors shards.

    Raises:
        CommandError: Exit 3: no safetensors, a missing shard, or a damaged or truncated one.
    """
    index_path = model_dir / "model.safetensors.index.json"
    if index_path.is_file():
        shards = sorted(set(read_json(index_path).get("weight_map", {}).values()))
    else:
        shards = ["model.safetensors"]
    missing = [shard for shard in shards if not (model_dir / shard).is_file()]
    if missing:
        raise CommandError(
            f"base model '{model_dir}' lacks {', '.join(missing)}; expected 16-bit safetensors",
            MODEL,
        )
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        tensors.update(read_header(model_dir / shard))
    return tensors


def _refuse_quantized(
    model_dir: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], option: str
) -> None:
    quantized = [name for name, info in tensors.items() if info.dtype in _BIT_TYPES]
    method = (config.get("quantization_config") or {}).get("quant_method", "?")
    if config.get("quantization_config") or quantized:
        found = f"quantization_config ({method})" if not quantized else f"packed '{quantized[0]}'"
        raise CommandError(
            f"base model '{model_dir}' is quantized: {found}; what is made of it would be rounded "
            f"twice. Name the 16-bit model it was made from{option}",
            MODEL,
        )


def read_provenance(adapter_dir: Path) -> dict[str, Any]:
    """Read the run's `provenance.json` beside the adapter folder; empty if there is none."""
    path = adapter_dir.resolve().parent / "provenance.json"
    return read_json(path) if path.is_file() else {}


def check_provenance(adapter: Adapter, base: BaseModel) -> None:
    """Compare the base with what training recorded about its own.

    Raises:
        CommandError: Exit 3: another base.
    """
    trained_on = read_provenance(adapter.path).get("base_model")
    expected = trained_on.get("fingerprint") if isinstance(trained_on, dict) else None
    if expected is not None and expected != base.fingerprint:
        raise CommandError(
            f"adapter for another base: provenance.json says fingerprint {expected[:12]}…, "
            f"'{base.path}' has {base.fingerprint[:12]}…; name the one it was trained on: "
            "--base DIR",
            MODEL,
        )
