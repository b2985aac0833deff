"""Estimates against measurements: memory within 30 %, disk by the sizes that were written."""

import dataclasses
from types import SimpleNamespace

import pytest

from export import stream_gguf, stream_rows, verify_rows, verify_streaming
from export._cli import CommandError
from scripts.estimates import (
    EXPORT_BASE_BYTES,
    PORTION_WEIGHTS,
    VERIFY_ACTIVATION_BYTES,
    VERIFY_POSITIONS,
    Workload,
    activation_bytes,
    estimate_disk,
    estimate_memory,
    estimate_ram,
    export_ram,
    gguf_bytes,
    verification_ram,
)
from scripts.machine import Machine
from scripts.model_shape import ModelShape
from scripts.recipe import TrainingRecipe

# `other`: two norms in each layer and the last one.
SMOL = ModelShape(576, 30, 9, 3, 64, 1536, 49152, True, 61 * 576)
TINY_LLAMA = ModelShape(2048, 22, 32, 4, 64, 5632, 32000, False, 45 * 2048)
MISTRAL = ModelShape(4096, 32, 32, 8, 128, 14336, 32768, False, 65 * 4096)
CPU = Machine("cpu", "CPU", 16_000_000_000, 15_000_000_000, 2, cpu_bf16=True)
T4 = Machine(
    "cuda", "T4", 12_670_000_000, 11_000_000_000, 2, (7, 5), 15_800_000_000, 15_600_000_000
)


# Peak resident memory of training SmolLM2-135M on a CPU: NF4, r=16 on all linear layers, bf16.
@pytest.mark.parametrize(
    ("checkpointing", "tokens", "measured"),
    [
        (False, 4 * 511, 3.75e9),
        (False, 2 * 511, 2.39e9),
        (False, 760, 2.6e9),
        (False, 1100, 2.9e9),
        (False, 1500, 3.8e9),
        (False, 2000, 3.8e9),
        (True, 2 * 511, 1.48e9),
        (True, 4 * 511, 1.78e9),
        (True, 1165, 1.48e9),
        (True, 2330, 2.06e9),
    ],
)
def test_cpu_memory_is_as_measured(checkpointing, tokens, measured):
    recipe = TrainingRecipe(use_gradient_checkpointing=checkpointing)
    assert estimate_memory(SMOL, recipe, CPU, tokens).total == pytest.approx(measured, rel=0.2)


def test_saved_activations_are_as_counted():
    # 737 KB a token over 30 layers, counted with saved-tensor hooks
    assert 30 * activation_bytes(SMOL, 16, 7, 2, fused=False) == pytest.approx(737e3, rel=0.1)


# Reserved memory that Unsloth's notebooks print on a T4: at load, and peak. Without CUDA's context.
@pytest.mark.parametrize(
    ("shape", "recipe", "tokens", "load", "peak"),
    [
        (
            MISTRAL,
            TrainingRecipe(use_gradient_checkpointing=True, max_length=2048),
            2 * 2048,
            4.52e9,
            5.836e9,
        ),
        (TINY_LLAMA, TrainingRecipe(lora_r=32, max_length=4096), 2 * 4096, 0.879e9, 13.508e9),
    ],
)
def test_gpu_memory_is_as_measured(shape, recipe, tokens, load, peak):
    estimate = estimate_memory(shape, recipe, T4, tokens)
    assert estimate.weights == pytest.approx(load, rel=0.15)
    assert estimate.total - estimate.overhead == pytest.approx(peak, rel=0.2)
    assert estimate.total <= T4.gpu_total_bytes  # both runs did fit


def test_parts_add_up_and_follow_the_recipe():
    recipe = TrainingRecipe(lora_r=16, per_device_train_batch_size=2)
    small = estimate_memory(TINY_LLAMA, recipe, CPU, 1000)
    assert small.total == sum(dataclasses.asdict(small).values())
    assert small.optimizer == 2 * small.adapter == 2 * small.gradients
    assert small.adapter == 4 * 25_231_360 // 2

    def total(**changes):
        return estimate_memory(TINY_LLAMA, dataclasses.replace(recipe, **changes), CPU, 1000).total

    assert total(use_gradient_checkpointing=True) < small.total < total(load_in_4bit=False)
    assert total(lora_r=8) < small.total
    assert estimate_memory(TINY_LLAMA, recipe, CPU, 2000).total > small.total
    no_bf16 = dataclasses.replace(CPU, cpu_bf16=False)
    assert estimate_memory(TINY_LLAMA, recipe, no_bf16, 1000).total > small.total


def test_kernels_that_are_not_fused_keep_more():
    recipe = TrainingRecipe(max_length=1024)
    plain = dataclasses.replace(recipe, backend="peft")
    fused_total = estimate_memory(TINY_LLAMA, recipe, T4, 4096).total
    assert estimate_memory(TINY_LLAMA, plain, T4, 4096).total > 1.3 * fused_total


def test_a_large_vocabulary_shows_in_the_held_out_pass():
    # 256 Ki tokens x 1024 positions x 12 bytes = 3.2 GB, more than a short training step takes
    wide = dataclasses.replace(SMOL, vocab=1 << 18)
    recipe = TrainingRecipe(use_gradient_checkpointing=True)
    estimate = estimate_memory(wide, recipe, CPU, 64)
    assert estimate.logits + estimate.activations == 1024 * (1 << 18) * 12


def test_ram_of_later_stages():
    stages = estimate_ram(MISTRAL, TrainingRecipe(), T4, 2048, ["Q4_K_M"])
    assert stages == {
        "training": stages["training"],
        "export": export_ram(MISTRAL, 2),
        "verification": verification_ram(MISTRAL, ["Q4_K_M"]),
    }
    assert "training" not in estimate_ram(SMOL, TrainingRecipe(), CPU, 2048, ["Q4_K_M"])
    assert set(estimate_ram(SMOL, TrainingRecipe(), CPU, 2048, [])) == {"evaluation"}


# All processes of an export together, two threads: models of 26 M and 1.1 to 1.2 B weights.
TINY = ModelShape(256, 2, 4, 2, 64, 512, 49152, False, 5 * 256)


@pytest.mark.parametrize(("shape", "measured"), [(TINY, 0.51e9), (TINY_LLAMA, 0.69e9)])
def test_export_ram_is_as_measured(shape, measured):
    assert export_ram(shape, 2) == pytest.approx(measured, rel=0.3)


def test_export_ram_is_that_of_a_few_portions():
    assert export_ram(MISTRAL, 2) < 1e9  # far below one 16-bit copy of 14.5 GB
    deeper = dataclasses.replace(MISTRAL, layers=320, intermediate=140_000)
    assert export_ram(deeper, 2) == export_ram(MISTRAL, 2)
    wider = dataclasses.replace(MISTRAL, heads=64)  # q as it was and as it will be, in float32
    assert export_ram(wider, 2) - export_ram(MISTRAL, 2) == 2 * 4 * 4096 * 4096
    assert export_ram(MISTRAL, 16) - export_ram(MISTRAL, 2) == 14 * 3 * (4 << 20)


def export_check_says(monkeypatch, shape, threads, available):
    """Ask the export's own check, which knows the real tensors; give what it needs."""
    told = {}
    tensors = [
        SimpleNamespace(shape=(shape.q_width, shape.hidden), weight=None),
        SimpleNamespace(shape=(shape.vocab, shape.hidden), weight=object()),
    ]
    monkeypatch.setattr(stream_gguf, "say", told.update)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=available))
    stream_gguf._check_memory(SimpleNamespace(tensors=tensors), threads)
    return told["memory"]


@pytest.mark.parametrize("threads", [2, 64])
@pytest.mark.parametrize("shape", [SMOL, TINY_LLAMA, MISTRAL])
def test_what_preflight_passes_the_export_does_not_refuse(monkeypatch, shape, threads):
    enough = export_ram(shape, threads)
    needed = export_check_says(monkeypatch, shape, threads, enough)
    assert needed <= enough
    with pytest.raises(CommandError, match="not enough memory: the export needs"):
        export_check_says(monkeypatch, shape, threads, needed - 1)
    # the same terms, beside a base that holds the parent process as well
    assert enough - needed == EXPORT_BASE_BYTES - stream_gguf._LIBRARY_BYTES


def test_numbers_of_other_folders_are_those_of_the_code():
    assert PORTION_WEIGHTS == stream_rows.PORTION_WEIGHTS
    assert VERIFY_POSITIONS == verify_rows.DEFAULT_MAX_TOKENS
    assert VERIFY_ACTIVATION_BYTES == verify_streaming._ACTIVATION_BYTES


def test_verification_ram_is_that_of_a_layer_not_of_the_model():
    # 218 M weights in a layer of Mistral: two times 0.87 GB; in one of SmolLM2 3.5 M
    assert verification_ram(MISTRAL, ["F16"]) == 900_000_000 + 2 * 4 * 218_103_808
    assert verification_ram(SMOL, ["F16"]) == 900_000_000 + (256 << 20) + 4 * 3_538_944
    assert verification_ram(MISTRAL, ["F16"]) < 4 * MISTRAL.parameters.total / 10
    deeper = dataclasses.replace(MISTRAL, layers=64)
    assert verification_ram(deeper, ["F16"]) == verification_ram(MISTRAL, ["F16"])


def test_llama_cpp_rearranges_some_types_into_a_copy():
    mapped = verification_ram(MISTRAL, ["F16", "Q8_0"])  # 14.5 and 7.7 GB that need no memory
    copied = verification_ram(MISTRAL, ["F16", "Q8_0", "Q4_K_M", "Q4_K_S"])  # one at a time
    assert mapped < copied == 900_000_000 + gguf_bytes(MISTRAL, "Q4_K_M")
    # measured: 0.53 GB for a Q4_0 of 0.69 GB (1.17 B weights), 0.04 GB for a Q8_0 of 1.25 GB
    assert gguf_bytes(TINY_LLAMA, "Q4_0") == pytest.approx(0.53e9, rel=0.3)


def test_padding_counts_and_end_to_end_does_not():
    lengths = [10, 20, 600, 5, 7]
    padded, laid = Workload(lengths), Workload(lengths, padded=False)
    assert padded.micro_batches(2, 512) == [40, 1024, 7]
    assert laid.micro_batches(2, 512) == [30, 517, 7]
    assert padded.micro_batches(2, 512, rows=2) == [40]
    recipe = TrainingRecipe(per_device_train_batch_size=2, max_length=512)
    assert (padded.biggest(recipe), laid.biggest(recipe)) == (1024, 517)
    assert Workload([]).biggest(recipe) == 1024  # not known: a full micro-batch


# Written by this project's exports and by llama.cpp, in bytes.
@pytest.mark.parametrize(
    ("shape", "kind", "written"),
    [(TINY_LLAMA, "F16", 2.2e9), (TINY_LLAMA, "Q4_K_M", 0.668e9), (SMOL, "Q4_K_M", 0.105e9)],
)
def test_gguf_sizes(shape, kind, written):
    assert gguf_bytes(shape, kind) == pytest.approx(written, rel=0.2)


def test_unknown_type_is_priced_as_f16():
    assert gguf_bytes(SMOL, "IQ9_Z") == gguf_bytes(SMOL, "F16") > gguf_bytes(SMOL, "q8_0")
    assert gguf_bytes(SMOL, "F32") > 4 * SMOL.parameters.total > gguf_bytes(SMOL, "BF16")


DOWNLOADED = TrainingRecipe(model_name_or_path="org/tiny", save_total_limit=2)


def test_disk_counts_the_download_and_the_files_that_are_asked_for():
    disk = estimate_disk(TINY_LLAMA, DOWNLOADED, ["Q4_K_M"])
    assert disk.downloads == {"org/tiny": 2 * 1_100_048_384}
    assert disk.quantized == {"Q4_K_M": gguf_bytes(TINY_LLAMA, "Q4_K_M")}
    # an export of 1.2 B weights wrote 717,400,000 bytes, and nothing else
    assert disk.export_peak == pytest.approx(0.7174e9 * 1.1 / 1.17, rel=0.05)
    many = estimate_disk(TINY_LLAMA, DOWNLOADED, ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M"])
    assert many.export_peak == sum(many.quantized.values()) > disk.export_peak


def test_f16_counts_where_it_is_asked_for_and_only_there():
    without, with_f16 = (
        estimate_disk(TINY_LLAMA, DOWNLOADED, kinds) for kinds in (["Q8_0"], ["Q8_0", "F16"])
    )
    assert with_f16.export_peak - without.export_peak == gguf_bytes(TINY_LLAMA, "F16")
    assert "F16" not in without.quantized


def test_verification_needs_its_scratch_beside_the_files():
    disk = estimate_disk(SMOL, DOWNLOADED, ["Q8_0"])
    assert disk.verification == 2048 * 49152 * 4  # 0.4 GB
    assert disk.verification_peak == disk.export_peak + disk.verification
    assert disk.by_purpose()["run"] == disk.adapter + disk.verification_peak
    two = estimate_disk(SMOL, DOWNLOADED, ["Q8_0", "F16"])  # one command, one reference
    assert two.verification == disk.verification
    training_only = estimate_disk(SMOL, DOWNLOADED, [])
    assert (training_only.verification_peak, training_only.quantized) == (0, {})
    assert training_only.by_purpose()["run"] == training_only.adapter


def test_a_quantized_mirror_costs_two_downloads():
    recipe = TrainingRecipe(model_name_or_path="unsloth/mistral-7b-v0.3-bnb-4bit")
    downloads = estimate_disk(MISTRAL, recipe, ["Q4_K_M"]).downloads
    assert downloads["unsloth/mistral-7b-v0.3"] == 2 * 7_248_023_552
    assert downloads["unsloth/mistral-7b-v0.3-bnb-4bit"] == pytest.approx(4.14e9, rel=0.01)
    left = estimate_disk(MISTRAL, recipe, [], cached=["unsloth/mistral-7b-v0.3-bnb-4bit"])
    assert list(left.downloads) == ["unsloth/mistral-7b-v0.3"]


def test_local_models_are_not_downloaded(tmp_path):
    for name in (TrainingRecipe().model_name_or_path, str(tmp_path)):
        recipe = TrainingRecipe(model_name_or_path=name)
        assert estimate_disk(SMOL, recipe, ["Q8_0"]).downloads == {}


def test_checkpoints_follow_the_limit():
    one, five = (
        estimate_disk(SMOL, TrainingRecipe(save_total_limit=limit), []).checkpoints
        for limit in (1, 5)
    )
    assert one < five
    # adapter of 4.9 M parameters: 4 + 8 bytes each, and a tokenizer
    assert one == 3 * (12 * 4_884_480 + (16 << 20))
