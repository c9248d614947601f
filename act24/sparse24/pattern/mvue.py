"""The minimum-variance unbiased estimator with two entries of four.

With a_i = |x_i| and S their sum, any estimator that keeps i with probability π_i and then returns x_i/π_i is
unbiased; its variance Σ a_i² (1/π_i - 1) under Σ π_i = 2 is least for

    π_i = 2 a_i / S                          if the largest a is at most S/2
    π_m = 1,  π_i = a_i / (S - a_m), i ≠ m   else, with m the largest

One uniform number u a group realises these marginals with exactly two kept (fewer where there are zeros):
of the intervals [c_i, c_i + π_i) laid end to end keep those that contain u or u + 1. Groups with at most two
non-zeros come back as they are.

The theory: arXiv 2203.10991 (MVUE of N:M sparse gradients). The public code of arXiv 2404.01847 ships an
approximation whose variance is slightly higher, which is NaN on a group with a single large value, and an
"exact" version that is biased; see docs/findings.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from act24.operation import operation
from act24.sparse24.pattern.random_bits import random_uniform


def _probabilities(magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """π by group, and the mask of the largest entry where it outweighs the others together.

    Args:
        magnitude: `[..., 4]`, non-negative. In a group with NaN or infinity these count as 1 and the others
            as 0: what is not finite stays and is seen.

    Returns:
        float32 (float64 for float64) `[..., 4]`, in [0, 1], of sum 2 where two or more entries are not
        zero; entries that are zero have 0. And boolean `[..., 4]`.
    """
    a = magnitude.to(torch.promote_types(magnitude.dtype, torch.float32))
    finite = a.isfinite()
    a = torch.where(finite.all(-1, keepdim=True), a, (~finite).to(a.dtype))
    largest, index = a.max(dim=-1, keepdim=True)
    a = a / torch.where(largest > 0, largest, 1)  # the sums below can neither overflow nor vanish
    others = a.scatter(-1, index, 0)
    # Summed, not subtracted from S: that loses everything beside one large value.
    rest = others.sum(dim=-1, keepdim=True)
    balanced = (2 * a / (1 + rest)).clamp(max=1)
    certain = torch.zeros_like(a, dtype=torch.bool).scatter(-1, index, (rest < 1) & (largest > 0))
    shared = torch.where(certain, 1, others / torch.where(rest > 0, rest, 1))
    return torch.where(rest < 1, shared, balanced), certain


def mvue_factor(x: Tensor, seed: Tensor | int, dim: int = -1) -> Tensor:
    """What `mvue24` multiplies by: 1/π for the entries that are drawn, 0 for the others. Not differentiable.

    Args:
        x: size K along `dim`, K a multiple of 4. NaN and infinity stay, and the finite entries of their
            groups do not.
        seed: int64 scalar. The same seed draws the same.

    Returns:
        float32 (float64 for float64), the shape of `x`, at most two non-zeros in every group.

    Raises:
        ValueError: K is not a multiple of 4.
    """
    if x.shape[dim] % 4:
        raise ValueError(f"2:4 needs a multiple of 4 along dimension {dim}, got {tuple(x.shape)}")
    with torch.no_grad():
        groups = x.detach().abs().movedim(dim, -1).unflatten(-1, (-1, 4))
        probability, certain = _probabilities(groups)
        numbers = torch.arange(groups[..., 0].numel(), device=x.device).view(groups.shape[:-1])
        u = random_uniform(numbers, seed).to(probability.dtype).unsqueeze(-1)
        # A certain entry stands aside, and the others share [0, 1) instead of [0, 2). The last end is set,
        # not summed, so that rounding can neither lose a draw nor add a third.
        length = torch.where(certain, 0, probability)
        end = length.cumsum(dim=-1)
        total = torch.where(certain.any(-1, keepdim=True), 1.0, 2.0).to(end.dtype)
        end = torch.where(end >= end[..., -1:], total, end)
        start = torch.cat((torch.zeros_like(end[..., :1]), end[..., :-1]), dim=-1)
        drawn = ((start <= u) & (u < end)) | ((start <= u + 1) & (u + 1 < end))
        drawn = (drawn | certain) & (probability > 0)
        factor = torch.where(drawn, 1 / torch.where(drawn, probability, 1), 0)
        return factor.flatten(-2).movedim(-1, dim)


@operation
def mvue24(x: Tensor, seed: Tensor | int, dim: int = -1) -> Tensor:
    """An unbiased random estimate of `x` with at most two non-zeros in every four entries along `dim`.

    Arguments and errors as for `mvue_factor`. The gradient is that of multiplying by a constant. Finite for
    finite `x`: values that 1/π would carry beyond the dtype stop at its largest.
    """
    largest = torch.finfo(x.dtype).max
    estimate = x * mvue_factor(x, seed, dim)
    return torch.where(x.isinf(), estimate, estimate.clamp(-largest, largest)).to(x.dtype)
