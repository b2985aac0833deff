"""Held-out loss, speed and memory of one GGUF file, in llama.cpp on the CPU.

In: a GGUF and rows of tokens that are ready to evaluate, one `{"input_ids": […], "labels": […]}` a
line; label -100 is not scored. Out: one JSON object on stdout.

Run: python -m export.measure_gguf model-Q8_0.gguf --rows rows.jsonl

Loss is in nats, the sum over a row's scored tokens: label t is predicted from position t - 1, as
Hugging Face models shift them. The file is hashed before it is loaded, so that it lies in the page
cache: `load_seconds` is of a second start. Prompt speed has the logits of every position in it, as
scoring needs them, but not the scoring. `peak_memory_bytes` is the most that this process had
resident, interpreter, libraries and the pages of the mapped file included.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export._cli import CONTEXT, MODEL, OK, USAGE, CommandError, run_command
from export._files import os_errors_told, sha256_file
from export._process import QUIET_THREADS
from export.gguf_header import GgufHeader, read_gguf_header
from export.llama_probe import evaluate_portion, evaluate_row, load_model

if TYPE_CHECKING:
    import numpy as np

NOT_SCORED = -100
DEFAULT_DECODE_TOKENS = 64
_PROMPT_TOKENS = 16
_REPEATS = 3
# Positions scored at once, few enough for the processor's cache.
_PIECE = 8


@dataclass(frozen=True)
class TokenRow:
    """One conversation; `labels` are as long as `ids`."""

    ids: list[int]
    labels: list[int]

    @property
    def scored(self) -> int:
        """Count the tokens that are predicted: the first one never is."""
        return sum(label != NOT_SCORED for label in self.labels[1:])


def read_token_rows(path: Path) -> list[TokenRow]:
    """Read the rows of a JSONL file, in their order.

    Raises:
        CommandError: Exit 2: no such file, a line that is no row, or nothing is scored.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(
            f"--rows: '{path}' cannot be read ({error}); expected a JSONL file", USAGE
        ) from error
    rows = [_parse(line, f"{path}:{at}") for at, line in enumerate(lines, 1) if line.strip()]
    if not any(row.scored for row in rows):
        raise CommandError(
            f"--rows: '{path}' has {len(rows)} rows and no scored token; expected at least one "
            f"label behind a row's first that is not {NOT_SCORED}",
            USAGE,
        )
    return rows


def _parse(line: str, place: str) -> TokenRow:
    try:
        value = json.loads(line)
        ids, labels = value["input_ids"], value["labels"]
    except (ValueError, KeyError, TypeError) as error:
        raise CommandError(
            f'{place}: expected {{"input_ids": [int…], "labels": [int…]}}; correct this line', USAGE
        ) from error
    for name, numbers in (("input_ids", ids), ("labels", labels)):
        # A JSON true is an int to isinstance.
        if not isinstance(numbers, list) or any(type(number) is not int for number in numbers):
            raise CommandError(f"{place}: '{name}' is no list of whole numbers; correct it", USAGE)
    if not ids or len(ids) != len(labels):
        raise CommandError(
            f"{place}: {len(ids)} input_ids and {len(labels)} labels; expected one label for each "
            "of at least one token",
            USAGE,
        )
    return TokenRow(ids, labels)


def check_fit(rows: Sequence[TokenRow], header: GgufHeader, decode_tokens: int) -> int:
    """Compare rows with what a file knows; gives the context that they need.

    Raises:
        CommandError: Exit 2: an unknown token. Exit 3: no language model. Exit 4: a row, or what is
            to be decoded, is longer than the trained context.
    """
    metadata = header.metadata
    family = metadata.get("general.architecture")
    trained = metadata.get(f"{family}.context_length")
    tokens = metadata.get("tokenizer.ggml.tokens")
    # Of an embedding model llama.cpp gives numbers, too; they are no predictions.
    causal = metadata.get(f"{family}.attention.causal", True)
    if trained is None or tokens is None or not causal:
        raise CommandError(
            f"'{header.path}' ({family}) predicts no next token, or does not tell its tokens and "
            "context length; expected a language model",
            MODEL,
        )
    known = tokens if isinstance(tokens, int) else len(tokens)
    for number, row in enumerate(rows, 1):
        if len(row.ids) > trained:
            raise CommandError(
                f"row {number} has {len(row.ids)} tokens, '{header.path.name}' is trained for "
                f"{trained}; cut the row or leave it out",
                CONTEXT,
            )
        labels = [label for label in row.labels if label != NOT_SCORED]
        strange = [token for token in (*row.ids, *labels) if not 0 <= token < known]
        if strange:
            raise CommandError(
                f"row {number} has token {strange[0]}, '{header.path.name}' knows 0 to {known - 1}; "
                "make the rows with this model's tokenizer",
                USAGE,
            )
    decoded = min(_PROMPT_TOKENS, len(rows[0].ids)) + decode_tokens
    if decoded > trained:
        raise CommandError(
            f"--decode-tokens {decode_tokens} and the prompt are {decoded} tokens, "
            f"'{header.path.name}' is trained for {trained}; ask for fewer",
            CONTEXT,
        )
    return max(decoded, *(len(row.ids) for row in rows))


def measure_rows(model: Any, rows: Sequence[TokenRow]) -> tuple[list[tuple[float, int]], float]:
    """Evaluate every row.

    Returns:
        For each row the summed loss in nats and the number of scored tokens; and the tokens
        evaluated a second.

    Raises:
        CommandError: Exit 3: llama.cpp failed, or a loss is not finite.
    """
    found = []
    seconds = 0.0
    for number, row in enumerate(rows, 1):
        total = 0.0
        started = time.perf_counter()
        for start, logits in evaluate_row(model, row.ids):
            seconds += time.perf_counter() - started
            total += sum_losses(logits, row.labels[start + 1 : start + 1 + len(logits)])
            started = time.perf_counter()
        if not math.isfinite(total):
            raise CommandError(
                f"the loss of row {number} is {total}: the file is damaged or overflows; "
                "export.verify_gguf tells more",
                MODEL,
            )
        found.append((total, row.scored))
    return found, sum(len(row.ids) for row in rows) / seconds


def sum_losses(logits: "np.ndarray", targets: Sequence[int]) -> float:
    """Add up the negative log-likelihoods of the targets that are scored.

    Args:
        logits: float32, shape (n, V); they are not changed.
        targets: At most n token ids, each predicted from the logits at its place.
    """
    import numpy as np

    total = 0.0
    places = [at for at, target in enumerate(targets) if target != NOT_SCORED]
    for first in range(0, len(places), _PIECE):
        piece = places[first : first + _PIECE]
        values = logits[piece]  # a copy, (at most 8, V)
        values -= values.max(axis=1, keepdims=True)
        chosen = values[np.arange(len(piece)), [targets[at] for at in piece]]
        log_sums = np.log(np.exp(values).sum(axis=1))
        total += float((log_sums - chosen).sum(dtype=np.float64))
    return total


def measure_decoding(model: Any, prompt: Sequence[int], count: int) -> float:
    """Decode greedily behind a prompt, past any end token; gives tokens a second, the median."""
    speeds = []
    for _ in range(_REPEATS):
        for _start, logits in evaluate_row(model, prompt):
            token = int(logits[-1].argmax())
        started = time.perf_counter()
        for at in range(len(prompt), len(prompt) + count):
            token = int(evaluate_portion(model, [token], at)[0].argmax())
        speeds.append(count / (time.perf_counter() - started))
    return statistics.median(speeds)


def peak_memory_bytes() -> int:
    """Give the peak resident set of this process so far.

    Not ru_maxrss: a new process inherits that from the one that started it.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measure_gguf(
    path: Path, rows: Sequence[TokenRow], n_threads: int, decode_tokens: int
) -> dict[str, Any]:
    """Measure one file.

    Args:
        path: A GGUF with a language model.
        rows: From `read_token_rows`.
        n_threads: Of llama.cpp.
        decode_tokens: Tokens to time; 0: no decoding speed.

    Raises:
        CommandError: Exit 2: a token that the file does not know. Exit 3: the file is unusable.
            Exit 4: something is longer than the trained context.
    """
    header = read_gguf_header(path)
    n_ctx = check_fit(rows, header, decode_tokens)
    sha256 = sha256_file(path)
    import llama_cpp

    started = time.perf_counter()
    model = load_model(str(path), n_ctx, n_threads)
    load_seconds = time.perf_counter() - started
    decoding = None
    if decode_tokens:
        decoding = measure_decoding(model, rows[0].ids[:_PROMPT_TOKENS], decode_tokens)
    losses, reading = measure_rows(model, rows)
    return {
        "file": path.name,
        "bytes": header.file_bytes,
        "type": header.type_name,
        "sha256": sha256,
        "rows": losses,
        "prompt_tokens_per_second": round(reading, 1),
        "tokens_per_second": None if decoding is None else round(decoding, 1),
        "peak_memory_bytes": peak_memory_bytes(),
        "load_seconds": round(load_seconds, 3),
        "n_threads": n_threads,
        "version": llama_cpp.__version__,
    }


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _at_least(least: int, option: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise CommandError(f"{option}: got '{text}', expected a number from {least} up", USAGE)
        return int(text)

    return parse


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m export.measure_gguf",
        description="Measure the loss of a GGUF on rows of tokens, its speed and its memory. Prints "
        "one JSON object.",
    )
    parser.add_argument("gguf", type=Path, help="GGUF file of a language model")
    parser.add_argument(
        "--rows",
        type=Path,
        required=True,
        metavar="FILE",
        help='lines {"input_ids": […], "labels": […]}; label -100 is not scored',
    )
    parser.add_argument(
        "--threads",
        type=_at_least(1, "--threads"),
        metavar="N",
        help="default: the cores that this process may use",
    )
    parser.add_argument(
        "--decode-tokens",
        type=_at_least(0, "--decode-tokens"),
        default=DEFAULT_DECODE_TOKENS,
        metavar="N",
        help="tokens to time (default: %(default)d); 0: no decoding speed",
    )
    return parser


@os_errors_told
def main(argv: list[str] | None = None) -> int:
    """Run the command; exit codes: 0 done, 2 usage or rows, 3 the file, 4 too long."""
    args = build_parser().parse_args(argv)
    for name, value in QUIET_THREADS.items():
        os.environ.setdefault(name, value)
    rows = read_token_rows(args.rows)
    measured = measure_gguf(args.gguf, rows, args.threads or _usable_cores(), args.decode_tokens)
    print(json.dumps(measured, ensure_ascii=False))
    return OK


if __name__ == "__main__":
    run_command(main)
