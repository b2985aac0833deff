"""How often an answer follows a system prompt: anchor, essence, mechanics, breakthrough, with it and without.

Asks a GGUF the same questions with ``--system`` and without it, greedily, through `integration.ask`.
Writes ``prompt_evaluation.json`` (every answer too) and ``prompt_evaluation.md``; exit 1 when no larger
share of answers has all four parts with the prompt.

    python -m scripts.evaluate_prompt --model model.gguf [--adapter json=json.gguf --route json]
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts._cli import FAILED, MODEL, OK, CommandError, log, run_command
from scripts.ask_model import AskRunner, run_ask, spread
from scripts.ask_model import ask as ask_model
from scripts.prompt_scores import Comparison, Verdict, compare_answers, judge_answers
from scripts.recipe import write_atomically
from scripts.tool_report import percent

QUESTIONS_PATH = Path(__file__).parent / "data" / "prompt_questions.jsonl"
OUTPUT_DIR = Path("outputs/prompts")
SYSTEM = "cognitive_designer"
MAX_TOKENS = 320
_SHOWN = {
    "all_four": "all four parts",
    "in_order": "… in order",
    "copied": "a part copied from the prompt",
    "banned": "banned phrase",
}


@dataclass(frozen=True)
class Settings:
    """Whom to ask under which prompt; ``adapters`` are ``NAME=FILE``, ``route`` is one of them."""

    model: str
    system: str = SYSTEM
    adapters: list[str] = field(default_factory=list)
    route: str | None = None


@dataclass(frozen=True)
class Answers:
    """Texts in the order of the questions, and what they took."""

    texts: list[str]
    tokens: list[int]
    cut: int

    def to_json(self, verdicts: Sequence[Verdict]) -> dict[str, Any]:
        """Give the answers with what was judged of each."""
        return {
            "mean_tokens": round(sum(self.tokens) / len(self.tokens), 1),
            "cut": self.cut,
            "mean_parts": round(sum(len(one.parts) for one in verdicts) / len(verdicts), 2),
            "answers": [
                {"text": text, "parts": list(one.parts), **one.measures()}
                for text, one in zip(self.texts, verdicts, strict=True)
            ],
        }


def read_questions(path: Path) -> list[str]:
    """Read ``{"prompt"}`` a line.

    Raises:
        CommandError: There is no such file, or a line is no question; it is named ``file:line``.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(
            f"--questions: '{path}' cannot be read ({error}); expected a JSONL file"
        ) from error
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str) or not prompt.strip():
            raise CommandError(f'{path}:{number}: expected {{"prompt": "…"}}; correct this line')
        questions.append(prompt)
    if not questions:
        raise CommandError(f"--questions: '{path}' has no question; expected one a line")
    return questions


def ask(settings: Settings, questions: Sequence[str], is_prompted: bool, run: AskRunner) -> Answers:
    """Ask every question, with the system prompt or without it.

    Raises:
        CommandError: The model cannot be asked, or a question got no answer.
    """
    options = ["--temperature", "0", "--seed", "1", "--max-tokens", str(MAX_TOKENS)]
    for adapter in settings.adapters:
        options += ["--adapter", adapter]
    if settings.route is not None:
        options += ["--route", settings.route]
    if is_prompted:
        options += ["--system", settings.system]
    rows = [{"id": number, "prompt": prompt} for number, prompt in enumerate(questions)]
    answers = ask_model(settings.model, rows, options, run, needs=["finish_reason", "usage"])
    for reply in answers:
        if reply["error"]:
            raise CommandError(
                f"question {reply['id'] + 1} was not answered: {reply['error']}", MODEL
            )
    return Answers(
        [one["text"] for one in answers],
        [one["usage"]["completion_tokens"] for one in answers],
        sum(one["finish_reason"] == "length" for one in answers),
    )


def markdown(result: Mapping[str, Any]) -> str:
    """Write the table."""
    rows = []
    for name, one in result["measures"].items():
        shares = (percent(one[side], interval=True) for side in ("without", "with"))
        changed = f"{one['only_without']} / {one['only_with']}"
        cells = [_SHOWN.get(name, name), *shares, changed, f"{one['mcnemar_p']:.3g}"]
        rows.append("| " + " | ".join(cells) + " |")
    table, asked = "\n".join(rows), result["questions"]["asked"]
    sides = {"Without": result["without"], "With": result["with"]}
    averages = " ".join(
        f"{name}: {one['mean_parts']} parts and {one['mean_tokens']:.0f} tokens on average, {one['cut']} cut "
        f"off at {MAX_TOKENS}."
        for name, one in sides.items()
    )
    return f"""# Answers under `{result["system"]}`

{asked} questions to `{result["model"]}`, greedy. Wilson 95 % intervals in brackets; *changed*: answers
that have it only without / only with the prompt; p of McNemar's exact test.

| answers with | without | with the prompt | changed | p |
| --- | ---: | ---: | ---: | ---: |
{table}

{averages}
"""


def evaluate(
    settings: Settings, questions: Sequence[str], source: Path, output_dir: Path, run: AskRunner
) -> tuple[Path, Comparison]:
    """Ask, judge and write; return the JSON and what became of all four parts.

    Raises:
        CommandError: The model cannot be asked.
    """
    judged = {}
    # With the prompt first: a name that does not exist is found before anything is waited for.
    for side in ("with", "without"):
        log(f"evaluate prompt: {len(questions)} questions {side} --system {settings.system[:60]}")
        answers = ask(settings, questions, side == "with", run)
        judged[side] = answers, judge_answers(answers.texts)
    measures = compare_answers(judged["without"][1], judged["with"][1])
    result = {
        "model": settings.model,
        "adapters": settings.adapters,
        "route": settings.route,
        "system": settings.system,
        "questions": {"file": str(source), "asked": len(questions), "prompts": list(questions)},
        "measures": {name: one.to_json() for name, one in measures.items()},
        **{side: answers.to_json(verdicts) for side, (answers, verdicts) in judged.items()},
    }
    output = output_dir / "prompt_evaluation.json"
    write_atomically(output, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    table = markdown(result)
    write_atomically(output.with_suffix(".md"), table)
    log(table)
    return output, measures["all_four"]


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.evaluate_prompt",
        description="Does a model follow the four parts more often under a system prompt?",
    )
    parser.add_argument("--model", required=True, metavar="GGUF", help="what integration.ask takes")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a LoRA GGUF; repeatable",
    )
    parser.add_argument("--route", metavar="NAME|base", help="adapter that answers")
    parser.add_argument(
        "--system", default=SYSTEM, metavar="NAME|TEXT|@FILE", help=f"default: {SYSTEM}"
    )
    parser.add_argument(
        "--questions", type=Path, default=QUESTIONS_PATH, metavar="FILE", help="what to ask (JSONL)"
    )
    parser.add_argument(
        "--rows", type=int, default=0, metavar="N", help="ask only N, spread over the file"
    )
    parser.add_argument(
        "--output", type=Path, default=OUTPUT_DIR, metavar="DIR", help=f"default: {OUTPUT_DIR}"
    )
    return parser


def main(argv: Sequence[str] | None = None, run: AskRunner = run_ask) -> int:
    """Evaluate a prompt and print the path of the result."""
    options = build_parser().parse_args(argv)
    if options.rows < 0:
        raise CommandError(f"--rows: got {options.rows}, expected 0 (all) or more")
    every = read_questions(options.questions)
    questions = spread(every, options.rows)
    settings = Settings(options.model, options.system, options.adapter, options.route)
    output, parts = evaluate(settings, questions, options.questions, options.output, run)
    print(output, flush=True)
    if parts.with_prompt.hits <= parts.without.hits:
        raise CommandError(
            f"the prompt does not help: all four parts in {parts.with_prompt.hits} of {len(questions)} answers "
            f"with it, {parts.without.hits} without; read {output}, or take a larger model",
            FAILED,
        )
    return OK


if __name__ == "__main__":
    run_command(main)
