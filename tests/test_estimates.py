"""Estimates against measurements: memory within 30 %, disk by the sizes that were written."""

import dataclasses

import pytest

from scripts.estimates import (
    Workload,
    activation_bytes,
    estimate_disk,
    estimate_memory,
    estimate_ram,
    gguf_bytes,
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
    stages = estimate_ram(MISTRAL, TrainingRecipe(), T4, 2048)
    assert set(stages) == {"training", "export", "verification"}
    assert stages["verification"] > 4 * MISTRAL.parameters.total  # its reference is float32
    assert stages["export"] < 3e9  # one matrix at a time
    assert "training" not in estimate_ram(SMOL, TrainingRecipe(), CPU, 2048)
    # measured: conversion of a TinyLlama-size model peaks at 0.74 GB
    assert 0.74e9 < estimate_ram(TINY_LLAMA, TrainingRecipe(), CPU, 1)["export"] < 2e9


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


def test_disk_counts_all_copies():
    recipe = TrainingRecipe(model_name_or_path="org/tiny", save_total_limit=2)
    disk = estimate_disk(TINY_LLAMA, recipe, ["F16", "Q4_K_M"])
    assert set(disk.quantized) == {"Q4_K_M"}
    assert disk.downloads == {"org/tiny": 2 * 1_100_048_384}
    # the merged copy goes before quantizing, so the peak is F16 and the larger of the two
    assert disk.export_peak == disk.f16 + disk.merged
    needs = disk.by_purpose()
    assert 6.6e9 < sum(needs.values()) < 8e9  # four copies: 2.2 + 2.2 + 2.2, quantized in its place
    many = estimate_disk(TINY_LLAMA, recipe, ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M"])
    assert many.export_peak == many.f16 + sum(many.quantized.values()) > disk.export_peak


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
