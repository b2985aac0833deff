"""The importance matrix of an export: given by the user, or computed from the run's own rows.

In: `--imatrix auto|FILE`, the training rows. Out: a file that K- and I-quants are made with; it is
kept beside the GGUF files, and computed again only when its inputs change.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from export._cli import USAGE, CommandError, log
from export._files import sha256_file
from export.export_plan import Plan
from export.imatrix_file import Imatrix, read_imatrix
from export.stream_job import write_files

# The model that the rows are run through: the most exact one that is there, else this is made.
_SOURCE_TYPES = ("F32", "BF16", "F16", "Q8_0")


@dataclass(frozen=True)
class ImatrixRequest:
    """Where an importance matrix comes from: a file, or rows to compute it from."""

    file: Path | None
    data: tuple[Path, ...] = ()

    @property
    def identity(self) -> str:
        """Tell what the matrix is, or is computed from; short, for the record of a file."""
        paths = (self.file,) if self.file else self.data
        return "imatrix-" + "-".join(sha256_file(path)[:16] for path in paths)

    @classmethod
    def parse(
        cls, option: str | None, data: Path | None, adapter_dir: Path
    ) -> "ImatrixRequest | None":
        """Read `--imatrix` and `--imatrix-data`.

        Raises:
            CommandError: Exit 2: a file that is not there, or no rows to compute from.
        """
        if option is None:
            if data is not None:
                raise CommandError("--imatrix-data needs --imatrix auto", USAGE)
            return None
        if option != "auto":
            if data is not None:
                raise CommandError(f"--imatrix '{option}' is a file; --imatrix-data: auto", USAGE)
            if not Path(option).is_file():
                raise CommandError(f"--imatrix '{option}' is no file; or: --imatrix auto", USAGE)
            return cls(Path(option))
        rows = data or adapter_dir.resolve().parent / "data/train.jsonl"
        if not rows.is_file():
            raise CommandError(
                f"--imatrix auto: '{rows}' is no file; name rows in the format of data/train.jsonl:"
                " --imatrix-data JSONL",
                USAGE,
            )
        return cls(None, (rows,))


def ensure_imatrix(
    plan: Plan, request: ImatrixRequest, temporary_dir: Path, n_threads: int
) -> Imatrix:
    """Give the importance matrix, computed now unless its file is there already.

    Raises:
        CommandError: As `compute_imatrix`, and for a full disk.
    """
    if request.file is not None:
        return read_imatrix(request.file)
    from export.imatrix import compute_imatrix

    path = plan.output_dir / f"{plan.prefix}.imatrix"
    inputs = f"{plan.inputs_of('F32')}-{plan.imatrix_inputs}"
    known = plan.imatrix_record
    if known.get("inputs") == inputs and path.is_file() and known["sha256"] == sha256_file(path):
        log(f"kept {path.name}: its inputs did not change")
        return read_imatrix(path)
    source = next((plan.path_of(n) for n in _SOURCE_TYPES if plan.is_current(n)), None)
    if source is None:
        log("the importance matrix needs a model to run: making a Q8_0 for it")
        source = temporary_dir / "source-Q8_0.gguf"
        write_files(plan.inputs, plan.metadata, {"Q8_0": source}, None, n_threads)
    made = temporary_dir / path.name
    imatrix = compute_imatrix(source, request.data, made, n_threads=n_threads)
    source_name = "a Q8_0" if source.parent == temporary_dir else source.name
    log(
        f"importance matrix from {imatrix.tokens} tokens of {imatrix.rows} rows, run by {source_name}"
    )
    plan.imatrix_record = {"file": path.name, "inputs": inputs, "sha256": sha256_file(made)}
    plan.save_record()
    os.replace(made, path)
    return replace(imatrix, path=path)
