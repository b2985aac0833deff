"""A LoRA GGUF, checked against its base before the C library sees it.

llama.cpp refuses some wrong files, reads others as if they fitted, and aborts the process on a third
kind (a metadata key of another type, factors of an embedding that is also the head). What is checked
is what `llama_adapter_lora_init` (llama.cpp, src/llama-adapter.cpp) expects, and what it does not ask:
the base's fingerprint, and whether the numbers are numbers.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from integration._cli import MODEL, CommandError, log
from integration.gguf_header import FLOAT32, STRING, GgufHeader, TensorEntry, read_header
from integration.prefix_store import file_identity

ALPHA = "adapter.lora.alpha"
_FINGERPRINT, _ADAPTER_HASH = "tomeforge.base.fingerprint", "tomeforge.adapter.sha256"
_TEMPLATE_HASH = "tomeforge.chat_template.sha256"
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_A, _B = ".lora_a", ".lora_b"
# llama.cpp reads these keys without asking for their type, and aborts on another one.
_TYPED = {
    "general.type": STRING,
    "general.architecture": STRING,
    "adapter.type": STRING,
    ALPHA: FLOAT32,
}


@dataclass(frozen=True)
class AdapterFile:
    """A checked LoRA GGUF.

    Attributes:
        rank: The largest rank of its modules.
        num_modules: Weights of the base that it changes.
        num_bytes: What its factors take in memory.
        identity: Tells it from any other file, and from an earlier one of the same name.
    """

    path: Path
    rank: int
    num_modules: int
    num_bytes: int
    identity: str


def check_adapter_file(path: Path, base: GgufHeader) -> AdapterFile:
    """Read a LoRA GGUF's header and numbers, and compare them with the base.

    A chat template other than the base's is told on stderr, for answers suffer from it.

    Raises:
        CommandError: Exit 3; the file is missing, broken, no adapter, or does not fit the base.
    """
    header = read_header(path, "adapter")
    _check_keys(header, base)
    modules = _modules(header)
    for name, (a, b) in modules.items():
        _check_shapes(path, base, name, a, b)
    _check_numbers(header)
    _check_origin(header, base)
    return AdapterFile(
        path,
        max(_rank(name, a) for name, (a, _) in modules.items()),
        len(modules),
        sum(part.num_bytes for pair in modules.values() for part in pair),
        file_identity(path),
    )


def _check_keys(header: GgufHeader, base: GgufHeader) -> None:
    path = header.path
    for key, kind in _TYPED.items():
        if header.kinds.get(key, kind) != kind:
            raise CommandError(
                f"adapter '{path}' has a damaged header ('{key}' is of type {header.kinds[key]}); "
                "export it again",
                MODEL,
            )
    if not header.is_adapter:
        raise CommandError(
            f"adapter '{path}' is a whole model, expected a LoRA GGUF; give it with --model", MODEL
        )
    if header.architecture != base.architecture:
        raise CommandError(
            f"adapter '{path}' is for {header.architecture or 'no architecture'}, the model is "
            f"{base.architecture}; use the base it was trained on",
            MODEL,
        )
    method = header.metadata.get("adapter.type")
    if method != "lora":
        raise CommandError(f"adapter '{path}' is of type '{method}'; expected lora", MODEL)
    alpha = header.metadata.get(ALPHA, 0.0)
    if not math.isfinite(alpha):
        raise CommandError(f"adapter '{path}' has alpha {alpha}; export it again", MODEL)


def _modules(header: GgufHeader) -> dict[str, tuple[TensorEntry, TensorEntry]]:
    """Pair the factors, by the name of the weight they change."""
    path = header.path
    names = {name.removesuffix(_A).removesuffix(_B) for name in header.tensors}
    for name in names:
        if name in header.tensors:
            # llama.cpp refuses such a tensor, or leaves it out in silence if it is a norm.
            raise CommandError(
                f"adapter '{path}' holds '{name}', which is no LoRA factor; merge it instead: "
                "python -m export.export_gguf",
                MODEL,
            )
        missing = [part for part in (_A, _B) if name + part not in header.tensors]
        if missing:
            raise CommandError(
                f"adapter '{path}' lacks '{name}{missing[0]}'; export it again", MODEL
            )
    if not names:
        raise CommandError(f"adapter '{path}' holds no LoRA factors; export it again", MODEL)
    return {name: (header.tensors[name + _A], header.tensors[name + _B]) for name in sorted(names)}


def _rank(name: str, a: TensorEntry) -> int:
    return a.shape[0] if name == _EMBEDDING else a.shape[1]


def _check_shapes(path: Path, base: GgufHeader, name: str, a: TensorEntry, b: TensorEntry) -> None:
    """Compare A (in, rank) and B (rank, out) with the base's weight (in, out)."""
    weight = base.tensors.get(name)
    if weight is None:
        raise CommandError(
            f"adapter '{path}' does not fit the model '{base.path}', which has no '{name}'; use the "
            "base it was trained on",
            MODEL,
        )
    if name == _EMBEDDING and _HEAD not in base.tensors:
        # llama.cpp loads such a file, and aborts the process at the first token.
        raise CommandError(
            f"adapter '{path}' changes the embedding, which the model '{base.path}' also uses as "
            "its head; merge it instead: python -m export.export_gguf",
            MODEL,
        )
    if min(len(weight.shape), len(a.shape), len(b.shape)) < 2:
        raise CommandError(f"adapter '{path}': '{name}' is no matrix; export it again", MODEL)
    # The factors of an embedding are stored the other way round.
    wanted = [weight.shape[1], weight.shape[0]] if name == _EMBEDDING else list(weight.shape[:2])
    got = [a.shape[1], b.shape[1]] if name == _EMBEDDING else [a.shape[0], b.shape[1]]
    inner = (a.shape[0], b.shape[0]) if name == _EMBEDDING else (a.shape[1], b.shape[0])
    if got != wanted or a.shape[2:] != weight.shape[2:] or b.shape[2:] != weight.shape[2:]:
        raise CommandError(
            f"adapter '{path}' does not fit the model '{base.path}': '{name}' is {wanted} there, "
            f"{got} in the adapter; use the base it was trained on",
            MODEL,
        )
    if inner[0] != inner[1] or not inner[0]:
        raise CommandError(
            f"adapter '{path}': the ranks of '{name}' are {inner[0]} and {inner[1]}; expected the "
            "same; export it again",
            MODEL,
        )


def _check_numbers(header: GgufHeader) -> None:
    """Refuse NaN and infinity, which turn every answer into noise."""
    import numpy as np

    # ggml types: F32, F16; of BF16 the exponent's bits are looked at.
    kinds: Mapping[int, type] = {0: np.float32, 1: np.float16, 30: np.uint16}
    data = np.memmap(header.path, np.uint8, mode="r")
    for name, entry in header.tensors.items():
        if entry.kind not in kinds:
            continue
        values: np.ndarray = data[entry.offset : entry.offset + entry.num_bytes].view(
            kinds[entry.kind]
        )
        finite = (values & 0x7F80) != 0x7F80 if entry.kind == 30 else np.isfinite(values)
        if not finite.all():
            raise CommandError(
                f"adapter '{header.path}' holds NaN or infinite values in '{name}': training "
                "diverged, or the file is damaged; train or export it again",
                MODEL,
            )


def _check_origin(header: GgufHeader, base: GgufHeader) -> None:
    """Compare what our own exports say about where they come from; other files say nothing."""
    mine, theirs = header.metadata.get(_FINGERPRINT), base.metadata.get(_FINGERPRINT)
    if mine and theirs and mine != theirs:
        raise CommandError(
            f"adapter '{header.path}' was trained on another base (fingerprint {mine[:12]}…) than "
            f"the model '{base.path}' ({theirs[:12]}…); use the base it was trained on",
            MODEL,
        )
    merged = base.metadata.get(_ADAPTER_HASH)
    if merged and merged == header.metadata.get(_ADAPTER_HASH):
        raise CommandError(
            f"adapter '{header.path}' is merged into the model '{base.path}' already; use the plain "
            "base: python -m export.export_base",
            MODEL,
        )
    template = base.chat_template
    wanted = header.metadata.get(_TEMPLATE_HASH)
    if wanted and template and hashlib.sha256(template.encode()).hexdigest() != wanted:
        log(
            f"note: adapter '{header.path}' was trained with another chat template than that of "
            f"'{base.path}'; answers may suffer, --template names another one"
        )
