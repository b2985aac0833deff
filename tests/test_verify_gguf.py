"""Certificates: good files pass; for every check there is a file that fails it, and it alone."""

import json
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from export import verify_gguf as module
from export._cli import FAILED, MODEL, TIMEOUT, USAGE, CommandError
from export.verify_checks import check_chat_prompts, check_logits
from export.verify_corpus import CONVERSATIONS, hard_texts
from export.verify_gguf import main, verify_gguf
from export.verify_reference import open_reference
from tests.conftest import make_adapter

pytestmark = pytest.mark.model


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


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_K_M"])
def test_good_file_passes_against_its_adapter(
    tiny_export_dir: Path, tiny_adapter_dir: Path, kind: str
) -> None:
    certificate = verify_gguf(tiny_export_dir / f"tiny-run-{kind}.gguf", tiny_adapter_dir)
    assert failed(certificate) == set()
    assert certificate["passed"]
    assert certificate["type"] == kind
    assert value_of(certificate, "token_ids")["strings"] >= 100


def test_merged_folder_is_a_reference_too(
    f16_path: Path, tiny_adapter_dir: Path, tmp_path: Path
) -> None:
    from export.merge_adapter import merge_adapter

    certificate = verify_gguf(f16_path, merge_adapter(tiny_adapter_dir, tmp_path / "merged"))
    assert failed(certificate) == set()
    assert value_of(certificate, "mean_kl") < 1e-5


def test_file_of_another_adapter_fails(
    f16_path: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    other = make_adapter(tmp_path / "other", tiny_model_dir, seed=5)
    assert failed(verify_gguf(f16_path, other)) == {"mean_kl", "next_token"}


def test_file_of_another_architecture_fails(f16_path: Path, default_model_dir: Path) -> None:
    header = module.read_gguf_header(f16_path)
    config = json.loads((default_model_dir / "config.json").read_text(encoding="utf-8"))
    check = module.check_architecture(header, config)
    assert not check.passed
    assert check.value["block_count"] == {"got": 2, "expected": 30}
    assert check.value["rope.freq_base"]["expected"] == 100000.0


@pytest.mark.parametrize(
    ("key", "change", "names"),
    [
        # SmolLM2 has no merged digits, so this shows in numbers that are no digits only: ½ and ².
        ("tokenizer.ggml.pre", lambda _: "gpt-2", {"token_ids"}),
        (
            "tokenizer.chat_template",
            lambda text: text.replace("assistant\n", "model\n"),
            {"chat_template", "chat_prompts"},
        ),
        (
            "tokenizer.chat_template",
            lambda text: "{{ bos_token }}" + text,
            {"chat_template", "chat_prompts", "bos_count"},
        ),
    ],
    ids=["digits not split", "template swapped", "double BOS"],
)
def test_changed_metadata_fails_by_name(
    f16_path: Path, tiny_adapter_dir: Path, tmp_path: Path, key: str, change: Any, names: set[str]
) -> None:
    path = patch_string(f16_path, tmp_path / "changed.gguf", key, change)
    assert main([str(path), "--reference", str(tiny_adapter_dir)]) == FAILED
    content = json.loads((tmp_path / "certificate.json").read_text(encoding="utf-8"))
    certificate = content["files"]["changed.gguf"]
    assert failed(certificate) == names
    assert not certificate["passed"]


def test_wrong_end_token_fails_by_name(
    f16_path: Path, tiny_adapter_dir: Path, tmp_path: Path
) -> None:
    data = bytearray(f16_path.read_bytes())
    struct.pack_into("<I", data, value_offset(bytes(data), "tokenizer.ggml.eos_token_id"), 5)
    (tmp_path / "eos.gguf").write_bytes(data)
    assert "eos_token" in failed(verify_gguf(tmp_path / "eos.gguf", tiny_adapter_dir))


def test_control_token_that_is_text_fails_by_name(
    f16_path: Path, tiny_adapter_dir: Path, tmp_path: Path
) -> None:
    data = bytearray(f16_path.read_bytes())
    # An array: type of its values, their number, the values. Token 1 is <|im_start|>, 1 plain text.
    types = value_offset(bytes(data), "tokenizer.ggml.token_type") + 12
    assert struct.unpack_from("<I", data, types + 4) == (3,)
    struct.pack_into("<I", data, types + 4, 1)
    (tmp_path / "text.gguf").write_bytes(data)
    names = failed(verify_gguf(tmp_path / "text.gguf", tiny_adapter_dir))
    assert {"token_ids", "chat_prompts"} <= names


def test_reference_tokenizes_as_training_does(tiny_adapter_dir: Path) -> None:
    from scripts.render import encode_prompt

    with open_reference(tiny_adapter_dir) as reference:
        for messages in CONVERSATIONS:
            assert reference.plain.chat_ids(messages) == encode_prompt(
                reference.tokenizer, messages
            )
        typed = reference.plain.chat_ids([{"role": "user", "content": "<|im_end|>"}])
        assert reference.plain.text_ids("<|im_end|>") == [2]
        assert isinstance(typed, list)
        # The end of the default system turn and of the user's: what was typed is none.
        assert typed.count(2) == 2


def test_broken_weights_fail_by_name(
    f16_path: Path, tiny_adapter_dir: Path, tmp_path: Path
) -> None:
    data = bytearray(f16_path.read_bytes())
    data[-(256 * 512) :] = bytes(256 * 512)
    (tmp_path / "holes.gguf").write_bytes(data)
    assert "mean_kl" in failed(verify_gguf(tmp_path / "holes.gguf", tiny_adapter_dir))


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


def test_abort_of_llama_cpp_is_a_finding(
    f16_path: Path, tiny_adapter_dir: Path, tmp_path: Path
) -> None:
    # A byte-level vocabulary read as SentencePiece: llama.cpp throws and takes its process down.
    path = patch_string(f16_path, tmp_path / "x.gguf", "tokenizer.ggml.model", lambda _: "llama")
    match = r"llama\.cpp failed while tokenizing \(killed by SIGABRT\)"
    with pytest.raises(CommandError, match=match) as caught:
        verify_gguf(path, tiny_adapter_dir)
    assert caught.value.exit_code == MODEL


def test_out_of_time_is_its_own_code(f16_path: Path, tiny_adapter_dir: Path) -> None:
    with pytest.raises(CommandError, match="out of time") as caught:
        main([str(f16_path), "--reference", str(tiny_adapter_dir), "--timeout", "0.05"])
    assert caught.value.exit_code == TIMEOUT
    with pytest.raises(CommandError) as caught:
        main([str(f16_path), "--reference", str(tiny_adapter_dir), "--timeout", "0"])
    assert caught.value.exit_code == USAGE


def test_hanging_child_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeper = tmp_path / "python"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n", encoding="utf-8")
    sleeper.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(sleeper))
    with pytest.raises(CommandError, match="out of time while starting") as caught:
        module.run_probe({"gguf": "x"}, time.monotonic() + 0.3)
    assert caught.value.exit_code == TIMEOUT


def test_reference_that_is_none_is_refused(f16_path: Path, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"neither config\.json nor adapter_config") as caught:
        verify_gguf(f16_path, tmp_path)
    assert caught.value.exit_code == MODEL


def test_command_prints_and_merges_certificates(
    tiny_export_dir: Path,
    tiny_adapter_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = shutil.copy(tiny_export_dir / "tiny-run-Q8_0.gguf", tmp_path)
    earlier = {"files": {"other.gguf": {"passed": True}}}
    (tmp_path / "certificate.json").write_text(json.dumps(earlier), encoding="utf-8")
    assert main([path, "--reference", str(tiny_adapter_dir)]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["passed"]
    assert "ok     mean_kl" in err
    content = json.loads((tmp_path / "certificate.json").read_text(encoding="utf-8"))
    assert set(content["files"]) == {"other.gguf", "tiny-run-Q8_0.gguf"}
    alone = module.write_certificate(json.loads(out), Path(path), tmp_path / "new/alone.json")
    assert json.loads(alone.read_text(encoding="utf-8")) == json.loads(out)


def test_chat_prompts_compare_refusals() -> None:
    equal = check_chat_prompts([[1, 2], "refused: x"], [[1, 2], "refused: y"], 1)
    assert [check.passed for check in equal] == [True, True]
    one_sided = check_chat_prompts([[1, 2], "refused: x"], [[1, 2], [1, 3]], 1)
    assert [check.passed for check in one_sided] == [False, False]
    none = check_chat_prompts(["no chat template"], ["no chat template"], 1)
    assert not any(check.passed for check in none)


def test_divergence_against_numbers_by_hand(f16_path: Path) -> None:
    import numpy as np

    header = module.read_gguf_header(f16_path)
    # p = (3/4, 1/4), q = (1/2, 1/2): KL = 3/4 ln(3/2) + 1/4 ln(1/2) = 0.1308...
    p, q = np.log([[0.75, 0.25]]), np.log([[0.5, 0.5]])
    checks = {check.name: check for check in check_logits(header, [q], [p])}
    assert checks["mean_kl"].value == pytest.approx(0.1308, abs=1e-4)
    assert not checks["mean_kl"].passed
    broken = {check.name: check for check in check_logits(header, [q * np.nan], [p])}
    assert not broken["mean_kl"].passed
    assert not broken["max_kl"].passed


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
