"""The trained router on disk: one .npz of plain arrays and a JSON text, nothing that can run code."""

import json
import os
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from integration._cli import FAILED, MODEL, CommandError

TRAIN_COMMAND = "python -m integration.router train"
VERSION = 1
_ARRAYS = ("weights", "bias", "examples")


@dataclass(frozen=True)
class Settings:
    """All of a trained router that is no array.

    Attributes:
        names: Adapters, in the order of the configuration.
        files: Path or glob of each adapter's LoRA GGUF.
        rules: Regular expressions of each adapter and of the base.
        classes: Names of the classifier's classes: those that have examples.
        texts: The examples.
        labels: Index in ``classes`` of each example.
        scripts: Writing systems of the examples.
        temperature: What logits are divided by, so that a probability is how often it is right.
        threshold: Probability that an adapter needs.
        switch_threshold: Probability that a later turn needs to change the adapter.
        min_similarity: Cosine to an example of the class that an adapter needs.
        encoder: Path of the embedding model.
        encoder_identity: Its ``file_identity``.
    """

    names: list[str]
    files: dict[str, str]
    rules: dict[str, list[str]]
    classes: list[str]
    texts: list[str]
    labels: list[int]
    scripts: list[str]
    temperature: float
    threshold: float
    switch_threshold: float
    min_similarity: float
    encoder: str
    encoder_identity: str
    version: int = VERSION


@dataclass(frozen=True)
class RouterData:
    """A trained router.

    Attributes:
        settings: Names, rules, thresholds.
        weights: Shape (classes, features).
        bias: Shape (classes,).
        examples: Embeddings of the examples, shape (examples, dim).
    """

    settings: Settings
    weights: np.ndarray
    bias: np.ndarray
    examples: np.ndarray


def save_router(data: RouterData, path: Path) -> None:
    """Write a router under a temporary name and rename it; an older one is replaced.

    Raises:
        CommandError: Exit 1; the file cannot be written.
    """
    text = json.dumps(asdict(data.settings), ensure_ascii=True).encode()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(
                file,
                settings=np.frombuffer(text, np.uint8),
                weights=data.weights.astype(np.float32),
                bias=data.bias.astype(np.float32),
                examples=data.examples.astype(np.float32),
            )
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CommandError(
            f"the router cannot be written to '{path}': {error.strerror}; choose another --output",
            FAILED,
        ) from error


def load_router(path: Path) -> RouterData:
    """Read a router and check that its parts fit each other.

    Raises:
        CommandError: Exit 3; it is missing, damaged, or of another version.
    """
    if not path.is_file():
        raise CommandError(f"there is no router '{path}'; train one: {TRAIN_COMMAND}", MODEL)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in _ARRAYS}
            content = json.loads(file["settings"].tobytes())
        if content.get("version") != VERSION:
            raise CommandError(
                f"the router '{path}' has version {content.get('version')}, expected {VERSION}; "
                f"train it again: {TRAIN_COMMAND}",
                MODEL,
            )
        data = RouterData(Settings(**content), **arrays)
        _check(data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError,
            zipfile.BadZipFile, NotImplementedError) as error:  # fmt: skip
        raise CommandError(
            f"the router '{path}' is damaged ({error}); train it again: {TRAIN_COMMAND}", MODEL
        ) from error
    return data


def _check(data: RouterData) -> None:
    one = data.settings
    lists: tuple[Any, ...] = (one.names, one.classes, one.texts, one.scripts, one.labels)
    n_classes, n_examples = len(one.classes), len(one.texts)
    fits = (
        all(isinstance(part, list) for part in lists)
        and all(isinstance(text, str) for part in lists[:-1] for text in part)
        and isinstance(one.files, dict)
        and isinstance(one.rules, dict)
        and data.weights.ndim == data.examples.ndim == 2
        and data.weights.shape[0] == n_classes >= 2
        and data.bias.shape == (n_classes,)
        and data.examples.shape[0] == len(one.labels) == n_examples > 0
        and all(label in range(n_classes) for label in one.labels)
        and set(range(n_classes)) == set(one.labels)
        and all(np.isfinite(array).all() for array in (data.weights, data.bias, data.examples))
        and min(one.temperature, one.threshold, one.switch_threshold) > 0
        and -1 <= one.min_similarity <= 1
    )
    if not fits:
        raise ValueError("its parts do not fit each other")
