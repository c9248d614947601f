"""Figures that say whether the factors of a low-rank linear are healthy; computed on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from act24.options import Range, in_range


def balance(weight_in: Tensor, weight_out: Tensor) -> Tensor:
    """|weight_out| / |weight_in|, Frobenius norms: 1 for balanced factors.

    Args:
        weight_in, weight_out: `[n, R, in]` and `[n, out, R]`, any floating dtype.

    Returns:
        float32 `[n]`.
    """
    norm_in = weight_in.float().norm(dim=(-2, -1))
    return weight_out.float().norm(dim=(-2, -1)) / norm_in.clamp(min=torch.finfo(torch.float32).tiny)


def largest_singular_value(weight_in: Tensor, weight_out: Tensor, iterations: int = 20) -> Tensor:
    """σ_max of W = weight_out weight_in, from below, by power iteration.

    The iteration takes place in R dimensions: for x = weight_inᵀ q, WᵀW x = weight_inᵀ (G_out G_in q).

    Args:
        weight_in, weight_out: `[n, R, in]` and `[n, out, R]`, any floating dtype.
        iterations: two products with `[n, R, R]` each.

    Returns:
        float32 `[n]`.

    Raises:
        OptionError: `iterations` is below 1.
    """
    in_range("largest_singular_value", "iterations", iterations, Range(ge=1))
    weight_in, weight_out = weight_in.float(), weight_out.float()
    gram_in, gram_out = weight_in @ weight_in.mT, weight_out.mT @ weight_out
    tiny = torch.finfo(torch.float32).tiny
    q = torch.ones_like(gram_in[..., :1])  # the same in every run
    for _ in range(iterations):
        q = gram_out @ (gram_in @ q)
        q = q / q.norm(dim=-2, keepdim=True).clamp(min=tiny)
    image = gram_in @ q
    stretch = (image * (gram_out @ image)).sum((-2, -1)) / (q * image).sum((-2, -1)).clamp(min=tiny)
    return stretch.clamp(min=0).sqrt()
