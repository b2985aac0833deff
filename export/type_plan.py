"""Ask llama.cpp which type each tensor gets in a quantized file, without quantizing anything.

In: a GGUF of float32 tensors that has no data, only room for it (a sparse file). Out: for each
quantization type the type of every tensor. `llama_model_quantize` decides in a dry run and says so
in its log: its mixtures (src/llama-quant.cpp) are not written again here.
"""

import ctypes
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from export._cli import FAILED, USAGE, CommandError

# The names are those of llama_cpp's LLAMA_FTYPE_MOSTLY_* constants; from large to small.
QUANTIZATION_TYPES = (
    *("F32", "BF16", "F16", "Q8_0", "Q6_K", "Q5_1", "Q5_K_M", "Q5_K_S", "Q5_0", "Q4_1", "Q4_K_M"),
    *("Q4_K_S", "IQ4_NL", "Q4_0", "IQ4_XS", "Q3_K_L", "Q3_K_M", "IQ3_M", "Q3_K_S", "IQ3_S"),
    *("IQ3_XS", "IQ3_XXS", "Q2_K", "IQ2_M", "Q2_K_S", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M"),
    "IQ1_S",
)
# These round every weight for itself; an importance matrix changes nothing.
UNWEIGHTED_TYPES = ("F32", "BF16", "F16", "Q8_0")
_LINE = re.compile(
    r"\[\s*\d+/\s*\d+\] (?P<name>\S+)\s+- \[[^\]]*\], type = +(?P<old>\w+), "
    r"size = [^\n]*?MiB(?: -> [^\n]*?MiB \((?P<new>\w+)\))?\s*\n"
)
_NEEDS_IMATRIX = "will require an imatrix"


def parse_types(text: str) -> list[str]:
    """Read a comma-separated list of quantization types, in any letter case, each one once.

    Raises:
        CommandError: Exit 2: an unknown type, or none; the message names the choices.
    """
    names = list(dict.fromkeys(part.strip().upper() for part in text.split(",") if part.strip()))
    unknown = [name for name in names if name not in QUANTIZATION_TYPES]
    if unknown or not names:
        raise CommandError(
            f"quantization type '{', '.join(unknown) or text}' is unknown; "
            f"choose from: {', '.join(QUANTIZATION_TYPES)}",
            USAGE,
        )
    return names


@dataclass
class TypePlan:
    """The types of one file.

    Attributes:
        tensors: ggml's name of the type, by tensor.
        needs_imatrix: llama.cpp refuses to make it without an importance matrix.
        sizes: Bytes by tensor, once they are known.
        total: Bytes of the whole file.
    """

    tensors: dict[str, str]
    needs_imatrix: bool
    sizes: dict[str, int] = field(default_factory=dict)
    total: int = 0


def plan_types(skeleton: Path, types: Iterable[str], has_imatrix: bool) -> dict[str, TypePlan]:
    """Let llama.cpp choose the types of all tensors.

    Args:
        skeleton: GGUF with metadata and float32 tensors; their data is not read.
        types: Names from `QUANTIZATION_TYPES`.
        has_imatrix: An importance matrix will be there; some mixtures depend on it.

    Raises:
        CommandError: Exit 1: llama.cpp refuses the model, or its log has another form.
    """
    import llama_cpp

    parts: list[str] = []

    @llama_cpp.llama_log_callback
    def collect(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        parts.append(text.decode("utf-8", errors="replace"))

    llama_cpp.llama_log_set(collect, ctypes.c_void_p(0))
    empty = (llama_cpp.llama_model_imatrix_data * 1)()
    plans = {}
    for type_name in types:
        parts.clear()
        params = llama_cpp.llama_model_quantize_default_params()
        prefix = "LLAMA_FTYPE_ALL_" if type_name == "F32" else "LLAMA_FTYPE_MOSTLY_"
        params.ftype = getattr(llama_cpp, prefix + type_name)
        params.dry_run = True
        if has_imatrix:
            params.imatrix = ctypes.cast(empty, type(params.imatrix))
        code = llama_cpp.llama_model_quantize(
            os.fsencode(skeleton), os.fsencode(os.devnull), ctypes.byref(params)
        )
        log = "".join(parts)
        found = {m["name"]: m["new"] or m["old"] for m in _LINE.finditer(log)}
        if code or not found:
            reason = [line.strip() for line in log.splitlines() if line.strip()][-1:]
            raise CommandError(
                f"llama.cpp cannot plan a {type_name} file: {' '.join(reason) or 'no reason given'}"
                "; the model is of a kind that this llama.cpp does not quantize",
                FAILED,
            )
        plans[type_name] = TypePlan(found, _NEEDS_IMATRIX in log)
    return plans
