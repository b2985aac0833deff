"""What a report is made of: sections of tables, facts, pictures, answers and commands; no layout.

Both templates write the same blocks, so the page and the Markdown file cannot differ in content.
"""

from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

GOOD, BAD, OPEN = "good", "bad", "open"
UNKNOWN = "–"
# Of an answer that is longer, the rest is folded; a rest of a few words or lines is not.
_SHOWN_CHARACTERS, _SHOWN_LINES = 420, 10


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: What it says.
        note: Smaller, such as an interval.
        mark: ``good``, ``bad`` or ``open`` where it is a verdict; the text says so too.
        share: Length of a bar beside the text, 0 to 1; None for no bar.
    """

    text: str
    note: str = ""
    mark: str = ""
    share: float | None = None


@dataclass(frozen=True)
class Table:
    """Rows under columns; the first column is a label."""

    kind: ClassVar[str] = "table"
    columns: list[str]
    rows: list[list[Cell]]
    caption: str = ""
    is_text: bool = False  # cells are words and stand left, not numbers


@dataclass(frozen=True)
class Facts:
    """Labels and values."""

    kind: ClassVar[str] = "facts"
    pairs: list[tuple[str, str]]


@dataclass(frozen=True)
class Text:
    """A paragraph; ``is_small`` for what explains a table."""

    kind: ClassVar[str] = "text"
    text: str
    is_small: bool = False


@dataclass(frozen=True)
class Hint:
    """What is missing or out of date, and the command that helps."""

    kind: ClassVar[str] = "hint"
    text: str
    command: str


@dataclass(frozen=True)
class Picture:
    """A picture by its name in ``scripts.report_pictures``, and its file beside the report."""

    kind: ClassVar[str] = "picture"
    name: str
    file: str
    alt: str


@dataclass(frozen=True)
class Code:
    """Lines to copy."""

    kind: ClassVar[str] = "code"
    caption: str
    language: str
    text: str


@dataclass(frozen=True)
class Answer:
    """What one contender answered, and which rules that follows."""

    name: str
    text: str
    note: str = ""
    rules: list[Cell] = field(default_factory=list)

    @property
    def shown(self) -> str:
        """The beginning, cut between lines or words; all of a text that is not long."""
        if not self.text.strip():
            return self.text
        lines = self.text.split("\n")
        if len(lines) > _SHOWN_LINES * 1.25:
            lines = lines[:_SHOWN_LINES]
        head = "\n".join(lines)
        if len(head) > _SHOWN_CHARACTERS * 1.25:
            head = head[:_SHOWN_CHARACTERS]
            words = head.rstrip().rpartition(" ")[0]
            head = words if len(words) > _SHOWN_CHARACTERS // 2 else head
        return head if head == self.text else head.rstrip()

    @property
    def rest(self) -> str:
        """What follows ``shown``."""
        return self.text[len(self.shown) :]


@dataclass(frozen=True)
class Answers:
    """One question, and the answers side by side."""

    kind: ClassVar[str] = "answers"
    question: str
    answers: list[Answer]
    outcome: Cell | None = None


@dataclass(frozen=True)
class Fold:
    """Blocks behind a line that opens them."""

    kind: ClassVar[str] = "fold"
    title: str
    verdict: Cell
    blocks: "list[Block]"


Block: TypeAlias = Table | Facts | Text | Hint | Picture | Code | Answers | Fold


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    id: str
    title: str
    blocks: list[Block]


@dataclass(frozen=True)
class KeyFigure:
    """One of the large figures at the top; ``before`` is what it was."""

    label: str
    value: str
    note: str = ""
    before: str = ""


@dataclass(frozen=True)
class Head:
    """The top of the report."""

    run_name: str
    base_model: str
    verdict: Cell
    sentences: list[str]
    figures: list[KeyFigure]
    hints: list[Hint]
