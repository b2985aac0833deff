"""Merge adapters into their 16-bit base, a few rows at a time: memory does not grow with the model.

In: a PEFT adapter folder and the base it names. Out: a model folder: the base's shards with the
adapted weights in place, training's tokenizer and chat template.

Run: python -m export.merge_adapter ADAPTER_DIR --output DIR [--base DIR] [--overwrite]
"""

import argparse
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from export._cli import MODEL, OK, USAGE, CommandError, log, run_command
from export._files import check_free_space, os_errors_told, working_dir, write_json
from export.adapter_options import Inputs, add_adapter_options, read_inputs
from export.base_card import read_card
from export.base_model import BaseModel, read_json
from export.merged_weights import MergedWeight, row_blocks
from export.safetensors_file import FLOAT_BYTES, TensorInfo, read_rows, write_header
from export.tokenizer_files import copy_tokenizer

if TYPE_CHECKING:
    import torch

INDEX_NAME = "model.safetensors.index.json"
# Larger portions leave the cache and are slower: 1 << 22 takes 1.6 times as long, and 181 MB for 56.
_BLOCK_WEIGHTS = 1 << 20
_CHUNK_BYTES = 1 << 24


def merge_adapter(inputs: Inputs, output_dir: Path, overwrite: bool = False) -> Path:
    """Merge into a new folder, which appears under its name only when it is whole.

    Args:
        inputs: Adapters, base and tokenizer, see `read_inputs`.
        output_dir: The folder to write.
        overwrite: Replace `output_dir` if it exists and holds a model.

    Raises:
        CommandError: Exit 1: not enough space. Exit 2: `output_dir` is taken. Exit 3: an adapter
            does not change a weight, or a weight overflows.
    """
    _check_free(output_dir, overwrite)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(weight.source.num_bytes for weight in inputs.model.weights.values())
    check_free_space(output_dir.parent, needed, "the merged model needs")
    with working_dir(output_dir.parent, "merge") as temporary_dir:
        new_dir = temporary_dir / "new"
        new_dir.mkdir()
        _write_model(inputs, new_dir)
        if output_dir.exists():
            os.replace(output_dir, temporary_dir / "old")
        os.replace(new_dir, output_dir)
    log(
        f"merged {len(inputs.model.adapted)} weights of {inputs.base.name} "
        "(checked: LoRA changed each one)"
    )
    return output_dir


def _check_free(output_dir: Path, overwrite: bool) -> None:
    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return
    if not overwrite:
        raise CommandError(f"output '{output_dir}' exists; replace it: --overwrite", USAGE)
    if not (output_dir / "config.json").is_file():
        raise CommandError(
            f"output '{output_dir}' is no model folder, so it is not replaced; choose another",
            USAGE,
        )


def _write_model(inputs: Inputs, target_dir: Path) -> None:
    import torch

    copy_tokenizer(inputs.tokenizer, target_dir, inputs.model.num_embeddings)
    write_json(target_dir / "config.json", dict(inputs.model.config))
    generation = inputs.base.path / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, target_dir / generation.name)
    (target_dir / "README.md").write_text(_card(inputs.base), encoding="utf-8")
    # Small products, bound by memory: a second thread only waits for the first.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        shards = _assign_shards(inputs)
        for shard, names in shards.items():
            _write_shard(inputs, names, target_dir / shard)
    finally:
        torch.set_num_threads(before)
    _write_index(inputs, shards, target_dir)


def _card(base: BaseModel) -> str:
    """Write the front matter that hub tools read licence and base from."""
    license_name = read_card(base.path).get("license")
    lines = [f"license: {license_name}"] if isinstance(license_name, str) and license_name else []
    if "/" in base.name:
        lines.append(f"base_model: {base.name}")
    return "\n".join(["---", *lines, "tags:", "- text-generation", "---", ""])


def _assign_shards(inputs: Inputs) -> dict[str, list[str]]:
    """Keep each weight in its base's shard; a weight the base has not goes into the last one."""
    shards: dict[str, list[str]] = {}
    for name, info in inputs.base.tensors.items():
        if name in inputs.model.weights:
            shards.setdefault(info.path.name, []).append(name)
    new = [name for name in inputs.model.weights if name not in inputs.base.tensors]
    shards[list(shards)[-1]] += new
    return shards


def _write_index(inputs: Inputs, shards: Mapping[str, list[str]], target_dir: Path) -> None:
    path = inputs.base.path / INDEX_NAME
    if not path.is_file():
        return
    index = read_json(path)
    index["weight_map"] = {name: shard for shard, names in shards.items() for name in names}
    size = sum(_num_bytes(inputs, name) for name in index["weight_map"])
    index["metadata"] = {**index.get("metadata", {}), "total_size": size}
    write_json(target_dir / INDEX_NAME, index)


def _stored_as(inputs: Inputs, name: str) -> str:
    """Give the type a weight is written in: the base's, and for an untied head the twin's."""
    base, weight = inputs.base.tensors.get(name), inputs.model.weights[name]
    if base is None:
        twins = (info for other, info in inputs.base.tensors.items() if "embed_tokens" in other)
        base = next(twins, weight.source)
    return base.dtype


def _num_bytes(inputs: Inputs, name: str) -> int:
    weight = inputs.model.weights[name]
    dtype = _stored_as(inputs, name)
    if dtype not in FLOAT_BYTES:
        return weight.source.num_bytes
    return weight.source.num_weights * FLOAT_BYTES[dtype]


def _write_shard(inputs: Inputs, names: list[str], target: Path) -> None:
    entries = {
        name: (_stored_as(inputs, name), inputs.model.weights[name].shape, _num_bytes(inputs, name))
        for name in names
    }
    with target.open("wb") as writer:
        write_header(writer, entries)
        for name in names:
            weight, dtype = inputs.model.weights[name], _stored_as(inputs, name)
            if weight.parts or weight.tokens or weight.source.dtype != dtype:
                _write_merged(weight, dtype, writer)
            else:
                _copy(weight.source, writer)


def _write_merged(weight: MergedWeight, dtype: str, writer: BinaryIO) -> None:
    """Round the merged rows once, to the base's type, and check that something is left."""
    import torch

    kind = {"F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}.get(
        dtype, torch.float32
    )
    rows = weight.shape[0] if weight.shape else 1
    changed = False
    for first, count in row_blocks(rows, _BLOCK_WEIGHTS * rows // weight.source.num_weights):
        values, differs = weight.rows(first, count)
        rounded = torch.from_numpy(values).to(kind)
        check_finite(weight.name, bool(rounded.isfinite().all()), dtype)
        if weight.parts and differs:
            # The base's own rows, or those of a vocabulary that grew, rounded as these are.
            source = torch.from_numpy(read_rows(weight.source, first, count))
            differs = not rounded.equal(source.to(kind))
        changed = changed or differs
        writer.write(_bytes_of(rounded))
    if weight.parts:
        check_changed(weight.name, changed, dtype)


def check_finite(name: str, is_finite: bool, kind: str) -> None:
    """Refuse values that are no numbers, or too large for the type they are written in.

    Raises:
        CommandError: Exit 3.
    """
    if not is_finite:
        raise CommandError(
            f"'{name}' holds NaN or infinite values after the merge ({kind}); expected "
            "finite ones: the base is damaged, training diverged, or a value is too large for "
            f"{kind}",
            MODEL,
        )


def check_changed(name: str, changed: bool, kind: str) -> None:
    """Refuse an adapter of which nothing is left in a weight.

    Raises:
        CommandError: Exit 3.
    """
    if not changed:
        raise CommandError(
            f"the adapter does not change '{name}': its part is smaller than one rounding step of "
            f"{kind}; it was hardly trained. Train longer",
            MODEL,
        )


def _bytes_of(tensor: "torch.Tensor") -> memoryview:
    import torch

    return memoryview(tensor.contiguous().view(torch.uint8).numpy().data)


def _copy(info: TensorInfo, writer: BinaryIO) -> None:
    with info.path.open("rb") as reader:
        reader.seek(info.begin)
        left = info.num_bytes
        while left > 0:
            chunk = reader.read(min(left, _CHUNK_BYTES))
            if not chunk:
                raise CommandError(f"'{info.path}' became shorter; copy the base again", MODEL)
            writer.write(chunk)
            left -= len(chunk)


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m export.merge_adapter",
        description="Merge an adapter into its 16-bit base model; prints the folder written.",
    )
    add_adapter_options(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser


@os_errors_told
def main(argv: list[str] | None = None) -> int:
    """Run the command; exit codes: 0 done, 1 no space, 2 output taken, 3 unusable input."""
    args = build_parser().parse_args(argv)
    _check_free(args.output, args.overwrite)
    print(merge_adapter(read_inputs(args), args.output, args.overwrite))
    return OK


if __name__ == "__main__":
    run_command(main)
