"""A small embedding model (GGUF, BERT family) in llama.cpp: text in, a vector of length 1 out.

The file is made by `python -m export.export_embedding`. Texts are cut to their head and tail, because
the time grows with every token and what a request is about stands at one of its ends.
"""

from collections.abc import Iterable
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from integration._cli import MODEL, CommandError
from integration.engine import initialize_backend
from integration.gguf_header import GgufHeader, read_header
from integration.prefix_store import file_identity

EXPORT_COMMAND = "python -m export.export_embedding"
# Tokens kept of a text, from its head and from its tail; the two marks around it come on top.
HEAD_TOKENS, TAIL_TOKENS = 26, 12
# Characters that are worth tokenizing: no token that is kept lies further from its end. A word of
# the vocabulary has at most 18 characters, but spaces between words take no token.
_END_CHARACTERS = 2000
_MEAN, _CLS = 1, 2  # llama.cpp's enum llama_pooling_type


class Encoder:
    """One loaded embedding model; safe for threads.

    Args:
        path: The GGUF; it is pooled as the file says.
        n_threads: Threads of evaluation.

    Raises:
        CommandError: Exit 3; the file is missing, broken, no embedding model, or refused by llama.cpp.
    """

    def __init__(self, path: Path, n_threads: int) -> None:
        import llama_cpp
        from llama_cpp import _internals, _logger

        header = check_embedding_file(path)
        self.path = path
        self.identity = f"{file_identity(path)}-{HEAD_TOKENS}+{TAIL_TOKENS}"
        self._lib, self._lock = llama_cpp, Lock()
        _logger.set_verbose(False)
        initialize_backend()
        model_params = llama_cpp.llama_model_default_params()
        model_params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
        params = llama_cpp.llama_context_default_params()
        size = min(HEAD_TOKENS + TAIL_TOKENS + 2, header.number("context_length", 512))
        # An encoder sees a text as a whole: it must fit into one portion of a batch.
        params.n_ctx = params.n_batch = params.n_ubatch = size
        params.n_seq_max = 1
        params.n_threads = params.n_threads_batch = n_threads
        params.embeddings, params.no_perf = True, True
        params.pooling_type = header.number("pooling_type")
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        try:
            self._model = _internals.LlamaModel(
                path_model=str(path), params=model_params, verbose=False
            )
            self._context = _internals.LlamaContext(model=self._model, params=params, verbose=False)
        except ValueError as error:
            raise CommandError(
                f"the embedding model '{path}' could not be loaded (llama.cpp: {error}); make it "
                f"again: {EXPORT_COMMAND}",
                MODEL,
            ) from error
        self._size = size
        self._batch: Any = _internals.LlamaBatch(n_tokens=size, embd=0, n_seq_max=1, verbose=False)
        self.dim = int(llama_cpp.llama_model_n_embd(self._model.model))

    def close(self) -> None:
        """Free the context and the model now instead of when the object dies."""
        self._batch.close()
        self._context.close()
        self._model.close()

    def encode(self, text: str) -> np.ndarray:
        """Give the embedding of a text, shape (dim,), float32, of length 1."""
        with self._lock:
            ids = self._tokenize(text)
            batch = self._batch.batch
            for at, token in enumerate(ids):
                batch.token[at], batch.pos[at] = token, at
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
                batch.logits[at] = True
            batch.n_tokens = len(ids)
            code = self._lib.llama_encode(self._context.ctx, batch)
            if code != 0:
                raise CommandError(
                    f"the embedding model '{self.path}' could not be evaluated (llama.cpp: code "
                    f"{code}); make it again: {EXPORT_COMMAND}",
                    MODEL,
                )
            pointer = self._lib.llama_get_embeddings_seq(self._context.ctx, 0)
            found = np.ctypeslib.as_array(pointer, shape=(self.dim,)).astype(np.float32)
        # A file with weights that are no numbers would poison every later comparison.
        length = float(np.linalg.norm(found))
        if not np.isfinite(length) or length == 0:
            raise CommandError(
                f"the embedding model '{self.path}' gives no numbers; make it again: "
                f"{EXPORT_COMMAND}",
                MODEL,
            )
        return found / np.float32(length)

    def encode_all(self, texts: Iterable[str]) -> np.ndarray:
        """Give the embeddings of texts, shape (texts, dim).

        One by one: side by side they would be rounded otherwise than a request that comes alone.
        """
        rows = [self.encode(text) for text in texts]
        return np.stack(rows) if rows else np.empty((0, self.dim), np.float32)

    def _tokenize(self, text: str) -> list[int]:
        data = clip(text, _END_CHARACTERS, _END_CHARACTERS).encode("utf-8", errors="replace")
        size = len(data) + 8
        tokens = (self._lib.llama_token * size)()
        count = self._lib.llama_tokenize(
            self._model.vocab, data, len(data), tokens, size, True, False
        )
        ids = list(tokens[: max(0, count)])
        if len(ids) <= self._size:
            return ids
        # The marks at both ends stay, and between them the ends of the text.
        head = 1 + round((self._size - 2) * HEAD_TOKENS / (HEAD_TOKENS + TAIL_TOKENS))
        return ids[:head] + ids[head - self._size :]


def clip(text: str, head: int, tail: int) -> str:
    """Cut a text to the characters of its head and tail, with a space between."""
    return text if len(text) <= head + tail else f"{text[:head]} {text[-tail:]}"


def check_embedding_file(path: Path) -> GgufHeader:
    """Make sure that a file is a whole embedding model.

    Raises:
        CommandError: Exit 3; it is missing, broken, or another kind of model.
    """
    if not path.is_file():
        raise CommandError(
            f"the embedding model '{path}' does not exist; make it: {EXPORT_COMMAND}", MODEL
        )
    try:
        header = read_header(path)
    except CommandError as error:
        raise CommandError(
            f"the embedding model is not usable: {error}; make it again: {EXPORT_COMMAND}", MODEL
        ) from error
    if header.number("pooling_type") not in (_MEAN, _CLS):
        raise CommandError(
            f"'{path}' is no embedding model: a {header.architecture or 'file'} without mean or CLS "
            f"pooling; expected one of the BERT family; make it: {EXPORT_COMMAND}",
            MODEL,
        )
    return header
