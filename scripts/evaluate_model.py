"""Base against tuned: held-out loss, instructions followed, length and repetition of answers.

Reads ``adapter/``, ``data/eval.jsonl`` and the files in ``gguf/``; writes ``evaluation.json``, the report
(see `scripts.report`), and what was measured, so that an interrupted run goes on, into ``evaluation/``.

    python -m scripts.evaluate_model --config scripts/recipes/smollm2-135m-cpu.yaml
    python -m scripts.evaluate_model --config RECIPE --ifeval input_data.jsonl --ask base,tuned
"""

import argparse
import contextlib
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts import generation, held_out
from scripts._cli import FAILED, MODEL, OK, CommandError, log, run_command
from scripts.answer_style import Answer
from scripts.ask_model import AskRunner, run_ask, spread
from scripts.conversations import RowRejectedError, to_conversation
from scripts.evaluation_gguf import Runner, affordable, answer_prompts, measure, run_measure
from scripts.evaluation_hf import BASE, TUNED, HuggingFaceModels
from scripts.evaluation_result import Contender, Measured, to_json
from scripts.exported_files import exported_types, has_current_export
from scripts.ifeval import Prompt, read_prompts
from scripts.prepare_data import load_rows
from scripts.provenance import sha256_file
from scripts.read_rows import check_unreadable, open_rows
from scripts.recipe import TrainingRecipe, parse_recipe, write_atomically
from scripts.render import EncodedConversation, encode_rows
from scripts.report import write_report

PROMPTS_PATH = Path(__file__).parent / "data" / "ifeval_prompts.jsonl"
OUTPUT_NAME = "evaluation.json"
FOLDER = "evaluation"
# Answers to a published file are cut where lm-eval cuts them.
IFEVAL_TOKENS = 1280
HfFactory = Callable[[TrainingRecipe], HuggingFaceModels]


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        eval_file: Held-out rows other than the run's.
        prompts_path: Prompts with verifiable rules.
        limit: Ask only so many of them; 0 asks all.
        room: Tokens of an answer.
        asked: Contenders that answer; None for all.
    """

    eval_file: Path | None
    prompts_path: Path
    limit: int
    room: int
    asked: list[str] | None


def _key(*parts: Any) -> str:
    """Hash what a measurement depends on, this program's own ways included."""
    sources = [sha256_file(Path(str(module.__file__))) for module in (generation, held_out)]
    return hashlib.sha256(json.dumps([sources, *parts]).encode()).hexdigest()[:16]


def _read_eval_rows(
    recipe: TrainingRecipe, eval_file: Path | None
) -> tuple[Path, list[dict[str, Any]]]:
    if eval_file is None:
        path = recipe.run_dir / "data" / "eval.jsonl"
        if not path.is_file():
            raise CommandError(
                f"'{path}' does not exist; prepare the data (python -m scripts.prepare_data --config …), "
                "or name other rows: --eval-file FILE"
            )
        return path, load_rows(path)
    rows, unreadable, rejected = [], [], Counter[str]()
    for raw in open_rows(str(eval_file)):
        if raw.error is not None:
            unreadable.append(f"{raw.where}: {raw.error}")
            continue
        try:
            rows.append({"messages": to_conversation(raw.value).messages})
        except RowRejectedError as error:
            rejected[str(error)] += 1
    total = len(rows) + len(unreadable) + rejected.total()
    check_unreadable(str(eval_file), len(unreadable), total, *unreadable[:1] or [""])
    for reason, count in [("unreadable", len(unreadable)), *rejected.most_common()]:
        if count:
            log(f"evaluate: {count} rows of {eval_file} left out: {reason}")
    if not rows:
        raise CommandError(f"--eval-file '{eval_file}' has no usable conversation")
    log(f"evaluate: {len(rows)} of {total} rows of {eval_file} are usable")
    return eval_file, rows


class _Evaluation:
    """One evaluation of a run: measures what ``evaluation/`` does not hold yet."""

    def __init__(
        self,
        recipe: TrainingRecipe,
        rows: Sequence[EncodedConversation],
        prompts: Sequence[Prompt],
        settings: Settings,
        hf: HuggingFaceModels,
    ) -> None:
        self._folder = recipe.run_dir / FOLDER
        self._recipe, self._rows, self._prompts = recipe, rows, prompts
        self._settings, self._hf = settings, hf
        self._rows_key = _key([[row.input_ids, row.labels] for row in rows])
        asked = [[one.id, one.prompt] for one in prompts]
        self._prompts_key = _key(asked, settings.room)

    def _measured(self, name: str, key: str, measure_now: Callable[[], Measured]) -> Measured:
        path = self._folder / f"rows-{name}-{_key(key, self._rows_key)}.json"
        if path.is_file():
            found: Measured = json.loads(path.read_text(encoding="utf-8"))
            return found
        log(f"evaluate: {name}: {len(self._rows)} held-out rows")
        started = time.monotonic()
        found = measure_now()
        found["seconds"] = round(time.monotonic() - started, 1)
        write_atomically(path, json.dumps(found, ensure_ascii=False) + "\n")
        return found

    def _answers_path(self, name: str, key: str, suffix: str) -> Path:
        return self._folder / f"answers-{name}-{_key(key, self._prompts_key)}{suffix}"

    def _is_asked(self, name: str) -> bool:
        return bool(self._prompts) and (
            self._settings.asked is None or name in self._settings.asked
        )

    def huggingface(self, role: str, adapter: str) -> Contender:
        """Measure base or tuned."""
        recipe = self._recipe
        base = [recipe.model_name_or_path, recipe.model_revision, recipe.prompt_format]
        key = _key(base, recipe.load_in_4bit, adapter if role == TUNED else None)

        def measure_now() -> Measured:
            losses = self._hf.losses(role, self._rows)
            return {"rows": losses, "questions": self._hf.answer_questions(role)}

        measured = self._measured(role, key, measure_now)
        answers: list[Answer] = []
        seconds = 0.0
        if self._is_asked(role):
            path = self._answers_path(role, key, ".json")
            answers, seconds = self._hf.answer_prompts(
                role, self._prompts, self._settings.room, path
            )
        return Contender(f"{role} (HF)", "hf", role, measured, answers, seconds)

    def gguf(self, name: str, path: Path, ask: AskRunner, run: Runner) -> Contender:
        """Measure a file of the export."""
        key = sha256_file(path)
        rows = affordable(path, self._rows)
        if len(rows) < len(self._rows):
            log(f"evaluate: {name}: {len(rows)} of {len(self._rows)} held-out rows, for time")
        measured = self._measured(name, key, lambda: measure(path, rows, run))
        answers: list[Answer] = []
        seconds = 0.0
        if self._is_asked(name):
            log(f"evaluate: {name}: asking {len(self._prompts)} prompts")
            output = self._answers_path(name, key, ".jsonl")
            answers, seconds = answer_prompts(path, self._prompts, self._settings.room, output, ask)
        return Contender(name, "gguf", TUNED, measured, answers, seconds)


def _check_asked(asked: Sequence[str] | None, names: Sequence[str]) -> None:
    if unknown := [name for name in asked or [] if name not in names]:
        raise CommandError(
            f"--ask: no contender {', '.join(unknown)} here, expected some of {', '.join(names)}; "
            "files are asked once they are exported"
        )


def evaluate(
    recipe: TrainingRecipe,
    settings: Settings,
    ask: AskRunner = run_ask,
    run: Runner = run_measure,
    hf_models: HfFactory = HuggingFaceModels,
) -> Path:
    """Measure every contender; return ``evaluation.json``.

    Args:
        recipe: The run.
        settings: What to measure.
        ask: Runs `integration.ask`.
        run: Runs `export.measure_gguf`.
        hf_models: Gives the models in Hugging Face's format.

    Raises:
        CommandError: There is no adapter yet, an input is unusable, or a contender failed.
    """
    weights = recipe.run_dir / "adapter" / "adapter_model.safetensors"
    if not weights.is_file():
        raise CommandError(
            f"'{weights.parent}' has no adapter; train one: python -m scripts.train_lora --config …",
            MODEL,
        )
    every = read_prompts(settings.prompts_path)
    prompts = spread(every, settings.limit) if settings.asked != [] else []
    is_exported = has_current_export(recipe.run_dir)
    if not is_exported and (recipe.run_dir / "gguf").is_dir():
        log(
            f"evaluate: the files in '{recipe.run_dir / 'gguf'}' are of an earlier adapter: left out"
        )
    files = exported_types(recipe.run_dir, None) if is_exported else []
    _check_asked(settings.asked, [BASE, TUNED, *(file.name for file in files)])
    eval_path, raw_rows = _read_eval_rows(recipe, settings.eval_file)

    from scripts.model_loading import load_tokenizer

    rows, _ = encode_rows(load_tokenizer(recipe), raw_rows, recipe.max_length, "held out")
    if not rows:
        raise CommandError(
            f"no row of '{eval_path}' has an answer that ends within {recipe.max_length} tokens; "
            "give shorter rows, or a larger --max-length"
        )
    started = time.monotonic()
    work = _Evaluation(recipe, rows, prompts, settings, hf_models(recipe))
    adapter = sha256_file(weights)
    contenders = [work.huggingface(role, adapter) for role in (BASE, TUNED)]
    contenders += [work.gguf(file.name, file.path, ask, run) for file in files]
    result = to_json(recipe, adapter, eval_path, contenders, prompts)
    result["ifeval"] = {
        "file": os.path.relpath(settings.prompts_path),
        "prompts": len(every),
        "asked": len(prompts),
        "answer_tokens": settings.room,
        "decoding": "greedy",
    }
    output = recipe.run_dir / OUTPUT_NAME
    write_atomically(output, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    base, now = result["base"]["loss"], result["tuned"]["loss"]
    log(f"evaluate: held-out loss {base:.4f} -> {now:.4f} ({now / base - 1:+.1%})")
    log(f"evaluate: done in {time.monotonic() - started:.0f} s; report: {write_report(recipe)}")
    return output


def build_parser() -> argparse.ArgumentParser:
    """Build the command line; the recipe's flags are added by ``parse_recipe``."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.evaluate_model",
        description="Base against tuned: evaluation.json and report.html of a run.",
    )
    parser.add_argument(
        "--eval-file", type=Path, metavar="FILE", help="held-out rows other than the run's"
    )
    parser.add_argument(
        "--ifeval",
        type=Path,
        metavar="FILE",
        help="prompts with verifiable rules (JSONL as IFEval publishes them) instead of ours",
    )
    parser.add_argument(
        "--ifeval-rows", type=int, default=0, metavar="N", help="ask only N of --ifeval; 0 = all"
    )
    parser.add_argument(
        "--ifeval-tokens",
        type=int,
        default=IFEVAL_TOKENS,
        metavar="N",
        help=f"longest answer to --ifeval; default: {IFEVAL_TOKENS}, as lm-eval has it",
    )
    parser.add_argument(
        "--ask",
        metavar="NAMES",
        help="who answers prompts, such as base,tuned,Q8_0; default: all, with --ifeval base,tuned",
    )
    return parser


def read_settings(recipe: TrainingRecipe, options: argparse.Namespace) -> Settings:
    """Turn options into settings.

    Raises:
        CommandError: A value is out of range, or an option has nothing to act on.
    """
    for name in ("ifeval_rows", "ifeval_tokens"):
        least = 0 if name == "ifeval_rows" else 1
        if getattr(options, name) < least:
            flag = "--" + name.replace("_", "-")
            raise CommandError(f"{flag}: got {getattr(options, name)}, expected {least} or more")
    asked = None if options.ask is None else [one.strip() for one in options.ask.split(",")]
    if options.ifeval is not None:
        asked = [BASE, TUNED] if asked is None else asked
        limit, room = options.ifeval_rows, options.ifeval_tokens
        return Settings(options.eval_file, options.ifeval, limit, room, asked)
    if options.ifeval_rows:
        raise CommandError(
            "--ifeval-rows goes with --ifeval FILE; of the shipped prompts, --eval-prompts N are asked"
        )
    if recipe.eval_prompts == 0:
        asked = []
    limit = max(0, recipe.eval_prompts)
    return Settings(options.eval_file, PROMPTS_PATH, limit, recipe.eval_answer_tokens, asked)


def main(
    argv: Sequence[str] | None = None,
    ask: AskRunner = run_ask,
    run: Runner = run_measure,
    hf_models: HfFactory = HuggingFaceModels,
) -> int:
    """Evaluate a run; exit 1 when the held-out loss did not fall."""
    recipe, options = parse_recipe("", argv, build_parser())
    with contextlib.redirect_stdout(sys.stderr):
        output = evaluate(recipe, read_settings(recipe, options), ask, run, hf_models)
    print(output)
    result = json.loads(output.read_text(encoding="utf-8"))
    return OK if result["tuned"]["loss"] < result["base"]["loss"] else FAILED


if __name__ == "__main__":
    run_command(main)
