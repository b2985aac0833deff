"""What `scripts.benchmark export` runs in processes of their own: random models, the stock chain.

    python -m scripts.benchmark_export_stock make SIZE DIR            (DIR/base and DIR/adapter)
    python -m scripts.benchmark_export_stock merge BASE ADAPTER DIR   (PEFT's merge_and_unload)
    python -m scripts.benchmark_export_stock quantize F16 FILE        (llama_model_quantize, Q4_K_M)
    python -m scripts.benchmark_export_stock compare OURS STOCK       (tensor counts, as JSON)

The random models have the shapes of TinyLlama-1.1B and Mistral-7B-v0.1, all but one: the vocabulary
is that of the embedded default model, whose tokenizer is at hand offline and known to llama.cpp's
converter. That makes them 6 % and 2 % larger.
"""

import argparse
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from scripts._cli import FAILED, OK, CommandError, run_command

VOCABULARY = 49152
RANK, ALPHA = 16, 32
_STD = 0.02  # of weights and LoRA factors: a delta is then about a sixth of a weight
_CHUNK = 1 << 22  # values in memory at a time
_SAME_BYTES = 0.5  # of each tensor; without the adapter 16 % were measured
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class ModelSize:
    """Shape of a random model; a shard takes whole tensors up to ``shard_bytes``."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    context: int
    architecture: str = "LlamaForCausalLM"
    model_type: str = "llama"
    shard_bytes: int = 5_000_000_000

    def linears(self) -> dict[str, tuple[int, int]]:
        """Give the seven linear kinds of a layer with their shapes (out, in)."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Give all tensors with their shapes, in the order of the files."""
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, self.hidden)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            found[f"{prefix}.input_layernorm.weight"] = (self.hidden,)
            found[f"{prefix}.post_attention_layernorm.weight"] = (self.hidden,)
            found |= {f"{prefix}.{kind}.weight": shape for kind, shape in self.linears().items()}
        found["model.norm.weight"] = (self.hidden,)
        found["lm_head.weight"] = (VOCABULARY, self.hidden)
        return found

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, two each: of the base, the merged model and the F16 file."""
        return 2 * sum(map(prod, self.tensors().values()))

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the LoRA factors, in float32."""
        return 4 * RANK * self.layers * sum(map(sum, self.linears().values()))


SIZES = {
    "1.1b": ModelSize(2048, 22, 5632, 32, 4, 2048),
    "7b": ModelSize(4096, 32, 14336, 32, 8, 32768, "MistralForCausalLM", "mistral"),
    "tiny": ModelSize(256, 2, 512, 4, 2, 1024, shard_bytes=30_000_000),  # two shards
}


def make_model(size: ModelSize, folder: Path) -> None:
    """Write a random base and an adapter for it, never holding more than a few MB of weights."""
    from scripts.default_model import ensure_default_model

    tokenizer_dir = ensure_default_model()
    for name in ("base", "adapter"):
        (folder / name).mkdir(parents=True)
        for file_name in _TOKENIZER_FILES:
            shutil.copyfile(tokenizer_dir / file_name, folder / name / file_name)
    _write_base(size, folder / "base")
    _write_adapter(size, folder / "adapter", folder / "base")


def _write_base(size: ModelSize, folder: Path) -> None:
    config = {
        "architectures": [size.architecture],
        "model_type": size.model_type,
        "vocab_size": VOCABULARY,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "max_position_embeddings": size.context,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if size.model_type == "mistral":
        config["sliding_window"] = None
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    shards = _split(size)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
        weight_map = {
            tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        }
        index = {"metadata": {"total_size": size.weight_bytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    for number, (name, shard) in enumerate(zip(names, shards, strict=True)):
        _write_shard(folder / name, shard, seed=number)


def _split(size: ModelSize) -> list[dict[str, tuple[int, ...]]]:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    taken = 0
    for name, shape in size.tensors().items():
        num_bytes = 2 * prod(shape)
        if shards[-1] and taken + num_bytes > size.shard_bytes:
            shards.append({})
            taken = 0
        shards[-1][name] = shape
        taken += num_bytes
    return shards


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
    """Write safetensors as a stream: the library would want all tensors of a file at once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # the format asks for aligned weights
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for number, shape in enumerate(shapes.values()):
            for chunk in _bfloat16_chunks(prod(shape), len(shape) == 1, (seed, number)):
                file.write(chunk)
        # Or the disk would still be busy with it while the first contender runs.
        file.flush()
        os.fsync(file.fileno())


def _bfloat16_chunks(count: int, is_norm: bool, seed: tuple[int, int]) -> Iterator[Any]:
    """Give normal values (ones for a norm) as the upper halves of float32, rounded to nearest."""
    import numpy as np

    random = np.random.Generator(np.random.SFC64(seed))
    for start in range(0, count, _CHUNK):
        length = min(_CHUNK, count - start)
        if is_norm:
            values = np.ones(length, np.float32)
        else:
            values = random.standard_normal(length, np.float32)
            values *= _STD
        bits = values.view(np.uint32)
        bits += 0x8000
        yield (bits >> 16).astype("<u2")


def _write_adapter(size: ModelSize, folder: Path, base_dir: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    random = np.random.Generator(np.random.SFC64(7))
    factors = {}
    for layer in range(size.layers):
        for kind, (rows, columns) in size.linears().items():
            key = f"base_model.model.model.layers.{layer}.{kind}"
            # Training starts with B = 0, and a merge of that would do nothing.
            for part, shape in (("lora_A", (RANK, columns)), ("lora_B", (rows, RANK))):
                values = random.standard_normal(shape, np.float32) * np.float32(_STD)
                factors[f"{key}.{part}.weight"] = values
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "base_model_name_or_path": str(base_dir),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": RANK,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": [kind.rpartition(".")[2] for kind in size.linears()],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def merge(base_dir: Path, adapter_dir: Path, output_dir: Path) -> None:
    """Merge as PEFT's documentation does."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(model, str(adapter_dir))
    model.merge_and_unload().save_pretrained(output_dir)
    AutoTokenizer.from_pretrained(base_dir).save_pretrained(output_dir)


def quantize(source: Path, target: Path) -> None:
    """Quantize as llama.cpp's own program does by default, with a thread for each core."""
    import ctypes

    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    params.nthread = os.cpu_count() or 1
    if llama_cpp.llama_model_quantize(
        os.fsencode(source), os.fsencode(target), ctypes.byref(params)
    ):
        raise CommandError(f"llama_model_quantize refused '{source}'", FAILED)


def compare(ours_path: Path, stock_path: Path) -> dict[str, float]:
    """Prove that two GGUF files are the same product.

    Returns:
        ``tensors``, and the share of ``identical bytes`` in them. That is not all, since stock rounds
        a merged weight to bfloat16 and to F16 before it is quantized: about nine tenths of Q4_K.

    Raises:
        CommandError: Exit 1: names, types or shapes differ, most of a tensor does (as without the
            adapter), or llama.cpp does not load a file.
    """
    import llama_cpp
    from gguf import GGUFReader

    tensors = []
    for path in (ours_path, stock_path):
        try:
            llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
            tensors.append({tensor.name: tensor for tensor in GGUFReader(path).tensors})
        except ValueError as error:
            raise CommandError(f"'{path}' cannot be loaded: {error}", FAILED) from error
    ours, stock = (
        {name: f"{t.tensor_type.name} {t.shape.tolist()}" for name, t in one.items()}
        for one in tensors
    )
    different = [
        f"{name}: ours {ours.get(name, 'absent')}, stock {stock.get(name, 'absent')}"
        for name in sorted(ours.keys() | stock.keys())
        if ours.get(name) != stock.get(name)
    ]
    if different:
        raise CommandError(
            f"ours and stock are different products: {len(different)} of {len(stock)} tensors "
            f"differ, first {different[0]}",
            FAILED,
        )
    shares = {name: _identical(t.data, tensors[1][name].data) for name, t in tensors[0].items()}
    worst = min(shares, key=lambda name: shares[name])
    if shares[worst] < _SAME_BYTES:
        raise CommandError(
            f"ours and stock are different products: {shares[worst]:.0%} of the bytes of {worst} "
            f"are the same, expected {_SAME_BYTES:.0%}",
            FAILED,
        )
    weights = [tensor.n_bytes for tensor in tensors[0].values()]
    share = sum(s * w for s, w in zip(shares.values(), weights, strict=True)) / sum(weights)
    return {"tensors": len(ours), "identical bytes": round(float(share), 3)}


def _identical(ours: Any, stock: Any) -> float:
    import numpy as np

    return float((ours.view(np.uint8) == stock.view(np.uint8)).mean())


_STEPS: dict[str, tuple[Callable[..., Any], int]] = {
    "make": (make_model, 2),
    "merge": (merge, 3),
    "quantize": (quantize, 2),
    "compare": (compare, 2),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one step; what it gives is printed as JSON."""
    parser = argparse.ArgumentParser(description="One step of scripts.benchmark export.")
    parser.add_argument("step", choices=list(_STEPS))
    parser.add_argument("arguments", nargs="+", help="make: size and folder; others: paths")
    options = parser.parse_args(argv)
    step, count = _STEPS[options.step]
    if len(options.arguments) != count:
        parser.error(f"{options.step}: got {len(options.arguments)} arguments, expected {count}")
    arguments: list[Any] = [Path(argument) for argument in options.arguments]
    if options.step == "make":
        arguments[0] = SIZES[options.arguments[0]]
    result = step(*arguments)
    if result is not None:
        print(json.dumps(result))
    return OK


if __name__ == "__main__":
    run_command(main)
