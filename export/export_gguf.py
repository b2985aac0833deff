"""Export an adapter to GGUF files that run on a CPU, with a model card and an Ollama Modelfile.

In: an adapter folder and the 16-bit base it names. Out, in one folder: a GGUF of each type asked
for, `README.md`, `Modelfile`, and `export.json`, by which the next run knows what it may keep. All
files are written in one pass over the base; no merged copy and no other file lies in between.

Run: python -m export.export_gguf ADAPTER_DIR --output DIR [--quantization F16,Q8_0,Q4_K_M]
"""

import argparse
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export._cli import OK, USAGE, CommandError, log, run_command
from export._files import os_errors_told, working_dir, write_atomically
from export.adapter_options import add_adapter_options, read_inputs
from export.base_model import read_json
from export.export_imatrix import ImatrixRequest, ensure_imatrix
from export.export_plan import Plan, make_plan
from export.gguf_header import read_gguf_header
from export.model_card import model_card, recommended_file
from export.modelfile import modelfile, read_chat_format
from export.naming import VERSION
from export.quant_menu import (
    MenuEntry,
    choose_by_kl,
    choose_by_size,
    format_menu,
    make_menu,
    parse_size,
)
from export.stream_job import plan_files, write_files
from export.type_plan import QUANTIZATION_TYPES, UNWEIGHTED_TYPES, parse_types

DEFAULT_TYPES = "F16,Q8_0,Q4_K_M"
CERTIFICATE_NAME = "certificate.json"


def export_gguf(
    plan: Plan, *, request: ImatrixRequest | None = None, n_threads: int = 0
) -> list[Path]:
    """Build the files that are asked for and not there yet, with card and Modelfile.

    Args:
        plan: See `make_plan`.
        request: Where an importance matrix comes from, for the types that use one.
        n_threads: 0 = all cores.

    Returns:
        The paths of all files asked for.

    Raises:
        CommandError: As `build_missing`.
    """
    paths = build_missing(plan, request=request, n_threads=n_threads)
    write_companions(plan)
    return paths


def build_missing(
    plan: Plan, *, request: ImatrixRequest | None = None, n_threads: int = 0
) -> list[Path]:
    """Build the files that are asked for and not there yet; give the paths of all of them.

    Args:
        plan: See `make_plan` and `make_base_plan`.
        request: Where an importance matrix comes from, for the types that use one.
        n_threads: 0 = all cores.

    Raises:
        CommandError: Exit 1: no space, or a step failed. Exit 2: a file is in the way. Exit 3:
            adapter or base are unusable or do not belong together.
    """
    plan.output_dir.mkdir(parents=True, exist_ok=True)
    if request is not None:
        plan.imatrix_inputs = request.identity
    missing = plan.missing
    for type_name in plan.wanted:
        if type_name not in missing:
            log(f"kept {plan.path_of(type_name).name}: its inputs did not change")
    with working_dir(plan.output_dir, "export") as temporary_dir:
        plain = [name for name in missing if name in UNWEIGHTED_TYPES or request is None]
        weighted = [name for name in missing if name not in plain]
        if plain:
            _build(plan, plain, temporary_dir, n_threads)
        if weighted and request is not None:
            plan.imatrix = ensure_imatrix(plan, request, temporary_dir, n_threads)
            _build(plan, weighted, temporary_dir, n_threads)
    plan.save_record()
    return [plan.path_of(type_name) for type_name in plan.wanted]


def _build(plan: Plan, types: Sequence[str], temporary_dir: Path, n_threads: int) -> None:
    """Write files in one pass; each appears under its name when it is whole."""
    plan.check_free(types)
    started = time.monotonic()
    files = {name: temporary_dir / plan.path_of(name).name for name in types}
    hashes = write_files(plan.inputs, plan.metadata, files, plan.imatrix_path, n_threads)
    adapted = len(plan.inputs.model.adapted)
    checked = f" ({adapted} adapted weights, each one checked)" if plan.inputs.adapters else ""
    log(
        f"wrote {', '.join(types)} in {time.monotonic() - started:.1f} s, in one pass over "
        f"{plan.inputs.base.name}{checked}"
    )
    for type_name, path in files.items():
        _publish(plan, type_name, path, hashes[type_name])


def _publish(plan: Plan, type_name: str, made: Path, sha256: str) -> None:
    """Record a whole file, then give it its name: a file with a name is always on record."""
    path = plan.path_of(type_name)
    header = read_gguf_header(made)
    log(header.describe())
    entry: dict[str, Any] = {
        "type": type_name,
        "bytes": header.file_bytes,
        "sha256": sha256,
        "bits_per_weight": round(header.bits_per_weight, 3),
        "fallbacks": dict(header.fallbacks),
        "matrices": header.num_matrices,
        "inputs": plan.inputs_of(type_name),
    }
    if plan.imatrix is not None and type_name not in UNWEIGHTED_TYPES:
        keys = ("data_sha256", "rows", "tokens", "chunks")
        entry["imatrix"] = {key: getattr(plan.imatrix, key) for key in keys}
    plan.record[path.name] = entry
    plan.built.add(type_name)
    plan.save_record()
    os.replace(made, path)


def write_companions(plan: Plan) -> None:
    """Write card and Modelfile about the files of these inputs; point out the others."""
    current = plan.current
    for name in plan.record.keys() - current.keys():
        if (plan.output_dir / name).is_file():
            log(f"note: {name} was made from other inputs (an earlier adapter?); not in the card")
    chat = read_chat_format(plan.inputs.tokenizer, plan.inputs.base.path)
    if chat.template is None:
        log(
            "warning: the tokenizer has no chat template, so chat programs will guess one. Train "
            "with prompt_format alpaca or chat_template, or put chat_template.jinja beside it"
        )
    certificate_path = plan.output_dir / CERTIFICATE_NAME
    certificate = read_json(certificate_path) if certificate_path.is_file() else None
    card = model_card(plan.facts, current, chat, certificate)
    write_atomically(plan.output_dir / "README.md", card)
    text = modelfile(recommended_file(current), chat, plan.facts)
    write_atomically(plan.output_dir / "Modelfile", text)


def menu_of(plan: Plan, has_imatrix: bool) -> list[MenuEntry]:
    """Ask llama.cpp what every type would cost; nothing is written."""
    return make_menu(plan_files(plan.inputs, plan.metadata, QUANTIZATION_TYPES, has_imatrix))


def export_close_enough(
    plan: Plan, limit: float, request: ImatrixRequest | None, n_threads: int
) -> list[Path]:
    """Build types, measure them, and keep the smallest whose mean KL divergence is in the limit.

    The reference is the adapter on its base in float32, evaluated once, on held-out rows.

    Raises:
        CommandError: Exit 1: no type is close enough. Exit 2: several adapters. Else as
            `export_gguf`.
    """
    from export.verify_measure import measure_kl, reference_logits

    if len(plan.inputs.adapters) > 1 or plan.inputs.adapters[0][1] != 1.0:
        raise CommandError(
            "--max-kld measures against one adapter as it was trained; merge the others first "
            "(export.merge_adapter), or choose by --max-size",
            USAGE,
        )
    menu = menu_of(plan, request is not None)
    plan.output_dir.mkdir(parents=True, exist_ok=True)
    adapter_dir, base_dir = plan.inputs.adapter.path, plan.inputs.base.path
    made: dict[str, tuple[Path, str]] = {}
    with (
        working_dir(plan.output_dir, "export") as temporary_dir,
        reference_logits(adapter_dir, temporary_dir, base_dir=base_dir) as logits,
    ):
        if request is not None:
            plan.imatrix_inputs = request.identity
            plan.imatrix = ensure_imatrix(plan, request, temporary_dir, n_threads)

        def measure(type_name: str) -> float:
            path = temporary_dir / plan.path_of(type_name).name
            hashes = write_files(
                plan.inputs, plan.metadata, {type_name: path}, plan.imatrix_path, n_threads
            )
            mean = measure_kl(path, logits, n_threads=n_threads).mean
            log(f"{type_name}: {path.stat().st_size / 1e6:.1f} MB, mean KL divergence {mean:.4g}")
            if mean <= limit:
                # The menu is halved towards smaller files: this one replaces the one before.
                for larger, _ in made.values():
                    larger.unlink()
                made.clear()
                made[type_name] = (path, hashes[type_name])
            else:
                path.unlink()
            return mean

        chosen = choose_by_kl(menu, limit, request is not None, measure)
        log(f"chose {chosen}")
        plan.wanted = [chosen]
        plan.check_free(plan.wanted)
        _publish(plan, chosen, *made[chosen])
    plan.save_record()
    write_companions(plan)
    return [plan.path_of(chosen)]


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m export.export_gguf",
        description="Merge an adapter and write GGUF files, a model card and a Modelfile; prints "
        "one path per line. Files whose inputs did not change are kept.",
    )
    add_adapter_options(parser)
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--quantization",
        default=DEFAULT_TYPES,
        metavar="TYPES",
        help="comma-separated (default: %(default)s); --list shows all of them",
    )
    what.add_argument(
        "--max-size", metavar="SIZE", help="the best type that fits, such as 700M or 1.5G"
    )
    what.add_argument(
        "--max-kld",
        type=float,
        metavar="KL",
        help="the smallest type whose measured mean KL divergence is at most this, such as 0.05",
    )
    what.add_argument(
        "--list", action="store_true", help="print what each type would cost, and write nothing"
    )
    parser.add_argument(
        "--imatrix",
        metavar="auto|FILE",
        help="importance matrix for K- and I-quants; auto: computed from the run's training rows",
    )
    parser.add_argument(
        "--imatrix-data",
        type=Path,
        metavar="JSONL",
        help="other rows for --imatrix auto (default: data/train.jsonl beside the adapter)",
    )
    parser.add_argument("--name", help="first part of the file names (default: base, size, run)")
    parser.add_argument(
        "--version", default=VERSION, metavar="X.Y", help="of your model (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="build every file again")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="0 = all cores")
    return parser


@os_errors_told
def main(argv: list[str] | None = None) -> int:
    """Run the command; exit codes: 0 done, 1 failed, 2 usage, 3 adapter or base unusable."""
    args = build_parser().parse_args(argv)
    if args.output is None and not args.list:
        raise CommandError("where to? name a folder: --output DIR", USAGE)
    if args.max_kld is not None and not (math.isfinite(args.max_kld) and args.max_kld > 0):
        raise CommandError(f"--max-kld {args.max_kld:g}; expected a number above 0", USAGE)
    if args.max_size is not None:
        args.max_size = parse_size(args.max_size)
    types = [] if args.list or args.max_size or args.max_kld else parse_types(args.quantization)
    inputs = read_inputs(args)
    plan = make_plan(
        inputs,
        args.output or Path(),
        types,
        name=args.name,
        version=args.version,
        overwrite=args.overwrite,
    )
    request = ImatrixRequest.parse(args.imatrix, args.imatrix_data, inputs.adapter.path)
    if args.list:
        print(format_menu(menu_of(plan, request is not None), request is not None))
        return OK
    if args.max_kld is not None:
        paths = export_close_enough(plan, args.max_kld, request, args.threads)
    else:
        if args.max_size is not None:
            menu = menu_of(plan, request is not None)
            plan.wanted = [choose_by_size(menu, args.max_size, request is not None)]
            log(f"chose {plan.wanted[0]}")
        paths = export_gguf(plan, request=request, n_threads=args.threads)
    print("\n".join(str(path) for path in paths))
    return OK


if __name__ == "__main__":
    run_command(main)
