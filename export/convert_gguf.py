"""Convert a merged model folder to an F16 GGUF with llama.cpp's own converter.

In: a model folder (16-bit safetensors, tokenizer). Out: one GGUF file.

Run: python -m export.convert_gguf MODEL_DIR --output FILE [--name NAME] [--metadata JSON]
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export._cli import FAILED, OK, USAGE, CommandError, run_command
from export._files import os_errors_told
from export._process import run_checked
from export.base_model import read_json


def find_converter(script: str = "convert_hf_to_gguf.py") -> Path:
    """Locate one of llama.cpp's converters: `LLAMA_CPP_DIR`, else what scripts/setup.sh installed.

    Raises:
        CommandError: Exit 1: it is in neither place.
    """
    named = os.environ.get("LLAMA_CPP_DIR")
    folder = Path(named) if named else Path(sys.prefix) / "share/llama.cpp"
    if not (folder / script).is_file():
        raise CommandError(
            f"llama.cpp's {script} is not in '{folder}'"
            + (" (LLAMA_CPP_DIR)" if named else "; install it: scripts/setup.sh"),
            FAILED,
        )
    return folder / script


def convert_to_gguf(
    model_dir: Path, output: Path, name: str, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write an F16 GGUF of a model folder, under a temporary name until it is whole.

    Args:
        model_dir: 16-bit safetensors with a tokenizer.
        output: The file to write; replaced if it exists.
        name: `general.name`, which chat programs show.
        metadata: More `general.*` keys; these win over what the converter finds by itself.

    Raises:
        CommandError: Exit 1: the converter is missing or failed.
    """
    script = find_converter()
    keys = {"general.name": name, "general.basename": name, **(metadata or {})}
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    with tempfile.TemporaryDirectory() as folder:
        metadata_path = Path(folder, "metadata.json")
        metadata_path.write_text(json.dumps(keys), encoding="utf-8")
        command = [sys.executable, str(script), str(model_dir), "--outtype", "f16"]
        command += ["--outfile", str(temporary), "--metadata", str(metadata_path)]
        try:
            run_checked(command, "conversion to GGUF")
            os.replace(temporary, output)
        finally:
            temporary.unlink(missing_ok=True)
    return output


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m export.convert_gguf",
        description="Convert a merged model folder to an F16 GGUF; prints the file written.",
    )
    parser.add_argument("model_dir", type=Path, help="folder that export.merge_adapter wrote")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="GGUF to write")
    parser.add_argument("--name", help="general.name (default: the output's name)")
    parser.add_argument(
        "--metadata", type=Path, metavar="JSON", help='more general.* keys: {"general.author": …}'
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser


@os_errors_told
def main(argv: list[str] | None = None) -> int:
    """Run the command; exit codes: 0 done, 1 conversion failed, 2 output taken."""
    args = build_parser().parse_args(argv)
    if args.output.exists() and not args.overwrite:
        raise CommandError(f"output '{args.output}' exists; replace it: --overwrite", USAGE)
    read_json(args.model_dir / "config.json")
    metadata = read_json(args.metadata) if args.metadata else None
    args.output.parent.mkdir(parents=True, exist_ok=True)
    print(convert_to_gguf(args.model_dir, args.output, args.name or args.output.stem, metadata))
    return OK


if __name__ == "__main__":
    run_command(main)
