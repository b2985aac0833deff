"""Ours against the usual way, alternating in one run; medians and ratios.

    python -m scripts.benchmark chat        # on the demo's Q8_0; --model FILE for another

``chat`` measures the seconds from a long prompt to the first token: `integration.ask` against stock
LangChain ``LlamaCpp`` with its defaults (only the context raised, or it would refuse the prompt).
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

DEMO_MODEL = Path("outputs/smollm2-135m-cpu/gguf/smollm2-135m-cpu-Q8_0.gguf")
PREFILL_TARGET = 1.6
PROMPT = (
    "A model reads its prompt before it writes the first word, and a long prompt takes long. " * 45
)
_STOCK = """
import sys, time, warnings
warnings.simplefilter("ignore")
from langchain_community.llms import LlamaCpp
model = LlamaCpp(model_path=sys.argv[1], n_ctx=2048, verbose=False, max_tokens=1)
model.invoke("warm up", max_tokens=1)
started = time.monotonic()
model.invoke(sys.stdin.read())
print(time.monotonic() - started)
"""


def _measure_ours(model: Path) -> float:
    lines = json.dumps("warm up") + "\n" + json.dumps(PROMPT) + "\n"
    done = subprocess.run(
        [sys.executable, "-m", "integration.ask", "--model", str(model), "--jsonl", "--n-ctx", "2048",
         "--max-tokens", "1"],
        input=lines, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(json.loads(done.stdout.splitlines()[1])["timings"]["first_token_s"])


def _measure_stock(model: Path) -> float:
    done = subprocess.run(
        [sys.executable, "-c", _STOCK, str(model)],
        input=PROMPT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout)


def benchmark_chat(model: Path, repeats: int) -> dict[str, Any]:
    """Measure prefill, ours and stock in turn.

    Returns:
        The object of the contract: ``benchmark``, ``metrics`` (seconds), ``targets``.
    """
    ours, stock = [], []
    for number in range(1, repeats + 1):
        ours.append(_measure_ours(model))
        stock.append(_measure_stock(model))
        log(f"round {number}/{repeats}: ours {ours[-1]:.2f} s, stock {stock[-1]:.2f} s")
    ratio = statistics.median(stock) / statistics.median(ours)
    return {
        "benchmark": "chat",
        "metrics": {
            "prefill_ours_s": round(statistics.median(ours), 3),
            "prefill_stock_s": round(statistics.median(stock), 3),
            "prompt_characters": len(PROMPT),
            "rounds": repeats,
        },
        "targets": [
            {
                "name": "prefill: stock seconds / our seconds",
                "value": round(ratio, 2),
                "target": PREFILL_TARGET,
                "met": ratio >= PREFILL_TARGET,
            }
        ],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run a benchmark; exit 1 when a target is missed."""
    parser = argparse.ArgumentParser(description="Ours against the usual way, in one run.")
    parser.add_argument("benchmark", choices=["chat"], help="what to measure")
    parser.add_argument(
        "--model", type=Path, default=DEMO_MODEL, help="a GGUF; default: the demo's"
    )
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds (default 5)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    if not options.model.is_file():
        raise CommandError(
            f"model '{options.model}' does not exist; expected a .gguf file; make demo builds one",
            MODEL,
        )
    if options.rounds < 1:
        raise CommandError(f"--rounds: got {options.rounds}, expected at least 1")
    result = benchmark_chat(options.model, options.rounds)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        for name, value in result["metrics"].items():
            print(f"{name:<20} {value}")
        for target in result["targets"]:
            state = "met" if target["met"] else "MISSED"
            print(f"{target['name']}: {target['value']} (target {target['target']}) {state}")
    return OK if all(target["met"] for target in result["targets"]) else FAILED


if __name__ == "__main__":
    run_command(main)
