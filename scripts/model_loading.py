"""The model that a recipe names, loaded for training; shared by training and evaluation."""

import logging
from pathlib import Path
from typing import Any

from scripts._cli import MODEL, CommandError, log
from scripts.chat_templates import alpaca_template
from scripts.recipe import EMBEDDED_MODEL, TrainingRecipe

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def resolve_model(recipe: TrainingRecipe) -> str:
    """Give the folder or hub name of the recipe's base model; make the embedded one if needed.

    Raises:
        CommandError: A local folder that is no model, or has no tokenizer.
    """
    name = recipe.model_name_or_path
    if name == EMBEDDED_MODEL:
        from scripts.default_model import ensure_default_model

        return str(ensure_default_model())
    folder = Path(name)
    looks_local = folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    if not looks_local:
        return name
    if not (folder / "config.json").is_file():
        raise CommandError(
            f"model '{name}' has no config.json; expected a Hugging Face model folder, a hub name "
            f"or {EMBEDDED_MODEL}",
            MODEL,
        )
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise CommandError(
            f"model '{name}' has no tokenizer; expected {' or '.join(TOKENIZER_FILES)}; copy the "
            "tokenizer files of the original model into the folder",
            MODEL,
        )
    return name


def precision() -> dict[str, bool]:
    """Choose bf16 or fp16 from the hardware: compute capability 8 or newer for bf16.

    torch's own answer is True on a T4, where bf16 is emulated (pytorch#148322).
    """
    import torch

    if torch.cuda.is_available():
        has_bf16 = torch.cuda.get_device_capability()[0] >= 8
        return {"bf16": has_bf16, "fp16": not has_bf16}
    from unsloth_zoo.cpu.runtime import cpu_bf16_supported

    return {"bf16": cpu_bf16_supported(), "fp16": False}


def load_model(recipe: TrainingRecipe) -> tuple[Any, Any]:
    """Load the base model in 4 bits (or 16) with Unsloth, and its tokenizer with the chat template.

    Returns:
        Model and tokenizer; the tokenizer's ``chat_template`` is the recipe's prompt format.

    Raises:
        CommandError: The model cannot be loaded, or has no template for ``prompt_format: model``.
    """
    name = resolve_model(recipe)
    # It warns about an optional package whose kernels no CPU uses in training.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from unsloth import FastLanguageModel  # first: it patches trl, transformers and peft

    log(f"loading {name} ({'4-bit' if recipe.load_in_4bit else '16-bit'})")
    try:
        model, tokenizer = FastLanguageModel.from_pretrained(
            model_name=name,
            revision=recipe.model_revision if not Path(name).is_dir() else None,
            max_seq_length=recipe.max_length,
            load_in_4bit=recipe.load_in_4bit,
            dtype=None,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CommandError(
            f"model '{name}' could not be loaded ({type(error).__name__}: {error}); check the name, "
            "the connection and the free memory",
            MODEL,
        ) from error
    if recipe.prompt_format == "alpaca":
        tokenizer.chat_template = alpaca_template(tokenizer)
    elif not tokenizer.chat_template:
        raise CommandError(
            f"model '{name}' has no chat template; set prompt_format: alpaca in the recipe"
        )
    if tokenizer.eos_token is None:
        raise CommandError(
            f"the tokenizer of '{name}' has no EOS token, so no answer can end", MODEL
        )
    if tokenizer.pad_token is None:
        # Labels come from spans and padding is masked by attention, so sharing an id hides no EOS;
        # adding a token would grow the vocabulary and break the GGUF.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return model, tokenizer
