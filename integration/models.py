"""A model by what names it: a GGUF file, a Hugging Face folder or hub name, or a server's URL."""

from pathlib import Path

from integration._cli import MODEL, CommandError
from integration.backend import ChatBackend
from integration.engine import Engine
from integration.gguf_header import read_header
from integration.hardware import context_size, usable_threads
from integration.local_model import LocalModel
from integration.prefix_store import PrefixStore
from integration.prompt import load_template
from integration.server_url import is_server_url


def load_model(
    spec: str | Path,
    n_ctx: int | None = None,
    n_threads: int | None = None,
    n_sequences: int = 1,
    template: str | None = None,
) -> ChatBackend:
    """Load what answers.

    Args:
        spec: A GGUF file, a Hugging Face folder or hub name (``owner/name``), or the URL of an
            OpenAI-compatible server.
        n_ctx: Context in tokens; by default the file's, capped at 8192 and by memory. GGUF only.
        n_threads: By default what affinity and cgroup quota allow.
        n_sequences: Conversations that can be decoded side by side. GGUF only.
        template: Name or file of a chat template in place of the model's own. GGUF only.

    Raises:
        CommandError: Exit 3 for an unusable model, 4 for a context that does not fit into memory.
    """
    name, path = str(spec), Path(spec)
    if is_server_url(name):
        from integration.server_model import connect_server

        return connect_server(name)
    if path.is_dir() or (not (path.suffix or path.exists()) and name.count("/") == 1):
        from integration.huggingface_model import load_huggingface

        return load_huggingface(name, n_threads=n_threads)
    return load_gguf(path, n_ctx, n_threads, n_sequences, template)


def load_gguf(
    path: Path,
    n_ctx: int | None = None,
    n_threads: int | None = None,
    n_sequences: int = 1,
    template: str | None = None,
) -> LocalModel:
    """Load a GGUF; arguments and errors are those of ``load_model``."""
    header = read_header(path)
    if header.is_adapter:
        raise CommandError(
            f"model '{path}' is a LoRA adapter, expected a whole model; give it with --adapter "
            "NAME=FILE beside its base",
            MODEL,
        )
    if not header.architecture or not header.tensors:
        raise CommandError(f"model '{path}' holds no model weights; export it again", MODEL)
    source = load_template(template) if template else None
    engine = Engine(
        header,
        context_size(header, n_ctx, n_sequences),
        n_threads or usable_threads(),
        n_sequences,
        PrefixStore(),
    )
    return LocalModel(engine, source)
