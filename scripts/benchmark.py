"""Ours against the usual way, alternating in one run; medians and ratios.

    python -m scripts.benchmark train       # --data rows.jsonl for other rows than the shipped sample
    python -m scripts.benchmark chat        # on the demo's Q8_0; --model FILE for another
    python -m scripts.benchmark export      # on a random TinyLlama-1.1B; --size 7b for Mistral's size
    python -m scripts.benchmark adapters    # on what make adapters built

``train`` measures real tokens per second, padding and peak memory of 4-bit LoRA training: ours against
what Unsloth's notebooks write and against TRL + PEFT, same model, rows and steps; the contenders are in
``scripts.benchmark_train``. ``chat`` measures decoding, waiting for the first token, and batches, against
raw llama-cpp-python, stock LangChain and processes of one request: `scripts.benchmark_chat`. ``export``
measures time, peak memory and bytes written from an adapter to a Q4_K_M file, against the chain PEFT,
converter, quantizer: `scripts.benchmark_export`. ``adapters`` measures switching, decoding and memory
of several adapters over one base: `scripts.benchmark_adapters`.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts._cli import FAILED, MODEL, OK, CommandError, log, run_command
from scripts.benchmark_adapters import benchmark_adapters
from scripts.benchmark_chat import DEMO_MODEL, benchmark_chat
from scripts.benchmark_export import SIZES, WORK_DIR, benchmark_export
from scripts.benchmark_train import ROWS_PER_FORWARD

SAMPLE = Path("scripts/data/finetome_sample.jsonl")
TRAIN_TARGET, PADDING_TARGET = 1.5, 0.05


def _measure_training(contender: str, data: Path, steps: int) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.benchmark_train", contender, "--data", str(data),
         "--steps", str(steps)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CommandError(f"contender '{contender}' failed: {reason}", FAILED)
    return json.loads(done.stdout.splitlines()[-1])


def _target(name: str, value: float, target: float, at_least: bool) -> dict[str, Any]:
    met = value >= target if at_least else value <= target
    return {"name": name, "value": round(value, 3), "target": target, "met": met}


def judge_training(figures: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Compare medians of the contenders with the targets.

    Args:
        figures: ``tokens_per_second``, ``padding`` and ``peak_gb`` by contender.
    """
    ours, notebook = figures["ours"], figures["unsloth"]
    lean, lean_notebook = figures["ours-lean"], figures["unsloth-lean"]
    return [
        _target(
            "real tokens/s: ours / Unsloth notebook",
            ours["tokens_per_second"] / notebook["tokens_per_second"],
            TRAIN_TARGET,
            True,
        ),
        _target("padding of ours", ours["padding"], PADDING_TARGET, False),
        _target(
            "peak memory: ours / Unsloth notebook",
            ours["peak_gb"] / notebook["peak_gb"],
            1.0,
            False,
        ),
        _target(
            "with gradient checkpointing, real tokens/s: ours / Unsloth notebook",
            lean["tokens_per_second"] / lean_notebook["tokens_per_second"],
            1.0,
            True,
        ),
    ]


def benchmark_train(data: Path, repeats: int, steps: int) -> dict[str, Any]:
    """Train a few steps with every contender in turn.

    Returns:
        The object of the contract; ``metrics`` holds medians by contender.
    """
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in ROWS_PER_FORWARD}
    for number in range(1, repeats + 1):
        for name, measured in rounds.items():
            measured.append(_measure_training(name, data, steps))
            log(f"round {number}/{repeats}: {name} {measured[-1]}")
    figures = {
        name: {key: statistics.median(one[key] for one in measured) for key in measured[0]}
        for name, measured in rounds.items()
    }
    return {
        "benchmark": "train",
        "metrics": {
            **{
                f"{name} {key}": value
                for name, row in figures.items()
                for key, value in row.items()
            },
            "rounds": repeats,
            "steps": steps,
        },
        "targets": judge_training(figures),
    }


def _run_chat(options: argparse.Namespace) -> dict[str, Any]:
    if not options.model.is_file():
        raise CommandError(
            f"model '{options.model}' does not exist; expected a .gguf file; make demo builds one",
            MODEL,
        )
    return benchmark_chat(options.model, options.rounds or 6, options.quick)


def _run_export(options: argparse.Namespace) -> dict[str, Any]:
    default = 1 if options.size == "7b" else 2
    if options.size == "7b" and options.rounds not in (None, default):
        raise CommandError(f"--rounds {options.rounds}: --size 7b is measured once; leave it out")
    return benchmark_export(options.size, options.rounds or default, options.work_dir)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a benchmark; exit 1 when a target is missed."""
    parser = argparse.ArgumentParser(description="Ours against the usual way, in one run.")
    parser.add_argument(
        "benchmark", choices=["train", "chat", "export", "adapters"], help="what to measure"
    )
    parser.add_argument(
        "--model", type=Path, default=DEMO_MODEL, help="chat: a GGUF; default: the demo's"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="chat, adapters: small amounts, for tests; has no targets",
    )
    parser.add_argument(
        "--data", type=Path, default=SAMPLE, help="train: rows; default: the shipped sample"
    )
    parser.add_argument("--steps", type=int, default=6, help="train: optimizer steps (default 6)")
    parser.add_argument(
        "--size",
        choices=list(SIZES),
        default="1.1b",
        help="export: of the random model (default 1.1b; tiny, for tests, has no targets)",
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        metavar="DIR",
        default=WORK_DIR,
        help="export: where the temporary folder goes (default: outputs)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        help="alternating rounds (default: train 3, chat 6, export 2, adapters 3)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    if options.rounds is not None and options.rounds < 1:
        raise CommandError(f"--rounds: got {options.rounds}, expected at least 1")
    if options.steps < 2:
        raise CommandError(f"--steps: got {options.steps}, expected at least 2: the first warms up")
    if options.benchmark == "chat":
        result = _run_chat(options)
    elif options.benchmark == "export":
        result = _run_export(options)
    elif options.benchmark == "adapters":
        result = benchmark_adapters(options.rounds or 3, options.quick)
    else:
        result = benchmark_train(options.data, options.rounds or 3, options.steps)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        width = max(map(len, result["metrics"]))
        for name, value in result["metrics"].items():
            print(f"{name:<{width}}  {value}")
        for target in result["targets"]:
            state = "met" if target["met"] else "MISSED"
            print(f"{target['name']}: {target['value']} (target {target['target']}) {state}")
    return OK if all(target["met"] for target in result["targets"]) else FAILED


if __name__ == "__main__":
    run_command(main)
