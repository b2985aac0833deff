"""Merge an adapter into its 16-bit base, tensor by tensor: memory stays at one tensor.

In: a PEFT adapter folder and the base it names. Out: a model folder: the base's shards with the
adapted weights in place, training's tokenizer and chat template.

Run: python -m export.merge_adapter ADAPTER_DIR --output DIR [--base DIR] [--overwrite]
"""

import argparse
import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from export._cli import MODEL, OK, USAGE, CommandError, log, run_command
from export._files import os_errors_told, working_dir
from export.base_model import (
    BaseModel,
    TensorInfo,
    front_matter,
    header_length,
    load_base,
    read_json,
)
from export.lora_math import WEIGHTS_NAME, Adapter, merge_module, read_adapter

if TYPE_CHECKING:
    import torch

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_CONFIG_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")
_CHUNK_BYTES = 1 << 24
# Rescaling rows to the length they have is not exact in float32; so much is no training.
_DORA_NOISE = 1e-6


def merge_adapter(
    adapter_dir: Path, output_dir: Path, base_dir: Path | None = None, overwrite: bool = False
) -> Path:
    """Merge into a new folder, which appears under its name only when it is whole.

    Args:
        adapter_dir: What training wrote: PEFT adapter, tokenizer, chat template.
        output_dir: The folder to write.
        base_dir: The 16-bit base, when the one that the adapter names is not to be used.
        overwrite: Replace `output_dir` if it exists and holds a model.

    Raises:
        CommandError: Exit 2: `output_dir` is taken. Exit 3: adapter or base are unusable or do not
            belong together.
    """
    _check_free(output_dir, overwrite)
    adapter = read_adapter(adapter_dir)
    base = load_base(adapter, base_dir)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with working_dir(output_dir.parent, "merge") as temporary_dir:
        new_dir = temporary_dir / "new"
        new_dir.mkdir()
        merge_into(adapter, base, new_dir)
        if output_dir.exists():
            os.replace(output_dir, temporary_dir / "old")
        os.replace(new_dir, output_dir)
    log(f"merged {len(adapter.modules)} weights of {base.name} (checked: each one changed)")
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


def merge_into(adapter: Adapter, base: BaseModel, target_dir: Path) -> None:
    """Write all files of the merged model into an existing, empty folder.

    Raises:
        CommandError: Exit 3: no tokenizer, or a weight that the adapter does not change or
            overflows.
    """
    copy_tokenizer(adapter.path, base, target_dir)
    for name in _CONFIG_FILES:
        if (base.path / name).is_file():
            shutil.copyfile(base.path / name, target_dir / name)
    (target_dir / "README.md").write_text(_card(base), encoding="utf-8")
    with _one_torch_thread():
        for shard in sorted({info.shard for info in base.tensors.values()}):
            _merge_shard(adapter, base, shard, target_dir / shard)


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    """The work is small and bound by memory; threads that wait for each other only cost.

    On a busy machine with two cores, two threads took 15 s where one takes 1.3 s.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def tokenizer_sources(adapter_dir: Path, base_dir: Path) -> dict[str, Path]:
    """Choose where each tokenizer file comes from: training's set, else the base's.

    Raises:
        CommandError: Exit 3: neither folder has a tokenizer.
    """
    ours = _present(adapter_dir, TOKENIZER_FILES)
    theirs = _present(base_dir, TOKENIZER_FILES)
    if not ours.keys() & set(_VOCABULARY_FILES):
        ours = theirs | ours
    elif "tokenizer.model" in theirs and "tokenizer.model" not in ours:
        # Without it llama.cpp gives every SentencePiece token the same score, and text is split
        # wrongly. transformers does not always save it, so take the base's if the vocabulary is
        # the same.
        if _same_vocabulary(ours, theirs):
            ours["tokenizer.model"] = theirs["tokenizer.model"]
        else:
            log("warning: training changed the vocabulary; the base's tokenizer.model is left out")
    if not ours.keys() & set(_VOCABULARY_FILES):
        raise CommandError(
            f"neither '{adapter_dir}' nor '{base_dir}' has a tokenizer ({_VOCABULARY_FILES[0]}); "
            "a model folder without tokenizer is of no use. Copy the training run's tokenizer "
            "files into the adapter folder",
            MODEL,
        )
    return ours


def copy_tokenizer(adapter_dir: Path, base: BaseModel, target_dir: Path) -> None:
    """Copy the tokenizer and chat template that training used.

    Raises:
        CommandError: Exit 3: no tokenizer, or more tokens than the embedding has rows.
    """
    sources = tokenizer_sources(adapter_dir, base.path)
    rows = [i.shape[0] for n, i in base.tensors.items() if n.endswith("embed_tokens.weight")]
    if rows and "tokenizer.json" in sources:
        content = read_json(sources["tokenizer.json"])
        vocabulary = content.get("model", {}).get("vocab", {})
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
        top = max([*ids, *(token["id"] for token in content.get("added_tokens", []))])
        if top >= rows[0]:
            raise CommandError(
                f"tokenizer of '{sources['tokenizer.json'].parent}' knows token {top}, the "
                f"embedding of '{base.path}' has {rows[0]} rows; train without new tokens",
                MODEL,
            )
    for name, source in sources.items():
        shutil.copyfile(source, target_dir / name)


def _present(folder: Path, names: tuple[str, ...]) -> dict[str, Path]:
    return {name: folder / name for name in names if (folder / name).is_file()}


def _same_vocabulary(ours: dict[str, Path], theirs: dict[str, Path]) -> bool:
    if "tokenizer.json" not in ours or "tokenizer.json" not in theirs:
        return True
    a, b = (read_json(files["tokenizer.json"]).get("model", {}) for files in (ours, theirs))
    return bool(a.get("vocab") == b.get("vocab"))


def _card(base: BaseModel) -> str:
    """Write the front matter from which the GGUF converter takes licence and base."""
    license_name = front_matter(base.path).get("license")
    lines = [f"license: {license_name}"] if license_name else []
    if "/" in base.name:
        lines.append(f"base_model: {base.name}")
    return "\n".join(["---", *lines, "tags:", "- text-generation", "---", ""])


def _merge_shard(adapter: Adapter, base: BaseModel, shard: str, target: Path) -> None:
    """Copy a shard's header as it is (names, types and shapes stay), then its tensors in order.

    Tensors are read, not mapped: mapped pages would stay, and the process would seem to grow to
    the size of the model.
    """
    from safetensors import safe_open

    source = base.path / shard
    infos = {name: info for name, info in base.tensors.items() if info.shard == shard}
    with (
        source.open("rb") as reader,
        target.open("wb") as writer,
        safe_open(adapter.path / WEIGHTS_NAME, framework="pt") as factors,
    ):
        _copy_bytes(reader, writer, 8 + header_length(source))
        start = reader.tell()
        for name, info in infos.items():
            reader.seek(start + info.begin)
            module = adapter.modules.get(name)
            if module is None:
                _copy_bytes(reader, writer, info.end - info.begin)
            else:
                weight = _read_tensor(reader, info)
                merged = merge_module(weight, module, factors)
                check_merged(name, weight, merged, _DORA_NOISE if module.magnitude_key else 0.0)
                writer.write(_bytes_of(merged))
            if writer.tell() != start + info.end:
                raise CommandError(f"'{source}': '{name}' is damaged; copy the base again", MODEL)


def _read_tensor(reader: BinaryIO, info: TensorInfo) -> "torch.Tensor":
    import torch

    types = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
    data = bytearray(reader.read(info.end - info.begin))
    return torch.frombuffer(data, dtype=types.get(info.dtype, torch.float64)).reshape(info.shape)


def _bytes_of(tensor: "torch.Tensor") -> memoryview:
    import torch

    return memoryview(tensor.contiguous().view(torch.uint8).numpy().data)


def check_merged(
    name: str, weight: "torch.Tensor", merged: "torch.Tensor", noise: float = 0.0
) -> None:
    """Check that a merge did something beyond relative `noise`, and something finite.

    Raises:
        CommandError: Exit 3.
    """
    if not merged.isfinite().all():
        raise CommandError(
            f"'{name}' holds NaN or infinite values after the merge ({merged.dtype}); expected "
            "finite ones: the base is damaged, or training diverged",
            MODEL,
        )
    if merged.equal(weight) or (noise and merged.allclose(weight, rtol=noise, atol=0.0)):
        raise CommandError(
            f"the adapter does not change '{name}': its part is smaller than one rounding step of "
            f"{weight.dtype}; it was hardly trained. Train longer",
            MODEL,
        )


def _copy_bytes(reader: BinaryIO, writer: BinaryIO, count: int) -> None:
    while count > 0:
        chunk = reader.read(min(count, _CHUNK_BYTES))
        if not chunk:
            return
        writer.write(chunk)
        count -= len(chunk)


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m export.merge_adapter",
        description="Merge an adapter into its 16-bit base model; prints the folder written.",
    )
    parser.add_argument("adapter_dir", type=Path, help="PEFT adapter folder, as training wrote it")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--base", type=Path, metavar="DIR", help="16-bit base (default: the one the adapter names)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser


@os_errors_told
def main(argv: list[str] | None = None) -> int:
    """Run the command; exit codes: 0 done, 2 output taken, 3 adapter or base unusable."""
    args = build_parser().parse_args(argv)
    print(merge_adapter(args.adapter_dir, args.output, args.base, args.overwrite))
    return OK


if __name__ == "__main__":
    run_command(main)
