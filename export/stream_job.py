"""Start export.stream_gguf in a process of its own, and follow what it says.

In: checked inputs and what is to be written. Out: its answer; a bar of bytes while it works.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from export._cli import FAILED, CommandError, log
from export._files import write_json
from export._process import child_environment, last_words
from export.adapter_options import Inputs
from export.gguf_metadata import MetadataValue
from export.tokenizer_files import copy_tokenizer

CHILD = ["-m", "export.stream_gguf"]
Metadata = Sequence[tuple[str, MetadataValue]]


def plan_files(
    inputs: Inputs, metadata: Metadata, types: Sequence[str], has_imatrix: bool
) -> dict[str, Any]:
    """Ask what files of these types would be, before anything is written.

    Returns:
        By type: `bytes`, `needs_imatrix`, `tensors` (name, shape, type, bytes).

    Raises:
        CommandError: As `export.stream_gguf.run_job`.
    """
    job = {"mode": "plan", "types": list(types), "has_imatrix": has_imatrix, "imatrix": None}
    plan: dict[str, Any] = _run(inputs, metadata, job)["plan"]
    return plan


def write_files(
    inputs: Inputs,
    metadata: Metadata,
    files: Mapping[str, Path],
    imatrix: Path | None,
    n_threads: int,
) -> dict[str, str]:
    """Write GGUF files in one pass over the base.

    Args:
        inputs: Adapters, base, tokenizer.
        metadata: Keys of every file.
        files: Where each type goes.
        imatrix: Importance matrix for the types that use one.
        n_threads: 0 = all cores.

    Returns:
        sha256 by type.

    Raises:
        CommandError: As `export.stream_gguf.run_job`.
    """
    job = {
        "mode": "write",
        "files": {name: str(path.resolve()) for name, path in files.items()},
        "imatrix": str(imatrix.resolve()) if imatrix else None,
        "n_threads": n_threads,
    }
    with _progress_bar() as show:
        answer = _run(inputs, metadata, job, show)
    log(
        f"took {answer['needed'] / 1e6:.1f} of {answer['free'] / 1e6:.1f} free MB on the disk, and "
        f"at most about {answer['memory'] / 1e9:.1f} GB of memory"
    )
    done: dict[str, str] = answer["done"]
    return done


def _run(
    inputs: Inputs,
    metadata: Metadata,
    job: Mapping[str, Any],
    show: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # What the converter reads beside weights: the merged model's config, training's tokenizer.
        write_json(folder / "config.json", dict(inputs.model.config))
        copy_tokenizer(inputs.tokenizer, folder, inputs.model.num_embeddings)
        content = {
            **job,
            "adapters": [[str(a.path.resolve()), weight] for a, weight in inputs.adapters],
            "base": str(inputs.base.path.resolve()),
            "model_dir": str(folder),
            "metadata": metadata,
        }
        write_json(folder / "job.json", content)
        return _follow(folder, show)


def _follow(folder: Path, show: Callable[[int, int], None] | None) -> dict[str, Any]:
    """Read the child's lines until it ends; its last words are kept for the error."""
    command = [sys.executable, *CHILD, str(folder / "job.json")]
    answer: dict[str, Any] = {}
    with (folder / "stderr.txt").open("w+", encoding="utf-8", errors="replace") as words:
        child = subprocess.Popen(
            command,
            cwd=Path(__file__).parents[1],
            env=child_environment(),
            stdout=subprocess.PIPE,
            stderr=words,
            text=True,
        )
        try:
            assert child.stdout is not None
            for line in child.stdout:
                message = json.loads(line) if line.startswith("{") else {}
                if "progress" in message and show is not None:
                    show(message["progress"], message["total"])
                answer.update(message)
        except BaseException:
            child.kill()
            raise
        finally:
            code = child.wait()
        words.seek(0)
        tail = last_words(words.read())
    if "error" in answer:
        raise CommandError(answer["error"], answer["code"])
    if code != 0:
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        hint = ". It may have run out of memory: close other programs" if code == -9 else ""
        raise CommandError(f"the export {how}: {tail or 'it said nothing'}{hint}", FAILED)
    return answer


@contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None]]:
    """Show bytes written, on a terminal only."""
    from tqdm import tqdm

    with tqdm(
        unit="B", unit_scale=True, desc="writing", disable=not sys.stderr.isatty(), leave=False
    ) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
