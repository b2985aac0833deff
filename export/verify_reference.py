"""The truth a GGUF is measured against: training's tokenizer and the trained model in float32.

In: a 16-bit model folder, or an adapter folder (then base + adapter, merged on demand, never
rounded). Out: token ids, rendered chats, log-probabilities. It runs in a process of its own, since
a large reference may take more memory than there is.

Run: python -m export.verify_reference, requests on stdin (by export.verify_gguf)
"""

import argparse
import contextlib
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from export._cli import FAILED, MODEL, CommandError, run_command
from export._files import sha256_file
from export.adapter_files import WEIGHTS_NAME, read_adapter
from export.base_model import base_fingerprint, load_base, read_json, read_tensor_index
from export.lora_config import CONFIG_NAME
from export.merged_weights import MergedModel, MergedWeight, plan_weights
from export.plain_tokens import PlainTokenizer, of_transformers
from export.tokenizer_files import tokenizer_sources
from export.verify_children import Handler, serve, tell
from export.verify_corpus import CONVERSATIONS, hard_texts
from export.verify_divergence import LOG_PROBS_NAME, ReferenceLogits, read_row
from export.verify_rows import answer_end, make_rows, read_conversations
from export.verify_streaming import StreamedModel

# Bytes of logits that are held at once.
_PORTION_BYTES = 64 << 20


@dataclass(frozen=True)
class Reference:
    """A merged model, computed on demand, and its tokenizer.

    Attributes:
        identity: What it is, without a path of this machine.
    """

    merged: MergedModel
    tokenizer: Any
    identity: dict[str, str]

    @property
    def config(self) -> Mapping[str, Any]:
        """The merged model's config.json."""
        return self.merged.config

    @cached_property
    def plain(self) -> PlainTokenizer:
        """Training's way from texts and chats to ids."""
        return of_transformers(self.tokenizer)

    @cached_property
    def model(self) -> StreamedModel:
        """The model in float32, one layer at a time."""
        return StreamedModel(self.merged)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        text = self.config.get("text_config") or {}
        size = self.merged.num_embeddings or text.get("vocab_size", self.config.get("vocab_size"))
        return int(size or 0)


@contextlib.contextmanager
def open_reference(reference_dir: Path, base_dir: Path | None = None) -> Iterator[Reference]:
    """Open a reference; the tokenizer is the one that the merged model would get.

    Raises:
        CommandError: Exit 3: neither a model nor an adapter folder, or an unusable one.
    """
    merged, model_dir, identity = _read_folder(reference_dir, base_dir)
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        tokenizer_dir = Path(name)
        for file_name, source in tokenizer_sources(reference_dir, model_dir).items():
            shutil.copyfile(source, tokenizer_dir / file_name)
        shutil.copyfile(model_dir / "config.json", tokenizer_dir / "config.json")
        try:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise CommandError(
                f"tokenizer of '{reference_dir}' does not load: {error}", MODEL
            ) from error
        yield Reference(merged, tokenizer, identity)


def _read_folder(
    reference_dir: Path, base_dir: Path | None
) -> tuple[MergedModel, Path, dict[str, str]]:
    if (reference_dir / CONFIG_NAME).is_file():
        adapter = read_adapter(reference_dir)
        base = load_base(adapter, base_dir)
        folder = reference_dir.resolve()
        identity = {
            "kind": "adapter",
            # A run's folder says more than "adapter"; of any other place only the last name is told.
            "name": f"{folder.parent.name}/adapter" if folder.name == "adapter" else folder.name,
            "sha256": sha256_file(reference_dir / WEIGHTS_NAME),
            "base": base.name,
            "base_fingerprint": base.fingerprint,
        }
        return plan_weights(base, [(adapter, 1.0)]), base.path, identity
    if not (reference_dir / "config.json").is_file():
        raise CommandError(
            f"--reference '{reference_dir}' has neither config.json nor {CONFIG_NAME}; expected "
            "the merged model or the adapter that the GGUF was made from",
            MODEL,
        )
    config = read_json(reference_dir / "config.json")
    if config.get("quantization_config"):
        raise CommandError(
            f"--reference '{reference_dir}' is quantized; expected the merged 16-bit model or the "
            "adapter that the GGUF was made from",
            MODEL,
        )
    tensors = read_tensor_index(reference_dir)
    weights = {name: MergedWeight(name, info) for name, info in tensors.items()}
    identity = {
        "kind": "model",
        "name": reference_dir.resolve().name,
        "fingerprint": base_fingerprint(reference_dir),
    }
    return MergedModel(weights, config), reference_dir, identity


def describe(reference: Reference, rows_path: Path | None, max_tokens: int) -> dict[str, Any]:
    """Give all that a certificate needs of a reference but its numbers, as JSON."""
    tokenizer, plain = reference.tokenizer, reference.plain
    texts = hard_texts(list(tokenizer.all_special_tokens))
    vocab_size = reference.vocab_size
    rows = make_rows(plain, read_conversations(rows_path), vocab_size, max_tokens)
    if not rows:
        raise CommandError(
            f"no conversation of {rows_path or 'the fixed ones'} can be evaluated: there is none, "
            f"or its tokens are beyond the {vocab_size} rows of the embedding; name another file: "
            "--rows FILE",
            MODEL,
        )
    control = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return {
        "identity": reference.identity,
        "config": reference.config,
        "texts": texts,
        "text_ids": [plain.text_ids(text) for text in texts],
        "chat_ids": [plain.chat_ids(messages) for messages in CONVERSATIONS],
        "template": tokenizer.chat_template,
        "bos_id": tokenizer.bos_token_id,
        "eos_id": tokenizer.eos_token_id,
        "answer_end": answer_end(plain, control),
        "rows": [asdict(row) for row in rows],
    }


def evaluate(model: StreamedModel, logits: ReferenceLogits) -> None:
    """Write the log-probabilities of all rows into the folder of `logits`.

    Raises:
        CommandError: Exit 1: the disk is too small. Exit 3: the model gives NaN.
    """
    import torch

    needed = logits.positions * logits.vocab_size * 4
    free = shutil.disk_usage(logits.folder).free
    if needed > free:
        raise CommandError(
            f"the reference's log-probabilities need {needed / 1e9:.1f} GB beside the GGUF, "
            f"{free / 1e9:.1f} GB are free; free some, or take fewer positions: --max-tokens N",
            FAILED,
        )
    hidden = torch.cat(model.hidden([row.ids for row in logits.rows]))
    portion = max(1, _PORTION_BYTES // (4 * logits.vocab_size))
    tell("computing the reference's logits")
    with (logits.folder / LOG_PROBS_NAME).open("wb") as file, torch.inference_mode():
        for states in hidden.split(portion):
            values = model.logits(states)  # (portion, V)
            for part in values.split(32):  # in place, with little beside it
                part.sub_(part.logsumexp(dim=1, keepdim=True))
                if not torch.isfinite(part).all():
                    raise CommandError(
                        "the reference itself gives NaN or infinite logits; train again", MODEL
                    )
            values.numpy().tofile(file)
            del values, part
    logits.save()


def find_end(
    model: StreamedModel, ids: Sequence[int], start: int, end_ids: Collection[int]
) -> int | None:
    """Give the place in `ids`, from `start` on, where the reference would have ended the text.

    One pass over a text that is already there: the reference need not generate. An end counts
    where it has more than half of the probability; below that, rounding may well choose otherwise.
    """
    import torch

    if not end_ids:
        return None
    states = model.hidden([ids])[0][start - 1 :]
    with torch.inference_mode():
        for first, part in enumerate(states.split(64)):
            share = model.logits(part).softmax(dim=1)[:, sorted(end_ids)].sum(dim=1)
            ended = (share > 0.5).nonzero()
            if len(ended):
                return int(start + first * 64 + ended[0, 0])
    return None


class _Server:
    """The child's state: one open reference."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._reference: Reference | None = None

    @property
    def _opened(self) -> Reference:
        assert self._reference is not None
        return self._reference

    def open(
        self, reference_dir: str, base_dir: str | None, rows_path: str | None, max_tokens: int
    ) -> dict[str, Any]:
        tell("opening the reference")
        base = Path(base_dir) if base_dir else None
        self._reference = self._stack.enter_context(open_reference(Path(reference_dir), base))
        return describe(self._reference, Path(rows_path) if rows_path else None, max_tokens)

    def evaluate(self, folder: str, rows: list[dict[str, Any]], source: str) -> None:
        tell("building the reference's model")
        model = self._opened.model
        chosen = tuple(read_row(row) for row in rows)
        evaluate(model, ReferenceLogits(Path(folder), model.vocab_size, chosen, source))

    def find_end(self, ids: list[int], start: int, end_ids: list[int]) -> int | None:
        tell("reading the generated answer with the reference")
        return find_end(self._opened.model, ids, start, end_ids)


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    return argparse.ArgumentParser(
        prog="python -m export.verify_reference",
        description="Child process of export.verify_gguf: answers requests (JSON lines on stdin) "
        "about one reference.",
    )


def main(argv: list[str] | None = None) -> int:
    """Answer requests until stdin closes."""
    build_parser().parse_args(argv)
    with contextlib.ExitStack() as stack:
        server = _Server(stack)
        handlers: dict[str, Handler] = {
            "open": server.open,
            "evaluate": server.evaluate,
            "find_end": server.find_end,
        }
        return serve(handlers)


if __name__ == "__main__":
    run_command(main)
