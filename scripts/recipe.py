"""The training recipe: one flat dataclass, default < YAML (``--config``) < flag.

Parsing imports nothing heavy, so ``--help`` answers at once. Keys are spelt as in TRL and PEFT.
"""

import argparse
import dataclasses
import difflib
import os
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from scripts._cli import CommandError

EMBEDDED_MODEL = "smollm2-135m-instruct"
PROMPT_FORMATS = ("model", "alpaca")
BACKENDS = ("unsloth", "peft")
TRACKERS = ("none", "tensorboard", "trackio", "wandb")
SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _option(default: Any, text: str) -> Any:
    if isinstance(default, list | tuple):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class TrainingRecipe:
    """Everything that decides a run. Lengths are in tokens, rates per optimizer step."""

    run_name: str = _option("", "folder under outputs/; the recipe's file name when empty")
    output_root: str = _option("outputs", "where runs are written")

    model_name_or_path: str = _option(
        EMBEDDED_MODEL, f"hub name, local folder, or {EMBEDDED_MODEL} (the embedded default)"
    )
    model_revision: str = _option("main", "branch, tag or commit on the hub")
    load_in_4bit: bool = _option(True, "train on NF4 weights (QLoRA)")
    backend: str = _option("unsloth", "unsloth, or peft where Unsloth does not run")

    dataset_name: str = _option(
        "scripts/data/finetome_sample.jsonl", "hub name, .jsonl/.json/.parquet file, or folder"
    )
    dataset_split: str = _option("train", "split of a hub data set")
    max_rows: int = _option(0, "use at most this many rows, drawn with the seed; 0 = all")
    min_score: float = _option(0.0, "leave out rows whose score column is lower; 0 = keep all")
    sources: list[str] = _option([], "keep only rows whose source column is one of these")
    near_duplicate_threshold: float = _option(
        0.85, "leave out rows whose word shingles overlap more (Jaccard); 1 = exact copies only"
    )
    tool_rows: int = _option(0, "add this many generated tool-use conversations; 0 = none")
    tool_phrasings: str = _option(
        "all", "all, or basic: few plain ones, for a training of some minutes"
    )
    eval_fraction: float = _option(0.08, "share of the rows held out for evaluation")
    max_eval_rows: int = _option(200, "hold out at most this many rows")
    eval_prompts: int = _option(
        -1, "base and tuned answer this many of the shipped prompts; -1 = all, 0 = none"
    )
    eval_answer_tokens: int = _option(512, "their answers are cut here")

    prompt_format: str = _option("model", "model = its own chat template, or alpaca")
    max_length: int = _option(512, "longer conversations are cut at a turn, or dropped")

    lora_r: int = _option(16, "rank of the adapter")
    lora_alpha: int = _option(16, "scale numerator: the delta is alpha / r * B @ A")
    lora_dropout: float = _option(0.0, "dropout on the adapter's input")
    lora_target_modules: list[str] = _option(list(ALL_LINEAR), "projections that get an adapter")
    use_rslora: bool = _option(False, "rank-stabilised scale: alpha / sqrt(r) instead of alpha / r")
    use_dora: bool = _option(
        False, "train magnitudes apart from directions; slower, not on GPU Unsloth"
    )
    use_gradient_checkpointing: bool = _option(False, "less memory, about a third slower")

    per_device_train_batch_size: int = _option(4, "conversations in one forward pass")
    gradient_accumulation_steps: int = _option(
        2, "forward passes in one optimizer step, over all devices together"
    )
    packing: bool = _option(True, "lay rows end to end instead of padding them")
    learning_rate: float = _option(2e-4, "peak learning rate")
    lr_scheduler_type: str = _option("cosine", "shape of the decay")
    warmup_steps: int = _option(5, "optimizer steps of linear warm-up")
    weight_decay: float = _option(0.0, "AdamW's weight decay")
    max_grad_norm: float = _option(1.0, "gradient norm is clipped here")
    num_train_epochs: float = _option(1.0, "passes over the training rows")
    max_steps: int = _option(-1, "stop after this many optimizer steps; -1 = by epochs")
    logging_steps: int = _option(1, "write metrics every this many optimizer steps")
    time_budget: str = _option("", "such as 55m: use as many rows as finish, export included")
    save_steps: int = _option(
        20, "measure held-out loss and write a checkpoint every this many optimizer steps"
    )
    save_total_limit: int = _option(2, "keep this many checkpoints, and the best one")
    checkpoint_dir: str = _option("", "such as a mounted Drive; the run's checkpoints/ when empty")
    early_stopping_patience: int = _option(
        0, "stop when held-out loss did not fall for this many measurements; 0 = never"
    )
    report_to: str = _option("none", "also log to " + ", ".join(TRACKERS[1:]))
    seed: int = _option(3407, "seeds the split, the adapter and the order of rows")

    def __post_init__(self) -> None:
        problems = list(_range_problems(self))
        if problems:
            raise CommandError("recipe: " + "; ".join(problems))

    @property
    def run_dir(self) -> Path:
        """Folder of this run: ``<output_root>/<run_name>``."""
        return Path(self.output_root) / self.run_name

    def to_yaml(self) -> str:
        """Give the resolved recipe, ready to be used as ``--config`` again."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)


def _range_problems(recipe: TrainingRecipe) -> typing.Iterator[str]:
    checks = [
        ("lora_r", recipe.lora_r >= 1, "at least 1"),
        ("lora_alpha", recipe.lora_alpha >= 1, "at least 1"),
        ("max_length", recipe.max_length >= 16, "at least 16"),
        ("learning_rate", 0 < recipe.learning_rate < 1, "between 0 and 1"),
        ("eval_fraction", 0 < recipe.eval_fraction < 1, "between 0 and 1"),
        ("per_device_train_batch_size", recipe.per_device_train_batch_size >= 1, "at least 1"),
        ("gradient_accumulation_steps", recipe.gradient_accumulation_steps >= 1, "at least 1"),
        ("num_train_epochs", recipe.num_train_epochs > 0, "more than 0"),
        ("max_rows", recipe.max_rows >= 0, "0 or more"),
        ("tool_rows", recipe.tool_rows >= 0, "0 or more"),
        ("tool_phrasings", recipe.tool_phrasings in ("all", "basic"), "all or basic"),
        (
            "near_duplicate_threshold",
            0.5 <= recipe.near_duplicate_threshold <= 1,
            "between 0.5 and 1",
        ),
        ("save_steps", recipe.save_steps >= 1, "at least 1"),
        (
            "prompt_format",
            recipe.prompt_format in PROMPT_FORMATS,
            " or ".join(PROMPT_FORMATS),
        ),
        (
            "lr_scheduler_type",
            recipe.lr_scheduler_type in SCHEDULERS,
            " or ".join(SCHEDULERS),
        ),
        ("backend", recipe.backend in BACKENDS, " or ".join(BACKENDS)),
        ("report_to", recipe.report_to in TRACKERS, " or ".join(TRACKERS)),
        ("early_stopping_patience", recipe.early_stopping_patience >= 0, "0 or more"),
        ("save_total_limit", recipe.save_total_limit >= 1, "at least 1"),
        ("lora_dropout", 0 <= recipe.lora_dropout < 1, "at least 0 and less than 1"),
        ("max_eval_rows", recipe.max_eval_rows >= 1, "at least 1"),
        ("eval_prompts", recipe.eval_prompts >= -1, "-1 or more"),
        ("eval_answer_tokens", recipe.eval_answer_tokens >= 1, "at least 1"),
        ("logging_steps", recipe.logging_steps >= 1, "at least 1"),
        ("warmup_steps", recipe.warmup_steps >= 0, "0 or more"),
        ("lora_target_modules", bool(recipe.lora_target_modules), "at least one module"),
    ]
    for key, good, expected in checks:
        if not good:
            yield f"{key}: got {getattr(recipe, key)!r}, expected {expected}"


_TYPES = typing.get_type_hints(TrainingRecipe)
_TRUE, _FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


def _coerce(key: str, value: Any) -> Any:
    """Turn a YAML scalar or a flag's string into the field's type.

    PyYAML reads ``2e-4`` as a string (YAML 1.1 wants ``2.0e-4``), so numbers are parsed here.

    Raises:
        ValueError: The value is not of the field's type; the message names key, value and type.
    """
    kind = _TYPES[key]
    mismatch = ValueError(f"{key}: got {value!r}, expected {getattr(kind, '__name__', kind)}")
    if kind == list[str]:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise mismatch
        return [item.strip() for item in items]
    if kind is bool:
        word = str(value).lower()
        if word not in _TRUE | _FALSE:
            raise mismatch
        return word in _TRUE
    if isinstance(value, bool | list | dict) or value is None:
        raise mismatch
    try:
        if kind is int:
            number = float(value)
            if number != int(number):
                raise mismatch
            return int(number)
        return kind(value)
    except (ValueError, OverflowError):
        raise mismatch from None


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        known = ", ".join(sorted(str(p) for p in Path("scripts/recipes").glob("*.yaml")))
        raise CommandError(f"recipe '{path}' does not exist; expected a YAML file such as: {known}")
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CommandError(f"recipe '{path}' is no valid YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise CommandError(
            f"recipe '{path}' holds a {type(loaded).__name__}, expected keys and values"
        )
    return loaded


def _resolve(values: dict[str, Any], origin: str) -> dict[str, Any]:
    """Check all keys and values at once, so that one run shows every mistake."""
    problems, resolved = [], {}
    for key, value in values.items():
        if key not in _TYPES:
            near = difflib.get_close_matches(str(key), _TYPES, n=1, cutoff=0.5)
            hint = f", did you mean '{near[0]}'?" if near else "; --help lists the keys"
            problems.append(f"unknown key '{key}'{hint}")
            continue
        try:
            resolved[key] = _coerce(key, value)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise CommandError(f"{origin}: " + "; ".join(problems))
    return resolved


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser ``--config`` and one flag per recipe key (``--learning-rate`` or ``_``)."""
    parser.add_argument("--config", type=Path, help="recipe YAML, or a run's recipe.yaml")
    group = parser.add_argument_group("recipe (default < --config < flag)")
    for item in dataclasses.fields(TrainingRecipe):
        hyphenated = "--" + item.name.replace("_", "-")
        names = [hyphenated] if "_" not in item.name else [hyphenated, "--" + item.name]
        group.add_argument(
            *names, dest=item.name, metavar="VALUE", default=None, help=item.metadata["help"]
        )


def load_recipe(arguments: argparse.Namespace) -> TrainingRecipe:
    """Resolve default < YAML < flag.

    Raises:
        CommandError: Unknown keys (with the nearest one), wrong types or ranges, all at once.
    """
    values: dict[str, Any] = {}
    if arguments.config is not None:
        values.update(_resolve(_read_yaml(arguments.config), f"recipe '{arguments.config}'"))
    flags = {
        key: getattr(arguments, key) for key in _TYPES if getattr(arguments, key, None) is not None
    }
    values.update(_resolve(flags, "flags"))
    if not values.get("run_name"):
        if arguments.config is None:
            raise CommandError("no recipe given; pass --config scripts/recipes/<name>.yaml")
        values["run_name"] = arguments.config.stem
    return TrainingRecipe(**values)


def parse_recipe(
    description: str, argv: Sequence[str] | None, parser: argparse.ArgumentParser | None = None
) -> tuple[TrainingRecipe, argparse.Namespace]:
    """Parse a command line that consists of a recipe and its overrides."""
    parser = parser or argparse.ArgumentParser(description=description)
    add_recipe_arguments(parser)
    arguments = parser.parse_args(argv)
    return load_recipe(arguments), arguments


def write_atomically(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
