"""Tool-use conversations from the tools' own schemas: seeded, reproducible, results really computed.

Each row is a chat with the tool list as its system turn. `scripts.tool_requests` holds the phrasings,
`scripts.tool_texts` the texts they are about, `scripts.tool_conversations` puts them together; here
the kinds are mixed, and the variety of the whole is measured.

    python -m scripts.make_tool_data --rows 200 --seed 7 > tool_rows.jsonl
    python -m scripts.make_tool_data --rows 2000 --report
"""

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from scripts._cli import OK, CommandError, run_command
from scripts.tool_texts import Corpus, Message
from tools.protocol import RESPONSE_START, system_with_tools

SAMPLE_PATH = Path(__file__).parent / "data" / "finetome_sample.jsonl"
Row = dict[str, Any]

# Shares of the kinds. Requests without a tool are as common as any tool, or a small model calls for
# everything; asking back is a plain answer too.
KINDS = {
    "text_formatter": 0.24,
    "template_generator": 0.17,
    "content_validator": 0.26,
    "no_tool": 0.18,
    "ask_back": 0.1,
    "follow_up": 0.05,
}
# A few hundred rows teach the plain wish, said in few ways; of the varied rows they would teach nothing.
BASIC_KINDS = {
    "text_formatter": 0.3,
    "template_generator": 0.21,
    "content_validator": 0.24,
    "no_tool": 0.25,
}
# A request may come in the middle of a conversation, or under a system prompt of the user's own.
TALK_BEFORE_SHARE = 0.05
OWN_SYSTEM_SHARE = 0.03
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You help the editors of a small newspaper. Be friendly and precise.",
    "You are the assistant of a software team. Keep answers short.",
    "You explain things to beginners with simple words and examples.",
    "Speak like a patient teacher.",
    "You work for the customer service of an online shop.",
    "Be polite. Never use slang.",
)


def sample_conversations() -> list[list[Message]]:
    """Read the shipped sample as messages."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    return [
        [
            {"role": roles[turn["from"]], "content": turn["value"]}
            for turn in json.loads(line)["conversations"]
        ]
        for line in SAMPLE_PATH.read_text(encoding="utf-8").splitlines()
    ]


def generate_conversations(
    num_rows: int, seed: int, corpus: Corpus, held_out: bool = False, basic: bool = False
) -> Iterator[Row]:
    """Yield rows of ``messages``, ``source`` and ``kind``.

    Args:
        num_rows: How many.
        seed: The same seed and corpus give the same rows.
        corpus: Where texts come from, beside the bank of the project.
        held_out: Use the phrasings and texts that training rows are never made of.
        basic: Use some eighty plain phrasings and single turns, for a training of minutes.

    Raises:
        CommandError: The corpus has too few sentences.
    """
    if not num_rows:
        return
    corpus.require_sentences()
    from scripts.tool_conversations import Conversations
    from tools import TOOLS

    rng = random.Random(seed)
    conversations = Conversations(corpus, rng, held_out, basic)
    kinds = BASIC_KINDS if basic else KINDS
    for _ in range(num_rows):
        kind = rng.choices(list(kinds), weights=list(kinds.values()))[0]
        turns: list[Message] = getattr(conversations, kind)()
        own = None
        if not basic:
            if rng.random() < TALK_BEFORE_SHARE:
                turns = conversations.no_tool() + turns
            own = rng.choice(SYSTEM_PROMPTS) if rng.random() < OWN_SYSTEM_SHARE else None
        system = {"role": "system", "content": system_with_tools(own, TOOLS)}
        yield {"messages": [system, *turns], "source": "tomeforge_tools", "kind": kind}


class Diversity:
    """Counts how varied the requests of rows are that pass through ``watch``."""

    def __init__(self) -> None:
        self._kinds: Counter[str] = Counter()
        self._seen: dict[int, set[tuple[str, ...]]] = {n: set() for n in (1, 2, 3)}
        self._total: Counter[int] = Counter()
        self._lengths: list[int] = []

    def watch(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield the rows, counting them."""
        for row in rows:
            self._kinds[row["kind"]] += 1
            for message in row["messages"]:
                if message["role"] == "user" and not message["content"].startswith(RESPONSE_START):
                    self._count(message["content"].lower().split())
            yield row

    def _count(self, words: list[str]) -> None:
        self._lengths.append(len(words))
        for n, grams in self._seen.items():
            found = list(zip(*(words[at:] for at in range(n)), strict=False))
            grams.update(found)
            self._total[n] += len(found)

    def to_json(self) -> dict[str, Any]:
        """Give the figures.

        Returns:
            Rows of each kind; ``distinct_1`` to ``distinct_3``: different n-grams of the words of all
            requests over all n-grams (Li et al. 2016, arXiv 1510.03055); quantiles of the requests'
            length in words.
        """
        lengths = sorted(self._lengths)
        shares = {"min": 0, "median": 0.5, "p95": 0.95, "max": 1}
        return {
            "rows": self._kinds.total(),
            "kinds": dict(self._kinds.most_common()),
            **{
                f"distinct_{n}": round(len(grams) / max(1, self._total[n]), 3)
                for n, grams in self._seen.items()
            },
            "request_words": {
                name: lengths[int(share * (len(lengths) - 1))]
                for name, share in shares.items()
                if lengths
            },
        }


def measure_diversity(rows: Iterable[Row]) -> dict[str, Any]:
    """Measure how varied the requests of rows are; see ``Diversity.to_json``."""
    diversity = Diversity()
    for _ in diversity.watch(rows):
        pass
    return diversity.to_json()


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(description="Print generated tool-use conversations as JSONL.")
    parser.add_argument("--rows", type=int, default=200, help="how many (default 200)")
    parser.add_argument("--seed", type=int, default=3407, help="the same seed gives the same rows")
    parser.add_argument(
        "--held-out", action="store_true", help="use the phrasings that no training row is made of"
    )
    parser.add_argument(
        "--basic", action="store_true", help="use the few plain phrasings of tool_phrasings: basic"
    )
    parser.add_argument("--report", action="store_true", help="print how varied they are instead")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print rows as JSON lines, or their report."""
    arguments = build_parser().parse_args(argv)
    if arguments.rows < 1:
        raise CommandError(f"--rows: got {arguments.rows}, expected at least 1")
    corpus = Corpus.of(sample_conversations())
    if arguments.basic and arguments.held_out:
        raise CommandError("--basic: its phrasings are for training only; leave out --held-out")
    rows = generate_conversations(
        arguments.rows, arguments.seed, corpus, arguments.held_out, arguments.basic
    )
    if arguments.report:
        print(json.dumps(measure_diversity(rows), indent=2))
        return OK
    for row in rows:
        print(json.dumps(row, ensure_ascii=False))
    return OK


if __name__ == "__main__":
    run_command(main)
