"""Failures that users of other exporters report, each prevented or told in one line."""

import errno
import json
import shutil
from pathlib import Path

import pytest

from export._cli import FAILED, MODEL, CommandError
from tests.conftest import export_adapter


@pytest.fixture
def adapter_dir(tiny_adapter_dir: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(tiny_adapter_dir, tmp_path / "tiny-run/adapter"))


def test_disk_that_fills_up_midway_names_the_missing_bytes(tmp_path: Path) -> None:
    from export.stream_rows import full_disk_told

    class File:
        path, total, written = tmp_path / "x.gguf", 1000, 400

    def write(number: int) -> None:
        with full_disk_told([File()]):
            raise OSError(number, "no")

    with pytest.raises(CommandError, match="full: 600 bytes were still to be written") as caught:
        write(errno.ENOSPC)
    assert caught.value.exit_code == FAILED
    with pytest.raises(OSError, match="no"):
        write(errno.EACCES)


@pytest.mark.model
def test_changed_pre_tokenizer_is_explained(adapter_dir: Path, tmp_path: Path) -> None:
    path = adapter_dir / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["pre_tokenizer"] = {"type": "Whitespace"}
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(
        CommandError, match=r"pre-tokenizer was not recognized.*changed the tokenizer itself"
    ) as caught:
        export_adapter(adapter_dir, tmp_path / "gguf", ["Q8_0"])
    assert caught.value.exit_code == MODEL


@pytest.mark.model
def test_missing_template_is_told(
    adapter_dir: Path,
    tiny_export_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def write_files(inputs: object, metadata: object, files: dict, *more: object) -> dict:
        shutil.copyfile(tiny_export_dir / "tiny-run-Q8_0.gguf", files["Q8_0"])
        return {"Q8_0": "0" * 64}

    monkeypatch.setattr("export.export_gguf.write_files", write_files)
    (adapter_dir / "chat_template.jinja").unlink()
    export_adapter(adapter_dir, tmp_path / "gguf", ["Q8_0"])
    assert "the tokenizer has no chat template" in capsys.readouterr().err
    assert "# TEMPLATE" in (tmp_path / "gguf/Modelfile").read_text(encoding="utf-8")


def test_merges_give_sentencepiece_its_order_back(tmp_path: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2

    from export.lazy_convert import merge_ranks
    from tests.tokenizers import make_mistral_tokenizer_dir

    folder = make_mistral_tokenizer_dir(tmp_path / "mistral")
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((folder / "tokenizer.model").read_bytes())
    scores = {piece.piece: piece.score for piece in proto.pieces}
    ranks = merge_ranks(tokenizer)
    assert len(ranks) > 25_000
    assert sorted(ranks, key=lambda piece: -scores[piece]) == list(ranks)
    # Older files write a merge as one string.
    tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    assert merge_ranks(tokenizer) == ranks
