"""Whether the three adapters do their job better than the plain base.

Asks the base, the base with an instruction, and each adapter the held-out requests of
``scripts/data/adapters``; writes ``adapters_evaluation.json`` (each answer too) and
``adapters_evaluation.md``. Exit code 1 where an adapter is not better than the plain base. Code that
answers hold is run, with limits (see ``scripts.code_check``).

    python -m scripts.evaluate_adapters
    python -m scripts.evaluate_adapters --model base-Q8_0.gguf --adapter json=json-LoRA.gguf --rows 20
"""

import argparse
import contextlib
import difflib
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts import adapter_answers, adapter_comparison, adapter_report, adapter_scores, code_check
from scripts._cli import FAILED, MODEL, OK, CommandError, log, run_command
from scripts.adapter_answers import read_held_out
from scripts.adapter_comparison import Settings, compare_adapter
from scripts.adapter_scores import SPECIALITIES
from scripts.ask_model import AskRunner, run_ask
from scripts.recipe import write_atomically

OUTPUT_DIR = Path("outputs/adapters")
OUTPUT_NAME = "adapters_evaluation.json"
BASE_GLOB = "smollm2-135m-base/gguf/*-Q8_0.gguf"
ADAPTER_GLOB = "smollm2-135m-{name}-cpu/gguf/*-LoRA.gguf"
OUTPUTS_DIR = Path("outputs")


def find_newest(pattern: str) -> Path | None:
    """Find the newest file below ``outputs/``."""
    found = sorted(OUTPUTS_DIR.glob(pattern), key=lambda path: (path.stat().st_mtime, path.name))
    return found[-1] if found else None


def find_model(value: Path | None) -> Path:
    """Give the base to ask.

    Raises:
        CommandError: It does not exist.
    """
    path = value or find_newest(BASE_GLOB)
    if path is None:
        raise CommandError(
            f"no base fits '{OUTPUTS_DIR / BASE_GLOB}'; expected the GGUF that the adapters were trained "
            "on: export it (make adapters), or name it with --model",
            MODEL,
        )
    if not path.is_file():
        raise CommandError(f"--model: '{path}' does not exist; expected a GGUF file", MODEL)
    return path


def find_adapters(values: Sequence[str]) -> dict[str, Path]:
    """Read ``--adapter NAME=FILE``; without any, find the three that `make adapters` makes.

    Raises:
        CommandError: A value has another form, a name is unknown or comes twice, a file is missing.
    """
    adapters: dict[str, Path] = {}
    for value in values:
        name, _, path = value.partition("=")
        if not name or not path:
            raise CommandError(f"--adapter: got '{value}', expected NAME=FILE such as json=a.gguf")
        if name not in SPECIALITIES:
            near = difflib.get_close_matches(name, SPECIALITIES, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise CommandError(
                f"--adapter: there are no requests for '{name}'; {hint}expected {', '.join(SPECIALITIES)}"
            )
        if name in adapters:
            raise CommandError(f"--adapter: '{name}' is given twice; name one file for it")
        if not Path(path).is_file():
            raise CommandError(
                f"--adapter: '{path}' does not exist; expected a LoRA GGUF "
                "(python -m export.export_lora_gguf …)",
                MODEL,
            )
        adapters[name] = Path(path)
    if adapters:
        return adapters
    found = {name: find_newest(ADAPTER_GLOB.format(name=name)) for name in SPECIALITIES}
    if missing := [name for name, path in found.items() if path is None]:
        globs = ", ".join(f"'{OUTPUTS_DIR / ADAPTER_GLOB.format(name=name)}'" for name in missing)
        raise CommandError(
            f"no adapter fits {globs}; make all three (make adapters), or name those that there are "
            "with --adapter NAME=FILE",
            MODEL,
        )
    return {name: path for name, path in found.items() if path is not None}


def _digest(settings: Settings, name: str) -> str:
    """Hash everything that the result of one adapter is made of."""
    modules = (adapter_answers, adapter_comparison, adapter_scores, code_check)
    paths = [Path(str(module.__file__)) for module in modules]
    paths += [adapter_answers.requests_path(name), settings.model, settings.adapters[name]]
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    named = [str(settings.model), str(settings.adapters[name])]
    digest.update(json.dumps([*named, settings.rows, settings.seed]).encode())
    return digest.hexdigest()


def _read_old(path: Path) -> dict[str, Any]:
    """Read the adapters of an earlier result; one that cannot be read has none."""
    try:
        adapters: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["adapters"]
        return {name: one for name, one in adapters.items() if one["inputs"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def evaluate(settings: Settings, output_dir: Path, run: AskRunner = run_ask) -> dict[str, Any]:
    """Ask all contenders, except about adapters for which nothing has changed; write the two files.

    They are written after each adapter, so that what was asked before an interruption is kept.

    Raises:
        CommandError: A request cannot be read or got no answer, or the output is no folder.
    """
    if any(path.exists() and not path.is_dir() for path in (output_dir, *output_dir.parents)):
        raise CommandError(f"--output: '{output_dir}' lies at or below a file; expected a folder")
    for name in settings.adapters:
        read_held_out(name)  # a line that is wrong is found before anybody is asked
    output = output_dir / OUTPUT_NAME
    inputs = {name: _digest(settings, name) for name in settings.adapters}
    old = {
        name: one for name, one in _read_old(output).items() if one["inputs"] == inputs.get(name)
    }
    result: dict[str, Any] = {
        "model": str(settings.model),
        "max_tokens": adapter_answers.MAX_TOKENS,
        "seed": settings.seed,
        "adapters": {},
    }
    for name in settings.adapters:
        if name in old:
            log(f"evaluate adapters: {name} is up to date in {output}")
            result["adapters"][name] = old[name]
        else:
            found = compare_adapter(settings, name, run)
            result["adapters"][name] = {"inputs": inputs[name], **found}
            kept = {other: old[other] for other in settings.adapters if other in old}
            _write(output, result | {"adapters": kept | result["adapters"]})
    _write(output, result)
    return result


def _write(output: Path, result: dict[str, Any]) -> None:
    write_atomically(output, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    write_atomically(output.with_suffix(".md"), adapter_report.markdown(result))


def _not_better(result: dict[str, Any]) -> list[str]:
    """Say which adapters are not better than the plain base."""
    lines = []
    for name, one in result["adapters"].items():
        if not one["better_than_base"]:
            base, own = (
                adapter_report.percent(one["contenders"][who]["scores"][one["main"]])
                for who in (adapter_comparison.BASE, name)
            )
            lines.append(
                f"error: the adapter '{name}' is not better than the plain base: {one['main']} {own}, "
                f"the base {base}; train it longer or on more rows"
            )
    return lines


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.evaluate_adapters",
        description="Do the adapters do their job better than the plain base?",
    )
    parser.add_argument(
        "--model", type=Path, metavar="GGUF", help=f"the base; default: {OUTPUTS_DIR / BASE_GLOB}"
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help=f"a LoRA GGUF for {', '.join(SPECIALITIES)}; repeatable; default: all three of outputs/",
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=0,
        metavar="N",
        help="ask only N requests of each adapter, spread over its file; default 0: all",
    )
    parser.add_argument(
        "--output", type=Path, default=OUTPUT_DIR, metavar="DIR", help=f"default: {OUTPUT_DIR}"
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="chooses the answers that the tables show (default 1)"
    )
    return parser


def main(argv: Sequence[str] | None = None, run: AskRunner = run_ask) -> int:
    """Compare the adapters with their base and print the path of the result."""
    options = build_parser().parse_args(argv)
    if options.rows < 0:
        raise CommandError(f"--rows: got {options.rows}, expected 0 (all) or more")
    adapters = find_adapters(options.adapter)
    settings = Settings(find_model(options.model), adapters, options.rows, options.seed)
    with contextlib.redirect_stdout(sys.stderr):
        result = evaluate(settings, options.output, run)
    log(adapter_report.summary(result))
    lines = _not_better(result)
    for line in lines:
        log(line)
    print(options.output / OUTPUT_NAME)
    return FAILED if lines else OK


if __name__ == "__main__":
    run_command(main)
