"""What an export must do: which files are asked for, which are there, what they are made from.

In: adapters and their base, or a base alone; the folder of an earlier export. Out: a `Plan`, checked
before the first byte is written.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from export._cli import USAGE, CommandError
from export._files import sha256_file, sha256_of, write_json
from export.adapter_files import WEIGHTS_NAME
from export.adapter_options import Inputs
from export.base_model import read_json
from export.gguf_metadata import MetadataValue, base_metadata, gguf_metadata
from export.imatrix_file import Imatrix
from export.lora_config import CONFIG_NAME
from export.naming import VERSION, export_file_name, file_prefix, plain_name
from export.run_facts import RunFacts, read_base_facts, read_run_facts
from export.type_plan import UNWEIGHTED_TYPES

# Raise it whenever the same inputs give other files: older exports are then built again.
FORMAT_VERSION = 2
RECORD_NAME = "export.json"
# Of a plain base: in one folder with a run's files, it must not pass for one of them.
BASE_RECORD_NAME = "export_base.json"


@dataclass
class Plan:
    """One export.

    Attributes:
        prefix: First part of the file names.
        metadata: What each file says about where it comes from.
        record_path: The file `export.json`.
        record: What it says, by file name; grows as files are written.
        wanted: The types asked for.
        imatrix: The importance matrix to use, once there is one.
        imatrix_inputs: Identifies what the matrix is computed from; empty without one.
        imatrix_record: What `export.json` says about the matrix computed for it.
        built: The types that this run wrote.
    """

    prefix: str
    output_dir: Path
    inputs: Inputs
    facts: RunFacts
    metadata: list[tuple[str, MetadataValue]]
    record_path: Path
    record: dict[str, Any]
    wanted: list[str]
    overwrite: bool = False
    imatrix: Imatrix | None = None
    imatrix_inputs: str = ""
    imatrix_record: dict[str, Any] = field(default_factory=dict)
    built: set[str] = field(default_factory=set)

    @property
    def imatrix_path(self) -> Path | None:
        """Where the importance matrix is, once there is one."""
        return self.imatrix.path if self.imatrix else None

    def path_of(self, type_name: str) -> Path:
        """Name the file of one type."""
        return self.output_dir / export_file_name(self.prefix, type_name)

    @cached_property
    def _common_hash(self) -> str:
        """Hash everything that decides the files: adapters, base, tokenizer, names, ourselves."""
        inputs = self.inputs
        paths = [inputs.base.path / "config.json"]
        for adapter, _ in inputs.adapters:
            paths += [adapter.path / CONFIG_NAME, adapter.path / WEIGHTS_NAME]
        paths += [inputs.tokenizer[name] for name in sorted(inputs.tokenizer)]
        told = json.dumps([[weight for _, weight in inputs.adapters], self.metadata])
        digest = hashlib.sha256(f"{sha256_of(paths)}{told}".encode())
        return f"{FORMAT_VERSION}-{inputs.base.fingerprint[:16]}-{digest.hexdigest()[:32]}"

    def inputs_of(self, type_name: str) -> str:
        """Identify what a file of one type is made from."""
        matrix = "" if type_name in UNWEIGHTED_TYPES else self.imatrix_inputs
        return f"{self._common_hash}-{matrix}" if matrix else self._common_hash

    def is_current(self, type_name: str) -> bool:
        """Tell whether a file of these inputs is there, byte for byte as it was written."""
        path = self.path_of(type_name)
        entry = self.record.get(path.name) or {}
        if self.overwrite and type_name not in self.built:
            return False
        return bool(
            entry.get("inputs") == self.inputs_of(type_name)
            and path.is_file()
            and path.stat().st_size == entry.get("bytes")
            and sha256_file(path) == entry.get("sha256")
        )

    def save_record(self) -> None:
        """Write `export.json`."""
        content = {
            "name": self.prefix,
            "base_model": self.facts.base_name,
            "current": sorted(self.current),
            "files": self.record,
        }
        if self.imatrix_record:
            content["imatrix"] = self.imatrix_record
        write_json(self.record_path, content)

    @property
    def current(self) -> dict[str, Any]:
        """The files on record that are there and were made from these inputs, of any type."""
        return {
            name: entry
            for name, entry in self.record.items()
            if entry["inputs"].startswith(self._common_hash) and (self.output_dir / name).is_file()
        }

    @property
    def missing(self) -> list[str]:
        """The types that must be built."""
        return [name for name in self.wanted if not self.is_current(name)]

    def check_free(self, types: Sequence[str]) -> None:
        """Refuse to replace files that are not ours.

        Raises:
            CommandError: Exit 2.
        """
        for type_name in types:
            path = self.path_of(type_name)
            if path.exists() and path.name not in self.record and not self.overwrite:
                raise CommandError(
                    f"'{path}' is in the way and was not written by this command; move it, or "
                    "replace it: --overwrite",
                    USAGE,
                )


def make_plan(
    inputs: Inputs,
    output_dir: Path,
    types: Sequence[str],
    *,
    name: str | None = None,
    version: str = VERSION,
    overwrite: bool = False,
) -> Plan:
    """Read what the run recorded and what an earlier export left.

    Raises:
        CommandError: Exit 2: a bad name or version, or a file of ours to be is somebody else's.
            Exit 3: a record that cannot be read.
    """
    _check_name(name)
    if not re.fullmatch(r"v?\d+(\.\d+)*", version):
        raise CommandError(f"--version '{version}'; expected numbers and dots: 1.0", USAGE)
    facts = read_run_facts(inputs.adapter.path, inputs.base)
    metadata = gguf_metadata(
        facts,
        name=name,
        version=version,
        base_fingerprint=inputs.base.fingerprint,
        adapter_sha256=sha256_file(inputs.adapter.path / WEIGHTS_NAME),
    )
    prefix = name or file_prefix(facts.base_name, facts.num_weights, facts.run_name, version)
    content = _read_record(output_dir / RECORD_NAME)
    plan = Plan(
        prefix,
        output_dir,
        inputs,
        facts,
        metadata,
        output_dir / RECORD_NAME,
        content.get("files", {}),
        list(types),
        overwrite,
        imatrix_record=content.get("imatrix", {}),
    )
    plan.check_free(types)
    return plan


def make_base_plan(
    inputs: Inputs,
    output_dir: Path,
    types: Sequence[str],
    *,
    name: str | None = None,
    overwrite: bool = False,
) -> Plan:
    """Plan the export of a base as it is; see `open_base_inputs`.

    Raises:
        CommandError: As `make_plan`.
    """
    _check_name(name)
    facts = read_base_facts(inputs.base)
    content = _read_record(output_dir / BASE_RECORD_NAME)
    plan = Plan(
        name or plain_name(facts.base_name, facts.num_weights).prefix,
        output_dir,
        inputs,
        facts,
        base_metadata(facts, name=name, base_fingerprint=inputs.base.fingerprint),
        output_dir / BASE_RECORD_NAME,
        content.get("files", {}),
        list(types),
        overwrite,
        imatrix_record=content.get("imatrix", {}),
    )
    plan.check_free(types)
    return plan


def _check_name(name: str | None) -> None:
    if name is not None and not re.fullmatch(r"\w[\w.-]*", name):
        raise CommandError(
            f"--name '{name}' is no file name; expected letters, digits, '.', '_', '-'", USAGE
        )


def _read_record(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
