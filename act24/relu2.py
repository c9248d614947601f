"""Squared ReLU, relu(h)² (Primer, arXiv 2109.08668), and what its output looks like.

The statistics vector is shared by every operation that produces relu² activations: counts and sums over
all elements that passed, in float32, so that vectors add up over micro-batches and ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from act24.operation import operation
from act24.sparse24.selection import top2_of_4

STATISTICS = ("elements", "zeros", "dropped_nonzeros", "energy", "dropped_energy")


@operation
def relu2(hidden: Tensor) -> Tensor:
    """relu(h)², elementwise; the derivative is 2·relu(h)."""
    positive = torch.relu(hidden)
    return positive * positive


def describe(positive: Tensor, mask: Tensor) -> Tensor:
    """The statistics of relu² activations under a 2:4 mask.

    Args:
        positive: relu(h), any shape.
        mask: what 2:4 keeps, the same shape, boolean.

    Returns:
        float32 `[len(STATISTICS)]`: elements, zeros before 2:4, non-zeros that 2:4 drops, the sum of
        squared activations, and the part of it that 2:4 drops. Not differentiable.
    """
    with torch.no_grad():
        activation = positive.float().square()
        energy = activation.square()
        zero = torch.zeros((), dtype=torch.float32, device=positive.device)
        nonzero = positive > 0
        return torch.stack(
            (
                zero + positive.numel(),
                (~nonzero).sum(dtype=torch.float32),
                (nonzero & ~mask).sum(dtype=torch.float32),
                energy.sum(),
                torch.where(mask, zero, energy).sum(),
            )
        )


@operation
def relu2_statistics(hidden: Tensor) -> Tensor:
    """`describe` for the pre-activation `[..., F]` of a dense relu²: what 2:4 would drop, were it on.

    Where F is no multiple of 4 nothing can be dropped, and the last two counts are of no meaning: zero.
    """
    positive = torch.relu(hidden.detach())
    if hidden.shape[-1] % 4:
        return describe(positive, torch.ones_like(positive, dtype=torch.bool))
    return describe(positive, top2_of_4(positive))
