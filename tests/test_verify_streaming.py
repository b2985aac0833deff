"""The reference, one layer at a time: the same logits as the whole model, in far less memory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from export._cli import FAILED, MODEL, CommandError
from export.base_model import read_json, read_tensor_index
from export.merged_weights import MergedModel, MergedWeight
from export.verify_divergence import ReferenceLogits
from export.verify_measure import _GIVE_BACK
from export.verify_reference import _read_folder, evaluate, find_end, open_reference
from export.verify_rows import Row
from export.verify_streaming import StreamedModel
from tests.conftest import make_adapter

pytestmark = pytest.mark.model
ROOT = Path(__file__).parent.parent
ROWS = [[5, 17, 300, 4, 9, 81], [1, 2, 3], [44] * 11 + [45], [7, 8]]
SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def streamed(model_dir: Path) -> StreamedModel:
    weights = {
        name: MergedWeight(name, info) for name, info in read_tensor_index(model_dir).items()
    }
    return StreamedModel(MergedModel(weights, read_json(model_dir / "config.json")))


def logits_of(model: StreamedModel, rows: list[list[int]] = ROWS) -> list[torch.Tensor]:
    return [model.logits(states) for states in model.hidden(rows)]


def distance(found: list[torch.Tensor], model: Any, rows: list[list[int]] = ROWS) -> float:
    with torch.inference_mode():
        expected = [model(torch.tensor([ids])).logits[0] for ids in rows]
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


def make_small(kind: str, folder: Path) -> Any:
    import transformers

    torch.manual_seed(3)
    if kind == "GPT2":
        config = transformers.GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=4)
    else:
        more = {"head_dim": 16, "query_pre_attn_scalar": 16} if kind == "Gemma2" else {}
        tied = {"tie_word_embeddings": kind not in ("Llama", "Mistral")}
        config = getattr(transformers, f"{kind}Config")(**SMALL, **more, **tied)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return model


# Untied heads, biases, soft caps and scaled embeddings, learned positions.
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Gemma2", "GPT2"])
def test_same_logits_as_the_whole_model(kind: str, tmp_path: Path) -> None:
    whole = make_small(kind, tmp_path)
    assert distance(logits_of(streamed(tmp_path)), whole) < 1e-4


def test_adapter_is_merged_and_its_twin_differs(tiny_model_dir: Path, tmp_path: Path) -> None:
    adapter_dir = make_adapter(tmp_path / "run/adapter", tiny_model_dir)
    whole = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    merged, _, identity = _read_folder(adapter_dir, None)
    assert identity["kind"] == "adapter"
    assert identity["name"] == "run/adapter"
    assert str(tmp_path) not in json.dumps(identity)
    found = logits_of(StreamedModel(merged))
    # Without the adapter it is another model: the twin.
    assert distance(found, whole) > 0.01
    with torch.no_grad():
        for name in merged.adapted:
            whole.get_parameter(name).copy_(torch.from_numpy(merged.weights[name].rows()[0]))
    assert distance(found, whole) < 1e-4


def test_one_changed_weight_is_seen(tmp_path: Path) -> None:
    whole = make_small("Llama", tmp_path)
    model = streamed(tmp_path)
    with torch.no_grad():
        whole.model.layers[1].mlp.up_proj.weight[3, 5] += 1
    assert distance(logits_of(model), whole) > 1e-3


def test_batches_change_nothing(tmp_path: Path) -> None:
    make_small("Llama", tmp_path)
    model = streamed(tmp_path)
    together = model.hidden(ROWS)
    model._activation_bytes = 1
    assert [len(batch) for batch in model._batches(ROWS)] == [1] * len(ROWS)
    alone = model.hidden(ROWS)
    assert max(float((a - b).abs().max()) for a, b in zip(together, alone, strict=True)) < 1e-5
    # Nothing stays in memory: every weight of the decoder's layers is on no device again.
    layers = model._decoder.layers.parameters()
    assert {parameter.device.type for parameter in layers} == {"meta"}


def test_missing_weight_is_one_error(tmp_path: Path) -> None:
    make_small("Llama", tmp_path)
    tensors = read_tensor_index(tmp_path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    weights = {name: MergedWeight(name, info) for name, info in tensors.items()}
    config = read_json(tmp_path / "config.json")
    with pytest.raises(CommandError, match=r"model\.layers\.1\.mlp\.up_proj") as caught:
        StreamedModel(MergedModel(weights, config))
    assert caught.value.exit_code == MODEL
    with pytest.raises(CommandError, match="cannot build"):
        StreamedModel(MergedModel(weights, {**config, "model_type": "no-such-model"}))


def test_reference_reads_where_an_answer_ends(tmp_path: Path) -> None:
    whole = make_small("Llama", tmp_path)
    with torch.no_grad():
        whole.lm_head.weight.mul_(60)  # so that it is sure of what follows
    whole.save_pretrained(tmp_path)
    ids = [5, 17, 300, 4, 9, 81]
    with torch.inference_mode():
        shares = whole(torch.tensor([ids])).logits[0].softmax(dim=1)
    best = int(shares[3].argmax())
    assert shares[3, best] > 0.5
    first = next(at for at in range(1, 6) if shares[at, best] > 0.5)
    model = streamed(tmp_path)
    # What position 3 predicts is the token at place 4; places before `start` are the prompt's.
    assert find_end(model, ids, 2, [best]) == first + 1
    unlikely = int(shares[1:].max(dim=0).values.argmin())
    assert find_end(model, ids, 2, [unlikely]) is None
    assert find_end(model, ids, 2, []) is None


def test_log_probabilities_are_those_of_the_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_small("Llama", tmp_path)
    rows = tuple(Row(ids, [], []) for ids in ROWS)
    written = ReferenceLogits(tmp_path, 512, rows, "fixed conversations")
    evaluate(streamed(tmp_path), written)
    logits = ReferenceLogits.open(tmp_path)
    assert logits == written
    assert (logits.positions, logits.longest) == (23, 12)
    with torch.inference_mode():
        expected = whole(torch.tensor([ROWS[1]])).logits[0].log_softmax(dim=1)
    found = torch.from_numpy(logits.log_probs(6, 3))
    assert float((found - expected).abs().max()) < 1e-4
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Disk", (), {"free": 1000}))
    with pytest.raises(CommandError, match="--max-tokens") as caught:
        evaluate(streamed(tmp_path), logits)
    assert caught.value.exit_code == FAILED


MEASURE = """
import sys
from pathlib import Path
from export.verify_reference import open_reference, evaluate
from export.verify_divergence import ReferenceLogits
from export.verify_rows import Row
import torch, transformers
from transformers import AutoModelForCausalLM
import accelerate

def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1e3

with open_reference(Path(sys.argv[1])) as reference:
    before = peak()
    rows = tuple(Row(list(range(1, 401)), [], []) for _ in range(2))
    folder = Path(sys.argv[2])
    evaluate(reference.model, ReferenceLogits(folder, reference.vocab_size, rows, ""))
    print(peak() - before)
"""


def test_memory_stays_far_below_the_model(default_model_dir: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(default_model_dir), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, **_GIVE_BACK},
        capture_output=True,
        text=True,
        check=True,
    )
    # SmolLM2-135M is 538 MB in float32, its embedding alone 113 MB.
    assert float(done.stdout) < 300


def test_reference_tokenizes_as_training_does(tiny_adapter_dir: Path) -> None:
    from export.verify_corpus import CONVERSATIONS
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
