"""Chat with a GGUF model in the terminal: streaming, with tools.

python -m integration.chat --model outputs/smollm2-135m-cpu/gguf/SmolLM2-135M-Instruct-cpu-v1.0-Q8_0.gguf
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from integration._cli import CONTEXT, OK, CommandError, run_command
from integration.options import Session, add_model_options, open_session

if TYPE_CHECKING:
    from integration.agent import CallRecord

HELP = """/tools [on|off]    list the tools, or switch calling on and off
/adapter [NAME]    list the adapters, or activate one (base = none)
/system [TEXT]     show or set the system prompt (NAME, TEXT or @FILE)
/save FILE         write the conversation as JSON (never over an existing file)
/reset             forget the conversation
/help              this list
/exit              leave (also Ctrl-D); Ctrl-C stops an answer and keeps it"""

_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def visible(text: str) -> str:
    """Show control characters instead of sending them to the terminal."""
    return _UNSAFE.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


class Chat:
    """A conversation and the commands on it."""

    def __init__(self, session: Session) -> None:
        self.session, self.system = session, session.system
        self.tools = session.tools
        self.messages: list[dict[str, str]] = []

    def prompt_messages(self) -> list[dict[str, str]]:
        """Give the conversation with its system turn."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + self.messages

    def answer(self, text: str) -> None:
        """Answer one user turn, streaming to stdout; Ctrl-C keeps what came so far."""
        from integration.agent import respond

        self.messages.append({"role": "user", "content": text})
        shown: list[str] = []

        def show(piece: str) -> None:
            shown.append(piece)
            print(visible(piece), end="", flush=True)

        try:
            respond(
                self.session.model,
                self.prompt_messages(),
                self.session.settings,
                self.tools,
                on_text=show,
                on_call=_show_call,
            )
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        except CommandError as error:
            self.messages.pop()
            if error.exit_code != CONTEXT:
                raise
            print(f"error: {error}; /reset starts anew", file=sys.stderr)
            return
        print()
        if shown:
            self.messages.append({"role": "assistant", "content": "".join(shown)})
        else:
            self.messages.pop()

    def command(self, line: str) -> bool:
        """Run a slash command; False ends the chat."""
        name, _, argument = line[1:].partition(" ")
        argument = argument.strip()
        if name in {"exit", "quit"}:
            return False
        commands = {
            "help": lambda _: print(HELP),
            "tools": self._tools,
            "adapter": self._adapter,
            "system": self._system,
            "save": self._save,
            "reset": self._reset,
        }
        if name not in commands:
            print(f"error: no command '/{name}'; /help lists them", file=sys.stderr)
            return True
        try:
            commands[name](argument)
        except CommandError as error:
            print(f"error: {error}", file=sys.stderr)
        return True

    def _tools(self, argument: str) -> None:
        from tools import TOOLS
        from tools.protocol import describe_tool

        if argument in {"on", "off"}:
            self.tools = TOOLS if argument == "on" else ()
        elif argument:
            raise CommandError(f"/tools: got '{argument}', expected on or off")
        print("tools are " + ("on" if self.tools else "off"))
        for tool in TOOLS:
            print(describe_tool(tool))

    def _adapter(self, argument: str) -> None:
        if argument:
            self.session.adapters.use(argument)
        for name in self.session.adapters.names:
            print(("* " if name == self.session.adapters.active else "  ") + name)

    def _system(self, argument: str) -> None:
        from integration.system_prompts import load_system_prompt

        if argument:
            self.system = load_system_prompt(argument)
        print(self.system or "(the model's own)")

    def _save(self, argument: str) -> None:
        if not argument:
            raise CommandError("/save needs a file name")
        path = Path(argument)
        text = json.dumps(
            {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "messages": self.prompt_messages()},
            ensure_ascii=False,
            indent=2,
        )
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text + "\n")
        except OSError as error:
            raise CommandError(f"/save: {path}: {error.strerror}; choose another name") from error
        print(f"saved {path}")

    def _reset(self, argument: str) -> None:
        self.messages.clear()
        print("forgotten")


def _show_call(record: "CallRecord") -> None:
    arguments = ", ".join(
        f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in record.arguments.items()
    )
    print(visible(f"[{record.name}({arguments})]"))
    print(visible(record.error or record.result or "").expandtabs())
    print()


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m integration.chat", description="Chat with a GGUF model."
    )
    add_model_options(parser, tools_default=True)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Chat until the end of the input."""
    options = build_parser().parse_args(argv)
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    session = open_session(options)
    chat = Chat(session)
    print(
        f"{options.model.name}, context {session.model.client.n_ctx()}, seed {session.seed}; "
        "/help lists the commands",
        file=sys.stderr,
    )
    asking = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(asking).strip()
        except EOFError:
            return OK
        if line.startswith("/"):
            if not chat.command(line):
                return OK
        elif line:
            chat.answer(line)


if __name__ == "__main__":
    run_command(main)
