"""What is known of a run: read once, nothing invented, no path of this machine."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from export._cli import MODEL, CommandError
from export.base_card import is_hub_name
from export.gguf_metadata import gguf_metadata
from export.run_facts import (
    DEFAULT_TEMPERATURE,
    Dataset,
    HeldOut,
    LoraSettings,
    RunFacts,
    TrainingSettings,
    read_run_facts,
)

SECRET = "/home/somebody/private"
CARD = """---
license: other
license_name: tome-community
license_link: LICENSE.txt
language: [en, no]
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# A model
"""
PROVENANCE = {
    "versions": {"python": "3.11", "torch": "2.11.0", "trl": "1.15.0", "peft": "0.21.2"},
    "base_model": {"name": f"{SECRET}/SmolLM2", "revision": "main", "fingerprint": "ab" * 32},
    "dataset": {"dataset": f"{SECRET}/rows.jsonl", "input_hash": "cd" * 32, "tool_rows": 160},
    "training": {"hash": "ef" * 32, "seed": 3407, "rows": 213, "steps": 107, "loss": 1.5},
}
RECIPE = "learning_rate: 1e-3\nnum_train_epochs: 1.0\nmax_steps: -1\n"
EVALUATION = {
    "held_out_file": f"{SECRET}/eval.jsonl",
    "base": {"loss": 2.0, "perplexity": 7.389, "tokens": 900, "rows": 13},
    "tuned": {"loss": 1.5, "perplexity": 4.482, "tokens": 900, "rows": 13},
}
ADAPTER = {
    "r": 16,
    "lora_alpha": 32,
    "use_rslora": True,
    "use_dora": False,
    "lora_dropout": 0.0,
    "target_modules": ["v_proj", "q_proj"],
    "base_model_name_or_path": f"{SECRET}/SmolLM2",
}


def make_run(folder: Path, **files: Any) -> Path:
    """Write a run's files; keys are file names with `__` for the dot."""
    adapter_dir = folder / "smollm2-135m-cpu/adapter"
    adapter_dir.mkdir(parents=True)
    (adapter_dir / "adapter_model.safetensors").write_bytes(b"weights")
    for key, content in files.items():
        name = key.replace("__", ".")
        place = adapter_dir if name.startswith("adapter_") else adapter_dir.parent
        text = content if isinstance(content, str) else json.dumps(content)
        (place / name).write_text(text, encoding="utf-8")
    return adapter_dir


def make_base(folder: Path, name: str = "", card: str = CARD, sampling: Any = None) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(card, encoding="utf-8")
    if sampling is not None:
        (folder / "generation_config.json").write_text(json.dumps(sampling), encoding="utf-8")
    tensors = {"a": SimpleNamespace(num_weights=134_515_000), "b": SimpleNamespace(num_weights=8)}
    return SimpleNamespace(path=folder, name=name or str(folder), config={}, tensors=tensors)


@pytest.fixture
def adapter_dir(tmp_path: Path) -> Path:
    return make_run(
        tmp_path,
        provenance__json=PROVENANCE,
        recipe__yaml=RECIPE,
        evaluation__json=EVALUATION,
        adapter_config__json=ADAPTER,
    )


def test_facts_of_a_whole_run(adapter_dir: Path, tmp_path: Path) -> None:
    assert read_run_facts(adapter_dir, make_base(tmp_path / "base")) == RunFacts(
        run_name="smollm2-135m-cpu",
        base_name="HuggingFaceTB/SmolLM2-135M-Instruct",
        num_weights=134_515_008,
        organization="HuggingFaceTB",
        repo_url="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
        license="other",
        license_name="tome-community",
        license_link="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct/blob/main/LICENSE.txt",
        languages=("en", "no"),
        datasets=(Dataset("rows.jsonl", False, "cd" * 32, 160),),
        lora=LoraSettings(16, 32.0, True, False, 0.0, ("q_proj", "v_proj")),
        training=TrainingSettings(
            rows=213,
            epochs=1.0,
            steps=107,
            learning_rate=1e-3,
            seed=3407,
            versions={"trl": "1.15.0", "peft": "0.21.2", "torch": "2.11.0"},
        ),
        held_out=HeldOut(2.0, 1.5, 7.389, 4.482, 13),
        sampling={"temp": DEFAULT_TEMPERATURE},
    )


def test_adapter_from_elsewhere_has_no_facts_and_that_is_fine(tmp_path: Path) -> None:
    facts = read_run_facts(make_run(tmp_path), make_base(tmp_path / "My Base", card="no card"))
    assert facts == RunFacts("smollm2-135m-cpu", "My Base", 134_515_008)
    keys = dict(gguf_metadata(facts))
    assert None not in keys.values()
    assert keys["general.base_model.0.name"] == "My Base"
    assert not [key for key in keys if "license" in key or "dataset" in key or "lora" in key]


def test_no_path_of_this_machine_gets_out(adapter_dir: Path, tmp_path: Path) -> None:
    for card in (CARD, "", f"---\nbase_model: {SECRET}/x\nlicense_link: {SECRET}/L\n---\n"):
        facts = read_run_facts(adapter_dir, make_base(tmp_path / "base", card=card))
        for text in (repr(facts), repr(gguf_metadata(facts))):
            assert "/home" not in text
            assert str(tmp_path) not in text
    assert SECRET in repr(PROVENANCE)  # what would have got out


@pytest.mark.parametrize(
    ("folder", "name", "card", "expected"),
    [
        ("x", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
        ("My-Model", "", "", "My-Model"),
        ("My-Model", "C:\\models\\Other", "", "Other"),
        ("My-Model", "outputs/models", "", "models"),
        ("hub/models--org--Nice-7B/snapshots/0a1b2c", "", CARD, "org/Nice-7B"),
        ("x", "", "---\nbase_model:\n- org/first\n- org/second\n---\n", "org/first"),
        ("x", "", "---\nbase_model: ../up\n---\n", "x"),
    ],
)
def test_public_name_of_the_base(
    tmp_path: Path, folder: str, name: str, card: str, expected: str
) -> None:
    facts = read_run_facts(make_run(tmp_path), make_base(tmp_path / folder, name, card))
    assert facts.base_name == expected
    assert (facts.repo_url is None) == ("/" not in expected)


def test_hub_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_hub_name("mlabonne/FineTome-100k")
    for path in ("/a/b", "./a/b", "a", "a/b/c", "~/a", "outputs/x", "me/rows.jsonl", "a\\b/c"):
        assert not is_hub_name(path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlabonne/FineTome-100k").mkdir(parents=True)
    assert not is_hub_name("mlabonne/FineTome-100k")


def test_revision_is_told_only_of_the_base_it_was_asked_for(tmp_path: Path) -> None:
    name = "org/Nice-7B"
    trained = {"base_model": {"name": name, "revision": "abc123"}}
    other = {"base_model": {"name": f"{name}-bnb-4bit", "revision": "abc123"}}
    for place, content, expected in (("1", trained, "abc123"), ("2", other, None)):
        run = make_run(tmp_path / place, provenance__json=content)
        facts = read_run_facts(run, make_base(tmp_path / "base", name))
        assert facts.base_revision == expected
        keys = dict(gguf_metadata(facts))
        assert keys.get("general.base_model.0.version") == expected


def test_hub_data_set_has_its_page_and_organization(tmp_path: Path) -> None:
    report = {"dataset": "mlabonne/FineTome-100k", "revision": "deadbeef", "input_hash": "cd"}
    run = make_run(tmp_path, provenance__json={"dataset": report})
    keys = dict(gguf_metadata(read_run_facts(run, make_base(tmp_path / "base"))))
    assert keys["general.dataset.count"] == 1
    assert keys["general.dataset.0.name"] == "FineTome-100k"
    assert keys["general.dataset.0.organization"] == "mlabonne"
    assert keys["general.dataset.0.version"] == "deadbeef"
    url = "https://huggingface.co/datasets/mlabonne/FineTome-100k"
    assert keys["general.dataset.0.repo_url"] == url


def test_evaluation_of_an_earlier_adapter_does_not_count(
    adapter_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_base(tmp_path / "base")
    assert read_run_facts(adapter_dir, base).held_out is not None
    os.utime(adapter_dir.parent / "evaluation.json", (1, 1))
    assert read_run_facts(adapter_dir, base).held_out is None
    assert "older than the adapter" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("provenance__json", '{"versions": '),
        ("provenance__json", "[1]"),
        ("evaluation__json", "nothing"),
        ("adapter_config__json", "{"),
        ("recipe__yaml", "a: [1"),
        ("recipe__yaml", "only text"),
    ],
)
def test_malformed_file_is_one_line(tmp_path: Path, name: str, text: str) -> None:
    adapter_dir = make_run(tmp_path, **{name: text})
    with pytest.raises(CommandError, match=name.replace("__", r"\.")) as caught:
        read_run_facts(adapter_dir, make_base(tmp_path / "base"))
    assert caught.value.exit_code == MODEL
    assert "\n" not in str(caught.value)


def test_wrong_types_and_broken_numbers_count_as_missing(tmp_path: Path) -> None:
    run = make_run(
        tmp_path,
        provenance__json={"versions": [1], "training": {"rows": True, "seed": "x"}, "dataset": 3},
        evaluation__json='{"base": {"loss": NaN}, "tuned": {"loss": 1.0}}',
        adapter_config__json={"r": 1.5, "lora_alpha": None, "target_modules": "all-linear"},
        recipe__yaml="num_train_epochs: 3\nmax_steps: 40\nlearning_rate: fast\n",
    )
    facts = read_run_facts(run, make_base(tmp_path / "base", card="---\nlicense: [a\n---\n"))
    assert facts.training == TrainingSettings()  # 40 steps decided, not 3 epochs
    assert facts.lora == LoraSettings(target_modules=("all-linear",))
    assert (facts.held_out, facts.datasets, facts.license) == (None, (), None)


def test_card_that_is_no_yaml_is_read_line_by_line(tmp_path: Path) -> None:
    card = "---\nlicense: mit\ntags: [unclosed\n---\n"
    assert read_run_facts(make_run(tmp_path), make_base(tmp_path / "b", card=card)).license == "mit"


def test_several_licences_are_told_as_such(tmp_path: Path) -> None:
    card = "---\nlicense: [mit, apache-2.0]\n---\n"
    facts = read_run_facts(make_run(tmp_path), make_base(tmp_path / "b", card=card))
    assert (facts.license, facts.license_name) == ("other", "mit, apache-2.0")


def test_sampling_defaults_are_the_bases_where_it_has_them(tmp_path: Path) -> None:
    theirs = {"temperature": 1, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1, "min_p": None}
    base = make_base(tmp_path / "base", sampling=theirs)
    keys = dict(gguf_metadata(read_run_facts(make_run(tmp_path), base)))
    found = {key.rpartition(".")[2]: value for key, value in keys.items() if "sampling" in key}
    assert found == {"temp": 1.0, "top_k": 50, "top_p": 0.9, "penalty_repeat": 1.1}
    assert type(found["temp"]) is float
    assert type(found["top_k"]) is int


def test_metadata_of_a_whole_run(adapter_dir: Path, tmp_path: Path) -> None:
    facts = read_run_facts(adapter_dir, make_base(tmp_path / "base"))
    metadata = gguf_metadata(facts, base_fingerprint="ab" * 32, adapter_sha256="12" * 32)
    keys = dict(metadata)
    assert len(keys) == len(metadata)
    assert keys["general.name"] == "SmolLM2 135M Instruct cpu"
    assert keys["general.basename"] == "SmolLM2"
    assert keys["general.finetune"] == "Instruct-cpu"
    assert keys["general.size_label"] == "135M"
    assert keys["general.version"] == "v1.0"
    assert keys["general.languages"] == ["en", "no"]
    assert keys["general.base_model.count"] == 1
    assert keys["tomeforge.lora.alpha"] == 32.0
    assert keys["tomeforge.lora.rslora"] is True
    assert keys["tomeforge.base.fingerprint"] == "ab" * 32
    assert keys["tomeforge.adapter.sha256"] == "12" * 32
    assert keys["tomeforge.held_out.loss_after"] == 1.5
    assert dict(gguf_metadata(facts, name="mine"))["general.name"] == "mine"
    assert metadata == gguf_metadata(facts, base_fingerprint="ab" * 32, adapter_sha256="12" * 32)


def test_general_keys_are_those_of_the_standard(adapter_dir: Path, tmp_path: Path) -> None:
    from gguf.constants import Keys

    values = [value for value in vars(Keys.General).values() if isinstance(value, str)]
    known = {value.replace("{id}", "0") for value in values}
    facts = read_run_facts(adapter_dir, make_base(tmp_path / "base"))
    ours = {key for key, _ in gguf_metadata(facts) if not key.startswith("tomeforge.")}
    # PyPI's gguf lacks the sampling keys; llama.cpp's own copy has them.
    assert {key for key in ours - known if not key.startswith("general.sampling.")} == set()
    assert "general.dataset.0.naem" not in known
