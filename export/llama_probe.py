"""The child process of export.verify_gguf: all that llama.cpp does with a file.

A damaged file, or a tokenizer that does not fit, makes llama.cpp abort its whole process: better
this one than the one that asks. `export.measure_gguf` loads and evaluates with the same functions.

Run: python -m export.llama_probe, requests on stdin (by export.verify_gguf)
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export._cli import MODEL, CommandError, run_command
from export.plain_tokens import PlainTokenizer, of_llama_cpp
from export.verify_children import serve, tell
from export.verify_divergence import Positions, ReferenceLogits

if TYPE_CHECKING:
    import numpy as np

# Tokens evaluated at once: their logits, (128, V) in float32, are 25 MB for 49,152 tokens.
BATCH = 128
# Positions compared at once, few enough for the processor's cache.
_PIECE = 8


def load_model(gguf: str, n_ctx: int, n_threads: int) -> Any:
    """Load a file as a `llama_cpp.Llama`; 0 threads are llama.cpp's choice.

    Raises:
        CommandError: Exit 3: llama.cpp refuses it.
    """
    import llama_cpp

    try:
        return llama_cpp.Llama(
            gguf,
            n_ctx=n_ctx,
            n_batch=BATCH,
            verbose=False,
            n_threads=n_threads or None,
            n_threads_batch=n_threads or None,
        )
    except ValueError as error:
        raise CommandError(
            f"'{gguf}' is unusable: llama.cpp cannot load the file: {error}", MODEL
        ) from error


def evaluate_row(model: Any, ids: Sequence[int]) -> "Iterator[tuple[int, np.ndarray]]":
    """Evaluate a row from its start, in portions; gives where each begins, and its logits."""
    import llama_cpp

    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(model.ctx), True)
    for start in range(0, len(ids), BATCH):
        yield start, evaluate_portion(model, ids[start : start + BATCH], start)


def evaluate_portion(model: Any, ids: Sequence[int], start: int) -> "np.ndarray":
    """Evaluate at most `BATCH` tokens behind the `start` that are evaluated already.

    Returns:
        Logits, float32 of shape (tokens, V), valid until the next evaluation.

    Raises:
        CommandError: Exit 3: llama.cpp failed.
    """
    import llama_cpp
    import numpy as np

    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    try:
        batch.n_tokens = len(ids)
        for at, token in enumerate(ids):
            batch.token[at], batch.pos[at] = token, start + at
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
            batch.logits[at] = True
        code = llama_cpp.llama_decode(model.ctx, batch)
    finally:
        llama_cpp.llama_batch_free(batch)
    if code != 0:
        raise CommandError(
            f"llama.cpp cannot evaluate {start + len(ids)} tokens (llama_decode: {code})", MODEL
        )
    shape = (len(ids), model.n_vocab())
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits(model.ctx), shape=shape)


class Probe:
    """One loaded GGUF. Every method is a request; arguments and replies are JSON."""

    def __init__(self) -> None:
        self._model: Any = None

    @cached_property
    def _plain(self) -> PlainTokenizer:
        return of_llama_cpp(self._model)

    def load(self, gguf: str, n_ctx: int, n_threads: int) -> dict[str, Any]:
        """Load the file.

        Raises:
            CommandError: Exit 3: llama.cpp refuses it.
        """
        import llama_cpp

        tell("loading")
        self._model = load_model(gguf, n_ctx, n_threads)
        vocab = llama_cpp.llama_model_get_vocab(self._model.model)
        ends = [
            token
            for token in range(self._model.n_vocab())
            if llama_cpp.llama_vocab_is_eog(vocab, token)
        ]
        return {
            "version": llama_cpp.__version__,
            "n_vocab": self._model.n_vocab(),
            "bos_id": self._model.token_bos(),
            "eos_id": self._model.token_eos(),
            "end_ids": ends,
        }

    def tokenize(self, texts: list[str], conversations: list[Any]) -> dict[str, Any]:
        """Tokenize texts, render and tokenize conversations, as chat does."""
        tell("tokenizing")
        plain = self._plain
        text_ids = [plain.text_ids(text) for text in texts]
        tell("rendering the chat template")
        return {"text_ids": text_ids, "chat_ids": [plain.chat_ids(chat) for chat in conversations]}

    def compare(self, folder: str) -> dict[str, list[Any]]:
        """Evaluate the reference's rows and compare each position.

        Rows with a token that the file does not know are left out: llama.cpp would abort.
        """
        tell("evaluating")
        reference = ReferenceLogits.open(Path(folder))
        found = Positions.empty()
        width = min(reference.vocab_size, self._model.n_vocab())
        first = 0
        for row in reference.rows:
            if max(row.ids) < self._model.n_vocab():
                for start, logits in evaluate_row(self._model, row.ids):
                    for at in range(0, len(logits), _PIECE):
                        part = logits[at : at + _PIECE]
                        expected = reference.log_probs(first + start + at, len(part))
                        found.add(row, start + at, expected, part, width)
            first += len(row.ids)
        return asdict(found)

    def generate(self, messages: list[Any], max_new_tokens: int) -> dict[str, Any]:
        """Answer greedily; `ids` are the prompt and the answer, `start` the answer's place."""
        import llama_cpp

        tell("generating")
        prompt = self._plain.chat_ids(messages)
        if isinstance(prompt, str):
            return {"stopped": False, "tokens": 0, "text": prompt, "ids": [], "start": 0}
        vocab = llama_cpp.llama_model_get_vocab(self._model.model)
        tokens: list[int] = []
        stopped = False
        self._model.reset()
        for token in self._model.generate(prompt, temp=0.0, repeat_penalty=1.0):
            if llama_cpp.llama_vocab_is_eog(vocab, token):
                stopped = True
                break
            tokens.append(token)
            if len(tokens) >= max_new_tokens:
                break
        text = self._model.detokenize(tokens).decode("utf-8", errors="replace")
        return {
            "stopped": stopped,
            "tokens": len(tokens),
            "text": text[:200],
            "ids": [*prompt, *tokens],
            "start": len(prompt),
        }


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    return argparse.ArgumentParser(
        prog="python -m export.llama_probe",
        description="Child process of export.verify_gguf: answers requests (JSON lines on stdin) "
        "about one GGUF.",
    )


def main(argv: list[str] | None = None) -> int:
    """Answer requests until stdin closes."""
    build_parser().parse_args(argv)
    probe = Probe()
    return serve(
        {
            "load": probe.load,
            "tokenize": probe.tokenize,
            "compare": probe.compare,
            "generate": probe.generate,
        }
    )


if __name__ == "__main__":
    run_command(main)
