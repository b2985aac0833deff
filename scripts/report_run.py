"""The files of a run, read once for its report, and the commands that write them."""

import contextlib
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from scripts._cli import CommandError
from scripts.metrics import read_metrics
from scripts.provenance import sha256_file
from scripts.recipe import TrainingRecipe
from scripts.report_blocks import Hint
from scripts.report_numbers import clean

PYTHON = ".venv/bin/python"
EVALUATION_VERSION = 2
_JSON_FILES = {
    "evaluation": "evaluation.json",
    "provenance": "provenance.json",
    "data": "data/report.json",
    "export": "gguf/export.json",
    "certificate": "gguf/certificate.json",
    "adapter": "adapter/adapter_config.json",
    "tools": "tools_evaluation.json",
}


class RunFiles:
    """Everything that a report reads, read once; what is missing is None, and empty for metrics."""

    def __init__(self, recipe: TrainingRecipe) -> None:
        self.run_dir = recipe.run_dir
        if not self.run_dir.is_dir():
            raise CommandError(
                f"'{self.run_dir}' does not exist; expected the folder of a run, train one: "
                "python -m scripts.train_lora --config …"
            )
        self.recipe = recipe
        self.trained_recipe = self._read_recipe()
        self.metrics = clean(read_metrics(self.run_dir / "metrics.jsonl"))
        self.files = {key: self._read_json(name) for key, name in _JSON_FILES.items()}

    def __getitem__(self, key: str) -> dict[str, Any] | None:
        return self.files[key]

    @property
    def config(self) -> str:
        """The recipe as a command line names it."""
        path = self.run_dir / "recipe.yaml"
        if path.is_file():
            return shlex.quote(str(path))
        return shlex.quote(f"scripts/recipes/{self.recipe.run_name}.yaml")

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """The evaluation, None if there is none or one of an older form."""
        found = self["evaluation"]
        return found if found and found.get("version") == EVALUATION_VERSION else None

    @property
    def exported(self) -> dict[str, dict[str, Any]]:
        """The GGUF files of this adapter, by name."""
        export = self["export"] or {"files": {}}
        names = export.get("current", list(export["files"]))
        return {name: export["files"][name] for name in names}

    @property
    def certificates(self) -> dict[str, dict[str, Any]]:
        """The certificates by file name."""
        return (self["certificate"] or {"files": {}})["files"]

    @property
    def adapter_path(self) -> Path:
        """The adapter's weights; they may be missing."""
        return self.run_dir / "adapter" / "adapter_model.safetensors"

    def is_of_this_adapter(self, name: str) -> bool:
        """Tell whether a file was written after the adapter, which it says something about."""
        path = self.run_dir / name
        weights = self.adapter_path
        return not weights.is_file() or path.stat().st_mtime >= weights.stat().st_mtime

    def command(self, module: str) -> str:
        """Give the command line that runs a module with this recipe."""
        return f"{PYTHON} -m {module} --config {self.config}"

    def path(self, name: str) -> str:
        """Give the path of a file of the run, as a shell takes it."""
        return shlex.quote(str(self.run_dir / name))

    def evaluation_hint(self) -> Hint:
        """Say why there are no measured figures."""
        text = "Base and tuned were not compared yet."
        if self["evaluation"]:
            text = "evaluation.json was written by an older version; evaluate the run again."
        return Hint(text, self.command("scripts.evaluate_model"))

    def _read_recipe(self) -> dict[str, Any]:
        path = self.run_dir / "recipe.yaml"
        if not path.is_file():
            return {}
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise CommandError(
                f"'{path}' is no valid YAML: {error}; train the run again"
            ) from error
        return clean(found) if isinstance(found, dict) else {}

    def _read_json(self, name: str) -> dict[str, Any] | None:
        path = self.run_dir / name
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, UnicodeDecodeError) as error:
            raise CommandError(
                f"'{path}' is no JSON ({error}); remove it and run the command that writes it again"
            ) from error
        if not isinstance(found, dict):
            raise CommandError(f"'{path}' holds a {type(found).__name__}; expected a JSON object")
        return dict(clean(found))


@contextlib.contextmanager
def expected_form(path: Path) -> Iterator[None]:
    """Turn a key that is missing in a file into one line that names the file.

    Raises:
        CommandError: The file is JSON, but not what the command that writes it gives.
    """
    try:
        yield
    except (KeyError, TypeError) as error:
        raise CommandError(
            f"'{path}' is not of the expected form ({type(error).__name__}: {error}); remove it and "
            "run the command that writes it again"
        ) from error


def adapter_hash(run: RunFiles) -> str | None:
    """Compute the SHA-256 of the adapter's weights; None if there are none."""
    if not run.adapter_path.is_file():
        return None
    return sha256_file(run.adapter_path)


def export_hint(run: RunFiles, text: str) -> Hint:
    """Say how to export."""
    adapter, output = run.path("adapter"), run.path("gguf")
    types = "--quantization F16,Q8_0,Q4_K_M"
    return Hint(text, f"{PYTHON} -m export.export_gguf {adapter} --output {output} {types}")
