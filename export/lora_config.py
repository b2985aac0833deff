"""Read PEFT's adapter_config.json: the part of it that decides a merge.

In: `adapter_config.json`. Out: a `LoraConfig`; what a merge would silently lose is refused.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export._cli import MODEL, CommandError

CONFIG_NAME = "adapter_config.json"
SUPPORTED = (
    "LoRA and DoRA on linear layers and embeddings (rsLoRA, rank_pattern, alpha_pattern, "
    "modules_to_save, trainable_token_indices included)"
)
# These start training from a changed base, so their B @ A does not fit the published one.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_UNSUPPORTED = (
    "use_qalora use_bdlora lora_bias layer_replication target_parameters "
    "alora_invocation_tokens fan_in_fan_out monteclora_config arrow_config kasa_config"
)


@dataclass(frozen=True)
class LoraConfig:
    """The part of adapter_config.json that decides the arithmetic.

    Attributes:
        token_indices: Rows of embeddings that were trained, by the embedding's module name.
        ties_weights: The head was trained as the embedding's twin (`ensure_weight_tying`).
    """

    base_name: str
    base_revision: str | None
    rank: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    token_indices: Mapping[str, tuple[int, ...]]
    ties_weights: bool

    def rank_of(self, module: str) -> int:
        """Give the rank that the configuration names for a module."""
        return int(_match_pattern(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """Give the factor in front of B @ A: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        alpha, rank = _match_pattern(self.alpha_pattern, module, self.alpha), self.rank_of(module)
        return float(alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def _match_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """Look a module up as PEFT does: the first pattern that ends the module's dotted name."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def parse_config(config: Mapping[str, Any]) -> LoraConfig:
    """Read adapter_config.json's content, refusing what a merge would silently lose.

    Raises:
        CommandError: Exit 3: the adapter is no LoRA or DoRA; the message names every reason.
    """
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type={config.get('peft_type')!r}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_BASE_CHANGING_INITS):
        problems.append(f"init_lora_weights={init!r}")
    problems += [f"{key}={config[key]!r}" for key in _UNSUPPORTED.split() if config.get(key)]
    if problems:
        raise CommandError(
            f"{CONFIG_NAME} has {', '.join(problems)}; supported: {SUPPORTED}. "
            "Train again without it (scripts.train_lora does)",
            MODEL,
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    patterns = [config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
    ranks = [rank, *patterns[0].values()]
    if not all(isinstance(value, int) and value > 0 for value in ranks):
        raise CommandError(f"{CONFIG_NAME} has ranks {ranks}; expected whole numbers > 0", MODEL)
    alphas = [alpha, *patterns[1].values()]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in alphas):
        raise CommandError(
            f"{CONFIG_NAME} has lora_alpha={alpha!r}, alpha_pattern={patterns[1]!r}; "
            "expected finite numbers",
            MODEL,
        )
    return LoraConfig(
        base_name=str(config.get("base_model_name_or_path") or ""),
        base_revision=config.get("revision"),
        rank=int(rank),  # type: ignore[arg-type]
        alpha=float(alpha),  # type: ignore[arg-type]
        use_rslora=bool(config.get("use_rslora")),
        use_dora=bool(config.get("use_dora")),
        rank_pattern=patterns[0],
        alpha_pattern=patterns[1],
        token_indices=_token_indices(config.get("trainable_token_indices")),
        ties_weights=bool(config.get("ensure_weight_tying")),
    )


def _token_indices(value: Any) -> dict[str, tuple[int, ...]]:
    """PEFT takes a list for the input embedding, or lists by module name."""
    named = value if isinstance(value, dict) else {"embed_tokens": value} if value else {}
    try:
        return {str(name): tuple(int(index) for index in rows) for name, rows in named.items()}
    except (TypeError, ValueError) as error:
        raise CommandError(
            f"{CONFIG_NAME} has trainable_token_indices={value!r}; expected token ids", MODEL
        ) from error


def read_config(adapter_dir: Path) -> LoraConfig:
    """Read and check `adapter_config.json` of an adapter folder.

    Raises:
        CommandError: Exit 3: the folder is no adapter, or not of a kind that can be merged.
    """
    path = adapter_dir / CONFIG_NAME
    if not path.is_file():
        raise CommandError(
            f"adapter folder '{adapter_dir}' has no {CONFIG_NAME}; expected a PEFT adapter. "
            "Train one: python -m scripts.train_lora --config RECIPE",
            MODEL,
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CommandError(f"'{path}' is no valid JSON: {error}; train again", MODEL) from error
    if not isinstance(content, dict):
        raise CommandError(f"'{path}' holds a {type(content).__name__}, expected keys", MODEL)
    return parse_config(content)
