"""The header check: whole files pass, every kind of broken one ends in one line and exit code 3."""

import contextlib
import random
import struct
from pathlib import Path

import pytest

from integration._cli import MODEL, CommandError
from integration.gguf_header import read_header


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def tiny_gguf(data_bytes: int = 128, version: int = 3) -> bytes:
    """One F32 tensor of 32 weights and two metadata entries."""
    metadata = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    metadata += text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")
    tensor = text("w") + struct.pack("<IQIQ", 1, 32, 0, 0)
    head = b"GGUF" + struct.pack("<IQQ", version, 1, 2) + metadata + tensor
    return head + bytes(-len(head) % 32) + bytes(data_bytes)


def write(tmp_path, data: bytes):
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    return path


def test_whole_file_is_read(tmp_path):
    header = read_header(write(tmp_path, tiny_gguf()))
    assert (header.architecture, len(header.tensors)) == ("llama", 1)
    assert header.metadata["tokenizer.ggml.tokens.length"] == 2
    assert not header.is_adapter


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"Dear reader, this is a text file.", "is no GGUF"),
        (tiny_gguf()[:-1], "is truncated: got"),
        (tiny_gguf()[:60], "damaged header"),
        (b"GGUF", "damaged header"),
        (tiny_gguf(version=9), "version 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 1), "out of range"),
    ],
)
def test_broken_file_is_named(tmp_path, data, message):
    with pytest.raises(CommandError, match=message) as caught:
        read_header(write(tmp_path, data))
    assert caught.value.exit_code == MODEL


def test_missing_file():
    with pytest.raises(CommandError, match="does not exist"):
        read_header(Path("no/such.gguf"))


def test_random_damage_never_raises_anything_else(tmp_path):

    rng, whole = random.Random(1), tiny_gguf()
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(4, len(data) - 128)] = rng.randrange(256)
        with contextlib.suppress(CommandError):
            read_header(write(tmp_path, bytes(data)))
