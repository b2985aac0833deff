"""Choose an adapter for a request, and say why: rules, then a classifier, else the plain base.

A conversation is sticky: its first request decides, and a later one changes the adapter only where it
clearly says so. Whatever cannot be placed goes to the base.
"""

import functools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from integration._cli import MODEL, CommandError
from integration.ask_format import BASE
from integration.embedding import EXPORT_COMMAND, Encoder, clip
from integration.router_config import RULE_FLAGS, shorten
from integration.router_features import features, hash_words, main_script
from integration.router_file import TRAIN_COMMAND, RouterData, load_router
from integration.router_training import TextEncoder, softmax

# How far a later turn must be ahead of the adapter it takes a conversation from.
SWITCH_MARGIN = 0.3
# A turn of few words, or a short one that points back, says little by itself: it changes the adapter
# only if it is nearly one of the examples.
_FEW_WORDS, _FEW_POINTING_WORDS, _ALIKE = 4, 9, 0.75
_POINTING = re.compile(
    r"^\W*(and|also|but|now|then|ok(ay)?|no|nope|yes|yep|why|instead|same|what if|what about|"
    r"how about|thanks?|спасибо|danke|merci|gracias)\b"
    r"|\b(it|its|that|this|them|those|these|again|above|shorter|longer|previous|last one)\b"
    r"|\b(step \d+|you (mean|said|wrote|gave|told))\b",
    re.IGNORECASE,
)
# A rule may need quadratic time; what it looks for stands at an end of a long text.
_RULE_CHARACTERS = 2000
_CACHED = 512


@dataclass(frozen=True)
class Route:
    """Where a request goes.

    Attributes:
        adapter: Name of the adapter; None is the plain base.
        scores: Calibrated probability of every class, the base included.
        reason: One short sentence.
    """

    adapter: str | None
    scores: dict[str, float]
    reason: str


@dataclass(frozen=True)
class _Opinion:
    """What one request says by itself."""

    choice: str
    reason: str
    scores: dict[str, float]
    by_rule: bool = False
    likeliest: str = BASE
    similarity: float = -1.0
    alikeness: float = 0.0


class Router:
    """A trained router with its embedding model; safe for threads.

    Args:
        data: What training made.
        encoder: The embedding model that it was trained with.
    """

    def __init__(self, data: RouterData, encoder: TextEncoder) -> None:
        self.data, self.encoder = data, encoder
        self.names, self.files = list(data.settings.names), dict(data.settings.files)
        self._rules = [
            (name, rule, re.compile(rule, RULE_FLAGS))
            for name, rules in data.settings.rules.items()
            for rule in rules
        ]
        self._labels = np.array(data.settings.labels)
        # A conversation comes again with every turn: only its newest text is new.
        self._opinion = functools.lru_cache(_CACHED)(self._form_opinion)

    @classmethod
    def load(cls, path: Path, n_threads: int = 1, encoder_path: Path | None = None) -> Self:
        """Load a router and its embedding model.

        Args:
            path: The file that training wrote.
            n_threads: Threads of the embedding model. One decides in 9 ms; two are hardly faster, and
                wait for each other whenever anything else runs.
            encoder_path: Where the embedding model is now, if not where it was.

        Raises:
            CommandError: Exit 3; one of the two is missing or damaged, or they do not belong together.
        """
        data = load_router(path)
        file = encoder_path or Path(data.settings.encoder)
        if not file.is_file():
            raise CommandError(
                f"the router '{path}' needs the embedding model '{file}', which does not exist; make "
                f"it ({EXPORT_COMMAND}) and train again: {TRAIN_COMMAND}",
                MODEL,
            )
        encoder = Encoder(file, n_threads)
        fits = data.examples.shape[1] == encoder.dim and encoder.dim < data.weights.shape[1]
        if encoder.identity != data.settings.encoder_identity or not fits:
            encoder.close()
            raise CommandError(
                f"the embedding model '{file}' has changed since the router '{path}' was trained; "
                f"train it again: {TRAIN_COMMAND}",
                MODEL,
            )
        try:
            return cls(data, encoder)
        except (re.error, TypeError) as error:
            raise CommandError(
                f"the router '{path}' is damaged ({error}); train it again: {TRAIN_COMMAND}", MODEL
            ) from error

    def decide(self, text: str) -> Route:
        """Route one request that stands alone."""
        return self.route([text], self.names)

    def route(self, texts: Sequence[str], available: Collection[str]) -> Route:
        """Route a conversation.

        Args:
            texts: What the user said so far, in order.
            available: Adapters that are loaded; no other is chosen.
        """
        adapter, reason = BASE, "the request is empty"
        opinion = _Opinion(BASE, reason, self._no_scores())
        begun = False
        for text in texts:
            opinion = self._opinion(text)
            if not text.strip():
                reason = _goes_on(adapter, opinion.reason) if begun else opinion.reason
                continue
            wanted, reason = self._step(adapter if begun else None, text, opinion)
            adapter, begun = wanted, True
            if wanted != BASE and wanted not in available:
                adapter, reason = BASE, f"would be {wanted}, which is not loaded"
        return Route(None if adapter == BASE else adapter, opinion.scores, reason)

    def probabilities(self, text: str) -> dict[str, float]:
        """Give the classifier's calibrated probability of each class that has examples."""
        return self._classify(text, self.encoder.encode(text))

    def nearest(self, text: str, count: int = 3) -> list[tuple[float, str, str]]:
        """Give the examples that are most like a text: cosine, class, example."""
        cosines = self.data.examples @ self.encoder.encode(text)
        one = self.data.settings
        return [
            (round(float(cosines[at]), 4), one.classes[one.labels[at]], one.texts[at])
            for at in np.argsort(-cosines, kind="stable")[:count]
        ]

    def _step(self, current: str | None, text: str, opinion: _Opinion) -> tuple[str, str]:
        """Give what the next text makes of the adapter of a conversation, and why."""
        by_rule = opinion.by_rule and not (opinion.choice == BASE and _points_back(text))
        if current is None or current == BASE or by_rule or opinion.choice == current:
            if current == BASE and not by_rule and _only_points_back(text, opinion):
                return BASE, _goes_on(BASE, "a short follow-up")
            return opinion.choice, opinion.reason
        one, wanted = self.data.settings, opinion.likeliest
        probability = opinion.scores[wanted]
        if wanted == current:
            return current, _goes_on(current, f"{probability:.0%} {wanted}")
        if _says_little(text) and opinion.alikeness < _ALIKE:
            return current, _goes_on(current, "a short follow-up")
        clear = (
            probability >= one.switch_threshold
            and probability - opinion.scores[current] >= SWITCH_MARGIN
            and opinion.similarity >= one.min_similarity
        )
        if clear:
            return wanted, opinion.reason
        return current, _goes_on(current, f"nothing clearly says {wanted} ({probability:.0%})")

    def _form_opinion(self, text: str) -> _Opinion:
        if not text.strip():
            return _Opinion(BASE, "the request is empty", self._no_scores())
        one = self.data.settings
        embedding = self.encoder.encode(text)
        found = self._classify(text, embedding)
        scores = {**self._no_scores(), **{name: round(value, 4) for name, value in found.items()}}
        rule = self._match(text)
        if rule is not None:
            name, pattern = rule
            return _Opinion(name, f"rule /{shorten(pattern)}/ of {name}", scores, by_rule=True)
        script = main_script(text)
        if script is not None and script not in one.scripts:
            return _Opinion(BASE, f"no example is written in this script ({script})", scores)
        likeliest = max(found, key=found.__getitem__)
        probability = found[likeliest]
        cosines = self.data.examples @ embedding
        cosines[self._labels != one.classes.index(likeliest)] = -2
        at = int(cosines.argmax())
        similarity, example = float(cosines[at]), shorten(one.texts[at])
        alikeness = (similarity + float(hash_words(text) @ hash_words(one.texts[at]))) / 2
        reason, choice = f"{probability:.0%} {likeliest}; like '{example}'", likeliest
        if likeliest != BASE and similarity < one.min_similarity:
            reason, choice = f"like none of the examples (nearest: '{example}')", BASE
        elif likeliest != BASE and probability < one.threshold:
            reason = f"unsure: {probability:.0%} {likeliest}, needs {one.threshold:.0%}"
            choice = BASE
        return _Opinion(choice, reason, scores, False, likeliest, similarity, alikeness)

    def _match(self, text: str) -> tuple[str, str] | None:
        """Give the class and the rule that decide; None without, or where rules contradict."""
        searched = clip(text.strip(), _RULE_CHARACTERS, _RULE_CHARACTERS)
        matches = [(name, rule) for name, rule, regex in self._rules if regex.search(searched)]
        return matches[0] if len({name for name, _ in matches}) == 1 else None

    def _classify(self, text: str, embedding: np.ndarray) -> dict[str, float]:
        logits = self.data.weights @ features(text, embedding) + self.data.bias
        found = softmax(logits.astype(np.float64) / self.data.settings.temperature)
        return dict(zip(self.data.settings.classes, found.tolist(), strict=True))

    def _no_scores(self) -> dict[str, float]:
        return dict.fromkeys([*self.names, BASE], 0.0)


def _says_little(text: str) -> bool:
    return len(text.split()) <= _FEW_WORDS or _points_back(text)


def _only_points_back(text: str, opinion: _Opinion) -> bool:
    """Whether a text is so short and so vague that it cannot begin something with an adapter."""
    vague = len(text.split()) <= _FEW_WORDS and _points_back(text)
    return vague and opinion.choice != BASE and opinion.alikeness < _ALIKE


def _points_back(text: str) -> bool:
    """Whether a text leans on what was said before: "and shorter", "thanks"."""
    return len(text.split()) <= _FEW_POINTING_WORDS and bool(_POINTING.search(text))


def _goes_on(adapter: str, why: str) -> str:
    return f"goes on with {adapter}: {why}"
