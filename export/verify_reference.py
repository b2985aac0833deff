"""The truth a GGUF is measured against: training's tokenizer and the trained model in float32.

In: a 16-bit model folder, or an adapter folder (then base + adapter, merged in memory, never
rounded). Out: token ids, rendered chats, logits.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export._cli import MODEL, CommandError
from export.base_model import BaseModel, load_base, read_json
from export.lora_math import CONFIG_NAME, WEIGHTS_NAME, Adapter, merge_module, read_adapter
from export.merge_adapter import tokenizer_sources
from export.plain_tokens import PlainTokenizer, of_transformers

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Reference:
    """A model folder, perhaps with an adapter on top, and its tokenizer."""

    model_dir: Path
    config: dict[str, Any]
    tokenizer: Any
    adapter: Adapter | None

    @cached_property
    def plain(self) -> PlainTokenizer:
        """Training's way from texts and chats to ids."""
        return of_transformers(self.tokenizer)

    def logits(self, prompts: Sequence[Sequence[int]]) -> "list[np.ndarray]":
        """Evaluate prompts in float32; one array of shape (T, V) for each.

        Raises:
            CommandError: Exit 3: the model does not load, or has no weight of an adapted name.
        """
        import torch

        model = self._load_model()
        with torch.inference_mode():
            return [model(torch.tensor([list(ids)])).logits[0].numpy() for ids in prompts]

    def _load_model(self) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        try:
            model = AutoModelForCausalLM.from_pretrained(
                self.model_dir, dtype=torch.float32, local_files_only=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise CommandError(
                f"reference '{self.model_dir}' does not load: {error}", MODEL
            ) from error
        if self.adapter is not None:
            _add_adapter(model, self.adapter)
        return model.eval()


def _add_adapter(model: Any, adapter: Adapter) -> None:
    import torch
    from safetensors import safe_open

    with (
        torch.no_grad(),
        safe_open(adapter.path / WEIGHTS_NAME, framework="pt") as factors,
    ):
        for name, module in adapter.modules.items():
            try:
                weight = model.get_parameter(name)
            except AttributeError:
                raise CommandError(
                    f"transformers' {type(model).__name__} has no weight '{name}'; merge first "
                    "(export.merge_adapter) and give that folder as --reference",
                    MODEL,
                ) from None
            weight.copy_(merge_module(weight, module, factors))


@contextlib.contextmanager
def open_reference(reference_dir: Path, base_dir: Path | None = None) -> Iterator[Reference]:
    """Open a reference; the tokenizer is the one that the merged model would get.

    Raises:
        CommandError: Exit 3: neither a model nor an adapter folder, or an unusable one.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    adapter, base = _read_folder(reference_dir, base_dir)
    model_dir = base.path if base else reference_dir
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
        yield Reference(model_dir, read_json(model_dir / "config.json"), tokenizer, adapter)


def _read_folder(
    reference_dir: Path, base_dir: Path | None
) -> tuple[Adapter | None, BaseModel | None]:
    if (reference_dir / CONFIG_NAME).is_file():
        adapter = read_adapter(reference_dir)
        return adapter, load_base(adapter, base_dir)
    if not (reference_dir / "config.json").is_file():
        raise CommandError(
            f"--reference '{reference_dir}' has neither config.json nor {CONFIG_NAME}; expected "
            "the merged model or the adapter that the GGUF was made from",
            MODEL,
        )
    return None, None
