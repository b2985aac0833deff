"""Conversations to rows of token ids and labels, the same ids that chat makes of the same messages.

In: checked conversations and a tokenizer with a chat template. Out: encoded rows and their totals.

Policies: the template is the one source of BOS; a conversation that is too long is cut after the last
whole answer that fits, and left out without one; `weight: 0` answers are rendered, never trained.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from scripts._cli import CommandError, log
from scripts.answer_spans import USE_ALPACA, Message, RenderError, answer_spans, render
from scripts.plain_tokens import Piece, PlainTokenizer, places_in_text
from scripts.row_checks import IGNORED, EncodedConversation, check_batch, check_encoded

__all__ = [
    "IGNORED",
    "EncodedConversation",
    "RenderError",
    "RowTotals",
    "answer_spans",
    "check_batch",
    "check_encoded",
    "encode_conversation",
    "encode_prompt",
    "encode_rows",
    "render",
]
_ROWS_AT_ONCE = 64


@dataclass
class RowTotals:
    """What became of the rows of a data set.

    Attributes:
        rows: Rows given.
        kept: Rows encoded.
        dropped_too_long: Rows left out because no trained answer fits.
        without_answer: Rows left out because they have no answer to train.
        cut_rows: Kept rows that lost turns.
        cut_turns: Turns those rows lost.
        tokens: Tokens of the kept rows.
        trained_tokens: Those with a label.
    """

    rows: int = 0
    kept: int = 0
    dropped_too_long: int = 0
    without_answer: int = 0
    cut_rows: int = 0
    cut_turns: int = 0
    tokens: int = 0
    trained_tokens: int = 0

    def add(self, row: EncodedConversation) -> None:
        """Count a kept row."""
        self.kept += 1
        self.cut_rows += row.dropped_turns > 0
        self.cut_turns += row.dropped_turns
        self.tokens += len(row.input_ids)
        self.trained_tokens += len(row.labels) - row.labels.count(IGNORED)

    def summary(self, max_length: int) -> str:
        """Say it in one line."""
        share = self.trained_tokens / max(1, self.tokens)
        parts = [f"{self.kept} rows, {self.tokens} tokens, {share:.0%} of them trained"]
        if self.cut_rows:
            parts.append(
                f"{self.cut_rows} cut to {max_length} tokens after a whole answer "
                f"({self.cut_turns} turns)"
            )
        if self.dropped_too_long:
            parts.append(
                f"{self.dropped_too_long} left out: no answer ends within {max_length} tokens"
            )
        if self.without_answer:
            parts.append(f"{self.without_answer} left out: no answer to train")
        return "; ".join(parts)


@dataclass
class _Plan:
    """A rendered conversation on its way to tokens.

    Attributes:
        messages: As rendered: control tokens in bodies are broken by the mark.
        text: All of it.
        spans: The assistant's turns in the text.
        pieces: The text in order; nothing of it is empty.
        mark: The character that breaks control tokens.
    """

    messages: list[Message]
    text: str
    spans: list[tuple[int, int]]
    pieces: list[Piece]
    mark: str

    @property
    def texts(self) -> list[Piece]:
        """The pieces that a tokenizer is to read."""
        return [piece for piece in self.pieces if isinstance(piece.content, str)]


class _Encoder:
    """A tokenizer and its facts, found once."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.plain = PlainTokenizer(tokenizer)

    def plan(self, messages: Sequence[Message]) -> _Plan:
        """Render a conversation and part it."""
        safe, mark = self.plain.protect(messages)
        text, spans = answer_spans(self.tokenizer, safe)
        answers = [turn for turn in safe if turn["role"] == "assistant"]
        starts = [
            span[0] for turn, span in zip(answers, spans, strict=True) if turn.get("weight") != 0
        ]
        return _Plan(safe, text, spans, self.plain.split(text, mark, starts), mark)

    def finish(
        self, plan: _Plan, texts: Iterator[tuple[list[int], list[int]]], max_length: int
    ) -> EncodedConversation | None:
        """Put tokenized pieces together, label the answers, cut.

        Args:
            plan: The conversation.
            texts: Ids and offsets of its text pieces, in order.
            max_length: Most tokens a row may have.
        """
        ids: list[int] = []
        starts: list[int] = []
        for piece in plan.pieces:
            if isinstance(piece.content, int):
                ids.append(piece.content)
                starts.append(piece.start)
                continue
            piece_ids, offsets = next(texts)
            ids += piece_ids
            starts += places_in_text(plan.text, plan.mark, piece, offsets)
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise RenderError(
                "the chat template writes the BOS token twice, and models see one in training; "
                f"{USE_ALPACA}"
            )
        labels = [IGNORED] * len(ids)
        ends: list[int] = []
        answers = [index for index, turn in enumerate(plan.messages) if turn["role"] == "assistant"]
        for index, span in zip(answers, plan.spans, strict=True):
            first, last = (bisect_left(starts, position) for position in span)
            ends.append(last)
            if plan.messages[index].get("weight") == 0:
                continue
            labels[first:last] = ids[first:last]
            if first == last or not self.plain.is_stop(ids[last - 1]):
                raise RenderError(
                    "an answer has no end-of-turn token in this chat template, so the model would "
                    f"never learn to stop; {USE_ALPACA}"
                )
        if len(ids) <= max_length:
            return EncodedConversation(ids, labels) if answers else None
        return self._cut(plan, ids, labels, answers, ends, max_length)

    def _cut(
        self,
        plan: _Plan,
        ids: list[int],
        labels: list[int],
        answers: list[int],
        ends: list[int],
        max_length: int,
    ) -> EncodedConversation | None:
        fitting = sum(end <= max_length for end in ends)
        if not fitting:
            return None
        end, kept = ends[fitting - 1], answers[fitting - 1] + 1
        if labels[:end].count(IGNORED) == end:
            return None
        if kept < len(plan.messages):
            part = render(self.tokenizer, plan.messages[:kept]).rstrip()
            if part != plan.text[: plan.spans[fitting - 1][1]]:
                raise RenderError(
                    "the chat template renders a shortened conversation differently from its start "
                    f"in the whole; raise max_length, or {USE_ALPACA}"
                )
        return EncodedConversation(ids[:end], labels[:end], len(plan.messages) - kept)


def encode_conversation(
    tokenizer: Any, messages: Sequence[Message], max_length: int
) -> EncodedConversation | None:
    """Tokenize a conversation; cut it at a turn, never inside one, when it is too long.

    Args:
        tokenizer: A fast Hugging Face tokenizer with a chat template.
        messages: Turns with ``role`` and ``content``; ``weight: 0`` leaves an answer untrained.
        max_length: Most tokens a row may have.

    Returns:
        The row, cut after the last whole answer that fits; None when no trained answer does.

    Raises:
        RenderError: See ``answer_spans``; or an answer has no end, or the BOS is written twice.
    """
    encoder = _Encoder(tokenizer)
    return next(_encode_all(encoder, [messages], max_length))


def encode_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Tokenize a conversation up to the assistant's turn, as chat does.

    Raises:
        RenderError: There is no template, or it refuses the messages.
    """
    plain = PlainTokenizer(tokenizer)
    safe, mark = plain.protect(messages)
    pieces = plain.split(render(tokenizer, safe, add_generation_prompt=True), mark)
    texts = [piece for piece in pieces if isinstance(piece.content, str)]
    tokenized = iter(plain.tokenize_pieces(texts))
    return [
        token
        for piece in pieces
        for token in ([piece.content] if isinstance(piece.content, int) else next(tokenized)[0])
    ]


def _encode_all(
    encoder: _Encoder, conversations: Iterable[Sequence[Message]], max_length: int
) -> Iterator[EncodedConversation | None]:
    """Encode conversations; many texts go to the tokenizer at once, which uses every core.

    Raises:
        RenderError: Its ``place`` says which conversation, counted from 0.
    """
    numbered = enumerate(conversations)
    while chunk := list(islice(numbered, _ROWS_AT_ONCE)):
        plans = [_placed(place, encoder.plan, messages) for place, messages in chunk]
        tokenized = iter(
            encoder.plain.tokenize_pieces([text for plan in plans for text in plan.texts])
        )
        for (place, _), plan in zip(chunk, plans, strict=True):
            yield _placed(place, encoder.finish, plan, tokenized, max_length)


def _placed(place: int, step: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return step(*arguments)
    except RenderError as error:
        error.place = place
        raise


def encode_rows(
    tokenizer: Any, rows: Sequence[dict[str, Any]], max_length: int, what: str = "rows"
) -> tuple[list[EncodedConversation], RowTotals]:
    """Tokenize prepared rows, check them and log the totals in one line.

    Args:
        tokenizer: A fast Hugging Face tokenizer with a chat template.
        rows: Objects with ``messages``.
        max_length: Most tokens a row may have.
        what: Name of the rows in messages.

    Raises:
        CommandError: No row fits, the template does not fit the rows, or a check fails.
    """
    encoder, totals = _Encoder(tokenizer), RowTotals(rows=len(rows))
    kept: list[EncodedConversation] = []
    numbers = [number for number, row in enumerate(rows, 1) if _has_answer(row["messages"])]
    totals.without_answer = len(rows) - len(numbers)
    conversations = (rows[number - 1]["messages"] for number in numbers)
    try:
        for row in _encode_all(encoder, conversations, max_length):
            if row is None:
                totals.dropped_too_long += 1
            else:
                totals.add(row)
                kept.append(row)
        if not kept and totals.dropped_too_long:
            raise RenderError(
                f"no conversation fits into max_length {max_length}; raise max_length"
            )
        check_encoded(kept, tokenizer)
    except RenderError as error:
        where = what if error.place is None else f"{what}, row {numbers[error.place]}"
        raise CommandError(f"{where}: {error}") from error
    log(f"{what}: {totals.summary(max_length)}")
    return kept, totals


def _has_answer(messages: Sequence[Message]) -> bool:
    return any(turn["role"] == "assistant" and turn.get("weight") != 0 for turn in messages)
