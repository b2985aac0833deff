"""A LoRA GGUF that does not fit is refused before llama.cpp reads it, and a good one passes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from integration._cli import MODEL, CommandError
from integration.adapter_file import check_adapter_file
from integration.gguf_header import TensorEntry, read_header

WIDTH, ROWS, RANK = 64, 32, 4
Q, EMBEDDING = "blk.0.attn_q.weight", "token_embd.weight"


def write(path: Path, tensors: dict[str, Any] | None = None, **keys: Any) -> Path:
    """Write a LoRA GGUF of one module; tensors and keys replace those of a good one."""
    from gguf import GGUFWriter

    factors = {
        f"{Q}.lora_a": np.ones((RANK, WIDTH), np.float32),
        f"{Q}.lora_b": np.ones((ROWS, RANK), np.float16),
        **(tensors or {}),
    }
    values = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 8.0, **keys}
    writer = GGUFWriter(path, values.pop("architecture", "llama"))
    for key, value in values.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    for name, value in factors.items():
        if value is not None:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def base(embedded_gguf):
    """A header of a model with one projection and a head of its own."""
    entry = TensorEntry((WIDTH, ROWS), 0, 0)
    embedding = TensorEntry((WIDTH, 100), 0, 0)
    return replace(
        read_header(embedded_gguf),
        tensors={Q: entry, EMBEDDING: embedding, "output.weight": embedding},
    )


def test_good_file_passes(base, tmp_path):
    found = check_adapter_file(write(tmp_path / "x.gguf"), base)
    assert (found.rank, found.num_modules) == (RANK, 1)
    assert found.num_bytes == RANK * (4 * WIDTH + 2 * ROWS)
    other = check_adapter_file(write(tmp_path / "y.gguf", architecture="llama"), base)
    assert other.identity != found.identity


BAD_KEYS = [
    ({"general.type": "model"}, "is a whole model"),
    ({"general.type": 7}, "damaged header"),
    ({"architecture": "qwen2"}, "is for qwen2, the model is llama"),
    ({"adapter.type": "control_vector"}, "of type 'control_vector'; expected lora"),
    ({"adapter.type": None}, "of type 'None'"),
    ({"adapter.lora.alpha": 8}, "damaged header"),
    ({"adapter.lora.alpha": float("nan")}, "has alpha nan"),
]


@pytest.mark.parametrize(("keys", "message"), BAD_KEYS)
def test_bad_keys_are_exit_3(base, tmp_path, keys, message):
    with pytest.raises(CommandError, match=message) as caught:
        check_adapter_file(write(tmp_path / "x.gguf", **keys), base)
    assert caught.value.exit_code == MODEL


def factors(a: tuple[int, ...], b: tuple[int, ...], name: str = Q, value: float = 1) -> dict:
    """Factors by numpy's shapes, the slowest dimension first."""
    return {
        f"{name}.lora_a": np.full(a, value, np.float32),
        f"{name}.lora_b": np.ones(b, np.float32),
    }


BAD_TENSORS = [
    (factors((RANK, WIDTH + 1), (ROWS, RANK)), r"is \[64, 32\] there, \[65, 32\]"),
    (factors((RANK, WIDTH), (ROWS + 1, RANK)), r"is \[64, 32\] there, \[64, 33\]"),
    (factors((RANK, WIDTH), (ROWS, RANK + 1)), "ranks of .* are 4 and 5"),
    ({f"{Q}.lora_b": None}, r"lacks '.*lora_b'"),
    ({f"{Q}.lora_a": None}, r"lacks '.*lora_a'"),
    ({f"{Q}.lora_a": None, f"{Q}.lora_b": None}, "no LoRA factors"),
    (factors((RANK, WIDTH), (ROWS, RANK), "blk.9.attn_q.weight"), "has no 'blk.9"),
    ({"blk.0.attn_norm.weight": np.ones(WIDTH, np.float32)}, "is no LoRA factor"),
    (factors((RANK, WIDTH), (ROWS, RANK), value=np.nan), "NaN or infinite"),
    (factors((RANK, WIDTH), (ROWS, RANK), value=np.inf), "NaN or infinite"),
    ({f"{Q}.lora_a": np.ones(WIDTH, np.float32)}, "is no matrix"),
    ({f"{Q}.lora_b": np.full((ROWS, RANK), np.inf, np.float16)}, "NaN or infinite"),
    (factors((RANK, 50), (WIDTH, RANK), EMBEDDING), r"'token_embd.weight' is"),
]


@pytest.mark.parametrize(("tensors", "message"), BAD_TENSORS)
def test_bad_tensors_are_exit_3(base, tmp_path, tensors, message):
    with pytest.raises(CommandError, match=message) as caught:
        check_adapter_file(write(tmp_path / "x.gguf", tensors), base)
    assert caught.value.exit_code == MODEL
    assert "\n" not in str(caught.value)


def test_embedding_over_a_tied_head_is_refused_and_over_its_own_not(base, tmp_path):
    """llama.cpp loads the first kind and aborts the process at the first token."""
    path = write(
        tmp_path / "x.gguf",
        {
            f"{EMBEDDING}.lora_a": np.ones((100, RANK), np.float32),
            f"{EMBEDDING}.lora_b": np.ones((WIDTH, RANK), np.float32),
        },
    )
    assert check_adapter_file(path, base).num_modules == 2
    tied = {name: entry for name, entry in base.tensors.items() if name != "output.weight"}
    with pytest.raises(CommandError, match=r"changes the embedding.*merge it instead"):
        check_adapter_file(path, replace(base, tensors=tied))


@pytest.mark.parametrize("content", [b"", b"some text", b"GGUF", "truncated", "missing", "folder"])
def test_file_that_is_none_is_exit_3(base, tmp_path, content):
    path = tmp_path / "x.gguf"
    if content == "truncated":
        whole = write(path).read_bytes()
        path.write_bytes(whole[:-8])
    elif content == "folder":
        path.mkdir()
    elif content != "missing":
        path.write_bytes(content)
    with pytest.raises(CommandError, match=r"adapter '.*x\.gguf'") as caught:
        check_adapter_file(path, base)
    assert caught.value.exit_code == MODEL


def test_origin_is_compared_where_both_tell_it(base, tmp_path, capsys):
    path = write(
        tmp_path / "x.gguf",
        **{
            "tomeforge.base.fingerprint": "a" * 64,
            "tomeforge.adapter.sha256": "c" * 64,
            "tomeforge.chat_template.sha256": "d" * 64,
        },
    )

    def tell(**keys: str):
        metadata = {**base.metadata, **{f"tomeforge.{k}": v for k, v in keys.items()}}
        return replace(base, metadata=metadata)

    check_adapter_file(path, tell(**{"base.fingerprint": "a" * 64}))
    assert "trained with another chat template" in capsys.readouterr().err
    with pytest.raises(CommandError, match=r"trained on another base \(fingerprint aaaaaaaaaaaa"):
        check_adapter_file(path, tell(**{"base.fingerprint": "b" * 64}))
    with pytest.raises(CommandError, match="merged into the model"):
        check_adapter_file(path, tell(**{"adapter.sha256": "c" * 64}))
    check_adapter_file(path, tell(**{"adapter.sha256": "e" * 64}))


def test_template_of_the_base_is_no_note(base, tmp_path, capsys):
    import hashlib

    own = hashlib.sha256(base.chat_template.encode()).hexdigest()
    check_adapter_file(write(tmp_path / "x.gguf", **{"tomeforge.chat_template.sha256": own}), base)
    assert capsys.readouterr().err == ""


def test_foreign_adapter_over_a_real_base(embedded_gguf, tmp_path):
    """Case 1: stock LlamaCpp loads it and segfaults (trap 18)."""
    from integration.adapters import Adapters
    from integration.models import load_gguf

    model = load_gguf(embedded_gguf, n_ctx=256)
    with pytest.raises(CommandError, match="does not fit the model"):
        Adapters(model, {"foreign": write(tmp_path / "x.gguf")})
