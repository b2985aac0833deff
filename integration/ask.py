"""One-shot and batch questions for shell pipelines.

python -m integration.ask --model m.gguf "Explain recursion with an example."
cat prompts.jsonl | python -m integration.ask --model m.gguf --jsonl > answers.jsonl
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from integration._cli import OK, TIMEOUT, TOOL, CommandError, log, read_utf8, run_command
from integration.ask_format import Request, answer_object, from_prompt
from integration.chat_screen import visible
from integration.options import Session, add_model_options, open_session, positive_int

if TYPE_CHECKING:
    from integration.agent import Reply
    from tools.protocol import ToolCall

PARALLEL = 4


def _respond(session: Session, request: Request, stream: bool) -> "Reply":
    from integration.agent import respond

    session.choose_adapter(request)
    if session.adapters is not None and request.adapter is not None:
        session.adapters.use(request.adapter)
    if request.reason and stream:
        log(f"route: {request.adapter} ({visible(request.reason)})")

    def show(text: str) -> None:
        sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()

    return respond(
        session.model,
        request.messages,
        session.settings_for(request.adapter),
        session.tools,
        on_text=show if stream else None,
        approve=approve_on_terminal if session.approve else None,
        dry_run=session.dry_run,
    )


def _exit_code(reply: "Reply", timeout_s: float) -> int:
    if reply.finish_reason == "timeout":
        log(f"error: no whole answer within {timeout_s:g} s; raise --timeout or lower --max-tokens")
        return TIMEOUT
    if reply.error is not None:
        log(f"error: the model's tool call failed: {reply.error.removeprefix('error: ')}")
        return TOOL
    if reply.finish_reason == "length":
        log("note: the answer was cut at --max-tokens or at the end of the context")
    return OK


def approve_on_terminal(call: "ToolCall") -> bool:
    """Ask on the terminal whether a tool may be run; stdin and stdout belong to the pipeline.

    Raises:
        CommandError: Exit 2; there is no terminal.
    """
    try:
        with open("/dev/tty", "r+", buffering=1, encoding="utf-8") as terminal:
            arguments = json.dumps(call.arguments, ensure_ascii=False)
            terminal.write(visible(f"run {call.name}({arguments})? [y/N] "))
            return terminal.readline().strip().casefold() in {"y", "yes"}
    except OSError as error:
        raise CommandError(
            "--approve asks on the terminal, and there is none; leave it out in a pipeline"
        ) from error


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m integration.ask", description="Ask a GGUF model, once or line by line."
    )
    parser.add_argument("prompt", nargs="?", help="the question; read from stdin when left out")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the answer as one JSON object")
    form.add_argument(
        "--jsonl", action="store_true", help="one request a line from stdin, one object a line out"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="--jsonl: write the objects here, not to stdout"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="--jsonl: go on with --output, skipping requests whose id (or prompt) is in it",
    )
    parser.add_argument(
        "--parallel",
        type=positive_int,
        metavar="N",
        help=f"--jsonl: requests decoded side by side (default {PARALLEL}); 1 gives the same text "
        "whatever else is asked",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="--tools: give the call that the model makes, run none",
    )
    parser.add_argument(
        "--free-calls",
        action="store_true",
        help="--tools: decode calls without the grammar, to see what the model does by itself",
    )
    add_model_options(parser, tools_default=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Answer a prompt, or every line of stdin."""
    options = build_parser().parse_args(argv)
    read_utf8(sys.stdin)
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    if options.jsonl:
        return _run_lines(options)
    if options.output or options.resume or options.parallel:
        raise CommandError("--output, --resume and --parallel go with --jsonl; add it")
    if options.prompt is None and sys.stdin.isatty():
        raise CommandError("no prompt; give one as the argument or on stdin")
    prompt = sys.stdin.read() if options.prompt is None else options.prompt
    if not prompt.strip():
        raise CommandError("the prompt is empty; expected some text")
    session = _open(options)
    request = from_prompt(prompt.strip(), session.system, options.route)
    reply = _respond(session, request, stream=not options.json)
    if options.json:
        log(f"seed {session.seed}")
        print(json.dumps(answer_object(request, reply), ensure_ascii=False, indent=2))
    else:
        print()
        for call in reply.tool_calls:
            arguments = json.dumps(call.arguments, ensure_ascii=False)
            log(visible(f"tool: {call.name}({arguments})"))
    return _exit_code(reply, options.timeout)


def _open(options: argparse.Namespace, n_sequences: int = 1) -> Session:
    session = open_session(options, n_sequences)
    session.dry_run = options.dry_run
    session.settings.free_calls = options.free_calls
    return session


def _run_lines(options: argparse.Namespace) -> int:
    from integration.lines import answer_lines, open_output

    if options.prompt is not None:
        raise CommandError("--jsonl reads its prompts from stdin; leave the argument out")
    if options.approve:
        raise CommandError("--approve asks a person, --jsonl has none; leave one of them out")
    if options.resume and options.output is None:
        raise CommandError("--resume goes on with a file; name it with --output FILE")
    with open_output(options.output, options.resume) as output:
        session = _open(options, options.parallel or PARALLEL)
        log(f"seed {session.seed}")
        return answer_lines(session, options.route, sys.stdin, output)


if __name__ == "__main__":
    run_command(main)
