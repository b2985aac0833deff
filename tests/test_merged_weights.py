"""Every kind of adapter against PEFT: the merged model computes what the adapted one does.

PEFT's `merge_and_unload` is no measure here, it loses the head of some tied models; the logits of
the model that was trained are.
"""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export._cli import MODEL, USAGE, CommandError
from export.adapter_options import Inputs, add_adapter_options, open_inputs, read_inputs
from export.merge_adapter import build_parser, merge_adapter
from export.merged_weights import MergedModel, row_blocks

pytestmark = pytest.mark.model

# No multiples of anything, so that a mix-up of rows shows.
VOCABULARY = 191
GROWN = 200
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# float32 through two layers, relative to the largest logit; the twins differ by more than 1e-3.
CLOSE, FAR = 1e-5, 1e-3

LINEAR = ["q_proj", "down_proj"]
Bases = Callable[..., Path]


def write_tokenizer(folder: Path, num_tokens: int) -> None:
    content = {"model": {"vocab": {f"w{i}": i for i in range(num_tokens)}}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """Give the base of a kind, made once: float32, two layers, ('llama' | 'qwen2', tied or not)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    made: dict[tuple[str, bool], Path] = {}
    kinds: dict[str, Any] = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }

    def give(kind: str, tied: bool) -> Path:
        if (kind, tied) in made:
            return made[kind, tied]
        torch.manual_seed(0)
        config = kinds[kind][0](
            hidden_size=64,
            intermediate_size=100,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            vocab_size=VOCABULARY,
            tie_word_embeddings=tied,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        folder = tmp_path_factory.mktemp("bases") / f"{kind}-{tied}"
        kinds[kind][1](config).save_pretrained(folder)
        write_tokenizer(folder, VOCABULARY)
        made[kind, tied] = folder
        return folder

    return give


def train(base_dir: Path, adapter_dir: Path, resize: int = 0, seed: int = 1, **keys: Any) -> Any:
    """Let PEFT make an adapter, move everything that it would train, and save it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on tied embeddings
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base_dir)
        if resize:
            model.resize_token_embeddings(resize, mean_resizing=False)
        keys = {"target_modules": LINEAR, "r": 4, "lora_alpha": 6, **keys}
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **keys))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if not parameter.requires_grad:
                    continue
                if "magnitude" in name:
                    parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.3))
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        adapted.eval().save_pretrained(adapter_dir)
    return adapted


def logits_of(model: Any, vocabulary: int = VOCABULARY) -> np.ndarray:
    """Run every token once: in rows of the same length, so that all positions are seen."""
    import torch

    ids = torch.arange(vocabulary // 20 * 20).flip(0).reshape(-1, 20)
    last = torch.arange(vocabulary - 20, vocabulary)[None]
    with torch.no_grad():
        logits: np.ndarray = model(torch.cat([ids, last])).logits.numpy()
    return logits


def apart(some: np.ndarray, other: np.ndarray) -> float:
    assert some.shape == other.shape
    return float(np.abs(some - other).max() / np.abs(other).max())


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return content


def tensors_of(folder: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def embed(**keys: Any) -> dict[str, Any]:
    return {"target_modules": ["q_proj", "embed_tokens"], **keys}


def head(**keys: Any) -> dict[str, Any]:
    return {"target_modules": ["q_proj", "lm_head"], **keys}


def both(**keys: Any) -> dict[str, Any]:
    return {"target_modules": ["q_proj", "embed_tokens", "lm_head"], **keys}


def save(*names: str, **keys: Any) -> dict[str, Any]:
    return {"modules_to_save": list(names), **keys}


TIES = {"ensure_weight_tying": True}
# Name: PEFT's options, and whether a tied base stays tied.
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, True),
    "rslora": ({"use_rslora": True}, True),
    "patterns": (
        {"alpha_pattern": {"layers.1.self_attn.q_proj": 3}, "rank_pattern": {"down_proj": 7}},
        True,
    ),
    "dora": ({"use_dora": True}, True),
    "dora_rslora": ({"use_dora": True, "use_rslora": True}, True),
    "norms": (save("input_layernorm", "norm"), True),
    "linear_saved": (save("v_proj"), True),
    "embed": (embed(), False),
    "head": (head(), False),
    "head_dora": (head(use_dora=True), False),
    "both": (both(), False),
    "embed_ties": (embed(**TIES), True),
    "head_ties": (head(**TIES), True),
    "both_ties": (both(**TIES), True),
    "save_embed": (save("embed_tokens"), False),
    "save_head": (save("lm_head"), False),
    "save_both": (save("embed_tokens", "lm_head"), False),
    "save_embed_ties": (save("embed_tokens", **TIES), True),
    "save_head_ties": (save("lm_head", **TIES), True),
    "save_both_ties": (save("embed_tokens", "lm_head", **TIES), True),
    # PEFT ties token rows to a tied head without being asked.
    "tokens": ({"trainable_token_indices": [3, 190, 100]}, True),
    "tokens_ties": ({"trainable_token_indices": [3, 190, 100], **TIES}, True),
    "tokens_named": ({"trainable_token_indices": {"embed_tokens": [3], "lm_head": [3]}}, True),
    "tokens_apart": ({"trainable_token_indices": {"embed_tokens": [3], "lm_head": [7]}}, False),
    "tokens_head": ({"trainable_token_indices": {"lm_head": [7]}}, False),
    "tokens_head_ties": ({"trainable_token_indices": {"lm_head": [7]}, **TIES}, False),
}
GROWN_CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "grown_only": ({}, True),
    "grown_save_both": (save("embed_tokens", "lm_head"), False),
    "grown_save_embed": (save("embed_tokens"), False),
    "grown_save_ties": (save("embed_tokens", **TIES), True),
    "grown_both": (both(), False),
    "grown_both_ties": (both(**TIES), True),
    "grown_tokens": ({"trainable_token_indices": [191, 192, 199]}, True),
}
# PEFT saves only one end of an untied model; on a tied one the other is the same tensor.
TIED_ONLY: dict[str, tuple[dict[str, Any], bool]] = {
    "grown_embed": (embed(), False),
    "grown_head": (head(), False),
    "grown_embed_ties": (embed(**TIES), True),
}


def merged_equals_peft(
    base_dir: Path, tmp_path: Path, keys: dict[str, Any], stays_tied: bool, resize: int = 0
) -> None:
    adapted = train(base_dir, tmp_path / "a", resize, **keys)
    merged = merge_adapter(open_inputs(tmp_path / "a", base_dir), tmp_path / "merged")
    size = resize or VOCABULARY
    theirs = logits_of(adapted, size)
    assert apart(logits_of(loaded(merged), size), theirs) < CLOSE
    config, names = config_of(merged), set(tensors_of(merged))
    assert config["tie_word_embeddings"] == stays_tied
    assert (HEAD in names) != stays_tied
    assert config["vocab_size"] == size
    assert open_inputs(tmp_path / "a", base_dir).model.adapted <= names
    if not resize:
        # The twin: the base alone is another function.
        assert apart(logits_of(loaded(base_dir)), theirs) > FAR


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", CASES)
def test_merged_model_computes_what_peft_does(
    base_of: Bases, tmp_path: Path, case: str, tied: bool
) -> None:
    keys, stays_tied = CASES[case]
    merged_equals_peft(base_of("llama", tied), tmp_path, keys, tied and stays_tied)


@pytest.mark.parametrize(
    ("case", "tied"),
    [(case, tied) for case in GROWN_CASES for tied in (False, True)]
    + [(case, True) for case in TIED_ONLY],
)
def test_vocabulary_that_grew_is_merged(
    base_of: Bases, tmp_path: Path, case: str, tied: bool
) -> None:
    keys, stays_tied = (GROWN_CASES | TIED_ONLY)[case]
    merged_equals_peft(base_of("llama", tied), tmp_path, keys, tied and stays_tied, GROWN)


def test_grown_embedding_may_be_the_last_tensor_of_its_file(base_of: Bases, tmp_path: Path) -> None:
    """Its rows are compared with its own source: the base's end where the file does."""
    from safetensors.numpy import save_file

    base_dir = base_of("llama", False)
    adapted = train(base_dir, tmp_path / "a", GROWN, **both())
    tensors = tensors_of(base_dir)
    split = tmp_path / "split"
    split.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (split / name).write_bytes((base_dir / name).read_bytes())
    shards = {"1.safetensors": [EMBEDDING], "2.safetensors": sorted(tensors.keys() - {EMBEDDING})}
    for shard, names in shards.items():
        save_file({name: tensors[name] for name in names}, split / shard, {"format": "pt"})
    places = {name: shard for shard, names in shards.items() for name in names}
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (split / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    merged = merge_adapter(open_inputs(tmp_path / "a", split), tmp_path / "m")
    assert apart(logits_of(loaded(merged), GROWN), logits_of(adapted, GROWN)) < CLOSE
    written = json.loads((merged / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert written["weight_map"] == places
    grown = 2 * (GROWN - VOCABULARY) * 64 * 4  # both ends, width 64, float32
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert written["metadata"]["total_size"] == size + grown


@pytest.mark.parametrize(("keys", "rows"), [(embed(), (200, 191)), (head(), (191, 200))])
def test_vocabulary_that_grew_at_one_end_is_refused(
    base_of: Bases, tmp_path: Path, keys: dict[str, Any], rows: tuple[int, int]
) -> None:
    train(base_of("llama", False), tmp_path / "a", GROWN, **keys)
    refused(
        f"the adapter's embedding has {rows[0]} tokens, its lm_head.weight {rows[1]}; train again "
        "with both in modules_to_save",
        tmp_path / "a",
    )


@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_trained_biases_are_merged(base_of: Bases, tmp_path: Path, bias: str, tied: bool) -> None:
    keys = {"bias": bias, "target_modules": ["q_proj", "v_proj"]}
    merged_equals_peft(base_of("qwen2", tied), tmp_path, keys, tied)
    base, merged = tensors_of(base_of("qwen2", tied)), tensors_of(tmp_path / "merged")
    changed = {
        name for name in base if "bias" in name and not np.array_equal(base[name], merged[name])
    }
    assert len(changed) == (4 if bias == "lora_only" else 6)


def test_tokenizer_may_know_as_many_tokens_as_the_grown_model(
    base_of: Bases, tmp_path: Path
) -> None:
    train(base_of("llama", True), tmp_path / "a", GROWN, **save("embed_tokens", **TIES))
    write_tokenizer(tmp_path / "a", GROWN)
    merged = merge_adapter(open_inputs(tmp_path / "a"), tmp_path / "m")
    assert (merged / "tokenizer.json").read_bytes() == (tmp_path / "a/tokenizer.json").read_bytes()
    write_tokenizer(tmp_path / "a", GROWN + 1)
    with pytest.raises(CommandError, match="knows token 200, the model has 200 rows") as caught:
        merge_adapter(open_inputs(tmp_path / "a"), tmp_path / "m2")
    assert caught.value.exit_code == MODEL


@pytest.mark.parametrize("keys", [{}, {"use_dora": True}, both()], ids=["lora", "dora", "both"])
def test_float32_merge_has_pefts_bits(base_of: Bases, tmp_path: Path, keys: dict[str, Any]) -> None:
    base_dir = base_of("llama", False)
    adapted = train(base_dir, tmp_path / "a", **keys)
    theirs = {k: v.numpy() for k, v in adapted.merge_and_unload().state_dict().items()}
    inputs = open_inputs(tmp_path / "a")
    ours, base = tensors_of(merge_adapter(inputs, tmp_path / "m")), tensors_of(base_dir)
    assert ours.keys() == theirs.keys() == inputs.model.weights.keys()
    for name, weight in inputs.model.weights.items():
        assert np.array_equal(ours[name], theirs[name]), name
        assert np.array_equal(ours[name], base[name]) == (name not in inputs.model.adapted)
        whole, changed = weight.rows()
        assert changed == (name in inputs.model.adapted)
        for per_block in (1, 128):
            parts = [weight.rows(*block) for block in row_blocks(weight.shape[0], per_block)]
            assert np.array_equal(np.concatenate([rows for rows, _ in parts]), theirs[name]), name
            assert all(differs == changed for _, differs in parts)
        assert np.array_equal(whole, theirs[name])


def test_token_rows_land_in_their_portions(base_of: Bases, tmp_path: Path) -> None:
    indices = [190, 64, 63, 0]
    train(base_of("llama", True), tmp_path / "a", trainable_token_indices=indices)
    model = open_inputs(tmp_path / "a").model
    (trained,) = model.weights[EMBEDDING].tokens
    whole, _ = model.weights[EMBEDDING].rows()
    base = tensors_of(base_of("llama", True))[EMBEDDING]
    parts = [model.weights[EMBEDDING].rows(*block)[0] for block in row_blocks(VOCABULARY, 1)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert {row for row in range(VOCABULARY) if not np.array_equal(whole[row], base[row])} == set(
        indices
    )
    assert trained.indices == tuple(indices)


def refused(match: str, *args: Any, code: int = MODEL, **keys: Any) -> None:
    with pytest.raises(CommandError, match=match) as caught:
        open_inputs(*args, **keys)
    assert caught.value.exit_code == code
    assert "\n" not in str(caught.value)


def test_token_beyond_the_vocabulary_is_refused(base_of: Bases, tmp_path: Path) -> None:
    train(base_of("llama", True), tmp_path / "a", trainable_token_indices=[3, 190])
    path = tmp_path / "a/adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for tokens in ([3, 191], [3, -1]):
        path.write_text(json.dumps(config | {"trainable_token_indices": tokens}), encoding="utf-8")
        refused(f"another base: it trained token .*, '{EMBEDDING}' has 191 rows", tmp_path / "a")
    path.write_text(json.dumps(config), encoding="utf-8")
    assert open_inputs(tmp_path / "a").model.num_embeddings == VOCABULARY


# --- Several adapters ---


@pytest.fixture(scope="module")
def pair(base_of: Bases, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two LoRAs of the untied base, with other ranks, scales and modules."""
    folder = tmp_path_factory.mktemp("pair")
    train(base_of("llama", False), folder / "one", target_modules=["q_proj", "v_proj"])
    keys = {"r": 8, "lora_alpha": 4, "use_rslora": True, "seed": 2}
    train(base_of("llama", False), folder / "two", **keys)
    return folder / "one", folder / "two"


def sum_by_hand(base_dir: Path, terms: list[tuple[Path, float, float]]) -> dict[str, np.ndarray]:
    """W + sum of w * s * B @ A in float64; a term is an adapter, its weight w and its scale s."""
    from safetensors.numpy import load_file

    total = {name: tensor.astype(np.float64) for name, tensor in tensors_of(base_dir).items()}
    for folder, weight, scale in terms:
        factors = load_file(folder / "adapter_model.safetensors")
        for key in [key for key in factors if ".lora_A" in key]:
            a, b = (
                factors[key.replace("lora_A", part)].astype(float) for part in ("lora_A", "lora_B")
            )
            name = key.removeprefix("base_model.model.").replace(".lora_A", "")
            total[name] += weight * scale * (b @ a)
    return total


def largest_error(model: MergedModel, expected: dict[str, np.ndarray]) -> float:
    assert model.weights.keys() == expected.keys()
    return max(
        float(np.abs(weight.rows()[0] - expected[name]).max())
        for name, weight in model.weights.items()
    )


def test_weighted_adapters_add_up(base_of: Bases, pair: tuple[Path, Path]) -> None:
    one, two = pair
    base_dir = base_of("llama", False)
    model = open_inputs(one, weight=0.5, more=[(two, -0.25)]).model
    terms = [(one, 0.5, 6 / 4), (two, -0.25, 4 / math.sqrt(8))]
    assert largest_error(model, sum_by_hand(base_dir, terms)) < 1e-6
    assert len(model.adapted) == 6  # q, v, down in two layers: the union
    # Twins: weights exchanged, one left out, rsLoRA forgotten.
    for twin in (
        [(one, -0.25, 6 / 4), (two, 0.5, 4 / math.sqrt(8))],
        terms[:1],
        [terms[0], (two, -0.25, 4 / 8)],
    ):
        assert largest_error(model, sum_by_hand(base_dir, twin)) > FAR


def test_weighted_adapters_equal_pefts_concatenation(
    base_of: Bases, pair: tuple[Path, Path]
) -> None:
    from peft import PeftModel

    one, two = pair
    base_dir = base_of("llama", False)
    model = PeftModel.from_pretrained(loaded(base_dir), one, adapter_name="one")
    model.load_adapter(two, adapter_name="two")
    model.add_weighted_adapter(["one", "two"], [0.5, 2.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    theirs = {k: v.numpy() for k, v in model.merge_and_unload().state_dict().items()}
    ours = open_inputs(one, weight=0.5, more=[(two, 2.0)]).model
    assert largest_error(ours, theirs) < 1e-6


def test_lora_of_an_embedding_may_be_weighted(base_of: Bases, tmp_path: Path) -> None:
    base_dir = base_of("llama", False)
    train(base_dir, tmp_path / "a", **embed())
    base = tensors_of(base_dir)[EMBEDDING]
    whole, half = (
        open_inputs(tmp_path / "a", weight=weight).model.weights[EMBEDDING].rows()[0] - base
        for weight in (1.0, 0.5)
    )
    assert np.abs(whole).max() > FAR
    assert np.allclose(half, whole / 2, atol=1e-6)


def test_what_cannot_be_added_up_is_refused(
    base_of: Bases, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base_dir = base_of("llama", False)
    train(base_dir, tmp_path / "dora", use_dora=True)
    train(base_dir, tmp_path / "saved", **save("lm_head"))
    train(base_dir, tmp_path / "rows", trainable_token_indices=[1])
    train(base_dir, tmp_path / "grown", GROWN)
    train(base_of("llama", True), tmp_path / "wide", target_modules=["embed_tokens"])
    alone = "Export it alone, with weight 1"
    for name, kind in (
        ("dora", "is a DoRA"),
        ("saved", r"is trained in full: lm_head\.weight"),
        ("rows", r"is trained in full: model\.embed_tokens\.weight"),
        ("grown", r"is trained in full: lm_head\.weight, model\.embed_tokens\.weight"),
    ):
        message = f"adapter '.*{name}' {kind}; only LoRA .*{alone}"
        refused(message, tmp_path / name, weight=0.5)
        refused(message, tmp_path / name, more=[(pair[0], 1.0)])
        refused(message, pair[0], more=[(tmp_path / name, 1.0)])
        assert open_inputs(tmp_path / name).model.weights  # alone it is taken


def test_second_adapter_must_be_of_the_same_base(pair: tuple[Path, Path], tmp_path: Path) -> None:
    import shutil

    other = Path(shutil.copytree(pair[1], tmp_path / "run/adapter"))
    content = {"base_model": {"name": "x", "fingerprint": "0" * 64}}
    (tmp_path / "run/provenance.json").write_text(json.dumps(content), encoding="utf-8")
    refused("another base: provenance.json says fingerprint 000000", pair[0], more=[(other, 1.0)])
    (tmp_path / "run/provenance.json").unlink()
    assert open_inputs(pair[0], more=[(other, 1.0)]).adapters[1][1] == 1.0


def parsed(*argv: str) -> Inputs:
    return read_inputs(build_parser().parse_args([*argv, "--output", "x"]))


def test_weights_are_read_from_the_command_line(pair: tuple[Path, Path], tmp_path: Path) -> None:
    import shutil

    one, two = map(str, pair)
    inputs = parsed(one, "--weight", "0.75", "--add-adapter", f"{two}=0.5", "--add-adapter", one)
    assert [(str(adapter.path), weight) for adapter, weight in inputs.adapters] == [
        (one, 0.75),
        (two, 0.5),
        (one, 1.0),
    ]
    odd = str(shutil.copytree(two, tmp_path / "lr=0.5"))
    for text, weight in ((odd, 1.0), (f"{odd}=2", 2.0), (f"{odd}=-1e-1", -0.1)):
        (_, (adapter, got)) = parsed(one, "--add-adapter", text).adapters
        assert (str(adapter.path), got) == (odd, weight)


@pytest.mark.parametrize("number", ["0", "nan", "inf", "x", "", "1,5", "-0.0"])
def test_bad_weights_are_refused(pair: tuple[Path, Path], number: str) -> None:
    with pytest.raises(CommandError, match=f"=.*'{number}' is no weight; expected DIR=N") as caught:
        parsed(str(pair[0]), "--add-adapter", f"{pair[1]}={number}")
    assert caught.value.exit_code == USAGE


@pytest.mark.parametrize("number", ["0", "nan", "-inf"])
def test_bad_weight_of_the_first_is_refused(pair: tuple[Path, Path], number: str) -> None:
    with pytest.raises(CommandError, match=f"--weight {number}; expected a number") as caught:
        parsed(str(pair[0]), f"--weight={number}")
    assert caught.value.exit_code == USAGE


def test_options_are_the_same_for_every_command() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    add_adapter_options(parser)
    args = parser.parse_args(["a"])
    assert (args.base, args.weight, args.add_adapter) == (None, 1.0, [])
