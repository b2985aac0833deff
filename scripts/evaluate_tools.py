"""How well a run's models call tools: base against tuned, each exported file, grammar or none.

Asks every contender the same requests, of which the right call is known, decodes greedily and runs
no call. Reads ``adapter/`` and ``gguf/``; writes ``tools_evaluation.json`` (each request's outcome
too), ``tools_evaluation.md`` and ``tools_confusion.png``. GGUF files are asked by `integration.ask`.

    python -m scripts.evaluate_tools --config scripts/recipes/smollm2-135m-tools-cpu.yaml
"""

import argparse
import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts import ask_model, generation, tool_answers, tool_outcomes, tool_report, tool_scores
from scripts._cli import MODEL, OK, CommandError, log, run_command
from scripts.ask_model import AskRunner, run_ask, spread
from scripts.exported_files import NO_FILES, GgufFile, exported_types
from scripts.recipe import TrainingRecipe, parse_recipe, write_atomically
from scripts.tool_answers import Answers, answer_with_transformers, ask_gguf, read_requests
from scripts.tool_outcomes import Outcome, ToolRequest, judge
from scripts.tool_scores import compare, score, score_parts

REQUESTS_PATH = Path(__file__).parent / "data" / "tool_eval_test.jsonl"
OUTPUT_NAME = "tools_evaluation.json"
HfRunner = Callable[[TrainingRecipe, Sequence[ToolRequest]], dict[str, Answers]]


@dataclass(frozen=True)
class Settings:
    """Whom to ask what; ``limit`` takes that many requests, spread evenly over the file."""

    requests_path: Path = REQUESTS_PATH
    files: list[GgufFile] = field(default_factory=list)
    with_hf: bool = True
    with_free: bool = True
    limit: int = 0


@dataclass(frozen=True)
class Contender:
    """A way to answer, and what came of it; ``decoding`` is ``grammar`` or ``free``."""

    name: str
    model: str
    decoding: str
    seconds: float
    outcomes: list[Outcome]

    def to_json(self) -> dict[str, Any]:
        """Give scores, parts and each request's outcome."""
        parts = {
            "by_tool": score_parts(self.outcomes, lambda one: one.expected_name),
            "by_group": score_parts(self.outcomes, lambda one: one.group),
        }
        return {
            "model": self.model,
            "decoding": self.decoding,
            "seconds": round(self.seconds, 1),
            "scores": score(self.outcomes).to_json(),
            **{
                by: {name: scores.to_json() for name, scores in some.items()}
                for by, some in parts.items()
            },
            "outcomes": [outcome.to_json() for outcome in self.outcomes],
        }


def other_files(values: Sequence[str], taken: Sequence[str]) -> list[GgufFile]:
    """Read ``--gguf NAME=FILE``.

    Raises:
        CommandError: A value has another form, a name comes twice, or a file does not exist.
    """
    names, files = list(taken), []
    for value in values:
        name, _, path = value.partition("=")
        if not name or not path:
            raise CommandError(f"--gguf: got '{value}', expected NAME=FILE such as base=model.gguf")
        if name in names:
            raise CommandError(f"--gguf: the name '{name}' is taken; choose another one")
        if not Path(path).is_file():
            raise CommandError(f"--gguf: '{path}' does not exist; expected a GGUF file")
        names.append(name)
        files.append(GgufFile(name, Path(path), tuned=False))
    return files


def _digest(recipe: TrainingRecipe, settings: Settings, requests: Sequence[ToolRequest]) -> str:
    """Hash everything that a result is made of."""
    from tools import TOOLS
    from tools.protocol import system_with_tools

    # Not the report: it is written anew each time.
    modules = (ask_model, generation, tool_answers, tool_outcomes, tool_scores)
    sources = [Path(__file__), *(Path(str(module.__file__)) for module in modules)]
    files = [one.path for one in settings.files]
    weights = recipe.run_dir / "adapter" / "adapter_model.safetensors"
    if settings.with_hf and not weights.is_file():
        raise CommandError(
            f"'{weights.parent}' has no adapter; train one (python -m scripts.train_lora --config …), "
            "or ask only GGUF files (--no-hf)",
            MODEL,
        )
    digest = hashlib.sha256()
    for path in [*sources, settings.requests_path, *files, *([weights] * settings.with_hf)]:
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    names = [(one.name, one.tuned) for one in settings.files]
    options = [names, settings.with_hf, settings.with_free, len(requests)]
    model = [recipe.model_name_or_path, recipe.model_revision, recipe.prompt_format]
    digest.update(json.dumps([options, model, system_with_tools(None, TOOLS)]).encode())
    return digest.hexdigest()


def _ask_all(
    recipe: TrainingRecipe,
    settings: Settings,
    requests: Sequence[ToolRequest],
    ask: AskRunner,
    answer_hf: HfRunner,
) -> list[Contender]:
    contenders: list[Contender] = []

    def add(name: str, model: str, decoding: str, got: Answers) -> None:
        outcomes = [judge(*pair) for pair in zip(requests, got.answers, strict=True)]
        contenders.append(Contender(name, model, decoding, got.seconds, outcomes))
        right = sum(one.right for one in outcomes)
        log(f"evaluate tools: {name}: {right} of {len(outcomes)} right in {got.seconds:.0f} s")

    if settings.with_hf:
        for model, got in answer_hf(recipe, requests).items():
            add(f"{model} (HF)", model, "free", got)
    for file in settings.files:
        for decoding in ("grammar", "free") if settings.with_free else ("grammar",):
            log(f"evaluate tools: asking {file.path} ({decoding})")
            got = ask_gguf(file.path, requests, decoding == "free", ask)
            add(f"{file.name} {decoding}", "tuned" if file.tuned else file.name, decoding, got)
    return contenders


def _comparisons(settings: Settings, contenders: Sequence[Contender]) -> list[dict[str, Any]]:
    """Compare base with tuned, no grammar with one, and each quantized file with F16."""
    by_name = {one.name: one for one in contenders}
    pairs = [("base (HF)", "tuned (HF)")]
    pairs += [(f"{file.name} free", f"{file.name} grammar") for file in settings.files]
    for decoding in ("grammar", "free"):
        pairs += [
            (f"F16 {decoding}", f"{file.name} {decoding}")
            for file in settings.files
            if file.tuned and file.name != "F16"
        ]
    return [
        {"from": before, "to": now}
        | {
            measure: change.to_json()
            for measure, change in compare(by_name[before].outcomes, by_name[now].outcomes).items()
        }
        for before, now in pairs
        if before in by_name and now in by_name
    ]


def evaluate(
    recipe: TrainingRecipe,
    settings: Settings,
    ask: AskRunner = run_ask,
    answer_hf: HfRunner = answer_with_transformers,
) -> Path:
    """Ask every contender; return ``tools_evaluation.json``.

    Args:
        recipe: The run.
        settings: Whom to ask what.
        ask: Runs `integration.ask`.
        answer_hf: Answers for ``base`` and ``tuned`` with transformers.

    Raises:
        CommandError: There is nobody to ask, an input is missing, or somebody gave no answers.
    """
    if not settings.with_hf and not settings.files:
        raise CommandError("nobody to ask: leave --no-hf out, or name a file (--files, --gguf)")
    every = read_requests(settings.requests_path)
    requests = spread(every, settings.limit)
    output = recipe.run_dir / OUTPUT_NAME
    inputs = _digest(recipe, settings, requests)
    old = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {}
    if old.get("inputs") == inputs:
        log(f"evaluate tools: {output} is up to date")
        _write_report(old, recipe.run_dir)
        return output
    contenders = _ask_all(recipe, settings, requests, ask, answer_hf)
    result = {
        "inputs": inputs,
        "requests": {
            "file": os.path.relpath(settings.requests_path),
            "asked": len(requests),
            "with_call": sum(request.call is not None for request in requests),
        },
        "files": {file.name: str(file.path) for file in settings.files},
        "contenders": {one.name: one.to_json() for one in contenders},
        "comparisons": _comparisons(settings, contenders),
    }
    write_atomically(output, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    _write_report(result, recipe.run_dir)
    return output


def _write_report(result: dict[str, Any], run_dir: Path) -> None:
    write_atomically(run_dir / "tools_evaluation.md", tool_report.markdown(result))
    tool_report.plot_confusion(result, run_dir / "tools_confusion.png")
    log(tool_report.summary(result))


def build_parser() -> argparse.ArgumentParser:
    """Build the command line; the recipe's flags are added by ``parse_recipe``."""
    parser = argparse.ArgumentParser(description="How well a run's models call tools.")
    parser.add_argument(
        "--requests", type=Path, default=REQUESTS_PATH, metavar="FILE", help="what to ask (JSONL)"
    )
    parser.add_argument(
        "--files", metavar="TYPES", help=f"such as F16,Q8_0; {NO_FILES}; default: all of the export"
    )
    parser.add_argument(
        "--gguf",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="ask this file too, such as a base; repeatable",
    )
    parser.add_argument("--no-hf", action="store_true", help="ask no transformers model")
    parser.add_argument("--no-free", action="store_true", help="ask files with the grammar only")
    parser.add_argument(
        "--limit",
        type=int,
        default=0,
        metavar="N",
        help="ask only N requests, spread over the file",
    )
    return parser


def main(
    argv: Sequence[str] | None = None,
    ask: AskRunner = run_ask,
    answer_hf: HfRunner = answer_with_transformers,
) -> int:
    """Evaluate a run's tool calls and print the path of the result."""
    recipe, options = parse_recipe("", argv, build_parser())
    if options.limit < 0:
        raise CommandError(f"--limit: got {options.limit}, expected 0 (all) or more")
    files = exported_types(recipe.run_dir, options.files)
    files += other_files(options.gguf, [file.name for file in files])
    settings = Settings(
        options.requests, files, not options.no_hf, not options.no_free, options.limit
    )
    with contextlib.redirect_stdout(sys.stderr):
        output = evaluate(recipe, settings, ask, answer_hf)
    print(output)
    return OK


if __name__ == "__main__":
    run_command(main)
