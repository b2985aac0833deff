"""Export an adapter as a LoRA GGUF: a small file that llama.cpp applies over the base's GGUF.

In: an adapter folder, its base (config and tensor list only). Out: one GGUF of some megabytes, to
be named beside the base: `python -m integration.chat --model BASE.gguf --adapter NAME=FILE`.

llama.cpp multiplies every B @ A by alpha / rank, with one alpha for the whole file, and its
converter reads nothing but `lora_alpha`: rsLoRA would come out sqrt(r) too weak, alpha_pattern wrong
in each module that it names. Here the true scale is written; see `_fold`.

Run: python -m export.export_lora_gguf ADAPTER_DIR --output FILE [--type F16] [--base DIR]
"""

import argparse
import hashlib
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from export._cli import FAILED, MODEL, OK, USAGE, CommandError, log, run_command
from export._files import os_errors_told, sha256_file, working_dir, write_atomically
from export._process import run_checked
from export.adapter_files import WEIGHTS_NAME, Adapter, LoraModule, read_adapter
from export.base_model import BaseModel, load_base
from export.converter import find_converter
from export.gguf_metadata import MetadataValue, gguf_metadata, value_type
from export.merged_weights import HEAD, plan_weights, row_blocks
from export.modelfile import modelfile, read_chat_format
from export.run_facts import read_run_facts
from export.safetensors_file import TensorInfo, read_rows, write_header
from export.tokenizer_files import tokenizer_sources

if TYPE_CHECKING:
    import numpy as np

# Rows that are no multiple of 32 (a rank of 8 or 16) stay F16 under Q8_0.
LORA_TYPES = ("F32", "F16", "BF16", "Q8_0")
# Half the bytes of F32 and faster. On SmolLM2-135M, rank 16, trained for 117 steps, the mean KLD to
# the F32 file is 1e-9 (BF16 7e-8, Q8_0 8e-7); llama.cpp's 16-bit KV cache alone costs 8e-7.
DEFAULT_TYPE = "F16"
# A factor nearer to 1 than one rounding of float32 is 1, and B keeps its bits.
_FLOAT32_NOISE = 2.0**-23
MODELFILE = "Modelfile"
_LARGEST = {"F16": 65504.0, "Q8_0": 65504.0}


def export_lora_gguf(
    adapter_dir: Path,
    output: Path,
    *,
    base_dir: Path | None = None,
    type_name: str = DEFAULT_TYPE,
    name: str | None = None,
    base_gguf: Path | None = None,
) -> Adapter:
    """Write an adapter as a LoRA GGUF, under a temporary name until it is whole.

    Args:
        adapter_dir: What training wrote; nothing but LoRA matrices.
        output: The file to write; replaced if it exists.
        base_dir: The base, when the one that the adapter names is not to be used.
        type_name: One of `LORA_TYPES`.
        name: `general.name`; by default made of the base's name and the run's.
        base_gguf: The base as GGUF; then an Ollama `Modelfile` of the two is written beside `output`.

    Returns:
        What was exported.

    Raises:
        CommandError: Exit 3: the adapter is unusable, does not belong to the base, or has parts
            that only a merge can express. Exit 1: the converter is missing or failed.
    """
    adapter = read_adapter(adapter_dir)
    base = load_base(adapter, base_dir)
    plan_weights(base, [(adapter, 1.0)])
    adapter = _only_lora(adapter, base)
    alpha = _common_alpha(adapter)
    converter = find_converter("convert_lora_to_gguf.py")
    keys = _metadata(adapter, base, name)
    output.parent.mkdir(parents=True, exist_ok=True)
    with working_dir(output.parent, "lora-gguf") as folder:
        lora_dir, config_dir = folder / "adapter", folder / "base"
        lora_dir.mkdir()
        config_dir.mkdir()
        _write_adapter(adapter, alpha, lora_dir, _LARGEST.get(type_name, 3.4e38))
        # The config alone: with an index.json beside it, the converter would look for the shards.
        (config_dir / "config.json").write_text(json.dumps(dict(base.config)), encoding="utf-8")
        command = [sys.executable, str(converter), str(lora_dir), "--base", str(config_dir)]
        command += ["--outtype", type_name.lower(), "--outfile", str(folder / "raw.gguf")]
        run_checked(command, "conversion of the adapter")
        _write_named(folder / "raw.gguf", folder / "named.gguf", keys, adapter)
        os.replace(folder / "named.gguf", output)
    if base_gguf is not None:
        chat = read_chat_format(tokenizer_sources(adapter_dir, base.path), base.path)
        source = os.path.relpath(base_gguf, output.parent)
        text = modelfile(source, chat, read_run_facts(adapter_dir, base), output.name)
        write_atomically(output.parent / MODELFILE, text)
    return adapter


def _refused(adapter: Adapter, reason: str) -> CommandError:
    return CommandError(
        f"adapter '{adapter.path}' {reason}; a LoRA GGUF cannot hold that. Merge instead: "
        f"python -m export.export_gguf {adapter.path} --output DIR",
        MODEL,
    )


def _only_lora(adapter: Adapter, base: BaseModel) -> Adapter:
    """Refuse what is not B @ A; drop weights that are the base's own.

    PEFT saves the weight of an adapted embedding or head along with it, trained or not.
    """
    if adapter.config.use_dora:
        raise _refused(adapter, "is a DoRA: its magnitudes rescale the base's rows")
    if adapter.tokens:
        raise _refused(adapter, f"trained single token rows of '{min(adapter.tokens)}'")
    trained = [name for name, info in adapter.saved.items() if not _is_copy(name, info, base)]
    if trained:
        raise _refused(
            adapter,
            f"trained {len(trained)} weights in full (modules_to_save or a bias), such as "
            f"'{min(trained)}'",
        )
    # llama.cpp has one tensor for a tied embedding and head. Its loader knows no head to adapt; an
    # embedding's factors are taken for the head's too, where they do not fit: the process aborts.
    tied = base.config.get("tie_word_embeddings", HEAD not in base.tensors)
    for name, module in adapter.modules.items():
        if tied and (module.is_embedding or name == HEAD):
            raise _refused(
                adapter,
                f"has LoRA on '{name}', and '{base.name}' has one tensor for embedding and head",
            )
    return replace(adapter, saved={})


def _is_copy(name: str, saved: TensorInfo, base: BaseModel) -> bool:
    import numpy as np

    own = base.tensors.get(name)
    if own is None and name == HEAD:
        own = next((info for key, info in base.tensors.items() if "embed_tokens" in key), None)
    if own is None or own.shape != saved.shape:
        return False
    blocks = row_blocks(saved.shape[0], (1 << 22) // math.prod(saved.shape[1:]))
    return all(np.array_equal(read_rows(saved, *at), read_rows(own, *at)) for at in blocks)


def _common_alpha(adapter: Adapter) -> float:
    """Choose the file's one alpha so that as many modules as possible keep their B untouched."""
    import numpy as np

    alphas = [float(np.float32(m.scale * m.rank)) for m in adapter.modules.values()]
    counts = Counter(alpha for alpha in alphas if alpha != 0 and math.isfinite(alpha))
    if not counts:  # and an alpha of 0 would be a scale of 1 to llama.cpp
        text = f"{len(alphas)} LoRA modules, lora_alpha {adapter.config.alpha:g}"
        raise CommandError(f"adapter '{adapter.path}' changes nothing: {text}; train again", MODEL)
    return counts.most_common(1)[0][0]


def _fold(module: LoraModule, alpha: float) -> "np.ndarray":
    """Give the B for which llama.cpp's alpha / rank * (B @ A) is what training meant.

    B is multiplied by scale * rank / alpha in float32, one rounding of 2^-24, and only where that
    factor is not 1: where alpha_pattern, or rsLoRA with rank_pattern, gives modules different ones.
    A is never touched. All other loss is that of the file's type.
    """
    import numpy as np

    b = read_rows(module.b)
    factor = module.scale * module.rank / alpha
    return b if abs(factor - 1) <= _FLOAT32_NOISE else b * np.float32(factor)


def _write_adapter(adapter: Adapter, alpha: float, folder: Path, largest: float) -> None:
    """Write an adapter folder for the converter, as float32, one matrix in memory at a time.

    Raises:
        CommandError: Exit 3: a value does not fit into the file's type.
    """
    import numpy as np

    # Nothing but what was checked: the converter acts upon other keys (invocation_string) too.
    config = {"peft_type": "LORA", "r": adapter.config.rank, "lora_alpha": alpha}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {}
    for module in adapter.modules.values():
        prefix = f"base_model.model.{module.weight_name.removesuffix('.weight')}"
        for part, info in (("A", module.a), ("B", module.b)):
            key = f"lora_embedding_{part}" if module.is_embedding else f"lora_{part}.weight"
            tensors[f"{prefix}.{key}"] = ("F32", info.shape, 4 * info.num_weights)
    with (folder / WEIGHTS_NAME).open("wb") as file:
        write_header(file, tensors)
        for module in adapter.modules.values():
            for values in (read_rows(module.a), _fold(module, alpha)):
                if not (top := np.abs(values).max()) <= largest:
                    raise CommandError(
                        f"'{module.weight_name}' has LoRA values up to {top:.3g}; this type holds "
                        f"{largest:.3g} at most, use --type F32",
                        MODEL,
                    )
                file.write(values.tobytes())


def _metadata(adapter: Adapter, base: BaseModel, name: str | None) -> dict[str, MetadataValue]:
    """Give the keys that say what the file is and which base it belongs to."""
    digest, facts = sha256_file(adapter.path / WEIGHTS_NAME), read_run_facts(adapter.path, base)
    known = gguf_metadata(
        facts, name=name, base_fingerprint=base.fingerprint, adapter_sha256=digest
    )
    # How to sample is the base file's to say: llama.cpp reads it there.
    keys = {key: value for key, value in known if not key.startswith("general.sampling.")}
    files = {path.name: path for path in adapter.path.iterdir() if path.is_file()}
    if template := read_chat_format(files).template:
        # For chat to compare with the base file's: another prompt format gives bad answers only.
        keys["tomeforge.chat_template.sha256"] = hashlib.sha256(template.encode()).hexdigest()
    return keys


def _write_named(
    raw: Path, target: Path, keys: Mapping[str, MetadataValue], adapter: Adapter
) -> None:
    """Copy the converter's file, with our keys in place of those it guessed from folder names.

    Raises:
        CommandError: Exit 1: the converter left out some of the adapter.
    """
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader = GGUFReader(raw)
    expected = sum(m.a.num_weights + m.b.num_weights for m in adapter.modules.values())
    got = sum(int(tensor.n_elements) for tensor in reader.tensors)
    # More is right where llama.cpp splits a fused layer: each part then has its own copy of A.
    if got < expected:
        raise CommandError(
            f"llama.cpp's converter wrote {got} of the adapter's {expected} numbers; it left out "
            f"some modules. Merge instead: python -m export.export_gguf {adapter.path} --output DIR",
            FAILED,
        )
    fields = {field.name: field for field in reader.fields.values()}
    writer = GGUFWriter(target, fields["general.architecture"].contents())
    for key, field in fields.items():
        if key.startswith("adapter.") or key in ("general.type", "general.quantization_version"):
            writer.add_key_value(key, field.contents(), field.types[0])
    for key, value in keys.items():
        writer.add_key_value(key, value, value_type(value), GGUFValueType.STRING)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m export.export_lora_gguf",
        description="Export an adapter as a LoRA GGUF to use over its base's GGUF; prints the file.",
    )
    parser.add_argument("adapter_dir", type=Path, help="PEFT adapter folder, as training wrote it")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="GGUF to write")
    text = f"of the adapter's numbers (default {DEFAULT_TYPE})"
    parser.add_argument(
        "--type", type=str.upper, choices=LORA_TYPES, default=DEFAULT_TYPE, help=text
    )
    text = "16-bit base (default: the one the adapter names)"
    parser.add_argument("--base", type=Path, metavar="DIR", help=text)
    parser.add_argument("--name", help="general.name (default: after the base and the run)")
    text = "the base as GGUF: write an Ollama Modelfile of both beside the output"
    parser.add_argument("--modelfile", type=Path, metavar="BASE_GGUF", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser


@os_errors_told
def main(argv: list[str] | None = None) -> int:
    """Run the command; exit codes: 0 done, 1 conversion failed, 2 usage, 3 adapter unusable."""
    args = build_parser().parse_args(argv)
    output: Path = args.output
    if output.is_dir() or output.suffix != ".gguf":
        what = "is a folder" if output.is_dir() else "does not end in .gguf"
        raise CommandError(f"--output '{output}' {what}; expected a file to write: NAME.gguf")
    made = [output, output.parent / MODELFILE] if args.modelfile else [output]
    taken = [path for path in made if path.exists()]
    if taken and not args.overwrite:
        raise CommandError(f"output '{taken[0]}' exists; replace it: --overwrite", USAGE)
    if args.modelfile and not args.modelfile.is_file():
        raise CommandError(f"--modelfile '{args.modelfile}' is no file; expected a GGUF", USAGE)
    adapter = export_lora_gguf(
        args.adapter_dir,
        output,
        base_dir=args.base,
        type_name=args.type,
        name=args.name,
        base_gguf=args.modelfile,
    )
    ranks = sorted({module.rank for module in adapter.modules.values()})
    rank = f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else f"{ranks[0]}"
    megabytes = output.stat().st_size / 1e6
    log(f"LoRA GGUF: {megabytes:.2f} MB, rank {rank}, {len(adapter.modules)} modules, {args.type}")
    print(output)
    return OK


if __name__ == "__main__":
    run_command(main)
