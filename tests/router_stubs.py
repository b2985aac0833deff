"""A small configuration and an embedding model made of hashed words, for tests of the router."""

import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from integration.router_config import RouterConfig, load_config
from integration.router_training import train_router
from integration.routing import Router

TOPICS = {
    "json": "as json object with keys fields array output valid",
    "coding": "write python function code loop class sort bug",
    "support": "my printer wifi broken account screen help restart",
    "base": "tell story weather poem capital history recipe holiday",
}


class FakeEncoder:
    """Words hashed into 64 directions: texts that share words are alike."""

    path, identity = Path("fake.gguf"), "fake"

    def __init__(self) -> None:
        self.calls = 0

    def encode(self, text: str) -> np.ndarray:
        self.calls += 1
        found = np.full(64, 1e-3, np.float32)
        for word in text.casefold().split():
            found[zlib.crc32(word.encode("utf-8", errors="replace")) % 64] += 1
        return found / np.linalg.norm(found)

    def encode_all(self, texts: Iterable[str]) -> np.ndarray:
        return np.stack([self.encode(text) for text in texts])


def examples(name: str, count: int = 12) -> list[str]:
    words = TOPICS[name].split()
    size = len(words)
    return [
        f"{words[at % size]} {words[(at * 3 + 1) % size]} {words[(at * 5 + 2) % size]} "
        f"{words[(at + 4) % size]} no{at}"
        for at in range(count)
    ]


def config_text(counts: dict[str, int] | None = None) -> str:
    counts = counts or dict.fromkeys(TOPICS, 12)
    lines = ["adapters:"]
    for name in ("json", "coding", "support"):
        lines += [f"  - name: {name}", f"    file: outputs/{name}/*-LoRA.gguf"]
        lines += ["    rules:", f"      - '\\b{name}!'", "    examples:"]
        lines += [f"      - '{text}'" for text in examples(name, counts[name])]
    lines += ["base:", "  rules: ['^(thanks|hello)$']", "  examples:"]
    lines += [f"    - '{text}'" for text in examples("base", counts["base"])]
    return "\n".join(lines) + "\n"


def make_config(folder: Path, counts: dict[str, int] | None = None) -> RouterConfig:
    path = folder / "adapters.yaml"
    path.write_text(config_text(counts), encoding="utf-8")
    return load_config(path)


def make_router(folder: Path) -> Router:
    encoder = FakeEncoder()
    data, _ = train_router(make_config(folder), encoder)
    return Router(data, encoder)
