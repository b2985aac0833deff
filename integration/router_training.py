"""Train the router: a logistic regression on example requests, and thresholds that are earned.

Whatever is chosen here - strength, temperature, thresholds - is chosen on requests that the
classifier had not seen (seeded cross-validation), so the figures of the report hold for new ones.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from integration._cli import CommandError
from integration.ask_format import BASE
from integration.router_config import RouteClass, RouterConfig
from integration.router_features import features, main_script
from integration.router_file import RouterData, Settings

STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0)
MOST_FOLDS, REPEATS = 5, 2
LEAST_THRESHOLD, WANTED_PRECISION = 0.5, 0.95
LEAST_SWITCH, WANTED_SWITCH_PRECISION = 0.6, 0.95
MOST_REFUSED = 0.05  # of the requests that an adapter is for, by the similarity alone
_ROUNDING = 1e-5


class TextEncoder(Protocol):
    """What is needed of an embedding model."""

    path: Path
    identity: str

    def encode(self, text: str) -> np.ndarray:
        """Give the embedding of a text, shape (dim,), of length 1."""

    def encode_all(self, texts: Iterable[str]) -> np.ndarray:
        """Give the embeddings of texts, shape (texts, dim)."""


@dataclass(frozen=True)
class _OutOfFold:
    """Logits for requests by classifiers that had not seen them, shape (rows x repeats, classes)."""

    logits: np.ndarray
    labels: np.ndarray

    def probabilities(self, temperature: float) -> np.ndarray:
        return softmax(self.logits / temperature)

    def log_loss(self, temperature: float = 1.0) -> float:
        right = self.probabilities(temperature)[np.arange(len(self.labels)), self.labels]
        return float(-np.log(np.maximum(right, 1e-12)).mean())


def train_router(
    config: RouterConfig, encoder: TextEncoder, known: Mapping[str, np.ndarray] | None = None
) -> tuple[RouterData, dict[str, Any]]:
    """Train a router and report on it.

    Args:
        config: Adapters and their examples.
        encoder: The embedding model.
        known: Embeddings that it gave before, by text.

    Raises:
        CommandError: Exit 2; a class has a single example.
    """
    from threadpoolctl import threadpool_limits

    classes = [one for one in config.classes if one.examples or one.more]
    for one in classes:
        if len(one.examples) + len(one.more) < 2:
            raise CommandError(
                f"'{config.path}': '{one.name}' has 1 example, and a router can neither learn from "
                "it nor be checked; add at least one more, better 10 to 50"
            )
    texts = [text for one in classes for text in (*one.examples, *one.more)]
    sizes = [len(one.examples) + len(one.more) for one in classes]
    labels = np.repeat(np.arange(len(classes)), sizes)
    judged = np.concatenate([_judged(one) for one in classes])
    found = dict(known or {})
    fresh = [text for text in texts if text not in found]
    if fresh:
        found |= zip(fresh, encoder.encode_all(fresh), strict=True)
    embeddings = np.stack([found[text] for text in texts])
    rows = np.stack([features(*pair) for pair in zip(texts, embeddings, strict=True)])
    # Examples span at most as many dimensions as they are: the same solution in less time.
    small, back = _reduce(rows)
    with threadpool_limits(1):  # on matrices this small, threads only wait for each other
        strength = min(
            STRENGTHS, key=lambda one: _out_of_fold(small, labels, judged, one, 1).log_loss()
        )
        unseen = _out_of_fold(small, labels, judged, strength, REPEATS)
        weights, bias = _fit(small, labels, strength)
    temperature = min(np.geomspace(0.2, 5, 201), key=unseen.log_loss)
    names = [one.name for one in classes]
    probabilities = unseen.probabilities(temperature)
    threshold, switch = _thresholds(probabilities, unseen.labels, names)
    own, unknown = _similarities(embeddings, labels, judged, names)
    min_similarity = _least_similarity(own, unknown)
    settings = Settings(
        names=[one.name for one in config.adapters],
        files={one.name: one.file for one in config.adapters},
        rules={one.name: list(one.rules) for one in config.classes},
        classes=names,
        texts=texts,
        labels=labels.tolist(),
        scripts=sorted({script for script in map(main_script, texts) if script}),
        temperature=float(temperature),
        threshold=threshold,
        switch_threshold=switch,
        min_similarity=min_similarity,
        encoder=str(encoder.path),
        encoder_identity=encoder.identity,
    )
    report = {
        "classes": {one.name: len(one.examples) for one in classes},
        "more": {one.name: len(one.more) for one in classes},
        "folds": _fold_count(labels[judged]),
        "repeats": REPEATS,
        "strength": strength,
        "temperature": round(float(temperature), 3),
        "log_loss": round(unseen.log_loss(temperature), 4),
        "threshold": threshold,
        "switch_threshold": switch,
        "min_similarity": min_similarity,
        "unknown_refused": round(float((unknown < min_similarity).mean()), 4),
        **_quality(probabilities, unseen.labels, names, threshold),
    }
    return RouterData(settings, weights @ back, bias, embeddings), report


def softmax(logits: np.ndarray) -> np.ndarray:
    """Turn logits into probabilities along the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _reduce(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rotate rows into the space they span: the rotated rows, and the way back for weights.

    By the eigenvectors of rows @ rows.T, which takes a fraction of the time of an SVD of so wide a
    matrix.
    """
    wide = rows.astype(np.float64)
    powers, left = np.linalg.eigh(wide @ wide.T)
    kept = powers > powers[-1] * _ROUNDING**2
    sizes = np.sqrt(powers[kept])
    return left[:, kept] * sizes, (left[:, kept] / sizes).T @ wide


def _fit(rows: np.ndarray, labels: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength, class_weight="balanced", max_iter=2000, tol=1e-3)
    model.fit(rows, labels)
    if len(model.intercept_) == 1:  # two classes: one row, whose opposite is the other class
        return np.vstack([-model.coef_, model.coef_]) / 2, np.array([-1, 1]) * model.intercept_ / 2
    return model.coef_, model.intercept_


def _fold_count(labels: np.ndarray) -> int:
    return int(min(MOST_FOLDS, np.bincount(labels).min()))


def _judged(one: RouteClass) -> np.ndarray:
    """Mark the examples that figures and thresholds come from: those that a person listed."""
    return np.arange(len(one.examples) + len(one.more)) < (len(one.examples) or len(one.more))


def _out_of_fold(
    rows: np.ndarray, labels: np.ndarray, judged: np.ndarray, strength: float, repeats: int
) -> _OutOfFold:
    """Judge requests by classifiers that were trained on all others."""
    from sklearn.model_selection import StratifiedKFold

    listed, rest = np.flatnonzero(judged), np.flatnonzero(~judged)
    logits = np.empty((repeats, len(listed), labels.max() + 1))
    for seed in range(repeats):
        folds = StratifiedKFold(_fold_count(labels[judged]), shuffle=True, random_state=seed)
        for seen, unseen in folds.split(listed, labels[listed]):
            used = np.concatenate([listed[seen], rest])
            weights, bias = _fit(rows[used], labels[used], strength)
            logits[seed, unseen] = rows[listed[unseen]] @ weights.T + bias
    return _OutOfFold(logits.reshape(-1, logits.shape[-1]), np.tile(labels[listed], repeats))


def _thresholds(
    probabilities: np.ndarray, labels: np.ndarray, names: list[str]
) -> tuple[float, float]:
    best, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    right = best == labels
    to_adapter = np.array([names[one] != BASE for one in best])
    threshold = least_threshold(
        confidence[to_adapter], right[to_adapter], WANTED_PRECISION, LEAST_THRESHOLD
    )
    switch = least_threshold(confidence, right, WANTED_SWITCH_PRECISION, LEAST_SWITCH)
    return threshold, max(threshold, switch)


def least_threshold(
    confidence: np.ndarray, right: np.ndarray, wanted: float, least: float
) -> float:
    """Give the smallest threshold, not under ``least``, over which enough of the answers are right.

    Where no threshold is enough, the one over which the largest share is right.
    """
    candidates = sorted({least, *(round(float(one), 4) for one in confidence if one > least)})
    shares = [
        float(right[confidence >= one].mean()) if (confidence >= one).any() else 0.0
        for one in candidates
    ]
    enough = [one for one, share in zip(candidates, shares, strict=True) if share >= wanted]
    return enough[0] if enough else candidates[int(np.argmax(shares))]


def _similarities(
    embeddings: np.ndarray, labels: np.ndarray, judged: np.ndarray, names: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Give the similarity to the nearest other example of an adapter: its own, and a foreign one.

    The second is how an unknown request looks: one of a class that the router was not shown.
    """
    cosines = embeddings @ embeddings.T
    np.fill_diagonal(cosines, -1)
    adapters = np.array([names[label] != BASE for label in labels])
    same = labels[:, None] == labels[None, :]
    known = np.where(same & adapters[None, :], cosines, -1).max(axis=1)[adapters & judged]
    unknown = np.where(~same & adapters[None, :], cosines, -1).max(axis=1)[judged]
    return known, unknown


def _least_similarity(known: np.ndarray, unknown: np.ndarray) -> float:
    """Give the similarity that best parts the two, refusing few of the known ones."""
    candidates = [-1.0, *sorted(known[known <= np.quantile(known, MOST_REFUSED)])]
    gains = [float((unknown < one).mean() - (known < one).mean()) for one in candidates]
    # Rounded down, so that the example it was taken from passes.
    return max(-1.0, math.floor(float(candidates[int(np.argmax(gains))]) * 1e4) / 1e4)


def _quality(
    probabilities: np.ndarray, labels: np.ndarray, names: list[str], threshold: float
) -> dict[str, Any]:
    best = probabilities.argmax(axis=1)
    to_adapter = np.array([names[one] != BASE for one in best])
    sent = to_adapter & (probabilities.max(axis=1) >= threshold)
    confusion = np.zeros((len(names), len(names)), int)
    np.add.at(confusion, (labels, best), 1)
    meant = np.array([names[one] != BASE for one in labels])
    return {
        "accuracy": round(float((best == labels).mean()), 4),
        "accepted": round(float(sent[meant].mean()), 4),
        "accepted_right": round(float((best == labels)[sent].mean()), 4) if sent.any() else None,
        "confusion": {
            name: {other: int(confusion[row, column]) for column, other in enumerate(names)}
            for row, name in enumerate(names)
        },
    }
