"""Does an answer follow the prompt `cognitive_designer`: answers in, verdicts and shares out. No model.

A part is there when its label (English or Russian) begins a line, bare or dressed in a number or
Markdown, and text of its own follows. Text that stands under one label in answers to different
questions was copied from the prompt, and is no part of any of them. The word lists are blunt: they
find words, not whether the analogy is any good.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scripts.adapter_scores import mcnemar_p
from scripts.tool_scores import Share

PARTS = {"anchor": "Якорь", "essence": "Суть", "mechanics": "Механика", "breakthrough": "Прорыв"}
_PART_OF = {word.casefold(): part for part, ru in PARTS.items() for word in (part, ru)}
# A colon or a spaced dash makes a word a label; so does a line that holds nothing else.
_LABEL = re.compile(
    r"^[ \t]*(?:>[ \t]*)?(?:[#•*_-]+[ \t]*)?(?:\(?\d{1,2}[.):][ \t]*)?[*_]*"
    rf"({'|'.join(_PART_OF)})[*_]*"
    r"(?:[ \t]*[:：][*_]*|[ \t]+[–—-][ \t]|[ \t]*$)",
    re.IGNORECASE | re.MULTILINE,
)
_ANALOGY = re.compile(
    # "I would like to" compares nothing, and "(like a bank)" names an example.
    r"(?<!\()(?<!would )(?<!'d )(?<!\bi )(?<!\byou )\blike\b(?! to\b)"
    r"|\bimagin(?:e|ing)\b|\bthink of\b|\bpicture (?:a|an|the|your|this)\b|\bas (?:if|though)\b"
    r"|\b(?:similar|akin|comparable) to\b|\bjust as\b|\banalog(?:y|ous)\b|\bresembl(?:es?|ing)\b"
    r"|\bпредставь|\bвообрази|\bсловно\b|\bкак (?:будто|если бы)\b|\bпохож|\bподобн|\bнапоминает\b",
    re.IGNORECASE,
)
_CONTRAST = re.compile(
    r"\bmis(?:take|taken|takes|conceptions?|understanding|understood)\b|\bwrong(?:ly)?\b|\bmyths?\b"
    r"|\bnot\b(?! (?:only|just|merely|simply)\b)[^.!?\n]{1,80}\bbut\b"
    r"|\b(?:people|many|some|most|we)(?: people)?(?: often| may| might)? (?:think|believe|assume)\b"
    r"|\bошиб|\bзаблужд|\bневерно\b|\bмиф|\bне\b[^.!?\n]{1,80}, а\b|\b(?:многие|люди) (?:думают|считают)\b",
    re.IGNORECASE,
)
_BANNED = re.compile(
    r"\bas (?:everyone|everybody|we all) knows?\b|\bobviously\b|\bsimply\b"
    r"|\bкак (?:всем )?известно\b|\bочевидно\b|\bпросто\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Verdict:
    """What one answer has.

    Attributes:
        parts: The four that are there, in the order of their first labels.
        copied: Parts that have a label but a copied text.
        analogy: It has a word of analogy anywhere.
        contrast: It sets a mistake against what is right.
        banned: It has a phrase that the prompt forbids.
    """

    parts: tuple[str, ...]
    copied: tuple[str, ...]
    analogy: bool
    contrast: bool
    banned: bool

    @property
    def all_four(self) -> bool:
        """Whether every part is there."""
        return len(self.parts) == len(PARTS)

    @property
    def in_order(self) -> bool:
        """Whether every part is there, in the prompt's order."""
        return self.parts == tuple(PARTS)

    def measures(self) -> dict[str, bool]:
        """Give every verdict by name."""
        return {
            "all_four": self.all_four,
            "in_order": self.in_order,
            **{part: part in self.parts for part in PARTS},
            "analogy": self.analogy,
            "contrast": self.contrast,
            "banned": self.banned,
            "copied": bool(self.copied),
        }


MEASURES = tuple(Verdict((), (), False, False, False).measures())


def read_parts(text: str) -> dict[str, str]:
    """Give the text under the first label of each part, in the order of the labels; none is empty."""
    labels = list(_LABEL.finditer(text))
    ends = [label.start() for label in labels[1:]] + [len(text)]
    parts: dict[str, str] = {}
    for label, end in zip(labels, ends, strict=False):  # without a label there is one end
        words = " ".join(re.findall(r"\w+", text[label.end() : end].casefold()))
        if words:
            parts.setdefault(_PART_OF[label[1].casefold()], words)
    return parts


def judge_answers(texts: Sequence[str]) -> list[Verdict]:
    """Judge one contender's answers to different questions."""
    every = [read_parts(text) for text in texts]
    uses = Counter(item for parts in every for item in parts.items())
    verdicts = []
    for text, parts in zip(texts, every, strict=True):
        copied = tuple(part for part, words in parts.items() if uses[part, words] > 1)
        verdicts.append(
            Verdict(
                tuple(part for part in parts if part not in copied),
                copied,
                *(bool(found.search(text)) for found in (_ANALOGY, _CONTRAST, _BANNED)),
            )
        )
    return verdicts


@dataclass(frozen=True)
class Comparison:
    """One measure without the prompt and with it, over the same questions."""

    without: Share
    with_prompt: Share
    only_without: int
    only_with: int

    @property
    def p(self) -> float:
        """How often chance alone does as much (McNemar's exact test, two-sided)."""
        return mcnemar_p(self.only_with, self.only_without)

    def to_json(self) -> dict[str, Any]:
        """Give all numbers."""
        return {
            "without": self.without.to_json(),
            "with": self.with_prompt.to_json(),
            "only_without": self.only_without,
            "only_with": self.only_with,
            "mcnemar_p": round(self.p, 6),
        }


def compare_answers(
    without: Sequence[Verdict], with_prompt: Sequence[Verdict]
) -> dict[str, Comparison]:
    """Compare verdicts about answers to the same questions, measure by measure.

    Raises:
        ValueError: There are not as many of one as of the other.
    """
    pairs = [
        (old.measures(), new.measures()) for old, new in zip(without, with_prompt, strict=True)
    ]
    return {
        name: Comparison(
            Share.of(old[name] for old, _ in pairs),
            Share.of(new[name] for _, new in pairs),
            sum(old[name] and not new[name] for old, new in pairs),
            sum(new[name] and not old[name] for old, new in pairs),
        )
        for name in MEASURES
    }
