"""Exact and near duplicates of conversations, in a store that lives on disk.

Exact copies share a SHA-256. Near copies are found by MinHash over word shingles: rows that agree in
one band of their signature are candidates, and the share of equal values in the whole signature
estimates how much their shingles overlap (Jaccard). All of it depends on texts only.
"""

import hashlib
import json
import re
import sqlite3
import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Message = dict[str, Any]

SHINGLE_WORDS = 3
MIN_WORDS = 8
# Bands come from the first half; the whole signature then estimates with half the error's variance.
NUM_VALUES, NUM_BAND_VALUES = 256, 128
_MINHASH_SEED = 1
_WANTED_RECALL = 0.99
# Templated data can put thousands of rows into one band; these many are looked at, best first.
MAX_CANDIDATES = 50
_BAND_SCAN = 200
_CACHE_KIB = 16 * 1024
# Scripts without spaces: every character counts as a word.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(f"[{_CJK}]|[^\\s{_CJK}]+")


def normalise(text: str) -> str:
    """Give a text as it is compared: composed, lower case, single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def content_key(messages: Sequence[Message]) -> bytes:
    """Hash a whole conversation; white space does not count, everything else does."""
    parts = [
        (message["role"], " ".join(unicodedata.normalize("NFC", message["content"]).split()))
        for message in messages
    ]
    return hashlib.sha256(json.dumps(parts).encode()).digest()


def first_request(messages: Sequence[Message]) -> str:
    """Give the first user turn."""
    return next(message["content"] for message in messages if message["role"] == "user")


def prompt_key(messages: Sequence[Message], seed: int) -> bytes:
    """Hash the first user turn with the seed: rows that ask the same have the same key."""
    return hashlib.sha256(f"{seed}\n{normalise(first_request(messages))}".encode()).digest()


def spoken_text(messages: Sequence[Message]) -> str:
    """Join the turns without the system turn, which many rows share."""
    return "\n".join(message["content"] for message in messages if message["role"] != "system")


def make_signature(text: str) -> bytes | None:
    """Give the MinHash of a text's word shingles; None when it has too few words to compare."""
    from rensa import RMinHash

    words = _WORD.findall(normalise(text))
    if len(words) < MIN_WORDS:
        return None
    minhash = RMinHash(num_perm=NUM_VALUES, seed=_MINHASH_SEED)
    minhash.update(
        [" ".join(shingle) for shingle in zip(words, words[1:], words[2:], strict=False)]
    )
    return array("I", minhash.digest()).tobytes()


def estimate_overlap(first: bytes, second: bytes) -> float:
    """Estimate the Jaccard index of two texts from their signatures."""
    import numpy

    return float(
        numpy.mean(numpy.frombuffer(first, numpy.uint32) == numpy.frombuffer(second, numpy.uint32))
    )


def values_per_band(threshold: float) -> int:
    """Give the widest band with which a pair at the threshold is still found 99 times of 100.

    A pair with overlap J agrees in one of b bands of r values with 1 - (1 - J^r)^b.
    """
    for values in (32, 16, 8, 4):
        bands = NUM_BAND_VALUES // values
        if 1 - (1 - threshold**values) ** bands >= _WANTED_RECALL:
            return values
    return 2


class NearDuplicateIndex:
    """Signatures by number, on disk; give them in an order that does not depend on the input.

    Args:
        database: Two tables are added to it.
        name: Prefix of the tables.
        threshold: Overlap from which two texts are near duplicates; with 1 nothing ever is.
    """

    def __init__(self, database: sqlite3.Connection, name: str, threshold: float) -> None:
        self._database, self._name, self._threshold = database, name, threshold
        self._width = values_per_band(threshold) * array("I").itemsize
        database.execute(
            f"CREATE TABLE {name}_signatures (number INTEGER PRIMARY KEY, signature BLOB)"
        )
        database.execute(
            f"CREATE TABLE {name}_bands (band INTEGER, number INTEGER, PRIMARY KEY (band, number)) "
            "WITHOUT ROWID"
        )

    def find(self, signature: bytes | None) -> int | None:
        """Give the number of the nearest text that overlaps enough, the first of equals."""
        if signature is None or self._threshold >= 1:
            return None
        shared: dict[int, int] = {}
        for band in self._bands(signature):
            for (number,) in self._database.execute(
                f"SELECT number FROM {self._name}_bands WHERE band = ? "
                f"ORDER BY number LIMIT {_BAND_SCAN}",
                (band,),
            ):
                shared[number] = shared.get(number, 0) + 1
        nearest: tuple[float, int] | None = None
        for number in sorted(shared, key=lambda item: (-shared[item], item))[:MAX_CANDIDATES]:
            (other,) = self._database.execute(
                f"SELECT signature FROM {self._name}_signatures WHERE number = ?", (number,)
            ).fetchone()
            overlap = estimate_overlap(signature, other)
            if overlap >= self._threshold and (nearest is None or (-overlap, number) < nearest):
                nearest = (-overlap, number)
        return nearest[1] if nearest else None

    def add(self, number: int, signature: bytes | None) -> None:
        """Remember a text."""
        if signature is None or self._threshold >= 1:
            return
        self._database.execute(
            f"INSERT INTO {self._name}_signatures VALUES (?, ?)", (number, signature)
        )
        self._database.executemany(
            f"INSERT OR IGNORE INTO {self._name}_bands VALUES (?, ?)",
            [(band, number) for band in self._bands(signature)],
        )

    def _bands(self, signature: bytes) -> list[int]:
        end = NUM_BAND_VALUES * array("I").itemsize
        return [
            int.from_bytes(
                hashlib.blake2b(
                    signature[start : start + self._width],
                    digest_size=8,
                    salt=start.to_bytes(4, "big"),
                ).digest(),
                "big",
                signed=True,
            )
            for start in range(0, end, self._width)
        ]


@dataclass(frozen=True)
class StoredRow:
    """A row on its way through the store.

    Attributes:
        where: Its place in the data set.
        line: What is written when it is kept.
        raw: The row as it was read, as a line of JSON.
        position: Its rank among the kept rows; -1 when it is none of them.
    """

    where: str
    line: bytes
    raw: bytes
    position: int = -1


@dataclass(frozen=True)
class LeftOut:
    """A row that is not kept; a copy comes with the place of the row that it copies."""

    reason: str
    row: StoredRow | None = None
    copy_of: str = ""


class RowStore:
    """Rows in a file, their keys and signatures in SQLite; its memory does not grow with them.

    Add rows in any order, call ``keep_unique``, then ``hold_out``, then read ``kept_rows``. The order
    of the keys (first request, then the whole text, both hashed) decides everything.

    Args:
        work_dir: Existing folder for the files; the caller removes it.
        seed: Changes the order, and so what is held out.
        threshold: Overlap of near duplicates; 1 looks for exact ones only.
    """

    def __init__(self, work_dir: Path, seed: int, threshold: float) -> None:
        self._seed, self._threshold = seed, threshold
        self._spool = (work_dir / "rows.jsonl").open("w+b")
        self.database = sqlite3.connect(work_dir / "rows.sqlite", isolation_level=None)
        # Nothing here outlives the run, so nothing waits for the disk; the cache is bounded.
        for setting in (
            "journal_mode = OFF",
            "synchronous = OFF",
            "locking_mode = EXCLUSIVE",
            "temp_store = FILE",
            f"cache_size = -{_CACHE_KIB}",
        ):
            self.database.execute(f"PRAGMA {setting}")
        for table in (
            "rows (number INTEGER PRIMARY KEY, prompt BLOB, content BLOB, tie BLOB, signature BLOB, "
            "place TEXT, start INTEGER, middle INTEGER, end INTEGER)",
            "kept (position INTEGER PRIMARY KEY, number INTEGER, prompt BLOB)",
            "held_out (prompt BLOB PRIMARY KEY) WITHOUT ROWID",
        ):
            self.database.execute(f"CREATE TABLE {table}")
        self.database.execute("BEGIN")

    def close(self) -> None:
        """Close the files."""
        self._spool.close()
        self.database.close()

    def add(self, row: StoredRow, messages: Sequence[Message]) -> None:
        """Spool a row. The raw row is kept too: that it is a copy is only known later."""
        signature = make_signature(spoken_text(messages)) if self._threshold < 1 else None
        start = self._spool.tell()
        middle = start + self._spool.write(row.line)
        end = middle + self._spool.write(row.raw)
        self.database.execute(
            "INSERT INTO rows VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                prompt_key(messages, self._seed),
                content_key(messages),
                # Copies may differ in source or weights: which one stays must not depend on order.
                hashlib.sha256(row.line).digest()[:8],
                signature,
                row.where,
                start,
                middle,
                end,
            ),
        )

    def keep_unique(self, max_rows: int = 0) -> Iterator[LeftOut]:
        """Keep the first of each set of copies, at most ``max_rows`` (0 = all); yield the rest."""
        self.database.execute("CREATE INDEX by_key ON rows (prompt, content, tie, number)")
        index = NearDuplicateIndex(self.database, "near", self._threshold)
        position, content_before, where_before = 0, b"", ""
        for number, prompt, content, signature, where in self.database.execute(
            "SELECT number, prompt, content, signature, place FROM rows "
            "ORDER BY prompt, content, tie, number"
        ):
            if content == content_before:
                yield LeftOut("exact duplicate", self._row(number), where_before)
                continue
            content_before, where_before = content, where
            near = index.find(signature)
            if near is not None:
                yield LeftOut("near duplicate", self._row(number), self.where_is(near))
            elif max_rows and position >= max_rows:
                yield LeftOut("over max_rows")
            else:
                self.database.execute(
                    "INSERT INTO kept VALUES (?, ?, ?)", (position, number, prompt)
                )
                index.add(position, signature)
                position += 1

    def count_kept(self) -> int:
        """Count the kept rows."""
        return self.database.execute("SELECT count(*) FROM kept").fetchone()[0]

    def hold_out(self, wanted: int) -> int:
        """Hold out whole groups of rows with the same first request; say how many rows that is.

        A group with which it would be more than twice what is wanted, or everything, is passed over.
        """
        most = min(2 * wanted, self.count_kept() - 1)
        chosen, held = [], 0
        for prompt, size in self.database.execute(
            "SELECT prompt, count(*) FROM kept GROUP BY prompt ORDER BY min(position)"
        ):
            if held >= wanted:
                break
            if held + size <= most:
                chosen.append((prompt,))
                held += size
        self.database.executemany("INSERT INTO held_out VALUES (?)", chosen)
        return held

    def kept_rows(self, held_out: bool) -> Iterator[StoredRow]:
        """Give the held-out rows, or the others, in the order of their keys."""
        chosen = "IN" if held_out else "NOT IN"
        for number, position in self.database.execute(
            f"SELECT number, position FROM kept WHERE prompt {chosen} (SELECT prompt FROM held_out) "
            "ORDER BY position"
        ):
            yield self._row(number, position)

    def where_is(self, position: int) -> str:
        """Give the place of a kept row in the data set."""
        return self.database.execute(
            "SELECT place FROM kept JOIN rows USING (number) WHERE position = ?", (position,)
        ).fetchone()[0]

    def _row(self, number: int, position: int = -1) -> StoredRow:
        where, start, middle, end = self.database.execute(
            "SELECT place, start, middle, end FROM rows WHERE number = ?", (number,)
        ).fetchone()
        self._spool.seek(start)
        return StoredRow(
            where, self._spool.read(middle - start), self._spool.read(end - middle), position
        )
