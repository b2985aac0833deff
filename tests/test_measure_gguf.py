"""Loss, speed and memory of a GGUF: the loss is Hugging Face's, and wrong rows are one line."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export import measure_gguf as module
from export._cli import CONTEXT, MODEL, USAGE, CommandError
from export._files import sha256_file
from export.gguf_header import GgufHeader
from export.llama_probe import BATCH, load_model
from export.measure_gguf import (
    NOT_SCORED,
    TokenRow,
    check_fit,
    main,
    measure_decoding,
    measure_rows,
    peak_memory_bytes,
    read_token_rows,
    sum_losses,
)

# Nats a token; llama.cpp rounds the inputs of F16 matrices to 16 bits.
TOLERANCE = 2e-3
ROOT = Path(__file__).parents[1]


def make_rows() -> list[TokenRow]:
    """Three portions with an unscored question; a short row; one with gaps."""
    rng = np.random.default_rng(0)
    long, short, gaps = (rng.integers(3, 49152, count).tolist() for count in (2 * BATCH + 44, 5, 9))
    return [
        TokenRow(long, [NOT_SCORED] * 100 + long[100:]),
        TokenRow(short, list(short)),
        TokenRow(gaps, [token if at % 3 else NOT_SCORED for at, token in enumerate(gaps)]),
    ]


def write_rows(path: Path, rows: list[TokenRow]) -> Path:
    lines = (json.dumps({"input_ids": row.ids, "labels": row.labels}) for row in rows)
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return path


def only(row: TokenRow, at: int) -> TokenRow:
    return TokenRow(row.ids, [t if i == at else NOT_SCORED for i, t in enumerate(row.ids)])


@pytest.fixture(scope="module")
def log_probs(tiny_adapter_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What Hugging Face's model says of every position of the rows, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    from export.merge_adapter import main as merge

    merged_dir = tmp_path_factory.mktemp("merged") / "model"
    assert merge([str(tiny_adapter_dir), "--output", str(merged_dir)]) == 0
    model = AutoModelForCausalLM.from_pretrained(merged_dir, dtype=torch.float32)
    with torch.no_grad():
        logits = [model(torch.tensor([row.ids])).logits[0] for row in make_rows()]
    return [torch.log_softmax(one, -1).numpy() for one in logits]


@pytest.fixture(scope="module")
def f16_model(tiny_export_dir: Path) -> Any:
    return load_model(str(tiny_export_dir / "tiny-run-F16.gguf"), 512, 1)


def expected_loss(log_probs: np.ndarray, row: TokenRow, shift: int = 1) -> float:
    """Sum one token after another: label t from position t - shift."""
    places = [at for at, label in enumerate(row.labels) if at and label != NOT_SCORED]
    return -sum(float(log_probs[at - shift, row.labels[at]]) for at in places)


@pytest.mark.model
def test_loss_is_that_of_hugging_face(
    f16_model: Any, log_probs: Any, tiny_export_dir: Path
) -> None:
    rows = make_rows()
    found, speed = measure_rows(f16_model, rows)
    assert [count for _, count in found] == [len(rows[0].ids) - 100, 4, 6]
    assert speed > 0
    for (loss, count), row, one in zip(found, rows, log_probs, strict=True):
        assert loss == pytest.approx(expected_loss(one, row), abs=TOLERANCE * count)
        assert loss != pytest.approx(expected_loss(one, row, shift=0), abs=20 * TOLERANCE * count)
    other, _ = measure_rows(load_model(str(tiny_export_dir / "tiny-run-Q4_K_M.gguf"), 512, 1), rows)
    far = [abs(a - b) > TOLERANCE * n for (a, n), (b, _) in zip(found, other, strict=True)]
    assert far == [True] * 3


@pytest.mark.model
def test_rows_are_independent_and_in_order(f16_model: Any) -> None:
    rows = make_rows()
    forward, _ = measure_rows(f16_model, rows)
    backward, _ = measure_rows(f16_model, rows[::-1])
    assert backward[::-1] == forward
    assert len(set(forward)) == 3
    # A token that is not scored counts for nothing, whatever it is.
    unscored = TokenRow(rows[0].ids, [NOT_SCORED] * len(rows[0].ids))
    assert measure_rows(f16_model, [unscored])[0] == [(0.0, 0)]


@pytest.mark.model
def test_labels_at_the_edges_of_portions(f16_model: Any, log_probs: Any) -> None:
    row = make_rows()[0]
    edges = [BATCH - 1, BATCH, BATCH + 1, 2 * BATCH, len(row.ids) - 1]
    found, _ = measure_rows(f16_model, [only(row, at) for at in edges])
    right = [-float(log_probs[0][at - 1, row.ids[at]]) for at in edges]
    wrong = [-float(log_probs[0][at, row.ids[at]]) for at in edges]
    assert [loss for loss, _ in found] == pytest.approx(right, abs=10 * TOLERANCE)
    assert [loss for loss, _ in found] != pytest.approx(wrong, abs=10 * TOLERANCE)
    assert [count for _, count in found] == [1] * len(edges)


@pytest.mark.model
def test_command_prints_one_object_and_nothing_else(tiny_export_dir: Path, tmp_path: Path) -> None:
    path = tiny_export_dir / "tiny-run-Q8_0.gguf"
    rows = write_rows(tmp_path / "rows.jsonl", make_rows())
    command = [sys.executable, "-m", "export.measure_gguf", str(path), "--rows", str(rows)]
    command += ["--threads", "1", "--decode-tokens", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    measured = json.loads(line)
    assert (measured["file"], measured["type"]) == (path.name, "Q8_0")
    assert measured["bytes"] == path.stat().st_size
    assert measured["sha256"] == sha256_file(path)
    assert [count for _, count in measured["rows"]] == [200, 4, 6]
    assert measured["n_threads"] == 1
    assert measured["peak_memory_bytes"] > measured["bytes"]
    for name in ("prompt_tokens_per_second", "tokens_per_second", "load_seconds"):
        assert measured[name] > 0


@pytest.mark.model
def test_no_decoding_has_no_speed(
    tiny_export_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tiny_export_dir / "tiny-run-Q8_0.gguf")
    rows = write_rows(tmp_path / "rows.jsonl", make_rows()[1:])
    assert main([path, "--rows", str(rows), "--decode-tokens", "0"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["tokens_per_second"] is None
    assert measured["n_threads"] == module._usable_cores()


@pytest.mark.model
def test_embedding_model_is_refused(embedding_gguf: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", make_rows()[1:2])
    with pytest.raises(CommandError, match=r"\(bert\) predicts no next token") as caught:
        main([str(embedding_gguf), "--rows", str(rows)])
    assert caught.value.exit_code == MODEL


def test_losses_are_those_of_the_softmax() -> None:
    logits = np.random.default_rng(1).standard_normal((30, 40)).astype(np.float32) * 5 + 1000
    before = logits.copy()
    targets = [at % 40 if at % 4 else NOT_SCORED for at in range(30)]
    exact = before.astype(np.float64) - 1000
    exact = np.log(np.exp(exact).sum(1, keepdims=True)) - exact
    scored = [(at, target) for at, target in enumerate(targets) if target != NOT_SCORED]
    assert len(scored) > 2 * module._PIECE
    expected = sum(exact[at, target] for at, target in scored)
    assert sum_losses(logits, targets) == pytest.approx(expected, abs=1e-3)
    assert sum_losses(logits, targets[:-1]) != pytest.approx(expected, abs=1e-3)
    assert (logits == before).all()
    assert sum_losses(logits, [NOT_SCORED] * 30) == 0


def test_decoding_goes_on_past_end_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[int], int]] = []
    end = np.array([[0, 0, 9]], np.float32)  # token 2, always

    def evaluate(model: Any, ids: list[int], start: int) -> np.ndarray:
        asked.append((ids, start))
        return end

    monkeypatch.setattr(module, "evaluate_row", lambda model, ids: iter([(0, end)]))
    monkeypatch.setattr(module, "evaluate_portion", evaluate)
    assert measure_decoding(None, [5, 6, 7], 4) > 0
    assert asked == [([2], at) for at in (3, 4, 5, 6)] * 3


def test_loss_that_is_none_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    row = TokenRow([0, 1], [NOT_SCORED, 1])
    for value, is_wrong in ((1.0, False), (math.nan, True), (math.inf, True)):
        logits = np.full((2, 3), value, np.float32)
        monkeypatch.setattr(module, "evaluate_row", lambda model, ids, got=logits: iter([(0, got)]))
        if not is_wrong:
            assert measure_rows(None, [row])[0] == [(pytest.approx(math.log(3)), 1)]
            continue
        with (
            np.errstate(invalid="ignore"),
            pytest.raises(CommandError, match="the loss of row 1 is nan") as caught,
        ):
            measure_rows(None, [row])
        assert caught.value.exit_code == MODEL


def test_peak_is_this_process_alone() -> None:
    def peak(code: str) -> int:
        told = (
            f"from export.measure_gguf import peak_memory_bytes; {code}; print(peak_memory_bytes())"
        )
        command = [sys.executable, "-c", told]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return int(done.stdout)

    ballast = b"x" * (200 << 20)
    assert peak_memory_bytes() > len(ballast)
    assert peak("pass") < 100 << 20
    assert peak("b'x' * (200 << 20)") > 200 << 20


GOOD = '{"input_ids": [1, 2], "labels": [-100, 2]}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", r"rows\.jsonl:2: expected"),
        ("[1, 2]", r"rows\.jsonl:2: expected"),
        ('{"input_ids": [1, 2]}', r"rows\.jsonl:2: expected"),
        ('{"input_ids": [1, 2], "labels": [2]}', "2 input_ids and 1 labels"),
        ('{"input_ids": [], "labels": []}', "0 input_ids and 0 labels"),
        ('{"input_ids": [1, 2.0], "labels": [1, 2]}', "'input_ids' is no list of whole numbers"),
        ('{"input_ids": [1, 2], "labels": [1, true]}', "'labels' is no list of whole numbers"),
        ('{"input_ids": "ab", "labels": "ab"}', "'input_ids' is no list of whole numbers"),
    ],
)
def test_wrong_row_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD}\n\n{GOOD}\n", encoding="utf-8")
    assert read_token_rows(path) == [TokenRow([1, 2], [-100, 2])] * 2
    path.write_text(f"{GOOD}\n{text}\n", encoding="utf-8")
    with pytest.raises(CommandError, match=message) as caught:
        read_token_rows(path)
    assert caught.value.exit_code == USAGE


def test_rows_without_anything_to_score_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    # The first token is predicted from nothing, so its label does not count.
    for text in ("", '{"input_ids": [1, 2], "labels": [1, -100]}'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(CommandError, match="no scored token"):
            read_token_rows(path)
    with pytest.raises(CommandError, match="cannot be read") as caught:
        read_token_rows(tmp_path / "nothing.jsonl")
    assert caught.value.exit_code == USAGE


def header(**changes: Any) -> GgufHeader:
    metadata = {
        "general.architecture": "llama",
        "llama.context_length": 20,
        "tokenizer.ggml.tokens": 100,  # the length of a list that is long
        **changes,
    }
    return GgufHeader(Path("m.gguf"), 1, metadata, ())


@pytest.mark.parametrize(
    ("row", "changes", "decode_tokens", "message", "code"),
    [
        (TokenRow([1] * 21, [1] * 21), {}, 0, "row 2 has 21 tokens.*trained for 20", CONTEXT),
        (TokenRow([1, 100], [1, 1]), {}, 0, "row 2 has token 100.*knows 0 to 99", USAGE),
        (TokenRow([1, -1], [1, 1]), {}, 0, "row 2 has token -1", USAGE),
        (TokenRow([1, 1], [1, 100]), {}, 0, "row 2 has token 100", USAGE),
        (TokenRow([1, 1], [1, 2]), {"tokenizer.ggml.tokens": ["a"] * 2}, 0, "0 to 1", USAGE),
        (TokenRow([1, 1], [1, 1]), {}, 19, "--decode-tokens 19.*are 21 tokens", CONTEXT),
        (TokenRow([1, 1], [1, 1]), {"tokenizer.ggml.tokens": None}, 0, "not tell", MODEL),
        (TokenRow([1, 1], [1, 1]), {"llama.context_length": None}, 0, "not tell", MODEL),
        (TokenRow([1, 1], [1, 1]), {"llama.attention.causal": False}, 0, "predicts no", MODEL),
    ],
)
def test_rows_must_fit_the_file(
    row: TokenRow, changes: Any, decode_tokens: int, message: str, code: int
) -> None:
    first = TokenRow([1, 99], [NOT_SCORED, 99])
    assert check_fit([first, TokenRow([0] * 20, [0] * 20)], header(), 18) == 20
    if changes.get("tokenizer.ggml.tokens"):
        first = TokenRow([1, 1], [NOT_SCORED, 1])
    with pytest.raises(CommandError, match=message) as caught:
        check_fit([first, row], header(**changes), decode_tokens)
    assert caught.value.exit_code == code


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--threads", "0"], "--threads: got '0', expected a number from 1 up", USAGE),
        (["--threads", "two"], "--threads: got 'two'", USAGE),
        (["--decode-tokens", "-1"], "--decode-tokens: got '-1', expected a number from 0", USAGE),
        ([], "no.gguf' is no file", MODEL),
    ],
)
def test_wrong_argument_is_one_line(
    tmp_path: Path, arguments: list[str], message: str, code: int
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", make_rows())
    with pytest.raises(CommandError, match=message) as caught:
        main([str(tmp_path / "no.gguf"), "--rows", str(rows), *arguments])
    assert caught.value.exit_code == code


def test_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    rows, path = write_rows(tmp_path / "rows.jsonl", make_rows()), tmp_path / "m.gguf"
    for data, message in ((b"Dear diary", "begins with b'Dear'"), (b"", "is empty")):
        path.write_bytes(data)
        with pytest.raises(CommandError, match=message) as caught:
            main([str(path), "--rows", str(rows)])
        assert caught.value.exit_code == MODEL


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, export.measure_gguf as m; m.build_parser().format_help(); "
        "print([n for n in ('torch', 'transformers', 'llama_cpp', 'numpy') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
