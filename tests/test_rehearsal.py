"""The Colab recipes, rehearsed: real commands and real tokenizers around tiny random models."""

import dataclasses
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from export.gguf_header import read_gguf_header
from export.verify_gguf import verify_gguf
from export.verify_reference import open_reference
from integration.local_model import LocalModel
from integration.models import load_gguf
from scripts.chat_templates import alpaca_template
from scripts.recipe import TrainingRecipe, parse_recipe
from scripts.render import IGNORED, encode_conversation, encode_prompt
from tests.conftest import TINY_CONFIG
from tests.test_chat_templates import MISTRAL_V3
from tests.test_verify_gguf import failed, patch_string, value_of, value_offset
from tests.tokenizers import PIECES_V1, PIECES_V3, find_mistral_model, make_mistral_tokenizer_dir
from tools.protocol import ToolCall, render_tool_call, render_tool_result

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

TINYLLAMA, MISTRAL, INSTRUCT, PEFT = "tinyllama", "mistral", "instruct", "peft"
TYPES = ("F16", "Q8_0", "Q4_K_M")
QUESTION = " Was heißt „Feuer“? </s>[INST]"
FIELDS = [
    "id", "prompt", "text", "tool_calls", "route", "finish_reason", "usage", "timings", "error",
]  # fmt: skip
CALL = ToolCall("text_formatter", {"text": "naïve  café </s>", "width": 40})
SYSTEM = "  Be brief. [INST]"
TURNS = [
    ("user", "  Leading spaces, ½ and </s><s>[INST] typed [/INST] 你好 🙂"),
    ("assistant", " def f(x):\n    return x</s> "),
    ("user", "\nWrap this:  a  b"),
    ("assistant", render_tool_call(CALL)),
    ("user", render_tool_result("▁naïve\n<unk>\t12345")),
]
CHAT = [{"role": role, "content": content} for role, content in [("system", SYSTEM), *TURNS]]
CHATS = {
    "system": CHAT,
    "no system": CHAT[1:],
    "one turn": CHAT[1:2],
    "only a space": [{"role": "user", "content": " "}],
}


@dataclass
class Rehearsal:
    """A recipe on its way from rows to an answer; `done` has what each command said."""

    name: str
    recipe: Path
    model_dir: Path
    base_dir: Path
    output_root: Path
    flags: tuple[str, ...] = ()
    stages: tuple[str, ...] = ("prepare", "train", "export", "verify", "ask")
    done: dict[str, subprocess.CompletedProcess[str]] = field(default_factory=dict)

    @property
    def run_dir(self) -> Path:
        return self.output_root / self.recipe.stem

    @property
    def adapter_dir(self) -> Path:
        return self.run_dir / "adapter"

    def gguf(self, kind: str) -> Path:
        return self.run_dir / "gguf" / f"{self.recipe.stem}-{kind}.gguf"

    def command(self, stage: str) -> list[str]:
        base = ["--base", str(self.base_dir)] if self.base_dir != self.model_dir else []
        return {
            "prepare": ["scripts.prepare_data", *self.recipe_flags],
            "train": ["scripts.train_lora", *self.recipe_flags],
            "export": [
                "export.export_gguf", str(self.adapter_dir), *base,
                "--output", str(self.run_dir / "gguf"), "--quantization", ",".join(TYPES),
                "--name", self.recipe.stem,
            ],
            "verify": [
                "export.verify_gguf", str(self.gguf("Q8_0")), *base,
                "--reference", str(self.adapter_dir),
            ],
            "ask": [
                "integration.ask", "--model", str(self.gguf("Q8_0")), "--json",
                "--max-tokens", "8", "--temperature", "0", QUESTION,
            ],
        }[stage]  # fmt: skip

    @property
    def recipe_flags(self) -> list[str]:
        return [
            "--config", str(self.recipe),
            "--model-name-or-path", str(self.model_dir),
            "--dataset-name", "scripts/data/finetome_sample.jsonl",
            "--max-rows", "16", "--tool-rows", "4", "--max-steps", "2", "--max-length", "256",
            "--output-root", str(self.output_root),
            *self.flags,
        ]  # fmt: skip

    def run(self) -> "Rehearsal":
        """Run the commands in order, up to the first that fails."""
        for stage in self.stages:
            command = [sys.executable, "-m", *self.command(stage)]
            # Two run at a time: more threads than cores would only wait for each other.
            self.done[stage] = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=240,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            if self.done[stage].returncode:
                break
        return self

    def output(self, stage: str) -> str:
        """Give what a command printed; it must have succeeded."""
        for name in self.stages[: self.stages.index(stage) + 1]:
            done = self.done[name]
            assert done.returncode == 0, f"{name}: {done.stderr[-3000:]}"
        return self.done[stage].stdout


def make_model(folder: Path, family: str, version: str, template: str | None = None) -> Path:
    """Write a random 16-bit model of two layers around one of Mistral's tokenizers."""
    import torch
    import transformers

    torch.manual_seed(0)
    make_config = getattr(transformers, f"{family}Config")
    config = make_config(
        **TINY_CONFIG,
        initializer_range=0.06,
        vocab_size={PIECES_V1: 32000, PIECES_V3: 32768}[version],
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.to(torch.float16).save_pretrained(folder)
    make_mistral_tokenizer_dir(folder, version)
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def quantize_model(folder: Path, source: Path) -> Path:
    """Write a model in 4 bits, as the hub's `…-bnb-4bit` ones are."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=config
    )
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    return folder


Rehearsals = dict[str, "Future[Rehearsal]"]


@pytest.fixture(scope="module")
def rehearsals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rehearsals]:
    """All of them, two at a time: most of a command is imports, on one core."""
    root = tmp_path_factory.mktemp("rehearsal")
    tiny_recipe = Path("scripts/recipes/tinyllama-1.1b-colab.yaml")
    large_recipe = Path("scripts/recipes/mistral-7b-colab.yaml")
    started: Rehearsals = {}
    with ThreadPoolExecutor(max_workers=2) as pool:

        def start(name: str, *values: Any) -> None:
            started[name] = pool.submit(Rehearsal(name, *values).run)

        llama = make_model(root / "tinyllama", "Llama", PIECES_V1)
        start(TINYLLAMA, tiny_recipe, llama, llama, root / "runs")
        mistral = make_model(root / "mistral", "Mistral", PIECES_V1)
        # The recipe trains on such a folder, and export takes the 16-bit weights.
        quantized = quantize_model(root / "mistral-bnb-4bit", mistral)
        start(MISTRAL, large_recipe, quantized, mistral, root / "runs")
        instruct = make_model(root / "instruct", "Mistral", PIECES_V3, MISTRAL_V3)
        flags = ("--prompt-format", "model")
        stages = ("train", "export", "ask")
        start(INSTRUCT, large_recipe, instruct, instruct, root / "instruct", flags, stages)
        flags = ("--backend", "peft")
        start(PEFT, large_recipe, mistral, mistral, root / "peft", flags, ("train",))
        yield started


@pytest.fixture(scope="module", params=[TINYLLAMA, MISTRAL, INSTRUCT])
def rehearsal(request: pytest.FixtureRequest, rehearsals: Rehearsals) -> Rehearsal:
    return rehearsals[request.param].result()


@pytest.fixture(scope="module")
def tinyllama(rehearsals: Rehearsals) -> Rehearsal:
    rehearsal = rehearsals[TINYLLAMA].result()
    rehearsal.output("export")
    return rehearsal


@pytest.fixture(scope="module")
def model(rehearsal: Rehearsal) -> Iterator[LocalModel]:
    rehearsal.output("export")
    model = load_gguf(rehearsal.gguf("F16"))
    yield model
    model.engine.close()


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def template_of(folder: Path) -> str:
    return (folder / "chat_template.jinja").read_text(encoding="utf-8")


def test_every_command_succeeds(rehearsal: Rehearsal) -> None:
    rehearsal.output("ask")
    if "prepare" in rehearsal.stages:  # training prepares the rows itself where that was not done
        assert rehearsal.output("prepare") == f"{rehearsal.run_dir / 'data'}\n"
    assert rehearsal.output("train") == f"{rehearsal.adapter_dir}\n"
    assert rehearsal.output("export").splitlines() == [str(rehearsal.gguf(kind)) for kind in TYPES]


def test_training_was_the_recipe_in_four_bits(rehearsal: Rehearsal) -> None:
    rehearsal.output("train")
    log = rehearsal.done["train"].stderr
    assert "(4-bit, unsloth)" in log
    assert "4-bit = True" in log  # Unsloth's own line
    recipe, _ = parse_recipe("", ["--config", str(rehearsal.recipe)])
    asked = dataclasses.asdict(recipe)
    used = yaml.safe_load((rehearsal.run_dir / "recipe.yaml").read_text(encoding="utf-8"))
    flags = [flag[2:].replace("-", "_") for flag in rehearsal.recipe_flags if flag[:2] == "--"]
    assert {key for key in asked if used[key] != asked[key]} <= set(flags)
    assert used["use_gradient_checkpointing"]
    training = json.loads((rehearsal.run_dir / "provenance.json").read_text())["training"]
    assert training["steps"] == 2
    assert training["skipped_steps"] == 0


def test_adapter_carries_the_template_that_trained_it(rehearsal: Rehearsal) -> None:
    rehearsal.output("train")
    template = template_of(rehearsal.adapter_dir)
    if rehearsal.name == INSTRUCT:
        assert template.endswith(MISTRAL_V3)
    else:
        base = tokenizer_of(rehearsal.base_dir)
        assert base.chat_template is None
        assert template == alpaca_template(base)
        assert template.startswith("{{- bos_token -}}")


def test_peft_trains_the_same_recipe(rehearsals: Rehearsals) -> None:
    from scripts.model_loading import load_model as load_for_training

    peft, unsloth = rehearsals[PEFT].result(), rehearsals[MISTRAL].result()
    assert peft.output("train") == f"{peft.adapter_dir}\n"
    unsloth.output("train")
    assert "(4-bit, peft)" in peft.done["train"].stderr
    assert json.loads((peft.run_dir / "provenance.json").read_text())["training"]["steps"] == 2
    names = ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json")
    assert all((peft.adapter_dir / name).is_file() for name in names)
    assert template_of(peft.adapter_dir) == template_of(unsloth.adapter_dir)
    rows = [
        encode_conversation(tokenizer_of(run.adapter_dir), CHAT[:5], 4000)
        for run in (peft, unsloth)
    ]
    assert rows[0] is not None
    assert rows[0] == rows[1]
    # And what it loads is in 4 bits: one byte for two weights, but for the embedding and the head.
    recipe = TrainingRecipe(
        model_name_or_path=str(peft.base_dir), backend="peft", prompt_format="alpaca"
    )
    model, _ = load_for_training(recipe)
    kinds = {type(module).__name__ for name, module in model.named_modules() if "_proj" in name}
    assert kinds == {"Linear4bit"}


def test_files_have_the_types_asked_for(rehearsal: Rehearsal) -> None:
    rehearsal.output("export")
    for kind in TYPES:
        header = read_gguf_header(rehearsal.gguf(kind))
        assert header.type_name == kind
        assert not header.fallbacks
        assert header.has_full_blocks


def check_certificate(certificate: dict[str, Any], kind: str) -> None:
    assert failed(certificate) == set()
    assert certificate["passed"]
    assert certificate["type"] == kind
    assert value_of(certificate, "token_ids")["differ"] == 0
    assert value_of(certificate, "chat_prompts")["refused_by_both"] == 0
    assert set(value_of(certificate, "bos_count")) == {1}
    assert value_of(certificate, "eos_token") == {"id": 2, "stops": True}


def test_certificates_pass(rehearsal: Rehearsal) -> None:
    rehearsal.output("export")
    told = "verify" in rehearsal.stages
    if told:
        check_certificate(json.loads(rehearsal.output("verify")), "Q8_0")
    for kind in ("F16",) if told else ("F16", "Q8_0"):
        certificate = verify_gguf(
            rehearsal.gguf(kind), rehearsal.adapter_dir, base_dir=rehearsal.base_dir
        )
        check_certificate(certificate, kind)


def test_ask_gives_the_object_of_the_contract(rehearsal: Rehearsal) -> None:
    answer = json.loads(rehearsal.output("ask"))
    assert list(answer) == FIELDS
    assert answer["prompt"] == QUESTION.strip()
    assert answer["error"] is None
    assert answer["finish_reason"] in ("stop", "length")
    messages = [{"role": "user", "content": QUESTION.strip()}]
    expected = encode_prompt(tokenizer_of(rehearsal.adapter_dir), messages)
    assert answer["usage"]["prompt_tokens"] == len(expected)
    assert 0 <= answer["usage"]["completion_tokens"] <= 8


def pieces_of_alpaca(messages: list[dict[str, str]]) -> list[int]:
    """Tokenize an alpaca prompt by hand, with SentencePiece itself."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(find_mistral_model()))
    ids, text = [1], ""
    for turn in messages:
        if turn["role"] == "assistant":
            ids += [*processor.encode(text + "### Response:\n" + turn["content"]), 2]
            text = "\n\n"
        else:
            text += "### Instruction:\n" if turn["role"] == "user" else ""
            text += turn["content"] + "\n\n"
    return [*ids, *processor.encode(text + "### Response:\n")]


def test_same_ids_in_training_chat_and_certificate(rehearsal: Rehearsal, model: LocalModel) -> None:
    tokenizer = tokenizer_of(rehearsal.adapter_dir)
    with open_reference(rehearsal.adapter_dir, rehearsal.base_dir) as reference:
        for name, messages in CHATS.items():
            trained = encode_prompt(tokenizer, messages)
            assert model.encode(messages) == trained, name
            assert reference.plain.chat_ids(messages) == trained, name
            assert trained.count(1) == 1, name
            assert trained.count(2) == len([t for t in messages if t["role"] == "assistant"])
            if rehearsal.name == INSTRUCT:
                asked = [turn for turn in messages if turn["role"] == "user"]
                assert trained.count(tokenizer.convert_tokens_to_ids("[INST]")) == len(asked)
            else:
                assert trained == pieces_of_alpaca(messages), name


def test_trained_row_begins_with_the_prompt_of_chat(
    rehearsal: Rehearsal, model: LocalModel
) -> None:
    row = encode_conversation(tokenizer_of(rehearsal.adapter_dir), CHAT[:3], 4000)
    assert row is not None
    prompt = model.encode(CHAT[:2])
    assert row.input_ids[: len(prompt)] == prompt
    assert row.labels[len(prompt)] == row.input_ids[len(prompt)]
    trained = [label for label in row.labels if label != IGNORED]
    assert trained[-1] == 2


def test_template_without_bos_is_not_certified(tinyllama: Rehearsal, tmp_path: Path) -> None:
    path = patch_string(
        tinyllama.gguf("F16"),
        tmp_path / "no-bos.gguf",
        "tokenizer.chat_template",
        lambda text: text.removeprefix("{{- bos_token -}}"),
    )
    certificate = verify_gguf(path, tinyllama.adapter_dir)
    assert failed(certificate) == {"chat_template", "chat_prompts", "bos_count"}
    assert set(value_of(certificate, "bos_count")) == {0}


def test_pieces_without_scores_are_not_certified(tinyllama: Rehearsal, tmp_path: Path) -> None:
    # What a GGUF without `tokenizer.model` comes to: text is split, but wrongly.
    data = bytearray(tinyllama.gguf("F16").read_bytes())
    at = value_offset(bytes(data), "tokenizer.ggml.scores")
    (length,) = struct.unpack_from("<Q", data, at + 4)
    data[at + 12 : at + 12 + 4 * length] = bytes(4 * length)
    (tmp_path / "flat.gguf").write_bytes(data)
    certificate = verify_gguf(tmp_path / "flat.gguf", tinyllama.adapter_dir)
    assert failed(certificate) == {"token_ids", "chat_prompts"}


def test_tokenizer_with_another_template_is_not_certified(
    tinyllama: Rehearsal, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tinyllama.adapter_dir, tmp_path / "adapter"))
    (other / "chat_template.jinja").write_text(MISTRAL_V3, encoding="utf-8")
    certificate = verify_gguf(tinyllama.gguf("F16"), other)
    assert {"chat_template", "chat_prompts"} <= failed(certificate)
    assert "token_ids" not in failed(certificate)
