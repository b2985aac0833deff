"""The child process of export.export_gguf and export_base: one pass over the base, any number of GGUF files.

Each portion of rows is read, merged in float32, quantized to every type asked for and appended to
the files; nothing else is kept. With a job of mode `plan` only the types and sizes are told.

In: a job file (JSON), see `run_job`. Out: one JSON object a line on stdout: `progress` and in the
end `plan`, `done` or `error`.

Run: python -m export.stream_gguf JOB.json (by export.export_gguf)
"""

import argparse
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export._cli import FAILED, MODEL, OK, CommandError, run_command
from export._files import check_free_space, os_errors_told
from export.adapter_options import Inputs, open_base_inputs, open_inputs
from export.gguf_metadata import value_type
from export.gguf_writer import GgufFile, padded, tensor_bytes
from export.lazy_convert import Converted, convert_lazily, use_vendored_gguf
from export.merge_adapter import check_changed
from export.stream_rows import PORTION_WEIGHTS, stream_rows
from export.type_plan import UNWEIGHTED_TYPES, TypePlan, plan_types

if TYPE_CHECKING:
    from export.imatrix_file import Imatrix


# torch, transformers and llama.cpp's converter.
_LIBRARY_BYTES = 500_000_000


def say(**content: Any) -> None:
    """Tell the parent something."""
    print(json.dumps(content), flush=True)


def run_job(job: Mapping[str, Any]) -> None:
    """Do one job.

    Args:
        job: `mode` (`plan` or `write`), `adapters` ([folder, weight] pairs, none for the plain
            base), `base` (folder),
            `model_dir` (config.json and tokenizer of the merged model), `metadata` ([key, value]
            pairs), `imatrix` (file or null), `has_imatrix` (for `plan`), `n_threads`, and `files`
            ({type: path}) or, for `plan`, `types`.

    Raises:
        CommandError: Exit 1: full disk, or llama.cpp refuses. Exit 2: a type that needs an
            importance matrix. Exit 3: unusable inputs.
    """
    import torch

    torch.set_num_threads(1)
    use_vendored_gguf()
    inputs = _open(job)
    converted = convert_lazily(inputs.model, Path(job["model_dir"]))
    converted.metadata.update(_entries(job["metadata"]))
    imatrix, about_imatrix = _read_imatrix(job.get("imatrix"), converted)
    types = list(job.get("files") or job["types"])
    plans = _plan(converted, types, imatrix is not None or bool(job.get("has_imatrix")))
    if job["mode"] == "plan":
        say(plan={name: _describe(converted, plan) for name, plan in plans.items()})
        return
    threads = job["n_threads"] or _num_cores()
    _check_memory(converted, threads)
    _check_space({Path(job["files"][name]): plan.total for name, plan in plans.items()})
    files = [
        GgufFile(
            converted,
            Path(job["files"][name]),
            name,
            plan.tensors,
            {} if name in UNWEIGHTED_TYPES else about_imatrix,
        )
        for name, plan in plans.items()
    ]
    stream_rows(
        converted, files, imatrix, threads, lambda done, total: say(progress=done, total=total)
    )
    done = {file.type_name: file.close() for file in files}
    _check_nothing_lost(inputs, converted)
    say(done=done)


def _open(job: Mapping[str, Any]) -> Inputs:
    adapters = [(Path(folder), share) for folder, share in job["adapters"]]
    if not adapters:
        return open_base_inputs(job["base"])
    (adapter_dir, weight), *more = adapters
    return open_inputs(adapter_dir, Path(job["base"]), weight=weight, more=more)


def _check_memory(converted: Converted, n_threads: int) -> None:
    """Compare the memory that streaming takes with what is available.

    Raises:
        CommandError: Exit 1.
    """
    import psutil

    rearranged = [math.prod(tensor.shape) for tensor in converted.tensors if tensor.weight is None]
    # A rearranged tensor is there as it was, and as it will be, while portions are quantized.
    needed = _LIBRARY_BYTES + 4 * (
        2 * max(rearranged, default=0) + 3 * (n_threads + 2) * PORTION_WEIGHTS
    )
    available = psutil.virtual_memory().available
    say(memory=needed)
    if available < needed:
        raise CommandError(
            f"not enough memory: the export needs about {needed / 1e9:.1f} GB, "
            f"{available / 1e9:.1f} GB are available; close other programs, or use fewer --threads",
            FAILED,
        )


def _check_space(files: Mapping[Path, int]) -> None:
    """Compare what the files will need, to the byte, with what is free.

    Raises:
        CommandError: Exit 1, naming the missing bytes.
    """
    needed = sum(files.values())
    # The files are made in a folder inside that of the output.
    folder = next(iter(files)).parent.parent
    free = check_free_space(folder, needed, f"{', '.join(path.name for path in files)} need")
    say(needed=needed, free=free)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_nothing_lost(inputs: Inputs, converted: Converted) -> None:
    """Require that every adapted weight is in the file, and that LoRA changed it."""
    unplaced = sorted(inputs.model.adapted & inputs.model.weights.keys() - converted.used)
    if unplaced:
        raise CommandError(
            f"{len(unplaced)} weights that the adapter changes are not in the GGUF, first "
            f"'{unplaced[0]}'; merge to a model folder instead: python -m export.merge_adapter",
            MODEL,
        )
    for name, merged in inputs.model.weights.items():
        if merged.parts:
            check_changed(name, name in converted.changed, "float32")


def _entries(pairs: Iterable[Sequence[Any]]) -> dict[str, Any]:
    """Make GGUF values of (key, value) pairs; the type of each value decides its GGUF type."""
    import gguf

    return {key: gguf.gguf_writer.GGUFValue(value, value_type(value)) for key, value in pairs}


def _read_imatrix(
    path: str | None, converted: Converted
) -> "tuple[Imatrix | None, dict[str, Any]]":
    """Read an importance matrix, and what a file made with it says about it."""
    if path is None:
        return None, {}
    from export.imatrix_file import check_imatrix, quantize_metadata, read_imatrix

    imatrix = read_imatrix(Path(path))
    check_imatrix(imatrix, {t.name: tuple(reversed(t.shape)) for t in converted.tensors})
    return imatrix, _entries(quantize_metadata(imatrix))


def _plan(converted: Converted, types: list[str], has_imatrix: bool) -> dict[str, TypePlan]:
    """Let llama.cpp choose, with a sparse file that takes no space."""
    names = [tensor.name for tensor in converted.tensors]
    with tempfile.TemporaryDirectory() as folder:
        skeleton = GgufFile(
            converted, Path(folder, "skeleton.gguf"), "F32", dict.fromkeys(names, "F32")
        )
        skeleton.make_room()
        plans = plan_types(skeleton.path, types, has_imatrix)
    for type_name, plan in plans.items():
        if plan.tensors.keys() != set(names):
            raise CommandError(
                f"llama.cpp planned {len(plan.tensors)} of {len(names)} tensors for {type_name}; "
                "its log has another form than this version expects. Set up again: "
                "scripts/setup.sh",
                FAILED,
            )
        sizes = tensor_bytes(converted, plan.tensors)
        plan.sizes = dict(zip(names, sizes, strict=True))
        plan.total = skeleton.header + padded(sizes, skeleton.alignment)
    return plans


def _describe(converted: Converted, plan: TypePlan) -> dict[str, Any]:
    """Give a file's exact size, and every tensor's, before it exists."""
    return {
        "bytes": plan.total,
        "needs_imatrix": plan.needs_imatrix,
        "tensors": [
            [t.name, list(reversed(t.shape)), plan.tensors[t.name].upper(), plan.sizes[t.name]]
            for t in converted.tensors
        ],
    }


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m export.stream_gguf",
        description="Child process of export.export_gguf: writes GGUF files in one pass.",
    )
    parser.add_argument("job", type=Path, help="job file (JSON)")
    return parser


@os_errors_told
def main(argv: list[str] | None = None) -> int:
    """Run one job; a failure is told as `error` on stdout, with its exit code."""
    args = build_parser().parse_args(argv)
    try:
        run_job(json.loads(args.job.read_text(encoding="utf-8")))
    except CommandError as error:
        say(error=str(error), code=error.exit_code)
        raise
    return OK


if __name__ == "__main__":
    run_command(main)
