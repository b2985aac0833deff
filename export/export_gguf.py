"""Export an adapter to GGUF files that run on a CPU, with a model card and an Ollama Modelfile.

In: an adapter folder and the 16-bit base it names. Out, in one folder: `<Name>-<TYPE>.gguf`,
`README.md`, `Modelfile`, and `export.json`, by which the next run knows what it may keep.

Run: python -m export.export_gguf ADAPTER_DIR --output DIR [--quantization F16,Q8_0,Q4_K_M]
"""

import argparse
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export._cli import OK, log, run_command
from export._files import os_errors_told, sha256_file, working_dir, write_atomically, write_json
from export.convert_gguf import convert_to_gguf, find_converter
from export.export_plan import RECORD_NAME, Plan, check_space, make_plan
from export.gguf_header import read_gguf_header
from export.merge_adapter import merge_into
from export.model_card import model_card, modelfile, read_chat_format, recommended_file
from export.quantize_gguf import QUANTIZATION_TYPES, describe, parse_types, quantize

DEFAULT_TYPES = "F16,Q8_0,Q4_K_M"


def export_gguf(
    adapter_dir: Path,
    output_dir: Path,
    types: Sequence[str],
    *,
    base_dir: Path | None = None,
    name: str | None = None,
    overwrite: bool = False,
    n_threads: int = 0,
) -> list[Path]:
    """Build the files that are asked for and not there yet; give the paths of all of them.

    Args:
        adapter_dir: What training wrote.
        output_dir: The folder for the files; earlier files of other types stay.
        types: Quantization types, as `parse_types` gives them.
        base_dir: The 16-bit base, when the one that the adapter names is not to be used.
        name: First part of the file names; the run's name by default.
        overwrite: Build everything again, and replace files that are not ours.
        n_threads: 0 = all cores.

    Raises:
        CommandError: Exit 1: no space, or a step failed. Exit 2: a file is in the way. Exit 3:
            adapter or base are unusable or do not belong together.
    """
    plan = make_plan(
        adapter_dir, output_dir, types, base_dir=base_dir, name=name, overwrite=overwrite
    )
    for type_name in plan.wanted:
        if type_name not in plan.missing:
            log(f"kept {plan.path_of(type_name).name}: its inputs did not change")
    if plan.missing:
        find_converter()
        check_space(plan)
        with working_dir(output_dir, "export") as temporary_dir:
            _build(plan, temporary_dir, n_threads)
    _write_companions(plan)
    return [plan.path_of(type_name) for type_name in plan.wanted]


def _build(plan: Plan, temporary_dir: Path, n_threads: int) -> None:
    """Merge, convert, quantize; each file appears under its name when it is whole."""
    f16_path = plan.path_of("F16")
    if "F16" in plan.missing or not plan.is_current("F16"):
        f16_path = _build_f16(plan, temporary_dir)
        if "F16" in plan.missing:
            f16_path = _publish(plan, "F16", f16_path)
    for type_name in plan.missing:
        if type_name != "F16":
            target = temporary_dir / plan.path_of(type_name).name
            quantize(f16_path, target, type_name, n_threads)
            _publish(plan, type_name, target)


def _build_f16(plan: Plan, temporary_dir: Path) -> Path:
    merged_dir = temporary_dir / "merged"
    merged_dir.mkdir()
    started = time.monotonic()
    merge_into(plan.adapter, plan.base, merged_dir)
    log(f"merged {len(plan.adapter.modules)} weights in {time.monotonic() - started:.1f} s")
    metadata: dict[str, Any] = {
        "general.description": f"{plan.base.name}, fine-tuned with LoRA (Tomeforge)",
        "general.quantized_by": "Tomeforge",
        "general.finetune": plan.name,
    }
    f16_path = temporary_dir / plan.path_of("F16").name
    convert_to_gguf(merged_dir, f16_path, plan.name, metadata)
    shutil.rmtree(merged_dir)
    log(f"F16 file after {time.monotonic() - started:.1f} s")
    return f16_path


def _publish(plan: Plan, type_name: str, made: Path) -> Path:
    """Record a whole file, then give it its name: a file with a name is always on record."""
    path = plan.path_of(type_name)
    header = read_gguf_header(made)
    log(describe(header))
    plan.record[path.name] = {
        "type": type_name,
        "bytes": header.file_bytes,
        "sha256": sha256_file(made),
        "bits_per_weight": round(header.bits_per_weight, 3),
        "fallbacks": dict(header.fallbacks),
        "matrices": header.num_matrices,
        "inputs": plan.inputs,
    }
    content = {"name": plan.name, "base_model": plan.base.name, "files": plan.record}
    write_json(plan.output_dir / RECORD_NAME, content)
    os.replace(made, path)
    return path


def _write_companions(plan: Plan) -> None:
    """Write card and Modelfile about the files of these inputs; point out the others."""
    there = {n: entry for n, entry in plan.record.items() if (plan.output_dir / n).is_file()}
    current = {n: entry for n, entry in there.items() if entry["inputs"] == plan.inputs}
    for name in sorted(there.keys() - current.keys()):
        log(f"note: {name} was made from other inputs (an earlier adapter?); not in the card")
    chat = read_chat_format(plan.tokenizer)
    card = model_card(plan.name, plan.base, current, chat)
    write_atomically(plan.output_dir / "README.md", card)
    write_atomically(plan.output_dir / "Modelfile", modelfile(recommended_file(current), chat))


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m export.export_gguf",
        description="Merge an adapter and write GGUF files, a model card and a Modelfile; prints "
        "one path per line. Files whose inputs did not change are kept.",
    )
    parser.add_argument("adapter_dir", type=Path, help="PEFT adapter folder, as training wrote it")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where to write")
    parser.add_argument(
        "--quantization",
        default=DEFAULT_TYPES,
        metavar="TYPES",
        help=f"comma-separated, of {', '.join(QUANTIZATION_TYPES)} (default: %(default)s)",
    )
    parser.add_argument(
        "--base", type=Path, metavar="DIR", help="16-bit base (default: the one the adapter names)"
    )
    parser.add_argument("--name", help="first part of the file names (default: the run's name)")
    parser.add_argument("--overwrite", action="store_true", help="build every file again")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="0 = all cores")
    return parser


@os_errors_told
def main(argv: list[str] | None = None) -> int:
    """Run the command; exit codes: 0 done, 1 failed, 2 usage, 3 adapter or base unusable."""
    args = build_parser().parse_args(argv)
    paths = export_gguf(
        args.adapter_dir,
        args.output,
        parse_types(args.quantization),
        base_dir=args.base,
        name=args.name,
        overwrite=args.overwrite,
        n_threads=args.threads,
    )
    print("\n".join(str(path) for path in paths))
    return OK


if __name__ == "__main__":
    run_command(main)
