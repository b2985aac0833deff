"""The demo: the whole pipeline on the embedded default model, then what came of it.

make demo
"""

import argparse
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts._cli import FAILED, OK, CommandError, log, run_command
from scripts.exported_files import exported_types

RECIPE = "scripts/recipes/smollm2-135m-cpu.yaml"
TOOL_REQUESTS = (
    "Please wrap this to 44 columns: A pipeline that checks every stage before the next one starts "
    "saves more time than a fast one that fails at the end.",
    "Please give me a bug report template.",
    "Check that this is a valid email address: ana.lopez@example.org",
)
SHOWN_LINES = 4
# An F16 file would take half a minute more to verify and measure.
QUANTIZATION = "Q8_0,Q4_K_M"


def _run(
    command: Sequence[str], accepted: Sequence[int] = (OK,), stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a stage; its progress goes to our stderr.

    Raises:
        CommandError: It ended with another exit code.
    """
    environment = {"QUANTIZATION": QUANTIZATION} | os.environ
    done = subprocess.run(
        command, input=stdin, stdout=subprocess.PIPE, text=True, check=False, env=environment
    )
    if done.returncode not in accepted:
        raise CommandError(
            f"the demo stopped: `{' '.join(command[-6:])}` ended with exit code {done.returncode}; "
            "its message is above; run make demo again to go on from there",
            done.returncode if done.returncode > 0 else FAILED,
        )
    return done


def ask_with_tools(model: Path) -> list[dict[str, Any]]:
    """Ask the exported model three things that a tool does best; give its answer objects."""
    command = [sys.executable, "-m", "integration.ask", "--model", str(model), "--tools", "--jsonl"]
    lines = "".join(json.dumps(request) + "\n" for request in TOOL_REQUESTS)
    done = _run([*command, "--seed", "1", "--max-tokens", "200"], (OK, FAILED), stdin=lines)
    return [json.loads(line) for line in done.stdout.splitlines()]


def _block(label: str, text: str) -> str:
    """Set a text behind a label, cut to a few lines."""
    lines = text.strip().splitlines() or [""]
    if len(lines) > SHOWN_LINES:
        lines = [*lines[:SHOWN_LINES], f"… (lines left out: {len(lines) - SHOWN_LINES})"]
    return textwrap.indent("\n".join(lines), " " * 9).replace(" " * 9, f"{label:>8} ", 1)


def _tool_text(reply: dict[str, Any]) -> str:
    """Show one request, what the model called, and what it answered."""
    parts = [_block("request", reply["prompt"])]
    for call in reply["tool_calls"]:
        arguments = json.dumps(call["args"], ensure_ascii=False)
        parts.append(_block("called", f"{call['name']}({arguments})"))
        parts.append(
            _block("error" if call["error"] else "result", call["error"] or call["result"])
        )
    if not reply["tool_calls"]:
        parts.append(_block("called", "no tool"))
    parts.append(_block("answer", reply["text"]))
    return "\n".join(parts)


def _side_by_side(left: str, right: str, width: int = 47) -> str:
    """Set two texts in two columns."""

    def wrap(text: str) -> list[str]:
        lines: list[str] = []
        for line in text.strip().splitlines():
            lines += textwrap.wrap(line, width) or [""]
        return lines

    columns = [["BASE", "-" * width, *wrap(left)], ["TUNED", "-" * width, *wrap(right)]]
    height = max(map(len, columns))
    padded = [column + [""] * (height - len(column)) for column in columns]
    return "\n".join(f"{a:<{width}}   {b}".rstrip() for a, b in zip(*padded, strict=True))


def talkative_file(run_dir: Path) -> Path:
    """Give the file that loses nothing and decodes fast."""
    (file,) = exported_types(run_dir, "Q8_0")
    return file.path


def summary(run_dir: Path, replies: Sequence[dict[str, Any]], seconds: float) -> str:
    """Write the closing text of the demo from the run's own files."""
    evaluation = json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))
    answer = evaluation["answers"][0]
    base, tuned = evaluation["base"], evaluation["tuned"]
    sizes = "\n".join(
        f"  {file.path.stat().st_size / 1e6:7.1f} MB  {file.path}"
        for file in exported_types(run_dir, None)
    )
    small = talkative_file(run_dir)
    tools = "\n\n".join(map(_tool_text, replies))
    return f"""
Held-out loss on {tuned["rows"]} conversations that it did not train on (nats per answer token)
  before {base["loss"]:.4f} (perplexity {base["perplexity"]:.2f})
  after  {tuned["loss"]:.4f} (perplexity {tuned["perplexity"]:.2f})

One question: {answer["question"]}

{_side_by_side(answer["base"], answer["tuned"])}

Requests for which it may call a tool; the model decides

{tools}

Files
{sizes}

Everything that was measured, to look at: {run_dir / "report.html"}

Done in {seconds:.0f} s. Try next:
  .venv/bin/python -m integration.chat --model {small}
  .venv/bin/python -m integration.ask --model {small} --json "Explain recursion with an example."
  printf 'Say hi\\nName a colour\\n' | .venv/bin/python -m integration.ask --model {small} --jsonl
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pipeline and print the summary; exit 1 when the model called no tool."""
    parser = argparse.ArgumentParser(
        description="Train, export and ask the embedded default model."
    )
    parser.add_argument("--recipe", default=RECIPE, help=f"default: {RECIPE}")
    options = parser.parse_args(argv)
    started = time.monotonic()
    _run(["scripts/pipeline.sh", options.recipe])
    run_dir = Path("outputs") / Path(options.recipe).stem
    replies = ask_with_tools(talkative_file(run_dir))
    print(summary(run_dir, replies, time.monotonic() - started))
    if not any(call["error"] is None for reply in replies for call in reply["tool_calls"]):
        log(
            "error: the tuned model called no tool in this run; train longer (max_rows: 0, tool_rows: 400)"
        )
        return FAILED
    return OK


if __name__ == "__main__":
    run_command(main)
