"""The arithmetic of a merge: W + scale * (B @ A), in float32, as PEFT's own merge does it.

With DoRA (arXiv:2402.09353) each row of that sum then gets the length that training learned.
The order of the operations is that of PEFT's `Linear.get_delta_weight` and `DoraLinearVariant`, so
that a float32 merge gives the same bits.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# Rows are merged in portions of multiples of this many: below it, matrix libraries take another
# kernel, whose sums differ in the last bit from those of the whole product (measured with MKL).
ROW_BLOCK = 64


def merge_rows(
    weight: "np.ndarray",
    a: "np.ndarray",
    b: "np.ndarray",
    scale: float,
    magnitude: "np.ndarray | None" = None,
) -> "np.ndarray":
    """Merge rows of one weight; all arrays are float32.

    Args:
        weight: Rows of W, shape (n, in).
        a: lora_A, shape (r, in).
        b: The same rows of lora_B, shape (n, r).
        scale: The effective scale, see `LoraConfig.scale_of`.
        magnitude: The same rows of DoRA's m, shape (n,).

    Returns:
        A new array of shape (n, in).
    """
    import torch

    delta = torch.from_numpy(b) @ torch.from_numpy(a)
    delta *= scale
    merged = torch.from_numpy(weight) + delta
    if magnitude is not None:
        norms = torch.linalg.norm(merged, dim=1)  # (n,)
        merged *= (torch.from_numpy(magnitude) / norms).view(-1, 1)
    result: np.ndarray = merged.numpy()
    return result


def merge_embedding_rows(
    weight: "np.ndarray", a: "np.ndarray", b: "np.ndarray", scale: float
) -> "np.ndarray":
    """Merge rows of an embedding, whose change is (B @ A) transposed.

    Args:
        weight: Rows of W, shape (n, width).
        a: The same tokens' columns of lora_embedding_A, shape (r, n).
        b: lora_embedding_B, shape (width, r).
        scale: The effective scale.
    """
    import torch

    delta = (torch.from_numpy(b) @ torch.from_numpy(a)).T
    result: np.ndarray = (torch.from_numpy(weight) + delta * scale).numpy()
    return result
