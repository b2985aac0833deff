"""Quantize a GGUF with the installed llama_cpp library; no compiled tool is needed.

In: an F16 GGUF. Out: a smaller one, and what it really costs: bits per weight, fallbacks.

Run: python -m export.quantize_gguf SOURCE TARGET --type Q4_K_M [--threads N] [--overwrite]
"""

import argparse
import ctypes
import os
import sys
from pathlib import Path

from export._cli import FAILED, OK, USAGE, CommandError, log, run_command
from export._files import os_errors_told
from export._process import run_checked
from export.gguf_header import GgufHeader, read_gguf_header

# The names are those of llama_cpp's LLAMA_FTYPE_MOSTLY_* constants. Value: nominal bits per weight
# where rows are multiples of 256, and where they are not (then llama.cpp takes other types).
QUANTIZATION_TYPES = {
    "F16": (16.0, 16.0),
    "Q8_0": (8.5, 8.5),
    "Q6_K": (6.6, 8.5),
    "Q5_K_M": (5.8, 6.8),
    "Q5_K_S": (5.6, 6.6),
    "Q4_K_M": (5.0, 6.3),
    "Q4_K_S": (4.7, 6.0),
    "Q4_0": (4.7, 5.4),
}


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


def quantize(source: Path, target: Path, type_name: str, n_threads: int = 0) -> GgufHeader:
    """Quantize in a child process, so that an abort inside llama.cpp cannot take us down.

    Args:
        source: An F16 (or F32, BF16) GGUF.
        target: The file to write, under a temporary name until it is whole.
        type_name: One of `QUANTIZATION_TYPES`.
        n_threads: 0 = all cores.

    Raises:
        CommandError: Exit 1: llama.cpp refused or died. Exit 2: unknown type. Exit 3: `source` is
            no GGUF model.
    """
    (type_name,) = parse_types(type_name)
    read_gguf_header(source)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    command = [sys.executable, "-m", "export.quantize_gguf", str(source.resolve())]
    command += [str(temporary.resolve()), "--type", type_name, "--threads", str(n_threads)]
    try:
        run_checked(
            [*command, "--in-process"], f"quantization to {type_name}", Path(__file__).parents[1]
        )
        header = read_gguf_header(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return GgufHeader(target, header.file_bytes, header.metadata, header.tensors)


def describe(header: GgufHeader) -> str:
    """Say in one line what a quantized file really is."""
    line = (
        f"{header.path.name}: {header.file_bytes / 1e6:.1f} MB, "
        f"{header.bits_per_weight:.2f} bits per weight"
    )
    if header.fallbacks:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(header.fallbacks.items()))
        line += (
            f"; {sum(header.fallbacks.values())} of {header.num_matrices} matrices fell back to "
            f"another type ({kinds}): their rows are no multiples of 256"
        )
    return line


def _quantize_here(source: Path, target: Path, type_name: str, n_threads: int) -> int:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{type_name}")
    params.nthread = n_threads or os.cpu_count() or 1
    code = llama_cpp.llama_model_quantize(
        os.fsencode(source), os.fsencode(target), ctypes.byref(params)
    )
    return FAILED if code else OK


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m export.quantize_gguf",
        description="Quantize a GGUF; prints the file written. What it really costs in bits per "
        "weight goes to stderr.",
    )
    parser.add_argument("source", type=Path, help="F16 GGUF")
    parser.add_argument("target", type=Path, help="GGUF to write")
    parser.add_argument("--type", required=True, help=", ".join(QUANTIZATION_TYPES))
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="0 = all cores")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing target")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    return parser


@os_errors_told
def main(argv: list[str] | None = None) -> int:
    """Run the command; exit codes: 0 done, 1 failed, 2 usage or target taken, 3 no GGUF."""
    args = build_parser().parse_args(argv)
    if args.in_process:
        return _quantize_here(args.source, args.target, args.type, args.threads)
    parse_types(args.type)
    if args.target.exists() and not args.overwrite:
        raise CommandError(f"target '{args.target}' exists; replace it: --overwrite", USAGE)
    log(describe(quantize(args.source, args.target, args.type, args.threads)))
    print(args.target)
    return OK


if __name__ == "__main__":
    run_command(main)
