"""One line of chat rows, as scripts.prepare_data writes them: `{"messages": [{"role", "content"}]}`."""

import json

Messages = list[dict[str, str]]


def parse_messages(line: str | bytes) -> Messages:
    """Read the messages of one line; other keys are left out.

    Raises:
        ValueError: No JSON, no messages, or one without role or content; the text says which.
    """
    row = json.loads(line)
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError("no messages")
    kept = []
    for turn in messages:
        role, content = map(turn.get, ("role", "content")) if isinstance(turn, dict) else (None, "")
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError("a message without role or content")
        content.encode("utf-8")  # half a surrogate pair is a ValueError too
        kept.append({"role": role, "content": content})
    return kept
