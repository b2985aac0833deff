"""Measure GGUF files against one evaluation of their reference.

For other code, to choose among candidates:

    with reference_logits(adapter_dir, scratch_dir) as logits:
        summary = measure_kl(gguf_path, logits)  # as often as there are files
        good = summary.mean <= 0.05
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from export._cli import FAILED, MODEL, CommandError
from export._files import working_dir
from export.verify_children import Child
from export.verify_divergence import KlSummary, Positions, ReferenceLogits, summarize
from export.verify_rows import DEFAULT_MAX_TOKENS, find_rows, source_name

DEFAULT_TIMEOUT_SECONDS = 900.0
MAX_NEW_TOKENS = 200
# glibc keeps freed memory below a threshold that it raises by itself up to 32 MB; the weights of
# layers that are gone would add up to most of the model (SmolLM2-135M: 700 MB instead of 170).
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(4 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20)}


def start_reference(reference_dir: Path) -> Child:
    """Start the process that evaluates a reference."""

    def dies(how: str) -> CommandError:
        return CommandError(
            f"the process of reference '{reference_dir}' {how}. If memory ran out (SIGKILL), close "
            "other programs, or take fewer positions: --max-tokens N",
            FAILED,
        )

    return Child("export.verify_reference", dies, _GIVE_BACK)


def start_probe(gguf_path: Path) -> Child:
    """Start the process that runs llama.cpp on a file."""
    return Child(
        "export.llama_probe",
        lambda how: CommandError(f"'{gguf_path}' is unusable: llama.cpp {how}", MODEL),
    )


def evaluate_reference(
    child: Child,
    folder: Path,
    reference_dir: Path,
    *,
    base_dir: Path | None,
    rows_path: Path | None,
    max_tokens: int,
    deadline: float,
) -> tuple[dict[str, Any], ReferenceLogits]:
    """Evaluate a reference once.

    Args:
        child: From `start_reference`.
        folder: An empty folder for its log-probabilities.
        reference_dir: The merged model or the adapter.
        base_dir: The adapter's base, None for the one it names.
        rows_path: Conversations (JSONL), None for the fixed ones.
        max_tokens: Positions to evaluate, at most.
        deadline: Of `time.monotonic()`.

    Returns:
        `export.verify_reference.describe`, and what the reference says about every position.
    """
    about: dict[str, Any] = child.ask(
        {
            "do": "open",
            "reference_dir": str(reference_dir.resolve()),
            "base_dir": str(base_dir.resolve()) if base_dir else None,
            "rows_path": str(rows_path.resolve()) if rows_path else None,
            "max_tokens": max_tokens,
        },
        deadline,
    )
    request = {
        "do": "evaluate",
        "folder": str(folder.resolve()),
        "rows": about["rows"],
        "source": source_name(rows_path, reference_dir),
    }
    child.ask(request, deadline)
    return about, ReferenceLogits.open(folder)


@contextlib.contextmanager
def reference_logits(
    reference_dir: Path,
    scratch_dir: Path,
    *,
    base_dir: Path | None = None,
    rows_path: Path | None = None,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
) -> Iterator[ReferenceLogits]:
    """Evaluate a reference once, for `measure_kl` of any number of files.

    Args:
        reference_dir: The merged model or the adapter.
        scratch_dir: On a disk with room for positions * vocabulary * 4 bytes (0.4 GB for 2,048
            positions of 49,152 tokens); what is written there is removed at the end.
        base_dir: The adapter's base, None for the one it names.
        rows_path: Conversations (JSONL); None for the run's held-out rows, or the fixed ones.
        max_tokens: Positions to evaluate, at most.
        timeout_seconds: For this evaluation.

    Raises:
        CommandError: Exit 1: out of memory or disk. Exit 3: unusable. Exit 6: out of time.
    """
    rows_path = rows_path or find_rows(reference_dir)
    with working_dir(scratch_dir, "reference") as folder:
        with start_reference(reference_dir) as child:
            _, logits = evaluate_reference(
                child,
                folder,
                reference_dir,
                base_dir=base_dir,
                rows_path=rows_path,
                max_tokens=max_tokens,
                deadline=time.monotonic() + timeout_seconds,
            )
        yield logits


def measure_kl(
    gguf_path: Path,
    logits: ReferenceLogits,
    *,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    n_threads: int = 0,
) -> KlSummary:
    """Compare one file with an evaluated reference, and do nothing else.

    Raises:
        CommandError: Exit 3: llama.cpp cannot use the file. Exit 6: out of time.
    """
    deadline = time.monotonic() + timeout_seconds
    with start_probe(gguf_path) as probe:
        load(probe, gguf_path, logits, n_threads, deadline)
        return compare(probe, logits, deadline)


def load(
    probe: Child, gguf_path: Path, logits: ReferenceLogits, n_threads: int, deadline: float
) -> dict[str, Any]:
    """Load a file with a context that holds every row, and a generated answer."""
    request = {
        "do": "load",
        "gguf": str(gguf_path.resolve()),
        "n_ctx": max(logits.longest, 256) + MAX_NEW_TOKENS,
        "n_threads": n_threads,
    }
    result: dict[str, Any] = probe.ask(request, deadline)
    return result


def compare(probe: Child, logits: ReferenceLogits, deadline: float) -> KlSummary:
    """Evaluate the rows with a loaded file."""
    request = {"do": "compare", "folder": str(logits.folder.resolve())}
    return summarize(Positions(**probe.ask(request, deadline)))
