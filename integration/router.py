"""Train, explain and evaluate the router that chooses an adapter for a request.

python -m integration.router train
python -m integration.router explain "my wifi keeps dropping"
python -m integration.router evaluate scripts/data/adapters/router_test.jsonl
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from integration._cli import FAILED, OK, CommandError, log, read_utf8, run_command
from integration.router_config import DEFAULT_CONFIG, DEFAULT_ENCODER, DEFAULT_ROUTER

if TYPE_CHECKING:
    import numpy as np

    from integration.routing import Router

_MOST_WORDS, _SHOWN_WORDS = 40, 8


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m integration.router",
        description="The router that chooses an adapter for a request, and says why.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="learn from the examples of adapters.yaml")
    train.add_argument(
        "--config",
        type=Path,
        default=DEFAULT_CONFIG,
        metavar="YAML",
        help=f"default {DEFAULT_CONFIG}",
    )
    train.add_argument(
        "--encoder",
        type=Path,
        default=DEFAULT_ENCODER,
        metavar="GGUF",
        help=f"default {DEFAULT_ENCODER}",
    )
    train.add_argument(
        "--output",
        type=Path,
        default=DEFAULT_ROUTER,
        metavar="FILE",
        help=f"default {DEFAULT_ROUTER}",
    )
    explain = commands.add_parser("explain", help="say where a request goes, and why")
    explain.add_argument("request", nargs="?", help="read from stdin when left out")
    evaluate = commands.add_parser("evaluate", help="count how often it is right on a JSONL file")
    evaluate.add_argument(
        "file", type=Path, help="rows with prompt and adapter, or with messages and adapters"
    )
    for command in (explain, evaluate):
        command.add_argument(
            "--router",
            type=Path,
            default=DEFAULT_ROUTER,
            metavar="FILE",
            help=f"default {DEFAULT_ROUTER}",
        )
        command.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the three commands."""
    options = build_parser().parse_args(argv)
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    if options.command == "train":
        return _train(options)
    if options.command == "explain":
        return _explain(options)
    return _evaluate(options)


def _known(output: Path, encoder_identity: str) -> "dict[str, np.ndarray]":
    """Give the embeddings that the router to be replaced holds: most examples are still the same."""
    from integration.router_file import load_router

    try:
        data = load_router(output)
    except CommandError:  # there is none, or it is of another version: it is replaced anyway
        return {}
    if data.settings.encoder_identity != encoder_identity:
        return {}
    return dict(zip(data.settings.texts, data.examples, strict=True))


def _train(options: argparse.Namespace) -> int:
    from integration.router_config import load_config, note_weak_classes

    config = load_config(options.config)
    if options.output.suffix != ".npz":
        raise CommandError(f"--output: '{options.output}' has no .npz at its end; add it")
    from integration.embedding import Encoder
    from integration.router_file import save_router
    from integration.router_report import training_text
    from integration.router_training import train_router

    # One thread: two wait for each other whenever something else runs, and this is not urgent.
    encoder = Encoder(options.encoder, n_threads=1)
    note_weak_classes(config)
    data, report = train_router(config, encoder, _known(options.output, encoder.identity))
    save_router(data, options.output)
    _write_report(report, options.output.with_name("report.json"))
    log(training_text(report))
    print(options.output)
    return OK


def _write_report(report: dict[str, Any], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(report, ensure_ascii=False, indent=2), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise CommandError(
            f"the report cannot be written to '{path}': {error.strerror}; choose another --output",
            FAILED,
        ) from error


def _explain(options: argparse.Namespace) -> int:
    from integration.router_report import explanation_text
    from integration.routing import Router

    if options.request is None and sys.stdin.isatty():
        raise CommandError("no request; give one as the argument or on stdin")
    if options.request is None:
        read_utf8(sys.stdin)
    text = sys.stdin.read() if options.request is None else options.request
    found = explain(Router.load(options.router), text)
    print(
        json.dumps(found, ensure_ascii=False, indent=2) if options.json else explanation_text(found)
    )
    return OK


def _evaluate(options: argparse.Namespace) -> int:
    from integration.router_evaluation import evaluate, load_cases
    from integration.router_file import load_router
    from integration.router_report import evaluation_text
    from integration.routing import Router

    cases = load_cases(options.file, load_router(options.router).settings.names)
    result = evaluate(Router.load(options.router), cases)
    print(
        json.dumps(result, ensure_ascii=False, indent=2)
        if options.json
        else evaluation_text(result)
    )
    return OK


def explain(router: "Router", text: str) -> dict[str, Any]:
    """Give the route of a request, the nearest examples, and the words that mattered."""
    route = router.decide(text)
    empty = not text.strip()
    probabilities = {} if empty else router.probabilities(text)
    likeliest = max(probabilities, key=probabilities.__getitem__) if probabilities else None
    return {
        "adapter": route.adapter,
        "reason": route.reason,
        "scores": route.scores,
        "likeliest": likeliest,
        "nearest": []
        if empty
        else [
            {"similarity": similarity, "adapter": name, "example": example}
            for similarity, name, example in router.nearest(text)
        ],
        "words": word_effects(router, text, likeliest) if likeliest else [],
    }


def word_effects(router: "Router", text: str, name: str) -> list[dict[str, Any]]:
    """Give what the probability of a class gains from each word: with it, less without it.

    Of a long text only the first words are tried; those that matter most come first.
    """
    words = text.split()
    whole = router.probabilities(" ".join(words))[name]
    effects: list[dict[str, Any]] = []
    for at, word in enumerate(words[:_MOST_WORDS] if len(words) > 1 else []):
        rest = " ".join(words[:at] + words[at + 1 :])
        change = whole - router.probabilities(rest)[name]
        effects.append({"word": word, "change": round(change, 4)})
    return sorted(effects, key=lambda one: -abs(one["change"]))[:_SHOWN_WORDS]


if __name__ == "__main__":
    run_command(main)
