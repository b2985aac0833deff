"""Export a base model as it is, without an adapter, to the GGUF that LoRA GGUFs are put beside.

In: a 16-bit model folder, or a model of the hub. Out, in one folder: a GGUF of each type asked for,
and `export_base.json`, by which the next run knows what it may keep. The key
`tomeforge.base.fingerprint` is that of every LoRA GGUF made for this base (export.export_lora_gguf).

Run: python -m export.export_base MODEL_DIR_OR_NAME --output DIR [--quantization Q8_0]
"""

import argparse
from pathlib import Path

from export._cli import OK, run_command
from export._files import os_errors_told
from export.adapter_options import open_base_inputs
from export.export_gguf import build_missing
from export.export_imatrix import ImatrixRequest
from export.export_plan import make_base_plan
from export.type_plan import parse_types

# Close to the 16-bit weights, and half their size: adapters are trained over the exact ones.
DEFAULT_TYPES = "Q8_0"


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m export.export_base",
        description="Write a base model, without an adapter, as GGUF files to use LoRA GGUFs over; "
        "prints one path per line. Files whose inputs did not change are kept.",
    )
    parser.add_argument(
        "model", metavar="MODEL_DIR_OR_NAME", help="16-bit model folder, or its name on the hub"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where to write")
    parser.add_argument(
        "--quantization",
        default=DEFAULT_TYPES,
        metavar="TYPES",
        help="comma-separated (default: %(default)s), as in export.export_gguf",
    )
    parser.add_argument(
        "--imatrix",
        metavar="auto|FILE",
        help="importance matrix for K- and I-quants; auto: computed from --imatrix-data",
    )
    parser.add_argument(
        "--imatrix-data",
        type=Path,
        metavar="JSONL",
        help="rows for --imatrix auto, in the format of a run's data/train.jsonl",
    )
    parser.add_argument("--name", help="first part of the file names (default: the base's name)")
    parser.add_argument("--overwrite", action="store_true", help="build every file again")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="0 = all cores")
    return parser


@os_errors_told
def main(argv: list[str] | None = None) -> int:
    """Run the command; exit codes: 0 done, 1 failed, 2 usage, 3 base unusable."""
    args = build_parser().parse_args(argv)
    types = parse_types(args.quantization)
    inputs = open_base_inputs(args.model)
    plan = make_base_plan(inputs, args.output, types, name=args.name, overwrite=args.overwrite)
    request = ImatrixRequest.parse(args.imatrix, args.imatrix_data, inputs.base.path)
    paths = build_missing(plan, request=request, n_threads=args.threads)
    print("\n".join(str(path) for path in paths))
    return OK


if __name__ == "__main__":
    run_command(main)
