"""The slash commands of the chat."""

import difflib
import re
from pathlib import Path

from integration._cli import CommandError
from integration.ask_format import AUTO
from integration.chat_answers import Chat
from integration.chat_files import load_conversation, save_conversation

COMMANDS = {
    "/tools": ("[on|off]", "list the tools, or switch calling on and off"),
    "/adapter": (
        "[NAME]",
        "list the adapters, or activate one (base = none), or several: a:0.5+b:0.5",
    ),
    "/system": ("[TEXT]", "show or set the system prompt (NAME, TEXT or @FILE; off = none)"),
    "/save": ("FILE", "write the conversation as JSON (never over an existing file)"),
    "/load": ("FILE", "go on with a conversation that /save wrote"),
    "/retry": ("", "answer the last message again, with another seed"),
    "/stats": ("", "tokens, speed, context, seed and sums of the session"),
    "/reset": ("", "forget the conversation"),
    "/help": ("", "this list"),
    "/exit": ("", "leave (also Ctrl-D); Ctrl-C stops an answer and keeps it"),
}
_KEYS = """\
/adapter auto lets the router choose; /adapter load NAME=FILE and /adapter unload NAME change the list.
On a terminal: Enter sends; Alt-Enter, or a backslash before Enter, starts a new line;
Tab completes commands and names; arrows and Ctrl-R find earlier input."""
# A path such as /etc/hosts is a message, not a command.
_COMMAND = re.compile(r"(/[\w-]*)(?:\s+(.*))?", re.DOTALL)


def help_text() -> str:
    """Give the list of commands and keys."""
    lines = [
        f"{f'{name} {argument}':<18} {purpose}" for name, (argument, purpose) in COMMANDS.items()
    ]
    return "\n".join([*lines, _KEYS])


class Commands:
    """Runs what the user types after a slash."""

    def __init__(self, chat: Chat) -> None:
        self._chat, self._screen = chat, chat.screen
        self._all_tools = chat.session.tools

    def matches(self, line: str) -> bool:
        """Whether a line is meant as a command."""
        return _COMMAND.fullmatch(line) is not None

    def choices(self, name: str) -> list[str]:
        """Give the words that may follow a command, for completion."""
        if name == "/tools":
            return ["on", "off"]
        if name == "/adapter" and self._chat.session.adapters:
            names = self._chat.session.adapters.names
            return [*names, AUTO] if self._chat.session.router else names
        if name == "/system":
            from integration.system_prompts import list_prompts

            return [*list_prompts(), "off"]
        return []

    def run(self, line: str) -> bool:
        """Run a command; False ends the chat. An error is shown, and the chat goes on."""
        match = _COMMAND.fullmatch(line)
        assert match
        name, argument = match[1], (match[2] or "").strip()
        if name in {"/exit", "/quit"}:
            return False
        try:
            if name not in COMMANDS:
                near = difflib.get_close_matches(name, COMMANDS, n=1)
                hint = f", did you mean '{near[0]}'?" if near else ";"
                raise CommandError(f"no command '{name}'{hint} /help lists them")
            if argument and not COMMANDS[name][0]:
                raise CommandError(f"{name} takes nothing, got '{argument}'")
            getattr(self, f"_{name[1:]}")(argument)
        except CommandError as error:
            self._screen.error(error)
        return True

    def _tools(self, argument: str) -> None:
        from tools.protocol import describe_tool

        if not self._all_tools:
            from tools import TOOLS

            self._all_tools = TOOLS
        if argument in {"on", "off"}:
            self._chat.tools = self._all_tools if argument == "on" else ()
        elif argument:
            raise CommandError(f"/tools: got '{argument}', expected on or off")
        self._screen.line("tools are " + ("on" if self._chat.tools else "off"))
        for tool in self._all_tools:
            self._screen.line(describe_tool(tool))

    def _adapter(self, argument: str) -> None:
        adapters = self._chat.session.adapters
        if adapters is None:
            raise CommandError("/adapter: this model has no adapters to choose from")
        action, _, rest = argument.partition(" ")
        if action == "load" and rest:
            from integration.adapters import parse_adapter_options

            ((name, path),) = parse_adapter_options([rest.strip()]).items()
            file = adapters.load(name, path.expanduser())
            self._screen.line(f"loaded {name}: rank {file.rank}, {file.num_bytes / 1e6:.1f} MB")
        elif action == "unload" and rest:
            adapters.unload(rest.strip())
        elif argument == AUTO:
            if self._chat.session.router is None:
                raise CommandError("/adapter auto: no router is loaded; start with --route auto")
            self._chat.is_routed = True
        elif argument:
            adapters.use(argument)
            self._chat.is_routed = False
        if self._chat.is_routed:
            self._screen.line("the router chooses")
        for name in dict.fromkeys([*adapters.names, adapters.active]):
            self._screen.line(("* " if name == adapters.active else "  ") + name)

    def _system(self, argument: str) -> None:
        from integration.system_prompts import load_system_prompt

        if argument:
            try:
                system = None if argument == "off" else load_system_prompt(argument)
            except (OSError, UnicodeDecodeError) as error:
                raise CommandError(f"/system: {argument}: {error}") from error
            self._chat.conversation.system = system
        self._screen.line(self._chat.conversation.system or "(the model's own)")

    def _save(self, argument: str) -> None:
        path = _path("/save", argument)
        chat = self._chat
        if not chat.conversation.exchanges:
            raise CommandError("/save: there is no conversation yet")
        adapter = chat.session.adapters.active if chat.session.adapters else None
        save_conversation(path, chat.conversation, model=chat.session.model.name, adapter=adapter)
        chat.session.model.remember()  # so that going on with it is quick
        self._screen.line(f"saved {path}")

    def _load(self, argument: str) -> None:
        system, exchanges = load_conversation(_path("/load", argument))
        self._chat.go_on_with(system, exchanges)
        self._screen.line(f"loaded exchanges: {len(exchanges)}; the last one:")
        for message in exchanges[-1]:
            mark = "> " if message["role"] == "user" else ""
            self._screen.line(mark + message["content"])

    def _retry(self, _: str) -> None:
        self._chat.retry()

    def _stats(self, _: str) -> None:
        for fact in self._chat.stats():
            self._screen.line(fact)

    def _reset(self, _: str) -> None:
        self._chat.forget()
        self._screen.line("forgotten")

    def _help(self, _: str) -> None:
        self._screen.line(help_text())


def _path(command: str, argument: str) -> Path:
    if not argument:
        raise CommandError(f"{command} needs a file name")
    try:
        return Path(argument).expanduser()
    except RuntimeError as error:  # the home of an unknown user
        raise CommandError(f"{command}: {argument}: {error}") from error
