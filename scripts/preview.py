"""Rows as the model will see them, with the trained tokens coloured.

In: encoded rows. Out: text, by ``scripts.train_lora --preview N``.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from scripts.render import IGNORED, EncodedConversation

_TRAINED, _OTHER, _RESET = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"
# A data set may hold terminal commands: control characters are shown as pictures.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_VISIBLE |= {0x7F: 0x2421} | dict.fromkeys(range(128, 160), 65533)


def preview_rows(
    tokenizer: Any, rows: Sequence[EncodedConversation], count: int, file: TextIO
) -> None:
    """Print the first rows, special tokens shown.

    Trained tokens are coloured on a terminal or with ``FORCE_COLOR``, and stand in ⟦…⟧ otherwise;
    ``NO_COLOR`` turns colours off.

    Args:
        tokenizer: The tokenizer that made the rows.
        rows: Encoded conversations.
        count: Most rows to print.
        file: Where to.
    """
    in_colour = _wants_colour(file)
    marked = f"{_TRAINED}coloured{_RESET}" if in_colour else "⟦in brackets⟧"
    print(f"trained tokens are {marked}, everything else is only read", file=file)
    for number, row in enumerate(rows[: max(0, count)], 1):
        trained = len(row.labels) - row.labels.count(IGNORED)
        cut = f", {row.dropped_turns} turns cut" if row.dropped_turns else ""
        print(
            f"\n--- row {number}: {len(row.input_ids)} tokens, {trained} trained{cut} ---",
            file=file,
        )
        for text, is_trained in _runs(tokenizer, row):
            print(_show(text, is_trained, in_colour), end="", file=file)
        print(file=file)


def _wants_colour(file: TextIO) -> bool:
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or file.isatty()


def _runs(tokenizer: Any, row: EncodedConversation) -> Iterator[tuple[str, bool]]:
    """Give the text of each run of trained or untrained tokens."""
    shown = ""
    flags = [label != IGNORED for label in row.labels]
    for end in range(1, len(flags) + 1):
        if end < len(flags) and flags[end] == flags[end - 1]:
            continue
        # Decoded from the start: a run by itself may lose a space or a half character.
        text = tokenizer.decode(row.input_ids[:end], clean_up_tokenization_spaces=False)
        yield text[len(shown) :], flags[end - 1]
        shown = text


def _show(text: str, is_trained: bool, in_colour: bool) -> str:
    text = text.translate(_VISIBLE)
    if in_colour:
        return f"{_TRAINED if is_trained else _OTHER}{text}{_RESET}"
    return f"⟦{text}⟧" if is_trained else text
