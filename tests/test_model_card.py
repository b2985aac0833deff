"""The model card: YAML that a parser reads back, a table that stays one, true figures only."""

import re
from typing import Any

import pytest
import yaml

from export.model_card import model_card, recommended_file
from export.modelfile import ChatFormat
from export.run_facts import Dataset, HeldOut, LoraSettings, RunFacts, TrainingSettings

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] +"
    " '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = ChatFormat(CHATML, "<|im_end|>")
NAME = "SmolLM2-135M-Instruct-cpu-v1.0"
FILES: dict[str, dict[str, Any]] = {
    f"{NAME}-Q8_0.gguf": {
        "type": "Q8_0",
        "bytes": 144_811_456,
        "sha256": "a" * 64,
        "bits_per_weight": 8.5,
        "fallbacks": {},
        "matrices": 211,
    },
    f"{NAME}-Q4_K_M.gguf": {
        "type": "Q4_K_M",
        "bytes": 105_454_432,
        "sha256": "b" * 64,
        "bits_per_weight": 6.174,
        "fallbacks": {"Q5_0": 150, "Q8_0": 30},
        "matrices": 211,
    },
}
Q8, Q4 = FILES
FACTS = RunFacts(
    run_name="smollm2-135m-cpu",
    base_name="HuggingFaceTB/SmolLM2-135M-Instruct",
    num_weights=134_515_008,
    organization="HuggingFaceTB",
    repo_url="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
    license="apache-2.0",
    languages=("en", "no"),
    datasets=(
        Dataset("mlabonne/FineTome-100k", True, "0123456789abcdef0123", 160),
        Dataset("rows.jsonl", False),
    ),
    lora=LoraSettings(16, 32.0, False, False, 0.0, ("q_proj", "v_proj")),
    training=TrainingSettings(213, 1.0, 107, 1e-3, 3407, {"trl": "1.15.0"}, "2 CPU cores", "abc12"),
    held_out=HeldOut(2.0123, 1.5, 7.48, 4.48, 13),
)
CHECKS = [
    {"name": "mean_kl", "value": 0.008123, "threshold": 0.02, "passed": True},
    {"name": "same_top_token", "value": {"share": 0.9712, "positions": 520}, "passed": True},
    {"name": "perplexity_ratio", "value": 1.00213, "threshold": 1.02, "passed": True},
]


def certify(name: str, sha256: str, passed: bool = True, checks: Any = None) -> dict[str, Any]:
    entry = {"sha256": sha256, "passed": passed, "checks": CHECKS if checks is None else checks}
    return {"files": {name: entry}}


def front_matter(card: str) -> dict[str, Any]:
    """Cut as huggingface_hub's REGEX_YAML_BLOCK does, and parse."""
    match = re.match(r"(\s*---[\r\n]+)([\S\s]*?)([\r\n]+---(\r\n|\n|$))", card)
    assert match is not None
    content = yaml.safe_load(match[2])
    assert isinstance(content, dict)
    return content


def table(card: str) -> list[list[str]]:
    """Read the table as GitHub does: a bar ends a cell unless a backslash is in front of it."""
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    return [
        [cell.strip().replace("\0", "|") for cell in row.replace("\\|", "\0").split("|")[1:-1]]
        for row in rows
    ]


def test_front_matter_is_what_the_hub_expects() -> None:
    assert front_matter(model_card(FACTS, FILES, CHAT)) == {
        "license": "apache-2.0",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "finetune",
        "datasets": ["mlabonne/FineTome-100k"],
        "language": ["en", "no"],
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "lora", "tomeforge"],
        "quantized_by": "Tomeforge",
    }


HOSTILE = [
    "no",
    "1.0",
    "a: b",
    "- a",
    "---",
    "# x",
    "*a",
    "&a",
    "!x",
    "{a",
    "[a",
    "%a",
    "'\"",
    "a|b",
    "\u2028",
    "é: ✓",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_stay_names(text: str) -> None:
    name = f"{text}`<b>|x"
    files = {f"{name}-Q8_0.gguf": {**FILES[Q8], "fallbacks": {text + "|": 1}}}
    facts = RunFacts(
        run_name=text,
        base_name=name,
        num_weights=1,
        license=text,
        license_name=text,
        license_link=f"https://x/{text}",
        languages=(text,),
        datasets=(Dataset(text, True, text), Dataset(name, False, text)),
        lora=LoraSettings(target_modules=(name,)),
        training=TrainingSettings(versions={"trl": name}, hardware=name, commit=name),
    )
    card = model_card(facts, files, CHAT)
    matter = front_matter(card)
    assert matter["license"] == matter["license_name"] == text
    assert matter["license_link"] == f"https://x/{text}"
    assert matter["datasets"] == matter["language"] == [text]
    assert "base_model" not in matter
    assert {len(row) for row in table(card)} == {5}
    assert table(card)[2][0] == f"`` {' '.join(name.split())}-Q8_0.gguf ``"
    assert "<b>" not in card.split("# ", 1)[1].splitlines()[0]


def test_yaml_by_hand_would_break_on_such_names() -> None:
    broken = []
    for text in HOSTILE:
        try:
            broken.append(yaml.safe_load(f"license: {text}\n") != {"license": text})
        except yaml.YAMLError:
            broken.append(True)
    assert sum(broken) > len(HOSTILE) // 2


def test_table_tells_what_a_file_really_costs() -> None:
    header, _, *rows = table(model_card(FACTS, FILES, CHAT))
    assert header == ["file", "type", "size", "bits per weight", "fallbacks"]
    assert rows == [
        [f"`{Q8}`", "Q8_0", "144.8 MB", "8.50", "–"],
        [f"`{Q4}`", "Q4_K_M", "105.5 MB", "6.17", "150 × Q5_0, 30 × Q8_0 of 211"],
    ]


def test_figures_of_the_certificate_are_in_the_table() -> None:
    card = model_card(FACTS, FILES, CHAT, certify(Q8, "a" * 64))
    header, _, first, second = table(card)
    assert header[5:] == ["KL divergence", "same top token", "perplexity ratio", "check"]
    assert first[5:] == ["0.0081", "97.1%", "1.0021", "passed"]
    assert second[5:] == ["–", "–", "–", "–"]
    assert "Not measured yet" not in card


def test_certificate_of_other_bytes_does_not_count() -> None:
    for other in (certify(Q8, "b" * 64), certify("else.gguf", "a" * 64), None, {}, {"files": [1]}):
        card = model_card(FACTS, FILES, CHAT, other)
        assert "KL divergence" not in card
        assert "Not measured yet" in card


def test_failed_and_partial_certificates_are_told_as_they_are() -> None:
    checks = [{"name": "mean_kl", "value": None}, {"name": "same_top_token", "value": 0.5}, "?"]
    card = model_card(FACTS, FILES, CHAT, certify(Q8, "a" * 64, passed=False, checks=checks))
    header, _, first, _ = table(card)
    assert header[5:] == ["same top token", "check"]
    assert first[5:] == ["50.0%", "**failed**"]
    none = {"files": {Q8: {"sha256": "a" * 64, "passed": True, "checks": None}}}
    assert table(model_card(FACTS, FILES, CHAT, none))[2][5:] == ["passed"]


def test_card_tells_what_was_trained_on_what() -> None:
    card = model_card(FACTS, FILES, CHAT)
    assert f"# {NAME}\n" in card
    for line in (
        "- **Data**: [mlabonne/FineTome-100k](https://huggingface.co/datasets/mlabonne/FineTome-100k)"
        " (version `0123456789abcdef`), and 160 generated tool-use conversations",
        "- **Data**: `rows.jsonl`",
        "- **Adapter**: LoRA of rank 16, alpha 32, on `q_proj`, `v_proj`",
        "- **Training**: 213 rows, 1 epoch, 107 steps, learning rate 0.001, seed 3407",
        "- **Software**: trl 1.15.0",
        "- **Hardware**: 2 CPU cores",
        "- **Commit**: `abc12`",
        "- **Held-out loss**: 2.012 → 1.5 nats per token (perplexity 7.48 → 4.48), on 13 rows that "
        "were not trained on",
    ):
        assert line + "\n" in card
    assert "apache-2.0, as the base model's." in card


def test_what_was_not_recorded_is_not_told() -> None:
    card = model_card(RunFacts("run", "base", 10**9), FILES, ChatFormat(None, None))
    matter = {"pipeline_tag", "tags", "quantized_by"}
    assert set(front_matter(card)) == matter
    for word in (
        "None",
        "Adapter**",
        "Training**",
        "Software",
        "Held-out",
        "Prompt format",
        "http",
    ):
        assert word not in card
    assert "whose folder named none" in card
    assert "is missing: the tokenizer had none" in card


def test_prompt_format_is_shown_as_rendered() -> None:
    card = model_card(FACTS, FILES, CHAT)
    shown = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is a tome?<|im_end|>\n"
    assert f"```\n{shown}<|im_start|>assistant\n```" in card
    fenced = model_card(FACTS, FILES, ChatFormat(CHATML.replace("<|im_end|>", "````"), "</s>"))
    assert "\n`````\n<|im_start|>system" in fenced


def test_commands_name_the_file_to_begin_with() -> None:
    card = model_card(FACTS, FILES, CHAT)
    assert f"Begin with `{Q8}`." in card
    assert f'python -m integration.ask --model {Q8} "What is a tome?"' in card
    assert f"llama-cli -m {Q8} --jinja" in card
    ollama = NAME.lower()
    assert f"ollama create {ollama} -f Modelfile && ollama run {ollama}" in card
    spaced = model_card(FACTS, {"a b;c-Q8_0.gguf": FILES[Q8]}, CHAT)
    assert "--model 'a b;c-Q8_0.gguf'" in spaced
    assert "ollama run a-b-c\n" in spaced


def test_importance_matrix_is_told_with_its_source() -> None:
    matrix = {"data_sha256": "c" * 64, "rows": 20, "tokens": 9000, "chunks": 18}
    card = model_card(FACTS, {Q8: FILES[Q8], Q4: {**FILES[Q4], "imatrix": matrix}}, CHAT)
    told = f"Importance matrix of `{Q4}`: 20 rows, 9000 tokens, 18 chunks (sha256 of "
    assert told + f"the token ids: `{'c' * 64}`)." in card
    assert "Importance matrix" not in model_card(FACTS, FILES, CHAT)


def test_recommended_file_is_truly_small_or_q8() -> None:
    assert recommended_file(FILES) == Q8
    assert recommended_file({Q8: FILES[Q8], Q4: {**FILES[Q4], "bits_per_weight": 4.85}}) == Q4
    assert recommended_file({Q4: FILES[Q4], "f": {"type": "F16", "bytes": 1}}) == "f"
