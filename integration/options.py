"""Command-line options that `ask` and `chat` share, and what they load."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from integration._cli import CommandError, log
from integration.ask_format import AUTO, BASE, Request

if TYPE_CHECKING:
    from integration.adapters import Adapters
    from integration.backend import ChatBackend
    from integration.decoding import Settings
    from integration.routing import Router

# Adapters that keep their conversation in the context; those of further ones are copied aside.
_MAX_CONVERSATIONS = 4


@dataclass
class Session:
    """A loaded model with its adapters, tools and decoding settings.

    Attributes:
        adapters: None where the model is no GGUF.
        seed: That of every answer of ``ask``.
        router: Chooses adapters under ``--route auto``.
        repeat_penalty: What the user asked for.
    """

    model: "ChatBackend"
    adapters: "Adapters | None"
    settings: "Settings"
    tools: Sequence[Any]
    system: str | None
    seed: int
    approve: bool = False
    dry_run: bool = False
    router: "Router | None" = None
    repeat_penalty: float | None = None

    def settings_for(self, adapter: str | None) -> "Settings":
        """Give the settings to decode with under an adapter.

        Adapters repeat on purpose (brackets, set phrases) and have learnt where an answer ends. Of the
        shipped ones' answers to 60 requests each, 58 instead of 53 held Python that parses without the
        penalty, and 60 instead of 40 had their closing sentence; of valid JSON there were 53 and 55.
        """
        if self.repeat_penalty is not None or adapter in (None, BASE):
            return self.settings
        return replace(self.settings, repeat_penalty=1.0)

    def choose_adapter(self, request: Request) -> None:
        """Let the router choose who answers a request, or check what the request asks for.

        Raises:
            CommandError: Exit 2; an unknown name, a bad weight, ``auto`` without a router, or an
                adapter for a model that has none.
        """
        if request.adapter == AUTO:
            if self.router is None or self.adapters is None:
                raise CommandError("adapter: 'auto' needs the router; start with --route auto")
            texts = [turn["content"] for turn in request.messages if turn["role"] == "user"]
            route = self.router.route(texts, self.adapters.names)
            request.adapter = route.adapter or BASE
            request.scores, request.reason = route.scores, route.reason
        elif self.adapters is not None and request.adapter is not None:
            request.adapter = self.adapters.check(request.adapter)
        elif request.adapter not in (None, BASE):
            raise CommandError(
                f"adapter: '{request.adapter}' was asked for, but the model '{self.model.name}' takes "
                "no adapters; give a GGUF as --model"
            )


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


def _penalty(text: str) -> float:
    value = float(text)
    if not 0.5 <= value <= 2:
        raise argparse.ArgumentTypeError(f"got {text}, expected 0.5 to 2")
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
        "--route",
        default=BASE,
        metavar="auto|NAME|base",
        help="adapter that answers: a name, several with weights (json:0.5+coding:0.5), or auto = the "
        "router chooses for each request (default: base)",
    )
    parser.add_argument(
        "--router", type=Path, metavar="FILE", help="what integration.router train wrote"
    )
    parser.add_argument("--max-tokens", type=positive_int, default=512, help="longest answer")
    parser.add_argument(
        "--temperature", type=non_negative_float, default=0.2, help="0 = always the likeliest token"
    )
    parser.add_argument(
        "--repeat-penalty",
        type=_penalty,
        metavar="P",
        help="1 = none; default: 1.1, and 1 under an adapter",
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


def open_session(
    options: argparse.Namespace, n_sequences: int = 1, keeps_conversations: bool = False
) -> Session:
    """Load the model and everything the options name.

    Args:
        options: Of a parser with ``add_model_options``.
        n_sequences: Requests to decode side by side, where the model can.
        keeps_conversations: Whoever switches adapters comes back to the conversation of each.

    Raises:
        CommandError: With the exit code of the contract.
    """
    from integration.adapters import find_adapter_files, parse_adapter_options
    from integration.decoding import Settings, draw_seed
    from integration.models import load_model
    from integration.system_prompts import load_system_prompt

    system = load_system_prompt(options.system)
    files = parse_adapter_options(options.adapter)
    router = _open_router(options) if options.route == AUTO else None
    if router is not None:
        files = files or find_adapter_files(router.files)
        for name in files.keys() - set(router.names):
            log(f"note: the router does not know the adapter '{name}' and never chooses it")
    if keeps_conversations:
        n_sequences = max(n_sequences, min(1 + len(files), _MAX_CONVERSATIONS))
    model = load_model(options.model, options.n_ctx, options.threads, n_sequences, options.template)
    adapters = _open_adapters(model, options, files)
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
    if options.repeat_penalty is not None:
        settings.repeat_penalty = options.repeat_penalty
    return Session(
        model,
        adapters,
        settings,
        tools,
        system,
        seed,
        options.approve,
        router=router,
        repeat_penalty=options.repeat_penalty,
    )


def _open_router(options: argparse.Namespace) -> "Router":
    from integration.router_config import DEFAULT_ROUTER
    from integration.routing import Router

    return Router.load(options.router or DEFAULT_ROUTER)


def _open_adapters(
    model: "ChatBackend", options: argparse.Namespace, files: dict[str, Path]
) -> "Adapters | None":
    from integration.adapters import Adapters
    from integration.local_model import LocalModel

    if isinstance(model, LocalModel):
        adapters = Adapters(model, files)
        if options.route != AUTO:
            adapters.use(options.route)
        return adapters
    if files or options.route != BASE:
        raise CommandError(
            f"--adapter and --route work on a GGUF, but --model is '{options.model}'; give adapters "
            "to the server, or export the base to GGUF"
        )
    return None
