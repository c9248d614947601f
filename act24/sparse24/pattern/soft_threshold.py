"""Soft thresholding to 2:4 (S-STE, arXiv 2409.09099), and the scale that goes with it.

Of every four entries the two of largest magnitude stay, less the third magnitude; the function is continuous
where two magnitudes change places. It makes magnitudes smaller, so its result S(a) is multiplied by one
scalar, β = ⟨a, S⟩ / ⟨S, S⟩. Every entry of S has the sign of the entry of a and at most its magnitude; so ⟨a,
S⟩ ≥ ⟨S, S⟩, and β is at least 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from act24.operation import operation
from act24.sparse24.pattern.selection import top2_of_4

#: The range that β is clamped to. Theory says 1 or more; without the upper end β grows without bound where
#: all entries are nearly equal.
SCALE_RANGE = (1.0, 2.0)


def third_largest(magnitude: Tensor, mask: Tensor) -> Tensor:
    """The larger of the two magnitudes that a mask drops.

    Args:
        magnitude: non-negative `[..., K]`, K a multiple of 4.
        mask: boolean `[..., K]`, that of `top2_of_4`.

    Returns:
        `[..., K]`: the same number for all four of a group.
    """
    dropped = torch.where(mask, 0, magnitude).unflatten(-1, (-1, 4))
    return dropped.amax(dim=-1, keepdim=True).expand_as(dropped).flatten(-2)


@operation
def soft_threshold24(x: Tensor) -> Tensor:
    """S(x): sign(x) · (|x| - t) on the two largest of every four, t the third magnitude; else 0.

    Args:
        x: `[..., K]`, K a multiple of 4. NaN stays.

    Returns:
        `[..., K]`, at most two non-zeros in every group. The gradient passes through the two that stay, as
        if t were constant: the exact one has -sign at a third position and so is not 2:4.

    Raises:
        ValueError: K is not a multiple of 4.
    """
    magnitude = x.detach().abs()
    mask = top2_of_4(magnitude)
    return torch.where(mask, x - x.detach().sign() * third_largest(magnitude, mask), 0)


def scale_sums(full: Tensor, sparse: Tensor) -> Tensor:
    """What `scale_from_sums` divides; sums add up over tensors and processes.

    Args:
        full, sparse: two tensors of one shape, any dtype: before and after soft thresholding.

    Returns:
        ⟨full, sparse⟩ and ⟨sparse, sparse⟩, float64 `[2]`.
    """
    full, sparse = full.double(), sparse.double()
    return torch.stack(((full * sparse).sum(), sparse.square().sum()))


def scale_from_sums(sums: Tensor) -> Tensor:
    """β = argmin ‖full - β · sparse‖², clamped to `SCALE_RANGE`; 1 where there is nothing to scale.

    Args:
        sums: `[..., 2]` of `scale_sums`.

    Returns:
        float32 `[...]`.
    """
    product, square = sums.unbind(-1)
    empty = square <= 0
    scale = product / torch.where(empty, 1, square)
    return torch.where(empty, 1, scale).clamp(*SCALE_RANGE).float()
