"""Read a PEFT adapter folder and check every tensor in it: names, shapes, ranks and values.

In: `adapter_config.json` and `adapter_model.safetensors`, as PEFT writes them. Out: an `Adapter`.
Nothing here touches a base model's files.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from export._cli import MODEL, CommandError
from export.lora_config import CONFIG_NAME, SUPPORTED, LoraConfig, read_config
from export.safetensors_file import FLOAT_BYTES, TensorInfo, read_header, read_rows

WEIGHTS_NAME = "adapter_model.safetensors"
_KEY = re.compile(
    r"^base_model\.model\.(?P<module>.+)\.(?P<part>lora_[AB](?=\.weight$)|lora_embedding_[AB]$"
    r"|lora_magnitude_vector$|token_adapter\.trainable_tokens_delta$)"
)
_SAVED_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.(?P<part>weight|bias)$")
_LORA_LIKE = re.compile(r"\.(lora_|vera_|ia3_|hada_|lokr_)")
# PEFT's wrappers around a weight of the base. It saves embeddings with them when their rows changed
# in number: the frozen original too, and the trained copy a second time.
_WRAPPERS = re.compile(r"(\.token_adapter)?(\.base_layer)?$|\.modules_to_save$")


@dataclass(frozen=True)
class LoraModule:
    """One adapted weight of the base: its name, the true scale and where its factors lie.

    Attributes:
        scale: What stands in front of B @ A.
        shape: Of the base's weight, (out, in); of an embedding, (tokens, width).
        a: lora_A, (r, in); of an embedding (r, tokens).
        b: lora_B, (out, r); of an embedding (width, r).
        magnitude: DoRA's m, (out,), or None.
        is_embedding: B @ A is then the transposed change.
    """

    weight_name: str
    scale: float
    rank: int
    shape: tuple[int, int]
    a: TensorInfo
    b: TensorInfo
    magnitude: TensorInfo | None = None
    is_embedding: bool = False


@dataclass(frozen=True)
class TokenRows:
    """Rows of an embedding that training replaced: their ids and values (n, width)."""

    indices: tuple[int, ...]
    values: TensorInfo


@dataclass(frozen=True)
class Adapter:
    """A checked adapter folder; each mapping is keyed by the name of the base's weight.

    Attributes:
        modules: LoRA and DoRA.
        saved: Weights that were trained in full, or grew with the vocabulary.
        tokens: Embeddings of which single rows were trained.
        beneath: Those of `saved` that stand under LoRA or trained rows, as `base_layer`.
    """

    path: Path
    config: LoraConfig
    modules: Mapping[str, LoraModule]
    saved: Mapping[str, TensorInfo] = field(default_factory=dict)
    tokens: Mapping[str, TokenRows] = field(default_factory=dict)
    beneath: frozenset[str] = frozenset()

    @property
    def weight_names(self) -> set[str]:
        """Every weight of the base that the adapter changes."""
        return {*self.modules, *self.saved, *self.tokens}


def read_adapter(adapter_dir: Path) -> Adapter:
    """Read an adapter folder.

    Raises:
        CommandError: Exit 3: not a LoRA or DoRA, damaged, never trained, or at odds with
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
    try:
        tensors = read_header(path)
    except CommandError as error:
        raise CommandError(f"{error}: it is damaged; train again", MODEL) from error
    found: dict[str, dict[str, TensorInfo]] = {}
    saved: dict[str, TensorInfo] = {}
    beneath = set()
    strange = []
    for key, info in sorted(tensors.items()):
        match, other = _KEY.match(key), _SAVED_KEY.match(key)
        if info.dtype not in FLOAT_BYTES:
            strange.append(key)
        elif match:
            found.setdefault(match["module"], {})[match["part"].split(".")[-1]] = info
        elif other and other["module"].endswith(".original_module"):
            continue
        elif other and not _LORA_LIKE.search(key):
            name = f"{_WRAPPERS.sub('', other['module'])}.{other['part']}"
            saved[name] = info
            if other["module"].endswith(".base_layer"):
                beneath.add(name)
        else:
            strange.append(key)
    if strange:
        raise CommandError(
            f"'{path}' holds {len(strange)} tensors that cannot be merged, "
            f"such as '{strange[0]}'; supported: {SUPPORTED}. Train again without them",
            MODEL,
        )
    if not found and not saved:
        raise CommandError(f"'{path}' holds no LoRA tensors; train again", MODEL)
    tokens = _collect_tokens(path, found, config)
    modules = _collect_modules(path, found, config)
    for name, info in saved.items():
        _check_finite(name, "the saved weight", info)
    return Adapter(adapter_dir, config, modules, saved, tokens, frozenset(beneath))


def _collect_tokens(
    path: Path, found: dict[str, dict[str, TensorInfo]], config: LoraConfig
) -> dict[str, TokenRows]:
    """Take the trained token rows out of `found`."""
    rows = {}
    for module in [name for name, parts in found.items() if "trainable_tokens_delta" in parts]:
        values = found[module].pop("trainable_tokens_delta")
        if not found[module]:
            del found[module]
        # A tied head's rows, saved with it when the vocabulary grew, are the embedding's.
        lists = [ids for name, ids in config.token_indices.items() if module.endswith(name)]
        indices = next(iter(lists or config.token_indices.values()), ())
        if len(values.shape) != 2 or len(indices) != values.shape[0]:
            raise CommandError(
                f"'{path}': '{module}' has {values.shape} trained token rows, {CONFIG_NAME} names "
                f"{len(indices)} tokens. The two files are of different runs",
                MODEL,
            )
        _check_finite(module, "trainable_tokens_delta", values)
        rows[f"{module}.weight"] = TokenRows(indices, values)
    return rows


def _collect_modules(
    path: Path, found: Mapping[str, Mapping[str, TensorInfo]], config: LoraConfig
) -> dict[str, LoraModule]:
    _check_magnitudes_match_config(path, found, config.use_dora)
    modules = {}
    zero = []
    for module, parts in found.items():
        is_embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
        a_part, b_part = (f"lora_{'embedding_' if is_embedding else ''}{side}" for side in "AB")
        if not {a_part, b_part} <= set(parts):
            raise CommandError(f"'{path}': '{module}' has {' and '.join(parts)} only", MODEL)
        a, b, magnitude = parts[a_part], parts[b_part], parts.get("lora_magnitude_vector")
        if magnitude is not None and is_embedding:
            raise CommandError(
                f"'{module}' is an embedding with DoRA; supported: {SUPPORTED}. "
                "Train again without it in target_modules",
                MODEL,
            )
        _check_shapes(module, a, b, config.rank_of(module))
        trained = all([_check_finite(module, a_part, a), _check_finite(module, b_part, b)])
        if magnitude is not None:
            _check_magnitude(module, magnitude, b.shape[0])
        # Magnitudes prove no training: untrained ones hold the row norms of the base as training
        # loaded it, and those of a 4-bit base differ from the 16-bit ones.
        if not trained:
            zero.append(module)
        shape = (a.shape[1], b.shape[0]) if is_embedding else (b.shape[0], a.shape[1])
        name = f"{module}.weight"
        scale = config.scale_of(module)
        modules[name] = LoraModule(name, scale, a.shape[0], shape, a, b, magnitude, is_embedding)
    if zero:
        raise CommandError(
            f"adapter was never trained: B @ A is zero in {len(zero)} of {len(modules)} modules, "
            f"first '{zero[0]}'; expected a finished training run",
            MODEL,
        )
    return modules


def _check_magnitudes_match_config(
    path: Path, found: Mapping[str, Mapping[str, TensorInfo]], use_dora: bool
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


def _check_shapes(module: str, a: TensorInfo, b: TensorInfo, rank: int) -> None:
    shapes = f"A {a.shape}, B {b.shape}"
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise CommandError(
            f"'{module}' has {shapes}; expected two matrices; supported: {SUPPORTED}", MODEL
        )
    if a.shape[0] != rank or b.shape[1] != rank:
        raise CommandError(
            f"'{module}' has {shapes}; {CONFIG_NAME} says rank {rank}. "
            "The two files are of different runs",
            MODEL,
        )


def _check_magnitude(module: str, magnitude: TensorInfo, rows: int) -> None:
    if magnitude.shape != (rows,):
        raise CommandError(
            f"'{module}' has lora_magnitude_vector {magnitude.shape}, expected ({rows},), "
            f"one for each row of B; supported: {SUPPORTED}",
            MODEL,
        )
    _check_finite(module, "lora_magnitude_vector", magnitude)


def _check_finite(module: str, part: str, info: TensorInfo) -> bool:
    """Check a tensor's values, in portions: a saved embedding may be large.

    Returns:
        Whether any value differs from zero.
    """
    import numpy as np

    rows = info.shape[0] if info.shape else 1
    step = max(1, (1 << 22) // max(1, info.num_weights // max(1, rows)))
    any_value = False
    for first in range(0, rows, step):
        values = read_rows(info, first, min(step, rows - first))
        if not np.isfinite(values).all():
            raise CommandError(
                f"'{module}': {part} holds NaN or infinite values; training diverged, "
                "train again with a lower learning rate",
                MODEL,
            )
        any_value = any_value or bool(values.any())
    return any_value
