"""What a user does without Tomeforge: PEFT's merge, llama.cpp's converter, `llama_model_quantize`."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from export.gguf_header import read_gguf_header

if TYPE_CHECKING:
    import numpy as np


def stock_chain(
    adapter_dir: Path,
    base_dir: Path,
    folder: Path,
    types: Sequence[str],
    imatrix: "Mapping[str, np.ndarray] | None" = None,
) -> dict[str, Path]:
    """Merge and convert in float32, then quantize; the files by type."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    merged_dir = folder / "merged"
    PeftModel.from_pretrained(model, adapter_dir).merge_and_unload().save_pretrained(merged_dir)
    for path in adapter_dir.iterdir():
        if path.name.startswith(("tokenizer", "chat_template")):
            shutil.copyfile(path, merged_dir / path.name)
    f32 = convert(merged_dir, folder / "F32.gguf", "f32")
    files = {name: folder / f"{name}.gguf" for name in types}
    for name, path in files.items():
        quantize(f32, path, name, imatrix)
    return files


def convert(model_dir: Path, target: Path, outtype: str = "f16", **general: str) -> Path:
    """Run `convert_hf_to_gguf.py`; `general` are keys `general.*` of the file."""
    from export.converter import find_converter

    command = [sys.executable, find_converter(), model_dir, "--outtype", outtype]
    if general:
        keys = {f"general.{key}": value for key, value in general.items()}
        metadata = target.with_suffix(".metadata.json")
        metadata.write_text(json.dumps(keys), encoding="utf-8")
        command += ["--metadata", metadata]
    done = subprocess.run(
        [*command, "--outfile", target], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return target


def quantize(
    source: Path,
    target: Path,
    type_name: str,
    imatrix: "Mapping[str, np.ndarray] | None" = None,
) -> Path:
    """Run `llama_model_quantize`, with values (in_sum2 / counts) by tensor or without."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{type_name}")
    params.nthread = 2
    if imatrix is not None:
        entries = (llama_cpp.llama_model_imatrix_data * (len(imatrix) + 1))()
        for entry, (name, values) in zip(entries, imatrix.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = ctypes.cast(entries, type(params.imatrix))
    code = llama_cpp.llama_model_quantize(
        os.fsencode(source), os.fsencode(target), ctypes.byref(params)
    )
    assert code == 0, f"llama_model_quantize refused {type_name}"
    return target


def differing_tensors(ours: Path, theirs: Path) -> list[str]:
    """Name the tensors that are not of the same type and bytes in both files."""
    first, second = read_tensors(ours), read_tensors(theirs)
    assert first.keys() == second.keys(), first.keys() ^ second.keys()
    return [name for name in first if first[name] != second[name]]


def read_tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    """Read type and bytes of every tensor; gguf's own reader takes seconds for the vocabulary."""
    data = path.read_bytes()
    return {
        tensor.name: (tensor.type_name, data[tensor.begin : tensor.begin + tensor.num_bytes])
        for tensor in read_gguf_header(path).tensors
    }
