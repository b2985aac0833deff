"""Read a PEFT adapter folder and compute each merged weight: W + scale * (B @ A).

With DoRA (arXiv:2402.09353) each row of that sum then gets the length that training learned.

In: `adapter_config.json` and `adapter_model.safetensors`, as PEFT writes them.
Out: one `LoraModule` per adapted weight. Nothing here touches a base model's files.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export._cli import MODEL, CommandError

if TYPE_CHECKING:
    import torch

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
SUPPORTED = "LoRA and DoRA on linear layers (rsLoRA, rank_pattern and alpha_pattern included)"
_KEY = re.compile(
    r"^base_model\.model\.(?P<module>.+)\.(?P<part>lora_[AB](?=\.weight$)|lora_magnitude_vector$)"
)
# These start training from a changed base, so their B @ A does not fit the published one.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraConfig:
    """The part of adapter_config.json that decides the arithmetic."""

    base_name: str
    base_revision: str | None
    rank: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def rank_of(self, module: str) -> int:
        """Give the rank that the configuration names for a module."""
        return int(_match_pattern(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """Give the factor in front of B @ A: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        alpha, rank = _match_pattern(self.alpha_pattern, module, self.alpha), self.rank_of(module)
        return float(alpha) / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True)
class LoraModule:
    """One adapted weight of the base: its name, the true scale and the keys of its tensors.

    `magnitude_key` is None unless the adapter is a DoRA.
    """

    weight_name: str
    scale: float
    rank: int
    shape: tuple[int, int]
    a_key: str
    b_key: str
    magnitude_key: str | None = None


@dataclass(frozen=True)
class Adapter:
    """A checked adapter folder; `modules` is keyed by the name of the base's weight."""

    path: Path
    config: LoraConfig
    modules: Mapping[str, LoraModule]


def _match_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """Look a module up as PEFT does: the first pattern that ends the module's dotted name."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def parse_config(config: Mapping[str, Any]) -> LoraConfig:
    """Read adapter_config.json's content, refusing what a merge would silently lose.

    Raises:
        CommandError: Exit 3: the adapter is no plain LoRA or DoRA; the message names every reason.
    """
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type={config.get('peft_type')!r}")
    if config.get("bias", "none") != "none":
        problems.append(f"bias={config['bias']!r}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_BASE_CHANGING_INITS):
        problems.append(f"init_lora_weights={init!r}")
    unsupported = (
        "use_qalora use_bdlora lora_bias modules_to_save trainable_token_indices "
        "layer_replication target_parameters alora_invocation_tokens fan_in_fan_out "
        "monteclora_config arrow_config kasa_config"
    )
    problems += [f"{key}={config[key]!r}" for key in unsupported.split() if config.get(key)]
    if problems:
        raise CommandError(
            f"adapter_config.json has {', '.join(problems)}; supported: {SUPPORTED}. "
            "Train again without it (scripts.train_lora does)",
            MODEL,
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    patterns = [config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
    ranks = [rank, *patterns[0].values()]
    if not all(isinstance(value, int) and value > 0 for value in ranks):
        raise CommandError(
            f"adapter_config.json has ranks {ranks}; expected whole numbers above 0", MODEL
        )
    if not all(isinstance(value, int | float) for value in [alpha, *patterns[1].values()]):
        raise CommandError(
            f"adapter_config.json has lora_alpha={alpha!r}, alpha_pattern={patterns[1]!r}; "
            "expected numbers",
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
    )


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


def read_adapter(adapter_dir: Path) -> Adapter:
    """Read an adapter folder and check every tensor: names, shapes, ranks and values.

    Raises:
        CommandError: Exit 3: not a plain LoRA or DoRA, damaged, never trained, or at odds with
            its configuration; the message names the first module concerned.
    """
    config = read_config(adapter_dir)
    path = adapter_dir / WEIGHTS_NAME
    if not path.is_file():
        old = (adapter_dir / "adapter_model.bin").is_file()
        raise CommandError(
            f"adapter folder '{adapter_dir}' has no {WEIGHTS_NAME}"
            + (", but an adapter_model.bin: save it again as safetensors" if old else ""),
            MODEL,
        )
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as tensors:
            modules = _collect_modules(path, list(tensors.keys()), tensors, config)
    except SafetensorError as error:
        raise CommandError(f"'{path}' is damaged ({error}); train again", MODEL) from error
    return Adapter(adapter_dir, config, modules)


def _collect_modules(
    path: Path, keys: list[str], tensors: Any, config: LoraConfig
) -> dict[str, LoraModule]:
    found: dict[str, dict[str, str]] = {}
    strange = []
    for key in sorted(keys):
        match = _KEY.match(key)
        if match:
            found.setdefault(match["module"], {})[match["part"]] = key
        else:
            strange.append(key)
    if strange:
        raise CommandError(
            f"'{path}' holds {len(strange)} tensors that are no LoRA factors of a linear layer, "
            f"such as '{strange[0]}'; supported: {SUPPORTED}. Train again without them",
            MODEL,
        )
    if not found:
        raise CommandError(f"'{path}' holds no LoRA tensors; train again", MODEL)
    _check_magnitudes_match_config(path, found, config.use_dora)
    modules = {}
    zero = []
    for module, parts in found.items():
        if not {"lora_A", "lora_B"} <= set(parts):
            raise CommandError(f"'{path}': '{module}' has {' and '.join(parts)} only", MODEL)
        a_key, b_key, m_key = parts["lora_A"], parts["lora_B"], parts.get("lora_magnitude_vector")
        a, b = tensors.get_tensor(a_key), tensors.get_tensor(b_key)
        _check_factors(module, a, b, config.rank_of(module))
        if m_key is not None:
            _check_magnitude(module, tensors.get_tensor(m_key), b.shape[0])
        # Magnitudes prove no training: untrained ones hold the row norms of the base as training
        # loaded it, and those of a 4-bit base differ from the 16-bit ones.
        if not b.any() or not a.any():
            zero.append(module)
        name = f"{module}.weight"
        shape = (b.shape[0], a.shape[1])
        modules[name] = LoraModule(
            name, config.scale_of(module), a.shape[0], shape, a_key, b_key, m_key
        )
    if zero:
        raise CommandError(
            f"adapter was never trained: B @ A is zero in {len(zero)} of {len(modules)} modules, "
            f"first '{zero[0]}'; expected a finished training run",
            MODEL,
        )
    return modules


def _check_magnitudes_match_config(
    path: Path, found: Mapping[str, Mapping[str, str]], use_dora: bool
) -> None:
    """Refuse a DoRA that would be merged as LoRA, in whole or in part, and the reverse."""
    odd = [name for name, parts in found.items() if ("lora_magnitude_vector" in parts) != use_dora]
    if odd:
        raise CommandError(
            f"{CONFIG_NAME} has use_dora={use_dora}, but {len(odd)} of {len(found)} modules in "
            f"'{path}' have {'no' if use_dora else 'a'} lora_magnitude_vector, first '{odd[0]}'. "
            "The two files are of different runs",
            MODEL,
        )


def _check_factors(module: str, a: "torch.Tensor", b: "torch.Tensor", rank: int) -> None:
    shapes = f"A {tuple(a.shape)}, B {tuple(b.shape)}"
    if a.dim() != 2 or b.dim() != 2:
        raise CommandError(
            f"'{module}' has {shapes}; expected two matrices; supported: {SUPPORTED}", MODEL
        )
    if a.shape[0] != rank or b.shape[1] != rank:
        raise CommandError(
            f"'{module}' has {shapes}; adapter_config.json says rank {rank}. "
            "The two files are of different runs",
            MODEL,
        )
    _check_finite(module, "lora_A", a)
    _check_finite(module, "lora_B", b)


def _check_magnitude(module: str, magnitude: "torch.Tensor", rows: int) -> None:
    if magnitude.shape != (rows,):
        raise CommandError(
            f"'{module}' has lora_magnitude_vector {tuple(magnitude.shape)}, expected ({rows},), "
            f"one for each row of B; supported: {SUPPORTED}",
            MODEL,
        )
    _check_finite(module, "lora_magnitude_vector", magnitude)


def _check_finite(module: str, part: str, tensor: "torch.Tensor") -> None:
    if not tensor.isfinite().all():
        raise CommandError(
            f"'{module}': {part} holds NaN or infinite values; training diverged, "
            "train again with a lower learning rate",
            MODEL,
        )


def merge_module(weight: "torch.Tensor", module: LoraModule, tensors: Any) -> "torch.Tensor":
    """Merge all that an adapter holds for one weight.

    Args:
        weight: The base's weight, shape (out, in).
        module: Which tensors of the adapter belong to it.
        tensors: The adapter's weights, opened with `safetensors.safe_open(framework="pt")`.
    """
    a, b = tensors.get_tensor(module.a_key), tensors.get_tensor(module.b_key)
    key = module.magnitude_key
    return merge_weight(
        weight, a, b, module.scale, None if key is None else tensors.get_tensor(key)
    )


def merge_weight(
    weight: "torch.Tensor",
    a: "torch.Tensor",
    b: "torch.Tensor",
    scale: float,
    magnitude: "torch.Tensor | None" = None,
) -> "torch.Tensor":
    """Compute V = W + scale * (B @ A) in float32 and round it once, to W's own type.

    With a magnitude m, each row i becomes m[i] * V[i] / |V[i]| before the rounding.

    Args:
        weight: W, shape (out, in).
        a: lora_A, shape (r, in).
        b: lora_B, shape (out, r).
        scale: The effective scale, see `LoraConfig.scale_of`.
        magnitude: DoRA's m, shape (out,).
    """
    import torch

    # addmm adds W after the product is summed, all in float32.
    merged = torch.addmm(weight.float(), b.float(), a.float(), alpha=scale)
    if magnitude is not None:
        norms = torch.linalg.vector_norm(merged, dim=1)  # (out,)
        merged *= (magnitude.float() / norms).unsqueeze(1)
    return merged.to(weight.dtype)
