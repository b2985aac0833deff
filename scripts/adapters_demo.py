"""Several adapters over one base: load, switch, stack, merge, route.

make adapters-demo

Everything is shown with the commands that a user has; each step prints the one that it ran.
"""

import argparse
import json
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts._cli import FAILED, MODEL, OK, CommandError, log, run_command
from scripts.adapter_scores import SPECIALITIES
from scripts.benchmark_adapters import RUN, find_built

REQUESTS = {
    "json": "Give me a JSON object with the keys name, capital and continent for Kenya.",
    "coding": "Write a Python function that returns the largest even number of a list.",
    "support": "My laptop gets no sound from the headphones since the last update.",
}
TO_ROUTE = (
    *REQUESTS.values(),
    "Why do leaves turn red in autumn?",
    "Напиши функцию на Python, которая переворачивает строку.",
    "Wi-Fi is gone again on my phone, what can I do?",
)
SHOWN_LINES = 9


def _run(command: Sequence[str], stdin: str = "", accepted: Sequence[int] = (OK,)) -> str:
    """Run a command of ours and show it; give its output.

    Raises:
        CommandError: It ended with another exit code.
    """
    shown = " ".join(shlex.quote(part) for part in command[2:])
    print(
        textwrap.fill(f"$ python -m {shown}", 118, subsequent_indent="    ", break_on_hyphens=False)
    )
    done = subprocess.run(command, input=stdin, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in accepted:
        raise CommandError(
            f"the demo stopped: `python -m {command[2]}` ended with exit code {done.returncode}; "
            "its message is above",
            done.returncode if done.returncode > 0 else FAILED,
        )
    return done.stdout


def _ask(
    model: Path, options: Sequence[str], requests: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "integration.ask", "--model", str(model), "--jsonl", *options]
    lines = "".join(json.dumps(request, ensure_ascii=False) + "\n" for request in requests)
    output = _run([*command, "--temperature", "0", "--max-tokens", "160"], lines, (OK, FAILED))
    return [json.loads(line) for line in output.splitlines()]


def _show(label: str, text: str) -> None:
    lines = [
        part for line in text.strip().splitlines() for part in textwrap.wrap(line, 100) or [""]
    ]
    if len(lines) > SHOWN_LINES:
        lines = [*lines[:SHOWN_LINES], f"… (lines left out: {len(lines) - SHOWN_LINES})"]
    print(textwrap.indent("\n".join(lines), " " * 12).replace(" " * 12, f"{label:>10}  ", 1))


def switch(base: Path, adapters: Mapping[str, Path]) -> None:
    """Answer each request with the base, with its adapter, and with two adapters stacked."""
    print("\n1. LOAD AND SWITCH: one base in memory, an adapter for each request\n")
    options = [part for name, file in adapters.items() for part in ("--adapter", f"{name}={file}")]
    requests = [
        {"prompt": REQUESTS[name], "adapter": adapter}
        for name in adapters
        for adapter in ("base", name)
    ]
    stacked = "+".join(f"{name}:0.5" for name in list(adapters)[1:])
    requests.append({"prompt": requests[-1]["prompt"], "adapter": stacked})
    shown = ""
    for answer in _ask(base, options, requests):
        if answer["prompt"] != shown:
            shown = answer["prompt"]
            print(f"\n  {shown}")
        _show(answer["route"]["adapter"] or "base", answer["error"] or answer["text"])


def merge(base: Path, name: str, adapter: Path) -> None:
    """Merge one adapter for deployment, and compare its answer with that of base and adapter."""
    print("\n2. MERGE: one file without an adapter beside it\n")
    run = Path(RUN.format(name))
    output = run / "merged"
    command = [sys.executable, "-m", "export.export_gguf", str(run / "adapter")]
    merged = Path(_run([*command, "--output", str(output), "--quantization", "Q8_0"]).split()[-1])
    request = [{"prompt": REQUESTS[name]}]
    # Under an adapter there is no penalty by default, so none in the file it is merged into.
    (at_run_time,) = _ask(base, ["--adapter", f"{name}={adapter}", "--route", name], request)
    (in_one_file,) = _ask(merged, ["--repeat-penalty", "1"], request)
    for label, answer in {"adapter": at_run_time, "merged": in_one_file}.items():
        _show(label, answer["text"])
    speeds = [answer["timings"]["tokens_per_second"] for answer in (at_run_time, in_one_file)]
    same = "the same" if at_run_time["text"] == in_one_file["text"] else "another"
    print(
        f"\n  {same} answer (both are rounded to Q8_0, but not at the same place); "
        f"{speeds[0]:.0f} tok/s with the adapter, {speeds[1]:.0f} merged"
    )


def route(base: Path, adapters: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Let the router choose for each request."""
    print("\n3. ROUTE: the request decides, with a reason\n")
    options = [part for name, file in adapters.items() for part in ("--adapter", f"{name}={file}")]
    answers = _ask(base, [*options, "--route", "auto"], [{"prompt": text} for text in TO_ROUTE])
    for answer in answers:
        chosen = answer["route"]
        print(f"\n  {answer['prompt']}\n  -> {chosen['adapter'] or 'base'}: {chosen['reason']}")
        _show("", answer["error"] or answer["text"])
    return answers


def main(argv: Sequence[str] | None = None) -> int:
    """Run the three steps; exit 1 when the router sent none of the adapters' requests to them."""
    parser = argparse.ArgumentParser(description="Load, switch, merge and route adapters.")
    parser.parse_args(argv)
    base, adapters = find_built()
    missing = [name for name in SPECIALITIES if name not in adapters]
    if missing:
        raise CommandError(
            f"the adapter '{missing[0]}' is not built; build it: scripts/adapters.sh {missing[0]}",
            MODEL,
        )
    switch(base, adapters)
    merge(base, "coding", adapters["coding"])
    answers = route(base, adapters)
    right = sum(a["route"]["adapter"] == name for a, name in zip(answers, REQUESTS, strict=False))
    options = " ".join(f"--adapter {name}={file}" for name, file in adapters.items())
    print(
        f"\nTry next:\n  .venv/bin/python -m integration.chat --model {base} {options} --route auto"
    )
    if right < len(REQUESTS):
        log(f"error: the router sent {right} of {len(REQUESTS)} requests to their adapter")
        return FAILED
    return OK


if __name__ == "__main__":
    run_command(main)
