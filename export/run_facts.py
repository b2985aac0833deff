"""What is known about a run, read once: the single source of metadata, model card and Modelfile.

In: `provenance.json`, `recipe.yaml`, `evaluation.json` beside the adapter, the adapter's own
configuration, the base's folder; each may be missing. Out: `RunFacts`, where None means that nothing
was recorded. Paths of this machine stay here.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from export._cli import MODEL, CommandError, log
from export.base_card import bare_name, is_hub_name, public_name, read_card
from export.base_model import BaseModel, read_json, read_provenance
from export.naming import run_name_of

HUB_URL = "https://huggingface.co"
DEFAULT_TEMPERATURE = 0.3
# Cards, metadata and Modelfile all take these: GGUF's key, and transformers' name for it.
SAMPLING_KEYS = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
_TOLD_VERSIONS = ("unsloth", "transformers", "trl", "peft", "torch")
_LANGUAGE = re.compile(r"[A-Za-z][\w-]{1,19}")


@dataclass(frozen=True)
class Dataset:
    """Rows that were trained on; a file of this machine is known by its bare name."""

    name: str
    is_hub: bool
    version: str | None = None
    tool_rows: int | None = None

    @property
    def url(self) -> str | None:
        """Its page on the hub."""
        return f"{HUB_URL}/datasets/{self.name}" if self.is_hub else None


@dataclass(frozen=True)
class LoraSettings:
    """What adapter_config.json says about the adapter."""

    rank: int | None = None
    alpha: float | None = None
    rslora: bool | None = None
    dora: bool | None = None
    dropout: float | None = None
    target_modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainingSettings:
    """How it was trained; `epochs` is None where a number of steps decided."""

    rows: int | None = None
    epochs: float | None = None
    steps: int | None = None
    learning_rate: float | None = None
    seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: str | None = None
    commit: str | None = None


@dataclass(frozen=True)
class HeldOut:
    """Base against tuned on rows that were not trained on; losses in nats per token."""

    loss_before: float
    loss_after: float
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    rows: int | None = None


@dataclass(frozen=True)
class RunFacts:
    """Everything that is told about a run.

    Attributes:
        run_name: The run's folder; empty for a plain base.
        base_name: ORG/NAME as the hub knows it, else a bare name.
        organization, repo_url: Of the base; None unless `base_name` is a hub name.
        base_revision: What the recipe asked the hub for, where the hub was asked.
        num_weights: Of the base.
        license: Identifier as the hub has it; `license_name` and `license_link` where the base's
            card names them.
        sampling: GGUF's names (`temp`, `top_p`, …); always with a temperature.
    """

    run_name: str
    base_name: str
    num_weights: int
    organization: str | None = None
    repo_url: str | None = None
    base_revision: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()
    datasets: tuple[Dataset, ...] = ()
    lora: LoraSettings = LoraSettings()
    training: TrainingSettings = TrainingSettings()
    held_out: HeldOut | None = None
    sampling: Mapping[str, int | float] = field(
        default_factory=lambda: {"temp": DEFAULT_TEMPERATURE}
    )


def read_run_facts(adapter_dir: Path, base: BaseModel) -> RunFacts:
    """Collect what the run and its base have on record.

    Args:
        adapter_dir: The adapter; the run's files lie beside it, or there are none.
        base: The 16-bit base that it is merged into.

    Raises:
        CommandError: Exit 3: one of the files is malformed.
    """
    run_dir = adapter_dir.resolve().parent
    provenance, recipe = read_provenance(adapter_dir), _read_recipe(run_dir / "recipe.yaml")
    facts = read_base_facts(base)
    # Of a local folder, or of 4-bit weights, the recipe's revision says nothing about this base.
    trained_on = _mapping(provenance, "base_model")
    same = facts.organization and trained_on.get("name") == facts.base_name
    return replace(
        facts,
        run_name=run_name_of(adapter_dir),
        base_revision=_text(trained_on, "revision") if same else None,
        datasets=_datasets(_mapping(provenance, "dataset")),
        lora=_lora(_read_if_there(adapter_dir / "adapter_config.json")),
        training=_training(provenance, recipe),
        held_out=_held_out(run_dir / "evaluation.json", adapter_dir),
    )


def read_base_facts(base: BaseModel) -> RunFacts:
    """Collect what a base has on record; there is no run, so its name is empty.

    Raises:
        CommandError: Exit 3: one of the files is malformed.
    """
    matter = read_card(base.path)
    name = public_name(base.path, base.name, matter)
    organization = name.partition("/")[0] if "/" in name else None
    repo_url = f"{HUB_URL}/{name}" if organization else None
    license_id, license_name, license_link = _license(matter, repo_url)
    return RunFacts(
        run_name="",
        base_name=name,
        num_weights=sum(tensor.num_weights for tensor in base.tensors.values()),
        organization=organization,
        repo_url=repo_url,
        license=license_id,
        license_name=license_name,
        license_link=license_link,
        languages=tuple(word for word in _texts(matter, "language") if _LANGUAGE.fullmatch(word)),
        sampling=_sampling(_read_if_there(base.path / "generation_config.json")),
    )


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _read_recipe(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CommandError(f"'{path}' is no valid YAML: {error}", MODEL) from error
    if not isinstance(content, dict):
        raise CommandError(f"'{path}' holds a {type(content).__name__}, expected keys", MODEL)
    return content


def _license(
    matter: Mapping[str, Any], repo_url: str | None
) -> tuple[str | None, str | None, str | None]:
    named = _texts(matter, "license")
    name, link = _text(matter, "license_name"), _text(matter, "license_link")
    if len(named) > 1:
        name, named = name or ", ".join(named), ["other"]
    if link and not re.match(r"https?://", link):
        inside = re.fullmatch(r"[\w-][\w.-]*", link)  # a file of the base's repository
        link = f"{repo_url}/blob/main/{link}" if inside and repo_url else None
    return (named[0] if named else None), name, link


def _datasets(report: Mapping[str, Any]) -> tuple[Dataset, ...]:
    name = _text(report, "dataset")
    if not name:
        return ()
    version = _text(report, "revision") or _text(report, "input_hash")
    hub = is_hub_name(name)
    tool_rows = _integer(report, "tool_rows") or None
    return (Dataset(name if hub else bare_name(name) or "rows", hub, version, tool_rows),)


def _lora(config: Mapping[str, Any]) -> LoraSettings:
    return LoraSettings(
        rank=_integer(config, "r"),
        alpha=_real(config, "lora_alpha"),
        rslora=_flag(config, "use_rslora"),
        dora=_flag(config, "use_dora"),
        dropout=_real(config, "lora_dropout"),
        target_modules=tuple(sorted(_texts(config, "target_modules"))),
    )


def _training(provenance: Mapping[str, Any], recipe: Mapping[str, Any]) -> TrainingSettings:
    training, versions = _mapping(provenance, "training"), _mapping(provenance, "versions")
    by_steps = (_integer(recipe, "max_steps") or -1) > 0
    told = {name: _text(versions, name) for name in _TOLD_VERSIONS}
    return TrainingSettings(
        rows=_integer(training, "rows"),
        epochs=None if by_steps else _real(recipe, "num_train_epochs"),
        steps=_integer(training, "steps"),
        learning_rate=_real(recipe, "learning_rate"),
        seed=_integer(training, "seed"),
        versions={name: value for name, value in told.items() if value},
        hardware=_text(provenance, "hardware"),
        commit=_text(provenance, "commit"),
    )


def _held_out(path: Path, adapter_dir: Path) -> HeldOut | None:
    content = _read_if_there(path)
    base, tuned = _mapping(content, "base"), _mapping(content, "tuned")
    before, after = _real(base, "loss"), _real(tuned, "loss")
    if before is None or after is None:
        return None
    weights = adapter_dir / "adapter_model.safetensors"
    if weights.is_file() and path.stat().st_mtime < weights.stat().st_mtime:
        log(f"note: '{path}' is older than the adapter; its figures are left out")
        return None
    return HeldOut(
        loss_before=before,
        loss_after=after,
        perplexity_before=_real(base, "perplexity"),
        perplexity_after=_real(tuned, "perplexity"),
        rows=_integer(tuned, "rows"),
    )


def _sampling(config: Mapping[str, Any]) -> dict[str, int | float]:
    found: dict[str, int | float] = {"temp": DEFAULT_TEMPERATURE}
    for key, theirs in SAMPLING_KEYS.items():
        value = _integer(config, theirs) if key == "top_k" else _real(config, theirs)
        if value is not None and value >= 0:
            found[key] = value
    return found


def _mapping(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = content.get(key)
    return value if isinstance(value, dict) else {}


def _text(content: Mapping[str, Any], key: str) -> str | None:
    value = content.get(key)
    return " ".join(value.split()) or None if isinstance(value, str) else None


def _texts(content: Mapping[str, Any], key: str) -> list[str]:
    value = content.get(key)
    items = value if isinstance(value, list) else [value]
    return [" ".join(item.split()) for item in items if isinstance(item, str) and item.strip()]


def _real(content: Mapping[str, Any], key: str) -> float | None:
    value = content.get(key)
    if isinstance(value, str):  # PyYAML reads 2e-4 as a string
        try:
            value = float(value)
        except ValueError:
            return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)


def _integer(content: Mapping[str, Any], key: str) -> int | None:
    value = _real(content, key)
    return int(value) if value is not None and value == int(value) else None


def _flag(content: Mapping[str, Any], key: str) -> bool | None:
    value = content.get(key)
    return value if isinstance(value, bool) else None
