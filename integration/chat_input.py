"""Where the user's messages come from: an editor on a terminal, lines of a pipe otherwise."""

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from integration.chat_commands import COMMANDS

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings

Choices = Callable[[str], list[str]]


def read_line() -> str:
    """Read a message of one line from a pipe.

    Raises:
        EOFError: There are no more.
    """
    return input()


def read_message(editor: "PromptSession[str]") -> str:
    """Let the user write a message, of one line or more.

    Raises:
        EOFError: Ctrl-D in an empty message.
        KeyboardInterrupt: Ctrl-C in an empty message; otherwise it empties the message.
    """
    while True:
        try:
            # Bytes that are no UTF-8 arrive as surrogates, which no tokenizer and no file takes.
            return editor.prompt().encode("utf-8", "replace").decode("utf-8")
        except KeyboardInterrupt:
            if not editor.default_buffer.text:
                raise


def history_path() -> Path:
    """Give the file that keeps what was typed, as the XDG base directories say."""
    state = os.environ.get("XDG_STATE_HOME", "")
    # A relative path is to be ignored, says the specification.
    base = Path(state) if Path(state).is_absolute() else Path.home() / ".local/state"
    return base / "tomeforge/chat_history"


def open_history() -> "History":
    """Open the history, readable by its owner only; without a writable home it lasts one session."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = history_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600)
        try:
            os.fchmod(handle, 0o600)
        finally:
            os.close(handle)
    except OSError:
        return InMemoryHistory()
    return FileHistory(path)


def complete(text: str, choices: Choices) -> Iterable[tuple[str, int, str]]:
    """Find what a line could become.

    Args:
        text: The line up to the cursor.
        choices: The words that may follow a command.

    Yields:
        A word, how many characters of the line it replaces, and what it does.
    """
    name, space, argument = text.partition(" ")
    if not space:
        for command, (_, purpose) in COMMANDS.items():
            if command.startswith(name):
                yield command, len(name), purpose
        return
    for word in choices(name):
        if word.startswith(argument):
            yield word, len(argument), ""


def _file_argument(text: str) -> str | None:
    name, _, argument = text.partition(" ")
    if name in {"/save", "/load"}:
        return argument
    return argument[1:] if name == "/system" and argument.startswith("@") else None


def open_editor(choices: Choices) -> "PromptSession[str]":
    """Make the line editor: Enter sends, Alt-Enter and a trailing backslash start a new line."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.application import get_app
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.output import create_output

    paths = PathCompleter(expanduser=True)

    class CommandCompleter(Completer):
        def get_completions(self, document: Document, complete_event: Any) -> Iterable[Completion]:
            text = document.text_before_cursor
            if not text.startswith("/") or "\n" in text:
                return
            for word, replaced, purpose in complete(text, choices):
                yield Completion(word, -replaced, display_meta=purpose)
            # Folders are read when asked for with Tab, not at every key.
            if complete_event.completion_requested and (file := _file_argument(text)) is not None:
                yield from paths.get_completions(Document(file), complete_event)

    @Condition
    def is_command() -> bool:
        return get_app().current_buffer.text.startswith("/")

    return PromptSession(
        "> ",
        multiline=True,
        prompt_continuation="  ",
        key_bindings=_key_bindings(),
        history=open_history(),
        completer=CommandCompleter(),
        complete_while_typing=is_command,
        # With the answers redirected into a file, the message is still written on the terminal.
        output=create_output(sys.stdout if sys.stdout.isatty() else sys.stderr),
    )


def _key_bindings() -> "KeyBindings":
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter", filter=has_focus(DEFAULT_BUFFER))
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        line = buffer.document
        if line.current_line_before_cursor.endswith("\\") and not line.current_line_after_cursor:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=has_focus(DEFAULT_BUFFER))
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
