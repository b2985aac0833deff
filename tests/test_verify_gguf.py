"""Certificates: good files pass; for every check there is a file that fails it, and it alone."""

import contextlib
import io
import json
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from export import verify_children
from export import verify_gguf as module
from export._cli import FAILED, MODEL, TIMEOUT, USAGE, CommandError
from export.verify_checks import check_chat_prompts, check_metadata, check_stops
from export.verify_corpus import CONVERSATIONS, hard_texts
from export.verify_gguf import main, verify_gguf
from export.verify_measure import measure_kl, reference_logits, start_probe, start_reference
from tests.conftest import make_adapter

pytestmark = pytest.mark.model
KINDS = ("F16", "Q8_0", "Q4_K_M")
# Enough for a verdict; each file is measured on all of them.
TOKENS = 240


@pytest.fixture
def f16_path(tiny_export_dir: Path) -> Path:
    return tiny_export_dir / "tiny-run-F16.gguf"


def failed(certificate: dict[str, Any]) -> set[str]:
    return {check["name"] for check in certificate["checks"] if not check["passed"]}


def value_of(certificate: dict[str, Any], name: str) -> Any:
    return next(check["value"] for check in certificate["checks"] if check["name"] == name)


def value_offset(data: bytes, key: str) -> int:
    """Give where the value of a metadata key begins, behind its type."""
    name = key.encode()
    return data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4


def patch_string(source: Path, target: Path, key: str, change: Any) -> Path:
    """Replace a string; the description grows so that the weights stay aligned to 32 bytes."""
    data = source.read_bytes()

    def replace(data: bytes, key: str, change: Any) -> tuple[bytes, int]:
        at = value_offset(data, key)
        (length,) = struct.unpack_from("<Q", data, at)
        new = change(data[at + 8 : at + 8 + length].decode()).encode()
        return (
            data[:at] + struct.pack("<Q", len(new)) + new + data[at + 8 + length :],
            len(new) - length,
        )

    data, grown = replace(data, key, change)
    data, _ = replace(data, "general.description", lambda text: text + " " * (-grown % 32))
    target.write_bytes(data)
    return target


def patch_bytes(source: Path, target: Path, key: str, offset: int, new: bytes) -> Path:
    data = bytearray(source.read_bytes())
    at = value_offset(bytes(data), key) + offset
    data[at : at + len(new)] = new
    target.write_bytes(data)
    return target


def make_files(export_dir: Path, folder: Path) -> list[Path]:
    """Write three good files and one for each thing that can be wrong with one."""
    good = [Path(shutil.copy(export_dir / f"tiny-run-{kind}.gguf", folder)) for kind in KINDS]
    f16 = good[0]
    template = "tokenizer.chat_template"
    # An array: type of its values, their number, the values. Token 1 is <|im_start|>, 1 plain text.
    kinds = value_offset(f16.read_bytes(), "tokenizer.ggml.token_type") + 12
    assert struct.unpack_from("<I", f16.read_bytes(), kinds + 4) == (3,)
    data = f16.read_bytes()
    (folder / "holes.gguf").write_bytes(data[: -(256 * 512)] + bytes(256 * 512))
    (folder / "half.gguf").write_bytes(data[: len(data) // 2])
    return [
        *good,
        # SmolLM2 has no merged digits, so this shows in numbers that are no digits only: ½ and ².
        patch_string(f16, folder / "digits.gguf", "tokenizer.ggml.pre", lambda _: "gpt-2"),
        patch_string(
            f16,
            folder / "other.gguf",
            template,
            lambda text: text.replace("assistant\n", "model\n"),
        ),
        patch_string(f16, folder / "bos.gguf", template, lambda text: "{{ bos_token }}" + text),
        patch_bytes(
            f16, folder / "eos.gguf", "tokenizer.ggml.eos_token_id", 0, struct.pack("<I", 5)
        ),
        patch_bytes(
            f16, folder / "text.gguf", "tokenizer.ggml.token_type", 16, struct.pack("<I", 1)
        ),
        folder / "holes.gguf",
        # A byte-level vocabulary read as SentencePiece: llama.cpp throws and takes its process down.
        patch_string(f16, folder / "abort.gguf", "tokenizer.ggml.model", lambda _: "llama"),
        folder / "half.gguf",
    ]


@pytest.fixture(scope="module")
def verified(
    tiny_export_dir: Path, tiny_adapter_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path, str]:
    """One run of the command over all files: what it printed, where, and its table."""
    folder = tmp_path_factory.mktemp("run") / "gguf"
    folder.mkdir()
    rows = folder.parent / "data/eval.jsonl"
    rows.parent.mkdir()
    answer = "A large book, one of a set. " * 12
    chat = [
        {"role": "user", "content": "What is a tome?"},
        {"role": "assistant", "content": answer},
    ]
    lines = [json.dumps({"messages": messages}) for messages in ([*chat, *chat], CONVERSATIONS[3])]
    rows.write_text("\n".join([*lines, ""]), encoding="utf-8")
    earlier = {"files": {"earlier.gguf": {"passed": True}}}
    (folder / "certificate.json").write_text(json.dumps(earlier), encoding="utf-8")
    files = make_files(tiny_export_dir, folder)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(
            [*map(str, files), "--reference", str(tiny_adapter_dir), "--max-tokens", str(TOKENS)]
        )
    assert code == FAILED
    return json.loads(out.getvalue())["files"], folder, err.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_good_file_passes_against_its_adapter(verified: Any, kind: str) -> None:
    certificate = verified[0][f"tiny-run-{kind}.gguf"]
    assert failed(certificate) == set()
    assert certificate["passed"]
    assert certificate["type"] == kind
    assert value_of(certificate, "token_ids")["strings"] >= 100
    assert value_of(certificate, "same_top_token")["positions"] == TOKENS
    assert value_of(certificate, "perplexity_ratio")["ratio"] == pytest.approx(1, abs=0.1)
    # A random model does not end its answers, and nor does its reference.
    stops = value_of(certificate, "stops")
    assert (stops["end_token"], stops["is_end"], stops["reference_stops_at"]) == (2, True, None)
    quantiles = value_of(certificate, "kl_quantiles")
    assert 0 <= quantiles["median"] <= quantiles["p99"] <= quantiles["p999"] <= quantiles["max"]


def test_certificate_says_what_was_measured(verified: Any) -> None:
    certificates, folder, table = verified
    certificate = certificates["tiny-run-F16.gguf"]
    # The rows of the run beside the GGUF's folder were found; the second is cut or left out.
    assert certificate["rows"]["source"] == "data/eval.jsonl"
    assert certificate["rows"]["tokens"] == TOKENS
    assert certificate["reference"]["kind"] == "adapter"
    assert certificate["reference"]["name"] == "tiny-run/adapter"
    assert len(certificate["reference"]["sha256"]) == 64
    # Not even of files that do not load: no path of this machine.
    assert str(folder.parent) not in json.dumps(certificates)
    assert value_of(certificate, "perplexity_ratio")["over"] in ("answers", "all")
    assert "ok     mean_kl" in table
    assert f"measured on {TOKENS} tokens" in table
    written = json.loads((folder / "certificate.json").read_text(encoding="utf-8"))["files"]
    assert written == {"earlier.gguf": {"passed": True}, **certificates}
    # The log-probabilities are gone.
    assert {path.suffix for path in folder.iterdir()} == {".gguf", ".json"}


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("digits", {"token_ids"}),
        ("other", {"chat_template", "chat_prompts"}),
        ("bos", {"chat_template", "chat_prompts", "bos_count"}),
        ("eos", {"eos_token"}),
        ("text", {"token_ids", "chat_prompts"}),
        ("holes", {"mean_kl"}),
        ("abort", {"loads"}),
        ("half", {"loads"}),
    ],
)
def test_broken_file_fails_by_name(verified: Any, name: str, names: set[str]) -> None:
    certificate = verified[0][f"{name}.gguf"]
    assert not certificate["passed"]
    assert names <= failed(certificate)
    if name != "holes":
        assert failed(certificate) <= names | {"bos_count", "stops"}


def test_abort_of_llama_cpp_is_a_finding(verified: Any) -> None:
    found = value_of(verified[0]["abort.gguf"], "loads")
    assert "llama.cpp failed while tokenizing (killed by SIGABRT)" in found
    assert "truncated" in value_of(verified[0]["half.gguf"], "loads")


def test_merged_folder_is_a_reference_too(
    f16_path: Path, tiny_adapter_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from export.merge_adapter import main as merge

    path, merged = shutil.copy(f16_path, tmp_path), tmp_path / "merged"
    assert merge([str(tiny_adapter_dir), "--output", str(merged)]) == 0
    capsys.readouterr()
    output = tmp_path / "new/alone.json"
    arguments = [path, "--reference", str(merged), "--output", str(output), "--max-tokens", "100"]
    assert main(arguments) == 0
    certificate = json.loads(capsys.readouterr().out)
    assert failed(certificate) == set()
    assert value_of(certificate, "mean_kl") < 1e-5
    assert certificate["reference"]["kind"] == "model"
    assert certificate["rows"]["source"] == "fixed conversations"
    assert json.loads(output.read_text(encoding="utf-8")) == certificate


def test_one_evaluation_measures_several_files(
    f16_path: Path, tiny_export_dir: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    # A file of another adapter is far from this reference: so are its quantized versions.
    other = make_adapter(tmp_path / "other/adapter", tiny_model_dir, seed=5)
    with reference_logits(other, tmp_path, max_tokens=100) as logits:
        far = measure_kl(f16_path, logits)
        check = {c.name: c.passed for c in module.check_divergence(read(f16_path), far)}
        assert not check["mean_kl"]
        assert far.positions == 100
        assert far.error > 0
        assert measure_kl(tiny_export_dir / "tiny-run-Q8_0.gguf", logits).mean > 0.1 * far.mean
    assert not list(tmp_path.glob(".*"))


def read(path: Path) -> Any:
    return module.read_gguf_header(path)


def test_file_of_another_architecture_fails(f16_path: Path, default_model_dir: Path) -> None:
    header = module.read_gguf_header(f16_path)
    config = json.loads((default_model_dir / "config.json").read_text(encoding="utf-8"))
    check = module.check_architecture(header, config)
    assert not check.passed
    assert check.value["block_count"] == {"got": 2, "expected": 30}
    assert check.value["rope.freq_base"]["expected"] == 100000.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: data[:3000], "truncated"),
        (lambda _: b"", "is empty"),
        (lambda _: b"Dear diary", "begins with b'Dear'"),
        (lambda _: b"GGUF" + b"\xff" * 400, "version"),
    ],
    ids=["half", "header only", "empty", "text", "garbage"],
)
def test_unusable_file_is_one_error(
    f16_path: Path, tiny_adapter_dir: Path, tmp_path: Path, make: Any, message: str
) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(make(f16_path.read_bytes()))
    with pytest.raises(CommandError, match=message) as caught:
        main([str(path), "--reference", str(tiny_adapter_dir)])
    assert caught.value.exit_code == MODEL
    assert not (tmp_path / "certificate.json").exists()


def test_lora_gguf_is_refused(f16_path: Path, tiny_adapter_dir: Path, tmp_path: Path) -> None:
    path = patch_string(f16_path, tmp_path / "lora.gguf", "general.type", lambda _: "adapter")
    with pytest.raises(CommandError, match="LoRA GGUF is used beside") as caught:
        verify_gguf(path, tiny_adapter_dir)
    assert caught.value.exit_code == MODEL


def test_out_of_time_is_its_own_code(f16_path: Path, tiny_adapter_dir: Path) -> None:
    with pytest.raises(CommandError, match="out of time") as caught:
        main([str(f16_path), "--reference", str(tiny_adapter_dir), "--timeout", "0.05"])
    assert caught.value.exit_code == TIMEOUT
    for wrong in (["--timeout", "0"], ["--max-tokens", "1"], [str(f16_path)]):
        with pytest.raises(CommandError) as caught:
            main([str(f16_path), *wrong, "--reference", str(tiny_adapter_dir)])
        assert caught.value.exit_code == USAGE


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let child processes run a shell command instead of Python."""

    def use(command: str) -> None:
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\n{command}\n", encoding="utf-8")
        program.chmod(0o755)
        monkeypatch.setattr(verify_children.sys, "executable", str(program))

    return use


def test_hanging_child_is_stopped(shell: Any) -> None:
    shell("exec sleep 60")
    for start in (start_probe, start_reference):
        with (
            start(Path("x")) as child,
            pytest.raises(CommandError, match="out of time while starting") as caught,
        ):
            child.ask({"do": "load"}, time.monotonic() + 0.3)
        assert caught.value.exit_code == TIMEOUT


def test_killed_child_is_one_error(shell: Any) -> None:
    shell('read line; echo \'{"phase": "thinking"}\'; echo last words >&2; kill -9 $$')
    message = r"reference 'x' failed while thinking \(killed by SIGKILL\): last words.*--max-tokens"
    for start, code, match in (
        (start_reference, FAILED, message),
        (start_probe, MODEL, r"'x' is unusable: llama\.cpp failed while thinking"),
    ):
        with start(Path("x")) as child, pytest.raises(CommandError, match=match) as caught:
            child.ask({"do": "evaluate"}, time.monotonic() + 20)
        assert caught.value.exit_code == code


def test_reference_that_is_none_is_refused(f16_path: Path, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"neither config\.json nor adapter_config") as caught:
        verify_gguf(f16_path, tmp_path)
    assert caught.value.exit_code == MODEL


def test_answer_must_end_where_the_references_ends() -> None:
    ended = {"stopped": True, "tokens": 9, "text": "Hi."}
    endless = {"stopped": False, "tokens": 200, "text": "Hi. Hi."}
    good = check_stops(ended, 2, [0, 2], None, 200)
    assert (good.passed, good.threshold is None) == (True, False)
    # The reference reads the same answer, and would have ended it at the third token.
    assert not check_stops(endless, 2, [0, 2], 3, 200).passed
    # It would not end it either: a note.
    note = check_stops(endless, 2, [0, 2], None, 200)
    assert (note.passed, note.threshold) == (True, None)
    # What the template writes behind an answer is a token that llama.cpp does not stop at.
    assert not check_stops(ended, 7, [0, 2], None, 200).passed
    assert check_stops(ended, None, [0, 2], None, 200).passed


def test_missing_metadata_is_listed(f16_path: Path) -> None:
    from dataclasses import replace

    header = read(f16_path)

    def without(*keys: str) -> Any:
        kept = {key: value for key, value in header.metadata.items() if key not in keys}
        return check_metadata(replace(header, metadata=kept))

    assert without().passed
    told = without("general.name", "general.file_type")
    assert told.passed
    assert {"general.name", "general.file_type"} <= set(told.value)
    assert not {"general.name", "general.file_type"} & set(without().value)
    for key in ("general.architecture", "tokenizer.ggml.tokens", "llama.context_length"):
        assert not without(key).passed


def test_chat_prompts_compare_refusals() -> None:
    equal = check_chat_prompts([[1, 2], "refused: x"], [[1, 2], "refused: y"], 1)
    assert [check.passed for check in equal] == [True, True]
    one_sided = check_chat_prompts([[1, 2], "refused: x"], [[1, 2], [1, 3]], 1)
    assert [check.passed for check in one_sided] == [False, False]
    none = check_chat_prompts(["no chat template"], ["no chat template"], 1)
    assert not any(check.passed for check in none)


def test_corpus_is_hard_and_fixed() -> None:
    texts = hard_texts(["<|im_end|>"])
    assert len(texts) >= 100
    assert len(set(texts)) == len(texts)
    for needle in ("\t", "12345", "Привет", "你好", "😀", "<|im_end|>", "def "):
        assert any(needle in text for text in texts)
    assert {message["role"] for chat in CONVERSATIONS for message in chat} == {
        "system",
        "user",
        "assistant",
    }
