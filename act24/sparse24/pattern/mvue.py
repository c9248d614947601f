"""The minimum-variance unbiased estimator with two entries of four.

With a_i = |x_i| and S their sum, any estimator that keeps i with probability π_i and then returns x_i/π_i is
unbiased; its variance Σ a_i² (1/π_i - 1) under Σ π_i = 2 is least for

    π_i = 2 a_i / S                          if the largest a is at most S/2
    π_m = 1,  π_i = a_i / (S - a_m), i ≠ m   else, with m the largest

A drawn entry is returned with the magnitude a_i / π_i, which is K = S/2 in the first case and K = S - a_m in
the second; the certain entry m is returned as it is. So no division is needed. Lay intervals of the lengths
a_i end to end, and draw one uniform number u for the group. In the first case the entries whose intervals
contain u K and (1 + u) K are kept. In the second case, m is kept, and of the others the one whose interval
contains u K. Each entry is then kept with its probability π_i, and exactly two are kept, fewer where there
are zeros. Groups with at most two non-zeros come back as they are.

The theory: arXiv 2203.10991 (MVUE of N:M sparse gradients). The public code of arXiv 2404.01847 ships an
approximation whose variance is slightly higher, which is NaN on a group with a single large value, and an
"exact" version that is biased; see docs/findings.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from act24.operation import operation
from act24.sparse24.pattern.random_bits import random_uniform


class _Groups(NamedTuple):
    """Groups of four magnitudes, each a quarter of what it is, so that no sum overflows.

    Attributes:
        magnitude: float32 (float64 for float64) `[..., 4]`. In a group with NaN or infinity these count as 1
            and the others as 0: what is not finite stays and is seen.
        certain: boolean `[..., 4]`, the largest entry where it outweighs the others together.
        ends: of the intervals of the entries that share the draw, `[..., 4]`, ascending.
        kept: K, a quarter of the magnitude with which these are kept, `[..., 1]`.
    """

    magnitude: Tensor
    certain: Tensor
    ends: Tensor
    kept: Tensor


def _groups(magnitude: Tensor) -> _Groups:
    """
    Args:
        magnitude: `[..., 4]`, non-negative, of any floating dtype.
    """
    a = magnitude.to(torch.promote_types(magnitude.dtype, torch.float32))
    finite = a.isfinite()
    a = torch.where(finite.all(-1, keepdim=True), a, (~finite).to(a.dtype)) * 0.25
    largest, total = a.amax(-1, keepdim=True), _ends(a)[..., 3:]
    certain = (2 * largest > total) & (a == largest)  # no second one is as large
    ends = _ends(torch.where(certain, 0, a))
    kept = torch.where(certain.any(-1, keepdim=True), ends[..., 3:], ends[..., 3:] * 0.5)
    return _Groups(a, certain, ends, kept)


def _ends(lengths: Tensor) -> Tensor:
    """Sums of the first one, two, three and four of four, in this order, as a kernel adds."""
    first, second, third, fourth = lengths.unbind(-1)
    two = first + second
    three = two + third
    return torch.stack((first, two, three, three + fourth), dim=-1)


def _drawn(groups: _Groups, u: Tensor) -> Tensor:
    """The entries that are kept, boolean `[..., 4]`, for uniform numbers `[..., 1]`."""
    # The last interval has no end, so that rounding can neither lose a draw nor add a third.
    end = torch.where(groups.ends >= groups.ends[..., 3:], torch.inf, groups.ends)
    start = torch.cat((torch.zeros_like(end[..., :1]), end[..., :-1]), dim=-1)
    one, other = u * groups.kept, (1 + u) * groups.kept
    other = torch.where(groups.certain.any(-1, keepdim=True), one, other)
    inside = ((start <= one) & (one < end)) | ((start <= other) & (other < end))
    return (inside | groups.certain) & (groups.magnitude > 0)


def _draw(x: Tensor, seed: Tensor | int, dim: int) -> tuple[Tensor, Tensor]:
    """The magnitudes with which entries are kept, 0 for those that are not, and by how much that is more than
    they had; both float32 (float64 for float64), the shape of `x`."""
    if x.shape[dim] % 4:
        raise ValueError(f"2:4 needs a multiple of 4 along dimension {dim}, got {tuple(x.shape)}")
    with torch.no_grad():
        groups = _groups(x.detach().abs().movedim(dim, -1).unflatten(-1, (-1, 4)))
        numbers = torch.arange(groups.kept.numel(), device=x.device).view(groups.kept.shape)
        drawn = _drawn(groups, random_uniform(numbers, seed).to(groups.kept.dtype))
        kept = torch.where(drawn, torch.where(groups.certain, groups.magnitude, groups.kept), 0)
        factor = torch.where(drawn, kept / torch.where(drawn, groups.magnitude, 1), 0)
        return (4 * kept).flatten(-2).movedim(-1, dim), factor.flatten(-2).movedim(-1, dim)


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
    return _draw(x, seed, dim)[1]


class _Mvue24(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, seed: Tensor | int, dim: int) -> tuple[Tensor, Tensor]:
        kept, factor = _draw(x, seed, dim)
        estimate = torch.copysign(kept.clamp(max=torch.finfo(x.dtype).max), x).to(x.dtype)
        estimate = torch.where(factor > 0, estimate, 0)
        return torch.where(x.isfinite(), estimate, torch.where(factor > 0, x, 0)), factor

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        (factor,) = ctx.saved_tensors
        return (grad * factor).to(grad.dtype), None, None


@operation
def mvue24(x: Tensor, seed: Tensor | int, dim: int = -1) -> Tensor:
    """An unbiased random estimate of `x` with at most two non-zeros in every four entries along `dim`.

    The shape and dtype of `x` are kept; arguments and errors as for `mvue_factor`. The gradient is that of
    multiplying by a constant. Finite for finite `x`: magnitudes beyond the dtype stop at its largest.
    """
    return _Mvue24.apply(x, seed, dim)[0]
