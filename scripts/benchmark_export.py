"""Adapter → Q4_K_M: `export.export_gguf` against the stock chain, on random models made on the spot.

    python -m scripts.benchmark export                  # TinyLlama-1.1B's size; 9 GB of disk
    python -m scripts.benchmark export --size 7b        # once; 35 GB of disk; stock needs 16 GB of RAM

The stock chain is what a user would run: PEFT's ``merge_and_unload``, llama.cpp's
``convert_hf_to_gguf.py``, ``llama_model_quantize``, each a process of its own. Its time and bytes are
sums, its memory is that of the largest process.

How these are measured, and what counts: `scripts.benchmark_usage`.
"""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts._cli import FAILED, CommandError, log
from scripts.benchmark_export_stock import SIZES
from scripts.benchmark_usage import Usage, add_up, median_of, run_step
from scripts.machine import cgroup_memory, inspect_disk

WORK_DIR = Path("outputs")
WALL_TARGET, PEAK_TARGET, WRITTEN_TARGET = 0.6, 0.3, 0.35
PEAK_7B_TARGET, STOCK_7B_PEAK = 3.0, 14.5  # GB
_QUANTIZED_SHARE = 0.35  # Q4_K_M of 16 bits: 0.31, and 0.34 where the vocabulary is most of it
_SMALL_FILES = 64_000_000  # tokenizers, configurations, logs
_MERGE_OVERHEAD = 1_200_000_000  # libraries and one shard's head room beside the whole model
_STEPS_MODULE = "scripts.benchmark_export_stock"


def find_converter() -> Path:
    """Locate llama.cpp's converter as the export does: LLAMA_CPP_DIR, else what set-up installed.

    Raises:
        CommandError: Exit 1: it is not there.
    """
    folder = Path(os.environ.get("LLAMA_CPP_DIR") or Path(sys.prefix) / "share/llama.cpp")
    script = folder / "convert_hf_to_gguf.py"
    if not script.is_file():
        raise CommandError(f"'{script}' is missing; install it: scripts/setup.sh", FAILED)
    return script


@dataclass(frozen=True)
class Workplace:
    """The folder of one benchmark: a random model below it, and a folder for each contender."""

    root: Path
    size: str

    @property
    def run_dir(self) -> Path:
        """Where base and adapter are."""
        return self.root / f"random-{self.size}"

    def run_ours(self) -> dict[str, Usage]:
        """Export as a user would."""
        command = [sys.executable, "-m", "export.export_gguf", str(self.run_dir / "adapter")]
        command += ["--output", str(self.root / "ours/gguf"), "--quantization", "Q4_K_M"]
        command += ["--base", str(self.run_dir / "base")]
        return {"ours": run_step(command, self.root / "ours", "our export")[0]}

    def run_stock(
        self, steps: tuple[str, ...] = ("merge", "convert", "quantize")
    ) -> dict[str, Usage]:
        """Run the stock chain; what is between adapter and result is deleted afterwards."""
        base, adapter = self.run_dir / "base", self.run_dir / "adapter"
        merged, f16, target = (self.root / "stock" / n for n in ("merged", "f16.gguf", "q.gguf"))
        own: list[str | Path] = [sys.executable, "-m", _STEPS_MODULE]
        convert: list[str | Path] = [sys.executable, find_converter(), merged]
        commands = {
            "merge": [*own, "merge", base, adapter, merged],
            "convert": [*convert, "--outtype", "f16", "--outfile", f16],
            "quantize": [*own, "quantize", f16, target],
        }
        usages = {}
        for step in steps:
            command = [str(part) for part in commands[step]]
            usages[f"stock {step}"] = run_step(command, target.parent, f"the stock {step}")[0]
        shutil.rmtree(merged)
        f16.unlink(missing_ok=True)
        return {**usages, "stock": add_up(list(usages.values()))}

    def compare(self) -> dict[str, float]:
        """Check that both contenders made the same product."""
        (ours,) = (self.root / "ours/gguf").glob("*.gguf")
        command = [sys.executable, "-m", _STEPS_MODULE, "compare", str(ours)]
        command += [str(self.root / "stock/q.gguf")]
        _, output = run_step(command, self.root / "compare", "the comparison of ours and stock")
        same: dict[str, float] = json.loads(output)
        log(
            f"same product: {same['tensors']} tensors of the same names, types and shapes, "
            f"{same['identical bytes']:.1%} of their bytes identical"
        )
        return same

    def clear(self) -> None:
        """Delete what the contenders wrote."""
        for name in ("ours", "stock"):
            shutil.rmtree(self.root / name, ignore_errors=True)


def judge_export(size: str, figures: Mapping[str, Usage]) -> list[dict[str, Any]]:
    """Compare medians with the targets of a size.

    Args:
        size: A key of `SIZES`; ``tiny`` has no targets, it takes nothing but start-up time.
        figures: By contender; for 7b ``stock`` is its merge alone, and may be absent.
    """

    def target(name: str, value: float, limit: float, at_least: bool = False) -> dict[str, Any]:
        met = value >= limit if at_least else value <= limit
        return {"name": name, "value": round(value, 3), "target": limit, "met": met}

    ours, stock = figures["ours"], figures.get("stock")
    targets = []
    if size == "7b":
        targets.append(target("peak memory of ours, GB", ours.peak / 1e9, PEAK_7B_TARGET))
        if stock is not None:
            name = "peak memory of the stock merge, GB (at least)"
            targets.append(target(name, stock.peak / 1e9, STOCK_7B_PEAK, at_least=True))
    elif size == "1.1b" and stock is not None:
        targets = [
            target("wall time: ours / stock", ours.wall / stock.wall, WALL_TARGET),
            target("peak memory: ours / stock", ours.peak / stock.peak, PEAK_TARGET),
            target("bytes written: ours / stock", ours.written / stock.written, WRITTEN_TARGET),
        ]
    return targets


def check_disk(size: str, folder: Path, stock_steps: tuple[str, ...]) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        CommandError: Exit 1, with the bytes that are missing.
    """
    shape = SIZES[size]
    quantized = shape.weight_bytes * _QUANTIZED_SHARE
    needed = shape.weight_bytes + shape.adapter_bytes + quantized + _SMALL_FILES
    needed += shape.weight_bytes * len({"merge", "convert"} & set(stock_steps))
    needed += quantized * ("quantize" in stock_steps)
    free = inspect_disk(folder).free_bytes
    if free < needed:
        raise CommandError(
            f"'{folder}' has {free / 1e9:.1f} GB free, the benchmark writes {needed / 1e9:.1f} GB: "
            f"{needed - free:.0f} bytes are missing; free them, or name another place: --work-dir",
            FAILED,
        )


def available_memory() -> int:
    """Give the memory that a child may take, inside the container's limit."""
    import psutil

    limit, used = cgroup_memory()
    available = int(psutil.virtual_memory().available)
    return available if limit is None else min(available, max(0, limit - used))


@contextlib.contextmanager
def working_dir(parent: Path) -> Iterator[Path]:
    """Give a folder inside ``parent`` that is gone afterwards, whatever happens.

    A killed run cannot clean up after itself; the next one removes its gigabytes.

    Raises:
        CommandError: Exit 2: ``parent`` is a file.
    """
    import psutil

    try:
        parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise CommandError(f"--work-dir '{parent}' is no folder; name another one") from error
    prefix = ".benchmark-export-"
    for stale in parent.glob(f"{prefix}*"):
        pid = stale.name.removeprefix(prefix)
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(stale, ignore_errors=True)
    folder = parent.resolve() / f"{prefix}{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _read_through(folder: Path) -> None:
    """Bring the base into the page cache: no contender shall wait for the disk alone."""
    buffer = bytearray(1 << 22)
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def benchmark_export(size: str, num_rounds: int, parent: Path) -> dict[str, Any]:
    """Make the model, then export it with both contenders in turn.

    Args:
        size: A key of `SIZES`. For 7b the stock chain is its merge, if the memory suffices.
        num_rounds: Who begins changes from round to round.
        parent: Where to work.

    Returns:
        The object of the contract; ``metrics`` holds medians by contender and stock step.
    """
    stock_steps: tuple[str, ...] = ("merge", "convert", "quantize")
    skipped = ""
    if size == "7b":
        needed, available = SIZES[size].weight_bytes + _MERGE_OVERHEAD, available_memory()
        skipped = "convert, quantize: the merge decides the memory, and the disk is spared"
        stock_steps = ("merge",)
        if available < needed:
            skipped = f"all: merging takes {needed / 1e9:.1f} GB, {available / 1e9:.1f} are free"
            stock_steps = ()
        log(f"stock steps left out: {skipped}")
    find_converter()  # now, not after the first contender
    measured: dict[str, list[Usage]] = {}
    same: dict[str, float] = {}
    with working_dir(parent) as root:
        check_disk(size, parent, stock_steps)
        place = Workplace(root, size)
        make = [sys.executable, "-m", _STEPS_MODULE, "make", size, str(place.run_dir)]
        log(f"making a random model of {SIZES[size].weight_bytes / 1e9:.2f} GB in '{root}'")
        run_step(make, place.run_dir, "making the random model")
        runs = {"ours": place.run_ours}
        if stock_steps:
            runs["stock"] = lambda: place.run_stock(stock_steps)
        for number in range(num_rounds):
            for name in sorted(runs, reverse=number % 2 == 1):
                _read_through(place.run_dir / "base")
                usages = runs[name]()
                for key, usage in usages.items():
                    measured.setdefault(key, []).append(usage)
                log(f"round {number + 1}/{num_rounds}: {name} {usages[name]}")
            if number == 0 and "quantize" in stock_steps:
                same = place.compare()
            place.clear()
    figures = {name: median_of(usages) for name, usages in measured.items()}
    metrics: dict[str, Any] = {"size": size, "model_gb": round(SIZES[size].weight_bytes / 1e9, 3)}
    for name, usage in figures.items():
        metrics |= usage.metrics(name)
    metrics["written_by"] = add_up(list(figures.values())).written_by
    metrics |= same
    if skipped:
        metrics["stock steps left out"] = skipped
    return {
        "benchmark": "export",
        "metrics": {**metrics, "rounds": num_rounds},
        "targets": judge_export(size, figures),
    }
