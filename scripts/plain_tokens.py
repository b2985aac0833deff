"""Rendered text to token ids as chat makes them: control tokens only where the template wrote them.

In: text, with the places where trained answers begin. Out: ids and where in the text each begins.
"""

import re
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

from scripts.answer_spans import Message


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """Give the text and id of every control token, those that a GGUF marks as such."""
    return {
        added.content: token
        for token, added in tokenizer.added_tokens_decoder.items()
        if added.special
    }


class Piece(NamedTuple):
    """A part of a rendered text.

    Attributes:
        start: Its place in the text.
        content: A control token's id, or text without marks.
        goes_on: The text begins an answer, after more text.
    """

    start: int
    content: int | str
    goes_on: bool = False


class PlainTokenizer:
    """The tokenizer's facts, found once.

    Text between two of the template's control tokens is tokenized for itself, as chat does it; a
    control token typed in a message stays text. Text is also parted where a trained answer begins: a
    prompt ends there in chat, so no token may join the prompt's last character to the answer's first
    (Mistral's tokenizer has one for `]<`, with which no tool call could be learned).
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.control = control_tokens(tokenizer)
        names = sorted(filter(None, self.control), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, names))) if names else None
        plain, spaced = self._tokenize(["a"])[0][0], self._tokenize([" a"])[0][0]
        is_sentencepiece = tokenizer.convert_ids_to_tokens(plain[:1])[0].startswith("▁")
        # SentencePiece writes a space in front of every text, and so does llama.cpp; some fast
        # tokenizers do not where one is there already. Then we write it.
        self._swallows_space = is_sentencepiece and plain == spaced
        # Text that goes on must get no such space: it is tokenized after this, which is taken off.
        self._anchor = "\n" if is_sentencepiece or plain == spaced else ""
        self._anchor_ids = self._tokenize([self._anchor])[0][0] if self._anchor else []

    def _tokenize(self, texts: list[str]) -> list[tuple[list[int], list[int]]]:
        """Give ids and start offsets of plain texts; control tokens in them are text."""
        if not texts:
            return []
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [(list(ids), [start for start, _ in offsets]) for ids, offsets in pairs]

    def tokenize_pieces(self, pieces: Sequence[Piece]) -> list[tuple[list[int], list[int]]]:
        """Tokenize text as llama.cpp does with special tokens off and no BOS.

        Args:
            pieces: Text pieces.

        Returns:
            For each its ids, and the offset in its text at which each token starts.
        """
        leads = [self._lead(piece) for piece in pieces]
        results = self._tokenize(
            [lead + str(piece.content) for lead, piece in zip(leads, pieces, strict=True)]
        )
        return [self._take_off(*values) for values in zip(leads, pieces, results, strict=True)]

    def _lead(self, piece: Piece) -> str:
        if piece.goes_on:
            return self._anchor
        starts_with_space = str(piece.content).startswith((" ", "▁"))
        return " " if self._swallows_space and starts_with_space else ""

    def _take_off(
        self, lead: str, piece: Piece, result: tuple[list[int], list[int]]
    ) -> tuple[list[int], list[int]]:
        ids, starts = result
        anchor = len(self._anchor_ids) if piece.goes_on else 0
        if ids[:anchor] != self._anchor_ids[:anchor]:
            # The text starts with a line break too, and the two became one token.
            return self._tokenize([str(piece.content)])[0]
        return ids[anchor:], [max(0, start - len(lead)) for start in starts[anchor:]]

    def protect(self, messages: Sequence[Message]) -> tuple[list[Message], str]:
        """Break control tokens in message bodies with a mark that no message has."""
        pattern = self._pattern
        if pattern is None or not any(pattern.search(turn["content"]) for turn in messages):
            return list(messages), ""
        used = set().union(*(turn["content"] for turn in messages))
        # Private use characters: no template and hardly any text has them.
        mark = next(mark for mark in map(chr, range(0xE000, 0xF8FF)) if mark not in used)
        broken = [
            turn
            | {
                "content": pattern.sub(
                    lambda found: found[0][0] + mark + found[0][1:], turn["content"]
                )
            }
            for turn in messages
        ]
        return broken, mark

    def split(self, text: str, mark: str, answer_starts: Sequence[int] = ()) -> list[Piece]:
        """Part rendered text at the template's control tokens and where trained answers begin."""
        edges = dict.fromkeys(answer_starts, True) | {0: False}
        tokens: dict[int, int] = {}
        for found in self._pattern.finditer(text) if self._pattern else ():
            tokens[found.start()] = self.control[found[0]]
            edges |= {found.start(): False, found.end(): False}
        places = sorted(edges)
        pieces = []
        for start, end in zip(places, [*places[1:], len(text)], strict=True):
            content = tokens.get(start)
            if content is not None:
                pieces.append(Piece(start, content))
            elif start < end:
                plain = text[start:end]
                plain = plain.replace(mark, "") if mark else plain
                pieces.append(Piece(start, plain, edges[start]))
        return pieces

    def is_stop(self, token: int) -> bool:
        """Whether a token can end an answer: EOS or a control token that is not the BOS."""
        if token == self.tokenizer.eos_token_id:
            return True
        return token in self.control.values() and token != self.tokenizer.bos_token_id


def places_in_text(text: str, mark: str, piece: Piece, offsets: Sequence[int]) -> list[int]:
    """Turn offsets in a text piece into places in the rendered text, marks counted again."""
    start, size = piece.start, len(str(piece.content))
    if not mark or mark not in text[start : start + size]:
        return [start + offset for offset in offsets]
    unmarked = (place for place in range(start, len(text)) if text[place] != mark)
    places = list(islice(unmarked, size))
    return [places[offset] for offset in offsets]
