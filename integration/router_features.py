"""What the router sees of a request: its embedding, its words and word pairs, and its writing system."""

import itertools
import re
import unicodedata
import zlib
from collections import Counter

import numpy as np

from integration.embedding import clip

HASH_SIZE = 4096
# Word beginnings stand for stems: in Russian or German a word has many endings.
_STEM, _LONG_WORD = 5, 6
_WORD = re.compile(r"\w+|[^\w\s]")
_HEAD, _TAIL = 1000, 600
_MOST_LETTERS = 300


def features(text: str, embedding: np.ndarray) -> np.ndarray:
    """Give the classifier's features, shape (dim + 2 * HASH_SIZE,): embedding, words, beginnings."""
    words = _words(text)
    stems = [word[:_STEM] for word in words if len(word) >= _LONG_WORD]
    return np.concatenate([embedding, _hash(_with_pairs(words)), _hash(stems)])


def hash_words(text: str) -> np.ndarray:
    """Count words and pairs of neighbours by crc32, shape (HASH_SIZE,), of length 1.

    The embedding knows what a request is about, words tell what is wanted ("as json", "my phone").
    """
    return _hash(_with_pairs(_words(text)))


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", clip(text, _HEAD, _TAIL)).casefold())


def _with_pairs(words: list[str]) -> list[str]:
    ends = ["^", *words, "$"]
    return ends + [f"{one} {two}" for one, two in itertools.pairwise(ends)]


def _hash(words: list[str]) -> np.ndarray:
    """Count by crc32; the square root keeps a word that is repeated from hiding the others."""
    counts = np.zeros(HASH_SIZE, np.float32)
    for word in words:
        # "replace": half a surrogate pair has no UTF-8.
        counts[zlib.crc32(word.encode("utf-8", errors="replace")) % HASH_SIZE] += 1
    roots = np.sqrt(counts)
    return roots / max(float(np.linalg.norm(roots)), 1e-9)


def main_script(text: str) -> str | None:
    """Name the writing system of most letters of a text (LATIN, CYRILLIC, CJK …); None without any."""
    letters = [letter for letter in clip(text, _HEAD, _TAIL) if letter.isalpha()][:_MOST_LETTERS]
    plain = unicodedata.normalize("NFKC", "".join(letters))
    names = Counter(unicodedata.name(letter, "UNKNOWN").partition(" ")[0] for letter in plain)
    return names.most_common(1)[0][0] if names else None
