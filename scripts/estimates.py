"""What a run will need: memory for training, RAM for the later stages, disk for all files.

Every constant is explained where it stands; tests/test_estimates.py holds the measurements.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.held_out import MAX_TOKENS
from scripts.machine import Machine, choose_precision
from scripts.model_shape import ModelShape
from scripts.recipe import EMBEDDED_MODEL, TrainingRecipe

# NF4 is half a byte; scales per 64 weights, themselves quantized (double quant), add 0.127 bits.
NF4_BYTES = 0.516
# Adapter, its gradient, and AdamW's two moments, each in fp32.
TRAINED_BYTES = {"adapter": 4, "gradients": 4, "optimizer": 8}
# Of the process after `import unsloth, trl`; CUDA: context, cuBLAS and bitsandbytes workspaces.
CPU_OVERHEAD_BYTES, CUDA_OVERHEAD_BYTES = 950_000_000, 1_200_000_000
# Host side of a CUDA process: CUDA and torch libraries, pinned buffers.
CUDA_HOST_BYTES = 3_000_000_000
# The loss is computed in chunks of at most so many fp32 logits; logits, softmax and gradient live
# together. Unsloth's CUDA kernel takes larger chunks.
CPU_LOGITS, CUDA_LOGITS, LOGIT_BYTES = 1 << 24, 1 << 26, 3 * 4
# Held-out loss keeps whole logits: 16-bit, the picked rows, fp32, log-softmax, also 12 bytes; a
# forward pass takes MAX_TOKENS, or one longer row.
# Layers' worth of tensors alive while one layer runs backward: recomputed activations, their
# gradients, fp32 temporaries. Measured with checkpointing on a CPU; fused CUDA kernels need fewer.
CPU_WORKING_LAYERS, CUDA_WORKING_LAYERS = 4, 2
# What the allocator holds over what is alive: glibc's fragments / torch's cached blocks.
CPU_SLACK, CUDA_SLACK = 1.5, 1.1
# Export streams portions of rows. Libraries, its parent process and the allocator: a model of 1.2 B
# weights took 0.70 GB in all on two threads (three types at a time), one of 26 M 0.51 GB.
EXPORT_BASE_BYTES = 600_000_000
# float32 values of a portion, and how many of its size each thread, and two more, keep in the air
# (PORTION_WEIGHTS and _check_memory of export).
PORTION_WEIGHTS, PORTION_COPIES = 1 << 20, 3
# Verification streams the reference layer by layer: PyTorch, transformers and hidden states, then
# activations (at least so much, or as much as a layer). Its log-probabilities of so many positions
# lie on the disk meanwhile (verify_streaming and verify_rows of export).
VERIFY_BASE_BYTES, VERIFY_ACTIVATION_BYTES, VERIFY_POSITIONS = 900_000_000, 256 << 20, 2048
# llama.cpp maps a file, which needs no memory of its own, and rearranges 4-bit blocks and such into
# a copy: 0.53 GB for a Q4_0 of 0.69 GB, 0.04 GB for Q8_0 and F16 (x86 with AVX-512).
MAPPED_ONLY = ("F32", "BF16", "F16", "Q8_0")
# Bits per weight of llama.cpp's types; a little more where rows are no multiple of 256.
BITS_PER_WEIGHT = {
    "F32": (32.0, 32.0),
    "F16": (16.0, 16.0),
    "Q8_0": (8.5, 8.5),
    "Q6_K": (6.56, 8.5),
    "Q5_K_M": (5.7, 6.8),
    "Q5_K_S": (5.55, 6.6),
    "Q4_K_M": (4.85, 6.3),
    "Q4_K_S": (4.6, 6.0),
    "Q4_0": (4.6, 5.4),
}
GGUF_METADATA_BYTES = TOKENIZER_BYTES = 16 << 20


@dataclass(frozen=True)
class Workload:
    """Token counts of the training rows, in the order in which training takes them.

    Attributes:
        lengths: Tokens of each row.
        padded: Whether rows of a micro-batch are padded to its longest, or laid end to end.
    """

    lengths: Sequence[int]
    padded: bool = True

    def micro_batches(self, batch_size: int, max_length: int, rows: int | None = None) -> list[int]:
        """Give the tokens that each micro-batch computes on, padding included."""
        cut = [min(length, max_length) for length in self.lengths[:rows]]
        groups = [cut[at : at + batch_size] for at in range(0, len(cut), batch_size)]
        return [max(group) * len(group) if self.padded else sum(group) for group in groups]

    def biggest(self, recipe: TrainingRecipe) -> int:
        """Give the tokens of the biggest micro-batch; a full one where no rows are known yet."""
        batch_size, max_length = recipe.per_device_train_batch_size, recipe.max_length
        return max(self.micro_batches(batch_size, max_length), default=batch_size * max_length)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by purpose, on the device that trains."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    overhead: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(dataclasses.astuple(self))


def activation_bytes(shape: ModelShape, r: int, num_modules: int, width: int, fused: bool) -> int:
    """Count what autograd keeps of one token in one layer.

    Args:
        shape: Of the model.
        r: Rank of the adapter.
        num_modules: Adapted projections in a layer.
        width: Bytes of an activation: 2 under autocast, 4 in fp32.
        fused: Unsloth's CUDA kernels, which keep less; on a CPU each operation keeps its inputs.
    """
    h, q, mlp = shape.hidden, shape.q_width, shape.intermediate
    rank = num_modules * r * width  # A's outputs, which B's gradient needs
    if fused:
        norms = 2 * h * width  # inputs of both norms
        projections = 2 * h * width  # inputs of q/k/v and of gate/up
        attention = 4 * q * width  # q, k, v (kv heads repeated, as xformers wants it) and output
        return norms + projections + attention + 2 * mlp * width + rank  # gate and up
    norms = 2 * h * 4  # inputs of both norms, which compute in fp32
    projections = 2 * h * width  # normalised inputs of q/k/v and of gate/up
    attention = 5 * q * width + 4 * shape.heads  # q, repeated k and v, output, o_proj's copy, lse
    return norms + projections + attention + 4 * mlp * width + rank  # gate, silu, up, product


def estimate_memory(
    shape: ModelShape, recipe: TrainingRecipe, machine: Machine, tokens: int
) -> MemoryEstimate:
    """Estimate the peak of training on the device that trains.

    Args:
        shape: Of the base model.
        recipe: 4 bits or 16, rank and modules, checkpointing.
        machine: Its device decides kernels, precision and overhead.
        tokens: Tokens of the biggest micro-batch, padding included.
    """
    on_cuda = machine.device == "cuda"
    fused = on_cuda and recipe.backend == "unsloth"
    width = 4 if choose_precision(machine.capability, machine.cpu_bf16).name == "fp32" else 2
    parameters, modules = shape.parameters, recipe.lora_target_modules
    weights = width * (parameters.total - parameters.linear)
    if recipe.load_in_4bit:
        largest = shape.hidden * max(shape.intermediate, shape.q_width)
        weights += int(NF4_BYTES * parameters.linear) + width * largest  # one is unpacked at a time
    else:
        weights += width * parameters.linear
    layer = activation_bytes(shape, recipe.lora_r, len(modules), width, fused)
    kept = layer * shape.layers
    if recipe.use_gradient_checkpointing:
        # Only each layer's input stays; Unsloth moves even that from the GPU to the host.
        kept = 0 if fused else offloaded_bytes(shape, 1, width)
    working = layer * (CUDA_WORKING_LAYERS if fused else CPU_WORKING_LAYERS)
    slack = CUDA_SLACK if on_cuda else CPU_SLACK
    activations = int(slack * tokens * (kept + working))
    logits = min(tokens * shape.vocab, CUDA_LOGITS if on_cuda else CPU_LOGITS) * LOGIT_BYTES
    # A held-out pass keeps no activations, so the larger of the two moments counts.
    logits = max(logits, held_out_bytes(shape, recipe) - activations)
    trained = shape.lora_parameters(recipe.lora_r, modules)
    return MemoryEstimate(
        weights=weights,
        activations=activations,
        logits=logits,
        overhead=CUDA_OVERHEAD_BYTES if on_cuda else CPU_OVERHEAD_BYTES,
        **{part: trained * size for part, size in TRAINED_BYTES.items()},
    )


def held_out_bytes(shape: ModelShape, recipe: TrainingRecipe) -> int:
    """Count the logits of one forward pass over held-out rows."""
    return max(MAX_TOKENS, recipe.max_length) * shape.vocab * LOGIT_BYTES


def offloaded_bytes(shape: ModelShape, tokens: int, width: int = 2) -> int:
    """Count the layer inputs that checkpointing keeps."""
    return tokens * shape.layers * shape.hidden * width


def estimate_ram(
    shape: ModelShape,
    recipe: TrainingRecipe,
    machine: Machine,
    tokens: int,
    quantizations: Sequence[str],
) -> dict[str, int]:
    """Estimate the host memory of each stage besides training on a CPU.

    `training` (with a GPU only): libraries and the layer inputs moved off the GPU. `evaluation`
    (without one): the model in 16 bits, in fp32 where the CPU has no bf16, and whole logits.
    `export` and `verification` (with GGUF types): see `export_ram` and `verification_ram`.
    """
    total = shape.parameters.total
    stages = {}
    if quantizations:
        stages["export"] = export_ram(shape, machine.cpu_threads)
        stages["verification"] = verification_ram(shape, quantizations)
    if machine.device == "cuda":
        kept = offloaded_bytes(shape, tokens) if recipe.use_gradient_checkpointing else 0
        return {"training": CUDA_HOST_BYTES + kept, **stages}
    width = 2 if machine.cpu_bf16 else 4
    evaluation = CPU_OVERHEAD_BYTES + width * total + held_out_bytes(shape, recipe)
    return {"evaluation": evaluation, **stages}


def export_ram(shape: ModelShape, threads: int) -> int:
    """Estimate the memory of an export, whatever the number of its types.

    Only what llama.cpp's converter rearranges is there as a whole, before and after: the largest
    such tensor is q of the attention.
    """
    rearranged = 2 * shape.hidden * shape.q_width
    portions = PORTION_COPIES * (threads + 2) * PORTION_WEIGHTS
    return EXPORT_BASE_BYTES + 4 * (rearranged + portions)


def verification_ram(shape: ModelShape, quantizations: Sequence[str]) -> int:
    """Estimate the memory of a verification: of the reference, then of llama.cpp beside it.

    The reference has one layer in float32 and its activations; it waits, without them, while
    llama.cpp has one file after the other.
    """
    layer = 4 * shape.parameters.linear // shape.layers
    reference = layer + max(VERIFY_ACTIVATION_BYTES, layer)
    copied = [gguf_bytes(shape, kind) for kind in quantizations if kind not in MAPPED_ONLY]
    return VERIFY_BASE_BYTES + max(reference, *copied, 0)


@dataclass(frozen=True)
class DiskEstimate:
    """Bytes by purpose; ``downloads`` by hub name.

    Attributes:
        quantized: GGUF files by type, F16 like any other: only if it is asked for.
        verification: What verification writes beside the files, and removes at its end.
    """

    checkpoints: int
    adapter: int
    quantized: dict[str, int]
    verification: int
    downloads: dict[str, int]

    @property
    def export_peak(self) -> int:
        """Most that an export holds at a time: its files, and nothing else."""
        return sum(self.quantized.values())

    @property
    def verification_peak(self) -> int:
        """Most that is there while the files are verified."""
        return self.export_peak + self.verification

    def by_purpose(self) -> dict[str, int]:
        """Sum up by folder: ``run``, ``checkpoints`` and ``downloads``."""
        return {
            "run": self.adapter + self.verification_peak,
            "checkpoints": self.checkpoints,
            "downloads": sum(self.downloads.values()),
        }


def estimate_disk(
    shape: ModelShape,
    recipe: TrainingRecipe,
    quantizations: Sequence[str],
    cached: Sequence[str] = (),
) -> DiskEstimate:
    """Estimate what training, export and verification write.

    The export goes from base and adapter to the files in one pass: the only other copy of the model
    is the download. All are priced before training starts.

    Args:
        shape: Of the base model.
        recipe: Its model name, adapter and ``save_total_limit``.
        quantizations: GGUF types that the export is asked for; none = no export.
        cached: Hub names that are downloaded already.
    """
    trained = shape.lora_parameters(recipe.lora_r, recipe.lora_target_modules)
    adapter = TRAINED_BYTES["adapter"] * trained + TOKENIZER_BYTES
    checkpoint = adapter + TRAINED_BYTES["optimizer"] * trained
    # Beside the limit: the best one, and the new one, before the trainer removes the oldest.
    num_checkpoints = recipe.save_total_limit + 2
    return DiskEstimate(
        checkpoints=num_checkpoints * checkpoint,
        adapter=adapter,
        quantized={kind: gguf_bytes(shape, kind) for kind in quantizations},
        verification=4 * VERIFY_POSITIONS * shape.vocab if quantizations else 0,
        downloads={
            name: size for name, size in _downloads(shape, recipe).items() if name not in cached
        },
    )


def gguf_bytes(shape: ModelShape, kind: str) -> int:
    """Estimate the size of a GGUF file; an unknown type is priced as F16."""
    regular, irregular = BITS_PER_WEIGHT.get(kind.upper(), BITS_PER_WEIGHT["F16"])
    even = all(width % 256 == 0 for width in (shape.hidden, shape.intermediate, shape.q_width))
    return int(shape.parameters.total * (regular if even else irregular) / 8) + GGUF_METADATA_BYTES


def _downloads(shape: ModelShape, recipe: TrainingRecipe) -> dict[str, int]:
    """Give the hub repositories that training and export load, and their sizes.

    A name that ends in ``bnb-4bit`` is a quantized mirror: the export takes the 16-bit original.
    """
    name = recipe.model_name_or_path
    if name == EMBEDDED_MODEL or Path(name).exists():
        return {}
    parameters = shape.parameters
    full = 2 * parameters.total
    original = name.removesuffix("-bnb-4bit").removesuffix("-unsloth")
    if original == name:
        return {name: full}
    mirror = int(NF4_BYTES * parameters.linear) + 2 * (parameters.total - parameters.linear)
    return {name: mirror, original: full}
