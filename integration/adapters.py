"""LoRA GGUFs by name over one loaded base: checked before the C library sees them."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from integration._cli import MODEL, CommandError
from integration.ask_format import BASE
from integration.gguf_header import read_header
from integration.local_model import LocalModel
from integration.prefix_store import file_identity

_EMBEDDING_FACTOR, _HEAD = "token_embd.weight.lora_a", "output.weight"


def parse_adapter_options(options: Sequence[str]) -> dict[str, Path]:
    """Read ``NAME=FILE`` options.

    Raises:
        CommandError: Exit 2; wrong form, or a name given twice.
    """
    named: dict[str, Path] = {}
    for option in options:
        name, sign, file = option.partition("=")
        if not (name and sign and file):
            raise CommandError(f"--adapter: got '{option}', expected NAME=FILE")
        if name == BASE or name in named:
            raise CommandError(f"--adapter: the name '{name}' is taken; choose another one")
        named[name] = Path(file)
    return named


class Adapters:
    """Named adapters of one model; one is active at a time, or none.

    Args:
        model: The loaded base.
        files: LoRA GGUFs by name.

    Raises:
        CommandError: Exit 3; a file is missing, broken, no adapter, or of another architecture.
    """

    def __init__(self, model: LocalModel, files: dict[str, Path]) -> None:
        self._model, self.active = model, BASE
        self._handles: dict[str, Any] = {name: self._load(path) for name, path in files.items()}
        self._keys = {name: file_identity(path) for name, path in files.items()}

    @property
    def names(self) -> list[str]:
        """Names that can be activated, the plain base first."""
        return [BASE, *self._handles]

    def _load(self, path: Path) -> Any:
        header, base = read_header(path), self._model.engine.header
        if not header.is_adapter:
            raise CommandError(f"adapter '{path}' is a whole model, expected a LoRA GGUF", MODEL)
        if header.architecture != base.architecture:
            raise CommandError(
                f"adapter '{path}' is for {header.architecture}, the model is "
                f"{base.architecture}; use the base it was trained on",
                MODEL,
            )
        if _EMBEDDING_FACTOR in header.tensor_names and _HEAD not in base.tensor_names:
            # llama.cpp loads such a file, and aborts the process at the first token.
            raise CommandError(
                f"adapter '{path}' changes the embedding, which the model '{base.path}' "
                "also uses as its head; merge it instead: python -m export.export_gguf",
                MODEL,
            )
        handle = self._model.engine.load_adapter(path)
        if handle is None:
            raise CommandError(
                f"adapter '{path}' does not fit the model '{base.path}'; use the base it "
                "was trained on",
                MODEL,
            )
        return handle

    def check(self, name: str) -> None:
        """Make sure that a name can be used.

        Raises:
            CommandError: Exit 2; no adapter has this name.
        """
        if name not in self.names:
            near = difflib.get_close_matches(name, self.names, n=1)
            hint = f", did you mean '{near[0]}'?" if near else f"; expected {', '.join(self.names)}"
            raise CommandError(f"no adapter is called '{name}'{hint}")

    def use(self, name: str) -> None:
        """Make one adapter, or the plain base, the active one.

        Keys and values in the cache depend on the adapter, so a switch clears them.

        Raises:
            CommandError: Exit 2; no adapter has this name.
        """
        self.check(name)
        if name == self.active:
            return
        with self._model.lock:
            handles = [] if name == BASE else [self._handles[name]]
            if not self._model.engine.set_adapters(handles, self._keys.get(name, "")):
                raise CommandError(f"llama.cpp could not activate the adapter '{name}'", MODEL)
            self.active = name
