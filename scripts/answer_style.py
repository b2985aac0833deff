"""How answers look, whatever they say: length, ends, stray chat markers, repetition. No torch."""

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scripts.tool_scores import Share

# Of the formats that models are trained in: none of these belongs into an answer.
_MARKERS = re.compile(
    r"<\|[a-z_]+\|>|</?s>|\[/?INST\]|<</?SYS>>|^#{2,3} ?(?:Instruction|Response|Input):",
    re.MULTILINE,
)
# Three times the same words at the end, and at least this many words, is a loop.
_LOOP_REPEATS, _LOOP_WORDS, _LONGEST_PERIOD = 3, 24, 60


@dataclass(frozen=True)
class Answer:
    """An answer's text, its tokens, and whether the model ended it itself."""

    text: str
    tokens: int
    ended: bool


def is_clean(text: str) -> bool:
    """Whether a text has no marker of a chat format, such as ``<|im_start|>``."""
    return not _MARKERS.search(text)


def is_looping(text: str) -> bool:
    """Whether a text ends in an exact repetition of its own words."""
    words = text.split()
    for period in range(1, _LONGEST_PERIOD + 1):
        length = max(_LOOP_REPEATS * period, _LOOP_WORDS)
        if length <= len(words) and words[-length:-period] == words[len(words) - length + period :]:
            return True
    return False


def repeated_ngrams(text: str, n: int) -> float:
    """Give the share of n-grams of words that came before in the same text.

    That is seq-rep-n of Welleck et al., Neural Text Generation with Unlikelihood Training (2020).
    """
    words = text.split()
    grams = [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def summarize(answers: Sequence[Answer]) -> dict[str, Any]:
    """Summarize answers of one model.

    Raises:
        ValueError: There are none.
    """
    if not answers:
        raise ValueError("no answers")
    tokens = [one.tokens for one in answers]
    words = [len(one.text.split()) for one in answers]
    texts = [one.text for one in answers]
    return {
        "tokens_mean": round(statistics.mean(tokens), 1),
        "tokens_median": statistics.median(tokens),
        "words_median": statistics.median(words),
        "ended": Share.of(one.ended for one in answers).to_json(),
        "clean": Share.of(map(is_clean, texts)).to_json(),
        "empty": Share.of(not text.strip() for text in texts).to_json(),
        "looping": Share.of(map(is_looping, texts)).to_json(),
        "repeated_4grams": round(statistics.mean(repeated_ngrams(text, 4) for text in texts), 4),
        "distinct_2": round(1 - repeated_ngrams(" ".join(texts), 2), 4),
    }
