"""Chat with a GGUF model in the terminal: streaming, with tools.

python -m integration.chat --model outputs/smollm2-135m-cpu/gguf/SmolLM2-135M-Instruct-cpu-v1.0-Q8_0.gguf
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from integration._cli import OK, read_utf8, run_command
from integration.chat_answers import Chat
from integration.chat_commands import Commands
from integration.chat_input import open_editor, read_line, read_message
from integration.chat_screen import Screen
from integration.options import Session, add_model_options, open_session

if TYPE_CHECKING:
    from integration.agent import Reply


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m integration.chat", description="Chat with a GGUF model."
    )
    add_model_options(parser, tools_default=True)
    return parser


def talk(session: Session, respond: "Callable[..., Reply]") -> int:
    """Chat until the end of the input.

    Args:
        session: The model and everything the options name.
        respond: ``integration.agent.respond``.
    """
    screen = Screen(sys.stdout, sys.stderr)
    at_terminal = sys.stdin.isatty() and (screen.out_is_terminal or screen.err_is_terminal)
    chat = Chat(session, screen, respond, at_terminal)
    commands = Commands(chat)
    read: Callable[[], str] = read_line
    if at_terminal:
        editor = open_editor(commands.choices)
        read = lambda: read_message(editor)  # noqa: E731
    # A model whose prompt format is unknown is refused now, not at the first message.
    session.model.warm_up()
    size = f", context {session.model.n_ctx}" if session.model.n_ctx else ""
    screen.note(f"{session.model.name}{size}, seed {session.seed}; /help lists the commands")
    while True:
        try:
            line = read().strip()
            if commands.matches(line):
                if not commands.run(line):
                    return OK
            elif line:
                chat.answer(line)
        except EOFError:
            return OK
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            screen.note("Ctrl-D or /exit leaves")


def main(argv: Sequence[str] | None = None) -> int:
    """Load the model and chat with it."""
    options = build_parser().parse_args(argv)
    read_utf8(sys.stdin)
    # What the terminal's character set lacks is shown, and never ends the chat.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    session = open_session(options, keeps_conversations=True)
    from integration.agent import respond

    return talk(session, respond)


if __name__ == "__main__":
    run_command(main)
