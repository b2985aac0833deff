"""Conversations on disk: what `/save` writes and `/load` reads back."""

import json
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from integration._cli import CommandError

if TYPE_CHECKING:
    from integration.chat_conversation import Conversation
    from integration.prompt import Message

_MAX_BYTES = 20_000_000


def save_conversation(path: Path, conversation: "Conversation", **facts: Any) -> None:
    """Write all exchanges as JSON, readable by the owner only; the file appears when it is whole.

    Args:
        path: A file that must not exist.
        conversation: What to save, exchanges that the model does not see any more included.
        **facts: Further keys of the file.

    Raises:
        CommandError: The file exists, or cannot be written.
    """
    content = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **facts,
        "messages": conversation.prompt(dropped=0),
    }
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(json.dumps(content, ensure_ascii=False, indent=2) + "\n")
            _publish(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise CommandError(f"/save: {path}: {error.strerror}; choose another name") from error


def _publish(temporary: str, path: Path) -> None:
    try:
        os.link(temporary, path)  # unlike a rename, it never replaces a file
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        path.open("x").close()
        os.replace(temporary, path)


def load_conversation(path: Path) -> "tuple[str | None, list[list[Message]]]":
    """Read what ``save_conversation`` wrote.

    Returns:
        The system prompt and the exchanges.

    Raises:
        CommandError: The file cannot be read, or holds anything else.
    """
    try:
        if not path.is_file():
            raise CommandError(f"/load: {path}: no such file; expected one that /save wrote")
        if path.stat().st_size > _MAX_BYTES:
            raise CommandError(f"/load: {path}: more than {_MAX_BYTES} bytes is no conversation")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"/load: {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _no_conversation(path, "no JSON") from error
    messages = content.get("messages") if isinstance(content, dict) else None
    if not isinstance(messages, list):
        raise _no_conversation(path, "it has no list of messages")
    for number, message in enumerate(messages, 1):
        if not _is_message(message):
            raise _no_conversation(path, f"message {number} is not a role with a text")
    system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else None
    if not messages or len(messages) % 2:
        raise _no_conversation(path, f"{len(messages)} turns are not pairs of user and assistant")
    for index, message in enumerate(messages):
        expected = "assistant" if index % 2 else "user"
        if message["role"] != expected:
            raise _no_conversation(
                path, f"turn {index + 1} is of '{message['role']}', not '{expected}'"
            )
    return system, _split(messages)


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or message.keys() != {"role", "content"}:
        return False
    try:
        return all(
            isinstance(value, str) and value.encode() is not None for value in message.values()
        )
    except UnicodeEncodeError:  # half of a surrogate pair is no text
        return False


def _no_conversation(path: Path, reason: str) -> CommandError:
    return CommandError(f"/load: {path}: {reason}; expected a file that /save wrote")


def _split(messages: "list[Message]") -> "list[list[Message]]":
    from tools.protocol import CALL_START, RESPONSE_START

    exchanges: list[list[Message]] = []
    for user, assistant in zip(messages[::2], messages[1::2], strict=True):
        is_result = (
            exchanges
            and user["content"].startswith(RESPONSE_START)
            and exchanges[-1][-1]["content"].startswith(CALL_START)
        )
        if is_result:
            exchanges[-1] += [user, assistant]
        else:
            exchanges.append([user, assistant])
    return exchanges
