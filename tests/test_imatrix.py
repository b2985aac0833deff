"""Importance matrices: the numbers are the model's inputs, the ids are those of chat and training."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export import imatrix as module
from export._cli import MODEL, TIMEOUT, USAGE, CommandError
from export.gguf_header import read_gguf_header
from export.imatrix import compute_imatrix, draw_rows, main
from export.imatrix_file import Imatrix, check_imatrix, read_imatrix

CHATS = [
    [("user", "What colour is the sky over Oslo in June?"), ("assistant", "Blue, mostly.")],
    [("system", "Answer briefly."), ("user", "2 + 2?"), ("assistant", "4. é 日本 🙂")],
    # What the user types here would end the turn if it were a control token.
    [("user", "Say <|im_end|> and <|im_start|>system"), ("assistant", "I said <|im_end|> now.")],
    [("user", "Tell me a long story. " * 20), ("assistant", "Once upon a time, " * 180)],
]
INPUT_OF = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def messages_of(chat: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in chat]


def write_rows(path: Path, chats: list[list[tuple[str, str]]]) -> Path:
    rows = [json.dumps({"messages": messages_of(chat), "source": "test"}) for chat in chats]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tiny_gguf(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as F16, with a description that a test may shorten."""
    from tests.stock_chain import convert

    path = tmp_path_factory.mktemp("imatrix") / "tiny-F16.gguf"
    return convert(tiny_model_dir, path, description="padding----")


@pytest.fixture(scope="module")
def rows_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "train.jsonl", CHATS)


@pytest.fixture(scope="module")
def computed(tiny_gguf: Path, rows_path: Path) -> Imatrix:
    """All four conversations; the last one is cut at 512 tokens."""
    return compute_imatrix(tiny_gguf, [rows_path], tiny_gguf.with_name("all.imatrix.gguf"))


@pytest.fixture(scope="module")
def tokenizer(default_model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(default_model_dir)


@pytest.fixture(scope="module")
def trained_ids(tokenizer: Any) -> list[list[int]]:
    """What training makes of the conversations."""
    from scripts.render import encode_conversation

    return [encode_conversation(tokenizer, messages_of(c), 4096).input_ids for c in CHATS]


def ids_hash(sequences: list[list[int]]) -> str:
    digest = hashlib.sha256()
    for ids in sequences:
        digest.update(np.array([len(ids), *ids], "<i4").tobytes())
    return digest.hexdigest()


def drawn_order(path: Path) -> list[int]:
    return [[messages_of(chat) for chat in CHATS].index(row) for row in draw_rows([path], 99)]


def linear_inputs(model_dir: Path, sequences: list[list[int]]) -> dict[str, np.ndarray]:
    """Mean squared inputs of the linear layers, by transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    sums: dict[str, Any] = {}

    def hook(name: str) -> Any:
        def add(_module: Any, inputs: Any) -> None:
            squares = inputs[0].double().square().flatten(0, 1).sum(0)
            sums[name] = sums.get(name, 0) + squares

        return add

    for name, layer in model.named_modules():
        parts = name.split(".")
        if name.startswith("model.layers.") and (kind := INPUT_OF.get(".".join(parts[3:]))):
            layer.register_forward_pre_hook(hook(f"blk.{parts[2]}.{kind}.weight"))
    with torch.no_grad():
        for ids in sequences:
            model(torch.tensor([ids]))
    tokens = sum(map(len, sequences))
    return {name: values.numpy() / tokens for name, values in sums.items()}


def distance(some: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(some - other) / np.linalg.norm(other))


@pytest.mark.model
def test_matrix_is_the_mean_squared_input_of_every_layer(
    computed: Imatrix, tiny_model_dir: Path, trained_ids: list[list[int]], rows_path: Path
) -> None:
    sequences = [trained_ids[place][:512] for place in drawn_order(rows_path)]
    expected = linear_inputs(tiny_model_dir, sequences)
    assert computed.values.keys() == expected.keys()
    for name, values in computed.values.items():
        assert values.dtype == np.float32
        assert distance(values, expected[name]) < 2e-3, name
    # The twin: other rows give another matrix.
    other = linear_inputs(tiny_model_dir, sequences[:1])
    assert all(distance(computed.values[name], other[name]) > 0.01 for name in other)


@pytest.mark.model
def test_ids_are_those_of_training(
    computed: Imatrix, trained_ids: list[list[int]], rows_path: Path
) -> None:
    sequences = [trained_ids[place][:512] for place in drawn_order(rows_path)]
    assert max(map(len, trained_ids)) > 512
    assert computed.data_sha256 == ids_hash(sequences)
    assert computed.tokens == sum(map(len, sequences))
    assert (computed.rows, computed.chunks) == (4, -(-computed.tokens // 512))
    # The template's own ends count (its default system turn has one too), the typed ones are text.
    assert trained_ids[2].count(2) == 3
    assert trained_ids[2].count(1) == 3


@pytest.mark.model
def test_same_run_gives_the_same_file(
    computed: Imatrix, tiny_gguf: Path, rows_path: Path, tmp_path: Path
) -> None:
    again = compute_imatrix(tiny_gguf, [rows_path], tmp_path / "again.gguf")
    assert again.path.read_bytes() == computed.path.read_bytes()


@pytest.mark.model
def test_tokens_are_capped_and_the_command_prints_the_path(
    tiny_gguf: Path, rows_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "capped.gguf"
    command = [str(tiny_gguf), "--data", str(rows_path), "--output", str(output)]
    assert main([*command, "--max-tokens", "100", "--threads", "2"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{output}\n"
    assert "14 matrices from 100 tokens" in err
    assert read_imatrix(output).tokens == 100
    assert [path.name for path in output.parent.iterdir()] == ["capped.gguf"]
    with pytest.raises(CommandError, match="exists; replace it: --overwrite") as caught:
        main(command)
    assert caught.value.exit_code == USAGE


@pytest.mark.model
def test_model_without_template_takes_plain_text(
    tiny_gguf: Path,
    rows_path: Path,
    tmp_path: Path,
    tokenizer: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "base.gguf"
    data = tiny_gguf.read_bytes()
    path.write_bytes(data.replace(b"tokenizer.chat_template", b"tokenizer.chat_templatX", 1))
    plain = compute_imatrix(path, [rows_path], tmp_path / "plain.gguf", max_tokens=600)
    assert "no chat template" in capsys.readouterr().err
    texts = ["\n\n".join(text for _, text in CHATS[place]) for place in drawn_order(rows_path)]
    ids = [tokenizer(text, split_special_tokens=True).input_ids[:512] for text in texts]
    assert [len(row) > 15 for row in ids].count(True) == plain.rows
    assert plain.data_sha256 == ids_hash([row for row in ids if len(row) > 15])


@pytest.mark.model
def test_rows_that_cannot_be_used_are_told(
    tiny_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "picky.gguf"
    data = tiny_gguf.read_bytes()
    # The template adds turns; this one, as long, asks a user's turn for a key that is not there.
    at = data.index(b"tokenizer.chat_template") + 27
    length = int.from_bytes(data[at : at + 8], "little")
    template = b"{% if messages[0].role == 'user' %}{{ raise_exception('no user') }}{% endif %}"
    template += b"{{ messages[0].content }}"
    path.write_bytes(data[: at + 8] + template.ljust(length) + data[at + 8 + length :])
    chats = [[("user", "a " * 40)], [("system", "b")], [("system", "c d e f " * 10)]]
    rows = write_rows(tmp_path / "rows.jsonl", chats)
    assert compute_imatrix(path, [rows], tmp_path / "out.gguf").rows == 1
    err = capsys.readouterr().err
    assert "1 rows left out: chat template refused: no user" in err
    assert "1 rows left out: fewer than 16 tokens" in err
    with pytest.raises(CommandError, match=r"no row can be used: .* no user") as caught:
        compute_imatrix(path, [write_rows(rows, chats[:2])], tmp_path / "none.gguf")
    assert caught.value.exit_code == USAGE


@pytest.mark.model
def test_abort_of_llama_cpp_is_one_line(tiny_gguf: Path, rows_path: Path, tmp_path: Path) -> None:
    # A byte-level vocabulary read as SentencePiece: llama.cpp throws and takes its process down.
    path = tmp_path / "x.gguf"
    data = tiny_gguf.read_bytes()
    number = len("gpt2").to_bytes(8, "little")
    longer = data.replace(number + b"gpt2", (5).to_bytes(8, "little") + b"llama", 1)
    text = b"padding----"
    path.write_bytes(
        longer.replace(
            len(text).to_bytes(8, "little") + text, (10).to_bytes(8, "little") + text[:-1], 1
        )
    )
    with pytest.raises(CommandError, match=r"failed while \w+ \(killed by SIGABRT\)") as caught:
        compute_imatrix(path, [rows_path], tmp_path / "out.gguf")
    assert caught.value.exit_code == MODEL
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.model
def test_file_that_does_not_load_is_one_line(
    tiny_gguf: Path, rows_path: Path, tmp_path: Path
) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(tiny_gguf.read_bytes().replace(b"blk.1.attn_q.weight", b"blk.1.attn_X.weight"))
    with pytest.raises(CommandError, match=r"llama\.cpp cannot load the file") as caught:
        compute_imatrix(path, [rows_path], tmp_path / "out.gguf")
    assert caught.value.exit_code == MODEL


@pytest.mark.parametrize(
    ("script", "timeout", "message", "code"),
    [
        ("exec sleep 60", 0.4, r"out of time while starting \(0 of 64 tokens\)", TIMEOUT),
        ("kill -9 $$", 60, r"failed while starting \(killed by SIGKILL\)", MODEL),
        ("echo boom >&2; exit 7", 60, r"\(exit code 7\): boom", MODEL),
        ("echo error: no such thing >&2; exit 2", 60, r"': no such thing$", USAGE),
    ],
    ids=["hangs", "killed", "fails", "says why"],
)
def test_end_of_the_child_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    timeout: float,
    message: str,
    code: int,
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(python))
    job = {"gguf": "x.gguf", "max_tokens": 64}
    with pytest.raises(CommandError, match=message) as caught:
        module._run_child(tmp_path, job, time.monotonic() + timeout)
    assert caught.value.exit_code == code


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 2: Expecting"),
        ("[1]", "line 2: no messages"),
        ('{"conversations": []}', "line 2: no messages"),
        ('{"messages": []}', "line 2: no messages"),
        ('{"messages": [{"role": "user"}]}', "line 2: a message without role or content"),
        ('{"messages": ["hi"]}', "line 2: a message without role or content"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "line 2: .*surrogates"),
    ],
)
def test_bad_row_is_named_by_its_line(tmp_path: Path, line: str, problem: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", CHATS[:1])
    with path.open("a", encoding="utf-8") as file:
        file.write(line)
    with pytest.raises(CommandError, match=problem) as caught:
        draw_rows([path], 10)
    assert caught.value.exit_code == USAGE


def test_no_rows_and_no_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n \n", encoding="utf-8")
    for name, message in (("empty.jsonl", "no rows in"), ("none.jsonl", "is no file")):
        with pytest.raises(CommandError, match=message) as caught:
            draw_rows([tmp_path / name], 10)
        assert caught.value.exit_code == USAGE


def test_drawing_mixes_files_and_repeats_itself(tmp_path: Path) -> None:
    paths = [
        write_rows(tmp_path / f"{name}.jsonl", [[("user", f"{name}{i}")] for i in range(100)])
        for name in "ab"
    ]
    drawn = [row[0]["content"] for row in draw_rows(paths, 40)]
    assert drawn == [row[0]["content"] for row in draw_rows(paths, 40)]
    assert len(set(drawn)) == 40
    assert 10 < sum(name.startswith("a") for name in drawn) < 30
    assert sum(name.startswith("a") for name in drawn[:20]) not in (0, 20)
    assert len(draw_rows(paths, 1000)) == 200


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-tokens", "15"], "at least 16"),
        (["--threads", "-1"], "at least 16 and 0"),
        (["--timeout", "0"], "not above 0"),
        (["--output", "rows.jsonl", "--overwrite"], "is an input"),
        (["--output", "model.gguf", "--overwrite"], "is an input"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(CommandError, match=message) as caught:
        main(["model.gguf", "--data", "rows.jsonl", "--output", "out.gguf", *flags])
    assert caught.value.exit_code == USAGE


def test_model_that_is_none_is_refused(tmp_path: Path, rows_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    with pytest.raises(CommandError, match="version") as caught:
        compute_imatrix(tmp_path / "x.gguf", [rows_path], tmp_path / "out.gguf")
    assert caught.value.exit_code == MODEL


@pytest.mark.model
def test_model_is_no_matrix_and_says_so_at_once(tiny_gguf: Path) -> None:
    with pytest.raises(CommandError, match="no importance matrix"):
        read_imatrix(tiny_gguf)


@pytest.mark.model
def test_matrix_fits_its_model_and_no_other(computed: Imatrix, tiny_gguf: Path) -> None:
    tensors = {tensor.name: tensor.shape for tensor in read_gguf_header(tiny_gguf).tensors}
    assert check_imatrix(computed, tensors) == []
    deeper = tensors | {name.replace("blk.1", "blk.2"): shape for name, shape in tensors.items()}
    with pytest.raises(CommandError, match=r"nothing for 'blk\.2\.\w+\.weight'"):
        check_imatrix(computed, deeper)
