"""The model that a recipe names, loaded for training; shared by training and evaluation."""

import logging
import sys
from pathlib import Path
from typing import Any

from scripts._cli import MODEL, CommandError, log
from scripts.chat_templates import ensure_pad_token, prepare_template
from scripts.machine import Precision, choose_precision, has_cpu_bf16
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


def precision() -> Precision:
    """Choose bf16, fp16 or fp32 for this machine; see ``choose_precision``."""
    import torch

    if torch.cuda.is_available():
        return choose_precision(torch.cuda.get_device_capability(), False)
    return choose_precision(None, has_cpu_bf16())


def load_tokenizer(recipe: TrainingRecipe) -> Any:
    """Load only the tokenizer, with the recipe's prompt format."""
    from transformers import AutoTokenizer

    name = resolve_model(recipe)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=_revision(recipe, name))
    except (OSError, ValueError) as error:
        raise CommandError(
            f"the tokenizer of '{name}' could not be loaded ({type(error).__name__}: {error}); "
            "check the name and the connection",
            MODEL,
        ) from error
    return _fit(tokenizer, name, recipe)


def _revision(recipe: TrainingRecipe, name: str) -> str:
    return "main" if Path(name).is_dir() else recipe.model_revision


def _fit(tokenizer: Any, name: str, recipe: TrainingRecipe) -> Any:
    if tokenizer.eos_token is None:
        raise CommandError(
            f"the tokenizer of '{name}' has no EOS token, so no answer can end", MODEL
        )
    ensure_pad_token(tokenizer)
    prepared = prepare_template(tokenizer, recipe.prompt_format)
    tokenizer.chat_template = prepared.source
    for note in prepared.notes:
        log(f"chat template: {note}")
    return tokenizer


def import_backend(recipe: TrainingRecipe) -> None:
    """Import Unsloth, if the recipe wants it: it patches TRL, transformers and PEFT and must be first.

    Raises:
        CommandError: Exit 3; it does not run here.
    """
    # It warns about an optional package whose kernels no CPU uses in training.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if recipe.backend == "unsloth":
        try:
            import unsloth  # noqa: F401
        except (ImportError, NotImplementedError) as error:
            raise CommandError(
                f"Unsloth does not run here ({type(error).__name__}: {error}); set backend: peft",
                MODEL,
            ) from error
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def load_model(recipe: TrainingRecipe) -> tuple[Any, Any]:
    """Load the base model in 4 bits (or 16), and its tokenizer with the chat template.

    Returns:
        Model and tokenizer; the tokenizer's ``chat_template`` is the recipe's prompt format.

    Raises:
        CommandError: The model cannot be loaded, or has no template for ``prompt_format: model``.
    """
    name = resolve_model(recipe)
    import_backend(recipe)
    log(f"loading {name} ({'4-bit' if recipe.load_in_4bit else '16-bit'}, {recipe.backend})")
    load = _load_with_unsloth if recipe.backend == "unsloth" else _load_with_peft
    try:
        model, tokenizer = load(recipe, name)
    except (OSError, ValueError, RuntimeError) as error:
        raise CommandError(
            f"model '{name}' could not be loaded ({type(error).__name__}: {error}); check the name, "
            "the connection and the free memory",
            MODEL,
        ) from error
    return model, _fit(tokenizer, name, recipe)


def _load_with_unsloth(recipe: TrainingRecipe, name: str) -> tuple[Any, Any]:
    from unsloth import FastLanguageModel

    return FastLanguageModel.from_pretrained(
        model_name=name,
        revision=_revision(recipe, name),
        max_seq_length=recipe.max_length,
        load_in_4bit=recipe.load_in_4bit,
        dtype=None,
    )


def _load_with_peft(recipe: TrainingRecipe, name: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    revision = _revision(recipe, name)
    half = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision().name]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=half,
    )
    is_quantized = "bnb-4bit" in name  # brings its own configuration
    model = AutoModelForCausalLM.from_pretrained(
        name,
        revision=revision,
        dtype=half,
        device_map={"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"},
        **(
            {"quantization_config": quantization}
            if recipe.load_in_4bit and not is_quantized
            else {}
        ),
    )
    for module in model.modules():
        # bitsandbytes repacks a weight in the first evaluation on such a CPU and never unpacks it,
        # which makes the gradients after it wrong.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.config.use_cache = False
    return model, AutoTokenizer.from_pretrained(name, revision=revision, padding_side="right")


def add_adapter(model: Any, recipe: TrainingRecipe) -> Any:
    """Put a fresh LoRA adapter on the model; the recipe's seed decides its weights.

    Raises:
        CommandError: The recipe asks for what the back end has not.
    """
    import torch

    adapter: dict[str, Any] = {
        "r": recipe.lora_r,
        "lora_alpha": recipe.lora_alpha,
        "lora_dropout": recipe.lora_dropout,
        "target_modules": recipe.lora_target_modules,
        "bias": "none",
        "use_rslora": recipe.use_rslora,
    }
    if recipe.use_dora:
        adapter["use_dora"] = True
    if recipe.backend == "unsloth":
        if recipe.use_dora and torch.cuda.is_available():
            raise CommandError("use_dora: Unsloth's GPU kernels know no DoRA; set backend: peft")
        from unsloth import FastLanguageModel

        return FastLanguageModel.get_peft_model(
            model,
            **adapter,
            use_gradient_checkpointing="unsloth" if recipe.use_gradient_checkpointing else False,
            random_state=recipe.seed,
        )
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(recipe.seed)
    if recipe.use_gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return get_peft_model(model, LoraConfig(**adapter, task_type="CAUSAL_LM"))
