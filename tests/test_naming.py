"""File names: readable, after the convention, and read back as what they were made of."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.naming import (
    base_of,
    export_file_name,
    file_prefix,
    model_name,
    plain_name,
    run_name_of,
    size_label,
)

SMOLLM, TINYLLAMA, MISTRAL = 134_515_008, 1_100_048_384, 7_248_023_552
# The expression of ggml's docs/gguf.md ("Validating Above Naming Convention"), in Python's spelling.
CONVENTION = re.compile(
    r"^(?:(?P<Sidecar>mmproj|mtp)-)?"
    r"(?P<BaseName>[A-Za-z0-9\s]*(?:(?:-(?:(?:[A-Za-z\s][A-Za-z0-9\s]*)|(?:[0-9\s]*)))*))"
    r"-(?:(?P<SizeLabel>(?:\d+x)?(?:\d+\.)?\d+[A-Za-z](?:-[A-Za-z]+(\d+\.)?\d+[A-Za-z]+)?)"
    r"(?:-(?P<FineTune>[A-Za-z0-9\s-]+))?)?"
    r"-(?:(?P<Version>v\d+(?:\.\d+)*))(?:-(?P<Encoding>(?!LoRA|vocab)[\w_]+))?"
    r"(?:-(?P<Type>LoRA|vocab))?(?:-(?P<Shard>\d{5}-of-\d{5}))?\.gguf$"
)
BASES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": SMOLLM,
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": TINYLLAMA,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": TINYLLAMA,
    "mistralai/Mistral-7B-v0.1": MISTRAL,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": 46_702_792_704,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "my_own folder": 14_000_000,
    "135M": SMOLLM,
    "世界": SMOLLM,
}


@pytest.mark.parametrize(
    ("base", "num_weights", "run", "expected"),
    [
        (
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            SMOLLM,
            "smollm2-135m-cpu",
            "SmolLM2-135M-Instruct-cpu-v1.0",
        ),
        (
            "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
            TINYLLAMA,
            "tinyllama-1.1b-colab",
            "TinyLlama-1.1B-intermediate-step-1431k-3T-colab-v1.0",
        ),
        ("unsloth/mistral-7b-v0.3", MISTRAL, "mistral-7b-colab", "mistral-7B-colab-v1.0"),
        # A base's version is not ours, and a run may have one of its own.
        (
            "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
            TINYLLAMA,
            "json v2",
            "TinyLlama-1.1B-Chat-json-v2-v1.0",
        ),
        # A length of 4k is no size; the true one is counted.
        (
            "microsoft/Phi-3-mini-4k-instruct",
            3_821_079_552,
            "x",
            "Phi-3-mini-3.8B-4k-instruct-x-v1.0",
        ),
        # Nothing of its own is left: it must still not pass for the base.
        ("my-folder", SMOLLM, "my_folder", "my-folder-135M-tuned-v1.0"),
        # Letters, digits, letters right after the size would be read as part of it.
        ("foo-135M", SMOLLM, "test2b", "foo-135M-test-2b-v1.0"),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400, "FineTome", "Llama-3.2-1B-FineTome-v1.0"),
        ("base", SMOLLM, "../../etc/héllo", "base-135M-etc-hello-v1.0"),
    ],
)
def test_prefix_of_known_bases(base: str, num_weights: int, run: str, expected: str) -> None:
    assert file_prefix(base, num_weights, run) == expected


def parse(name: str) -> dict[str, str | None]:
    match = CONVENTION.fullmatch(name)
    assert match is not None, name
    return match.groupdict()


@pytest.mark.parametrize(
    ("base", "num_weights", "prefix", "title"),
    [
        (
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            SMOLLM,
            "SmolLM2-135M-Instruct-v1.0",
            "SmolLM2 135M Instruct",
        ),
        ("mistralai/Mistral-7B-v0.3", MISTRAL, "Mistral-7B-v0.3", "Mistral 7B"),
        ("my_own folder", 14_000_000, "my-own-folder-14M-v1.0", "my own folder 14M"),
    ],
)
def test_plain_base_keeps_its_own_name(
    base: str, num_weights: int, prefix: str, title: str
) -> None:
    made = plain_name(base, num_weights)
    assert (made.prefix, made.title) == (prefix, title)
    read = parse(export_file_name(made.prefix, "Q8_0"))
    assert (read["SizeLabel"], read["FineTune"] or "") == (made.size_label, made.finetune)
    assert read["Encoding"] == "Q8_0"


# Words that mean something in the convention, and letters and digits that are none in ASCII.
WORDS = ["v2", "v1.0", "LoRA", "vocab", "Q8_0", "4b", "135M", "8x7B", "A3B", "test2b", "a1b2c"]
WORDS += ["3.8B", "00001-of-00002", "Chat", "İ", "½", "٣"]
runs = st.text(max_size=30) | st.lists(st.sampled_from(WORDS), max_size=4).map("-".join)


@given(st.sampled_from(sorted(BASES)), runs, st.booleans())
def test_every_name_reads_back_as_its_parts(base: str, run: str, lora: bool) -> None:
    made = model_name(base, BASES[base], run)
    read = parse(export_file_name(made.prefix, "Q4_K_M", lora=lora))
    assert read == {
        "Sidecar": None,
        "BaseName": made.base_name,
        "SizeLabel": made.size_label,
        "FineTune": made.finetune,
        "Version": "v1.0",
        "Encoding": "Q4_K_M",
        "Type": "LoRA" if lora else None,
        "Shard": None,
    }


def test_dot_of_a_base_name_is_the_one_thing_that_the_expression_refuses() -> None:
    name = export_file_name(file_prefix("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768, "a.b"), "Q8_0")
    assert name == "Qwen2.5-0.5B-Instruct-a-b-v1.0-Q8_0.gguf"
    assert CONVENTION.fullmatch(name) is None
    assert parse(name.replace("Qwen2.5", "Qwen25"))["FineTune"] == "Instruct-a-b"


@pytest.mark.parametrize(
    "name", ["a_b-135M-x-v1.0-Q8_0.gguf", "a-135M-x.y-v1.0-Q8_0.gguf", "a-135M-x.gguf"]
)
def test_expression_refuses_what_was_not_sanitised(name: str) -> None:
    assert CONVENTION.fullmatch(name) is None


def test_without_the_dash_a_word_would_be_part_of_the_size() -> None:
    assert parse("foo-135M-test2b-v1.0-Q8_0.gguf")["SizeLabel"] == "135M-test2b"
    assert parse("foo-135M-test-2b-v1.0-Q8_0.gguf")["SizeLabel"] == "135M"


def test_parts_of_a_base() -> None:
    chat = base_of("TinyLlama/TinyLlama-1.1B-Chat-v1.0", TINYLLAMA)
    assert (chat.name, chat.size_label, chat.finetune, chat.version) == (
        "TinyLlama",
        "1.1B",
        "Chat",
        "v1.0",
    )
    assert base_of("a/b-7b").size_label == "7B"
    # The name's size is far from the weights: not believed.
    assert base_of("a/b-7b", SMOLLM).size_label is None
    assert base_of("Qwen/Qwen3-30B-A3B", BASES["Qwen/Qwen3-30B-A3B"]).size_label == "30B-A3B"


def test_size_labels_are_those_of_gguf_py() -> None:
    from gguf.utility import size_label as theirs

    for count in (999, 1_000_000, 1_000_001, SMOLLM, TINYLLAMA, MISTRAL, 9_960_000_000, 10**13):
        assert size_label(count) == theirs(count, 0, 0, 0)
    assert size_label(SMOLLM) == "135M"


def test_a_users_own_name_stays_as_it_is() -> None:
    assert export_file_name("my.own_name", "F16") == "my.own_name-F16.gguf"


def test_run_names(tmp_path: Path) -> None:
    assert run_name_of(Path("outputs/smollm2-cpu/adapter")) == "smollm2-cpu"
    assert run_name_of(Path("outputs/x/checkpoints/checkpoint-20")) == "checkpoint-20"
    assert run_name_of(tmp_path / "my run/adapter") == "my-run"
