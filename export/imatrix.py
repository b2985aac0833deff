"""Compute the importance matrix of a GGUF from conversations in the model's own chat format.

In: a GGUF model and chat rows (JSON lines with `messages`, as scripts.prepare_data writes them).
Out: an imatrix GGUF as llama.cpp's tools read it, with the hash of the tokens it was made from.

Run: python -m export.imatrix GGUF --data ROWS.jsonl --output FILE.gguf [--max-tokens N] [--overwrite]
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from export._cli import MODEL, OK, TIMEOUT, USAGE, CommandError, log, run_command
from export._files import os_errors_told
from export._process import child_environment, how_it_ended, last_words
from export.chat_rows import Messages, parse_messages
from export.gguf_header import read_gguf_header
from export.imatrix_file import Imatrix, read_imatrix, write_imatrix

# llama.cpp's tools/perplexity/README.md finds no consistent gain beyond 10,000 tokens (Q2_K of
# Llama 3 8B: mean KL 0.331 with 10k, 0.331 to 0.337 with up to 10M); chat rows are more mixed.
DEFAULT_MAX_TOKENS = 10_000
MIN_TOKENS = 16  # fewer in one pass are no data to llama-imatrix, nor to us
DEFAULT_TIMEOUT_SECONDS = 4 * 3600.0
_SEED = 0
_EXPECTED_ROW = '{"messages": [{"role": "…", "content": "…"}, …]}'


def compute_imatrix(
    gguf_path: Path,
    data_paths: Sequence[Path],
    output: Path,
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    n_threads: int = 0,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
) -> Imatrix:
    """Run a model over chat rows in a child process and write its importance matrix.

    The same model, rows and settings give the same matrix. An existing `output` is replaced.

    Args:
        gguf_path: The model; F16 is best.
        data_paths: Chat rows, JSON lines.
        output: The imatrix GGUF to write, under a temporary name until it is whole.
        max_tokens: Where to stop; rows are drawn from all files alike.
        n_threads: Of llama.cpp; 0 = its own choice.
        timeout_seconds: For everything together.

    Raises:
        CommandError: Exit 2: rows that cannot be used. Exit 3: the model or llama.cpp fails.
            Exit 6: out of time.
    """
    import numpy as np

    deadline = time.monotonic() + timeout_seconds
    read_gguf_header(gguf_path)
    # A row that counts has at least MIN_TOKENS; so many rows reach the limit if a quarter counts.
    rows = draw_rows(data_paths, max_tokens // MIN_TOKENS * 4)
    job = {"gguf": str(gguf_path.resolve()), "max_tokens": max_tokens, "n_threads": n_threads}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = (json.dumps(messages) + "\n" for messages in rows)
        (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        _run_child(folder, job, deadline)
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        with np.load(folder / "sums.npz") as arrays:
            tensors = {key: arrays[key].astype(np.float32) for key in arrays.files}
    _tell_notes(result)
    origin = {"data_sha256": result["data_sha256"], "model": gguf_path.name}
    origin |= {"tokens": result["tokens"], "rows": result["rows"]}
    datasets = [path.name for path in data_paths]
    write_imatrix(output, tensors, datasets, result["chunk_size"], origin)
    return read_imatrix(output)


def draw_rows(paths: Sequence[Path], limit: int) -> list[Messages]:
    """Draw rows at random, each with the same chance, and shuffle them; the same ones every time.

    Raises:
        CommandError: Exit 2: a file or a row cannot be used (every row is checked), or no rows.
    """
    rng = random.Random(_SEED)
    drawn: list[Messages] = []
    for number, messages in enumerate(_read_rows(paths)):
        if len(drawn) < limit:
            drawn.append(messages)
        elif (place := rng.randrange(number + 1)) < limit:
            drawn[place] = messages
    if not drawn:
        names = ", ".join(f"'{path}'" for path in paths)
        raise CommandError(f"no rows in {names}; expected lines of {_EXPECTED_ROW}", USAGE)
    rng.shuffle(drawn)
    return drawn


def _read_rows(paths: Iterable[Path]) -> Iterator[Messages]:
    for path in paths:
        if not path.is_file():
            raise CommandError(f"'{path}' is no file; expected chat rows (JSON lines)", USAGE)
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        yield parse_messages(line)
                    except (ValueError, RecursionError) as error:
                        raise CommandError(
                            f"'{path}' line {number}: {error}; expected {_EXPECTED_ROW}", USAGE
                        ) from error


def _run_child(folder: Path, job: dict[str, Any], deadline: float) -> None:
    """Run `export.imatrix_child`, whose death is one line; a bar shows how far it is."""
    from tqdm import tqdm

    command = [sys.executable, "-m", "export.imatrix_child", str(folder / "job.json")]
    errors = folder / "errors.txt"
    with (
        errors.open("wb") as stderr,
        tqdm(total=job["max_tokens"], unit=" tokens", disable=not sys.stderr.isatty()) as bar,
    ):
        child = subprocess.Popen(
            command,
            cwd=Path(__file__).parents[1],
            env=child_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
        try:
            while _is_running(child):
                if time.monotonic() > deadline:
                    done = f"{_said(folder, 'progress') or 0} of {job['max_tokens']} tokens"
                    raise CommandError(
                        f"out of time while {_said(folder, 'phase') or 'starting'} ({done}); give "
                        "it more: --timeout SECONDS, or take less: --max-tokens N",
                        TIMEOUT,
                    )
                bar.update(int(_said(folder, "progress") or bar.n) - bar.n)
        finally:
            child.kill()
            child.wait()
    if child.returncode == 0:
        return
    said = errors.read_text("utf-8", "replace")
    message = last_words(said, 1)
    if child.returncode in {USAGE, MODEL} and message.startswith("error: "):
        raise CommandError(f"'{job['gguf']}': {message.removeprefix('error: ')}", child.returncode)
    raise CommandError(
        f"'{job['gguf']}' is unusable: llama.cpp failed while "
        f"{_said(folder, 'phase') or 'starting'} ({how_it_ended(child.returncode)}): "
        + last_words(said, 5),
        MODEL,
    )


def _is_running(child: "subprocess.Popen[bytes]") -> bool:
    try:
        child.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        return True
    return False


def _said(folder: Path, name: str) -> str:
    path = folder / f"{name}.txt"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _tell_notes(result: dict[str, Any]) -> None:
    if not result["has_template"]:
        log("note: the model has no chat template; the rows were evaluated as plain text")
    if result["refused"]:
        log(f"note: {result['refused']} rows left out: chat template {result['refusal']}")
    if result["too_short"]:
        log(f"note: {result['too_short']} rows left out: fewer than {MIN_TOKENS} tokens")


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m export.imatrix",
        description="Compute an importance matrix from chat rows; prints the file written.",
    )
    parser.add_argument("gguf", type=Path, help="GGUF model, best F16")
    parser.add_argument(
        "--data",
        type=Path,
        action="append",
        required=True,
        metavar="FILE",
        help="chat rows (JSON lines with messages); may be given again",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="imatrix GGUF to write"
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=DEFAULT_MAX_TOKENS,
        metavar="N",
        help="stop after so many tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=int, default=0, metavar="N", help="0 = llama.cpp's choice"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=DEFAULT_TIMEOUT_SECONDS,
        metavar="S",
        help="seconds for everything together (default: %(default)g)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser


@os_errors_told
def main(argv: list[str] | None = None) -> int:
    """Run the command; exit codes: 0 done, 2 usage, rows or output, 3 the model, 6 time."""
    args = build_parser().parse_args(argv)
    if args.timeout <= 0:
        raise CommandError(f"--timeout {args.timeout:g} is not above 0; got no time", USAGE)
    if args.max_tokens < MIN_TOKENS or args.threads < 0:
        raise CommandError(
            f"--max-tokens {args.max_tokens} --threads {args.threads}: expected at least "
            f"{MIN_TOKENS} and 0",
            USAGE,
        )
    if args.output.resolve() in {path.resolve() for path in (args.gguf, *args.data)}:
        raise CommandError(f"output '{args.output}' is an input; name another file", USAGE)
    if args.output.exists() and not args.overwrite:
        raise CommandError(f"output '{args.output}' exists; replace it: --overwrite", USAGE)
    started = time.monotonic()
    imatrix = compute_imatrix(
        args.gguf,
        args.data,
        args.output,
        max_tokens=args.max_tokens,
        n_threads=args.threads,
        timeout_seconds=args.timeout,
    )
    log(
        f"{args.output.name}: {len(imatrix.values)} matrices from {imatrix.tokens} tokens of "
        f"{imatrix.rows} rows in {time.monotonic() - started:.0f} s"
    )
    print(args.output)
    return OK


if __name__ == "__main__":
    run_command(main)
