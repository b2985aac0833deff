"""Command-line options that `ask` and `chat` share, and what they load."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from integration._cli import CommandError

if TYPE_CHECKING:
    from integration.adapters import Adapters
    from integration.backend import ChatBackend
    from integration.decoding import Settings


@dataclass
class Session:
    """A loaded model with its adapters, tools and decoding settings.

    ``adapters`` is None where the model is no GGUF; ``seed`` is that of every answer of ``ask``.
    """

    model: "ChatBackend"
    adapters: "Adapters | None"
    settings: "Settings"
    tools: Sequence[Any]
    system: str | None
    seed: int
    approve: bool = False
    dry_run: bool = False


def positive_int(text: str) -> int:
    """Parse a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected at least 1")
    return value


def non_negative_float(text: str) -> float:
    """Parse a number of at least 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text}, expected 0 or more")
    return value


def add_model_options(parser: argparse.ArgumentParser, tools_default: bool) -> None:
    """Add the options of the contract."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="GGUF",
        help="the model file; a Hugging Face folder or name and the URL of an OpenAI-compatible "
        "server will do as well",
    )
    parser.add_argument(
        "--tools",
        action=argparse.BooleanOptionalAction,
        default=tools_default,
        help="let the model call tools",
    )
    parser.add_argument(
        "--approve", action="store_true", help="ask before each call of a tool (on the terminal)"
    )
    parser.add_argument(
        "--system", metavar="NAME|TEXT|@FILE", help="system prompt, such as cognitive_designer"
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a LoRA GGUF; repeatable",
    )
    parser.add_argument(
        "--route", default="base", metavar="NAME|base", help="adapter that answers (default: base)"
    )
    parser.add_argument("--max-tokens", type=positive_int, default=512, help="longest answer")
    parser.add_argument(
        "--temperature", type=non_negative_float, default=0.2, help="0 = always the likeliest token"
    )
    parser.add_argument("--seed", type=int, help="repeat an answer; drawn and reported by default")
    parser.add_argument("--threads", type=positive_int, help="default: what this process may use")
    parser.add_argument("--n-ctx", type=positive_int, help="context in tokens; default: the file's")
    parser.add_argument(
        "--template",
        metavar="NAME|FILE",
        help="chat template for a file that has none: chatml, alpaca, or Jinja in a file",
    )
    parser.add_argument(
        "--timeout",
        type=non_negative_float,
        default=0.0,
        metavar="S",
        help="seconds an answer may take",
    )


def open_session(options: argparse.Namespace, n_sequences: int = 1) -> Session:
    """Load the model and everything the options name.

    Args:
        options: Of a parser with ``add_model_options``.
        n_sequences: Requests to decode side by side, where the model can.

    Raises:
        CommandError: With the exit code of the contract.
    """
    from integration.decoding import Settings, draw_seed
    from integration.models import load_model
    from integration.system_prompts import load_system_prompt

    if options.route == "auto":
        raise CommandError(
            "--route auto: no router has been trained here; name an adapter or base instead"
        )
    system = load_system_prompt(options.system)
    model = load_model(options.model, options.n_ctx, options.threads, n_sequences, options.template)
    adapters = _open_adapters(model, options)
    tools: Sequence[Any] = ()
    if options.tools:
        from tools import TOOLS

        tools = TOOLS
    seed = draw_seed() if options.seed is None else options.seed
    settings = Settings(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        timeout_s=options.timeout,
        seed=seed,
    )
    return Session(model, adapters, settings, tools, system, seed, options.approve)


def _open_adapters(model: "ChatBackend", options: argparse.Namespace) -> "Adapters | None":
    from integration.adapters import BASE, Adapters, parse_adapter_options
    from integration.local_model import LocalModel

    files = parse_adapter_options(options.adapter)
    if isinstance(model, LocalModel):
        adapters = Adapters(model, files)
        adapters.use(options.route)
        return adapters
    if files or options.route != BASE:
        raise CommandError(
            f"--adapter and --route work on a GGUF, but --model is '{options.model}'; give adapters "
            "to the server, or export the base to GGUF"
        )
    return None
