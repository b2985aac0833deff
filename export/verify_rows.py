"""Choose the conversations a GGUF is measured on: the run's held-out rows, as training saw them.

In: a JSONL file of `{"messages": […]}`, or the fixed conversations of verify_corpus. Out: `Row`s.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from export._cli import USAGE, CommandError
from export.chat_rows import parse_messages
from export.plain_tokens import Message, PlainTokenizer
from export.verify_corpus import CONVERSATIONS

# Where a run keeps its held-out conversations, seen from the adapter's or the GGUF's folder.
HELD_OUT = Path("data/eval.jsonl")
FIXED = "fixed conversations"
MAX_ROW_TOKENS = 512
DEFAULT_MAX_TOKENS = 2048


@dataclass(frozen=True)
class Row:
    """One conversation to evaluate.

    Attributes:
        ids: Token ids, (T,).
        answers: Sorted half-open [start, end) ranges of the assistant's tokens.
        speaks: Positions whose next token is the first of an answer.
    """

    ids: list[int]
    answers: list[tuple[int, int]]
    speaks: list[int]


def find_rows(reference_dir: Path, gguf_path: Path | None = None) -> Path | None:
    """Look for the held-out rows of the run that made an adapter or a file."""
    folders = [reference_dir.resolve().parent]
    if gguf_path is not None:
        folders.append(gguf_path.resolve().parent.parent)
    return next((folder / HELD_OUT for folder in folders if (folder / HELD_OUT).is_file()), None)


def source_name(path: Path | None, reference_dir: Path) -> str:
    """Name the rows for a certificate: relative to the run, never a path of this machine."""
    if path is None:
        return FIXED
    run_dir = reference_dir.resolve().parent
    if path.resolve().parts[-2:] == HELD_OUT.parts:
        return HELD_OUT.as_posix()
    if path.resolve().is_relative_to(run_dir):
        return path.resolve().relative_to(run_dir).as_posix()
    return path.name


def read_conversations(path: Path | None) -> Iterator[Sequence[Message]]:
    """Read conversations one by one, or give the fixed ones.

    Raises:
        CommandError: Exit 2: the file is missing, or a line holds no conversation.
    """
    if path is None:
        yield from CONVERSATIONS
        return
    if not path.is_file():
        raise CommandError(
            f"--rows '{path}' is no file; expected lines {{\"messages\": [...]}}, such as "
            "scripts.prepare_data writes to data/eval.jsonl"
        )
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _parse_line(path, number, line)


def _parse_line(path: Path, number: int, line: str) -> list[Message]:
    try:
        return [*parse_messages(line)]
    except ValueError as error:
        raise CommandError(
            f"'{path}' line {number} is no conversation: {line.strip()[:60]!r}; expected "
            '{"messages": [{"role": "user", "content": "…"}, …]}',
            USAGE,
        ) from error


def make_rows(
    plain: PlainTokenizer,
    conversations: Iterable[Sequence[Message]],
    vocab_size: int,
    max_tokens: int = DEFAULT_MAX_TOKENS,
) -> list[Row]:
    """Render and cut conversations, in their order, until there are `max_tokens` positions.

    A conversation that the template refuses is left out; if it refuses all, or there is none, the
    plain texts are taken. So is one with a token beyond the vocabulary, which has no embedding.
    """
    rows: list[Row] = []
    refused: list[Sequence[Message]] = []
    left = max_tokens
    for messages in conversations:
        row = _render(plain, messages)
        if row is None:
            refused.append(messages)
            continue
        row = _cut(row, min(left, MAX_ROW_TOKENS))
        if len(row.ids) > 1 and max(row.ids) < vocab_size:
            rows.append(row)
            left -= len(row.ids)
        if left < 2:
            break
    for messages in refused if not rows else ():
        ids = plain.text_ids("\n\n".join(turn["content"] for turn in messages))
        row = _cut(Row(ids, [], [len(ids) - 1]), min(left, MAX_ROW_TOKENS))
        if len(row.ids) > 1 and max(row.ids) < vocab_size:
            rows.append(row)
            left -= len(row.ids)
    return rows


def _render(plain: PlainTokenizer, messages: Sequence[Message]) -> Row | None:
    """Render a whole conversation; one that ends in a question is rendered up to the answer."""
    is_open = messages[-1]["role"] != "assistant"
    ids = plain.chat_ids(messages, add_generation_prompt=is_open)
    if isinstance(ids, str):
        return None
    answers = []
    for index, turn in enumerate(messages):
        if turn["role"] == "assistant":
            start = plain.chat_ids(messages[:index])
            end = plain.chat_ids(messages[: index + 1], add_generation_prompt=False)
            if _begins(ids, start) and _begins(ids, end):
                answers.append((len(start), len(end)))
    speaks = [start - 1 for start, _ in answers] + ([len(ids) - 1] if is_open else [])
    return Row(ids, answers, speaks)


def _begins(ids: Sequence[int], start: Sequence[int] | str) -> bool:
    """Tell whether a rendering is the beginning of another; a refusal is not."""
    return not isinstance(start, str) and len(start) > 0 and list(ids[: len(start)]) == list(start)


def _cut(row: Row, length: int) -> Row:
    answers = [(start, min(end, length)) for start, end in row.answers if start < length]
    return Row(row.ids[:length], answers, [at for at in row.speaks if at < length])


def answer_end(plain: PlainTokenizer, control_ids: set[int]) -> int | None:
    """Give the control token that the template writes behind an answer; None if it writes none."""
    question: list[Message] = [{"role": "user", "content": "Hi."}]
    start = plain.chat_ids(question)
    whole = plain.chat_ids(
        [*question, {"role": "assistant", "content": "Hello."}], add_generation_prompt=False
    )
    if isinstance(whole, str) or not _begins(whole, start):
        return None
    return next((token for token in whole[len(start) :] if token in control_ids), None)
