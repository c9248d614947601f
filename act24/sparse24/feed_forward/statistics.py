"""What 2:4 does to an activation, as one vector of counts and sums.

Float32 and additive: vectors of micro-batches and processes are summed, and ratios are taken last. Energy is
the sum of squared activations. Tokens of padding are left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Names of the entries. The last five: 2:4 along the tokens, for the weight gradients, of what 2:4 along the
#: features has left; zero where the backward has none.
STATISTICS = (
    "elements",
    "zeros",
    "groups",
    "crowded_groups",
    "dropped_nonzeros",
    "energy",
    "dropped_energy",
    "feature_nonzeros",
    "feature_dropped_nonzeros",
    "feature_energy",
    "feature_dropped_energy",
    "dense_feature_energy",
)
_FEATURE_WISE = 5


@torch.no_grad()
def token_wise_statistics(activation: Tensor, mask: Tensor, real: Tensor | None) -> Tensor:
    """Counts of an activation under a 2:4 mask along the features.

    Args:
        activation: non-negative `[T, F]`, before 2:4.
        mask: boolean `[T, F]`, what 2:4 keeps.
        real: boolean `[T]`, the tokens that are no padding; None for all.

    Returns:
        float32 `[len(STATISTICS)]`: elements, zeros, groups of four, those with more than 2 non-zeros,
        non-zeros dropped, energy, energy dropped; the feature-wise entries are 0.
    """
    if real is not None:
        activation = activation * real[:, None]
    nonzero = activation > 0
    energy = activation.float().square()
    # Filled on the device: a tensor made of a Python number would be copied there, and waited for.
    tokens = energy.new_full((), len(activation)) if real is None else real.float().sum()
    groups = tokens * (activation.shape[1] // 4)
    if activation.shape[1] % 4:
        crowded = torch.zeros_like(tokens)
    else:
        crowded = (nonzero.unflatten(1, (-1, 4)).sum(-1, dtype=torch.int32) > 2).sum(dtype=torch.float32)
    counts = (
        tokens * activation.shape[1],
        tokens * activation.shape[1] - nonzero.sum(dtype=torch.float32),
        groups,
        crowded,
        (nonzero & ~mask).sum(dtype=torch.float32),
        energy.sum(),
        torch.where(mask, 0, energy).sum(),
    )
    return torch.cat((torch.stack(counts), energy.new_zeros(_FEATURE_WISE)))


@torch.no_grad()
def feature_wise_statistics(value: Tensor, kept: Tensor, dense: Tensor | None) -> Tensor:
    """Counts of what 2:4 along the tokens does to a 2:4 activation.

    Args:
        value: `[T, F]`, 2:4 along the features, padding zeroed.
        kept: `[T, F]`, what 2:4 along the tokens leaves of it.
        dense: boolean `[F]`, the features that it leaves alone; None for none.

    Returns:
        float32 `[len(STATISTICS)]`: non-zeros, those dropped, energy, energy dropped, energy in the dense
        features; the token-wise entries are 0.
    """
    energy, left = value.float().square(), kept.float().square()
    nonzeros = (value != 0).sum(dtype=torch.float32)
    counts = (
        nonzeros,
        nonzeros - (kept != 0).sum(dtype=torch.float32),
        energy.sum(),
        (energy - left).sum(),
        energy.new_zeros(()) if dense is None else torch.where(dense, energy, 0).sum(),
    )
    return torch.cat((energy.new_zeros(len(STATISTICS) - _FEATURE_WISE), torch.stack(counts)))
