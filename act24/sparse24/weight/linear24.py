"""2:4 weights: masks, the linear that runs under one, and what training does to the dropped weights.

Sources: arXiv 2404.01847 (transposable masks, masked decay on gradients, MVUE of the output gradient, flip
rate), arXiv 2409.09099 (S-STE: soft thresholding with a fixed scale), arXiv 2102.04010 (SR-STE).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from act24.operation import cast_for_autocast, operation
from act24.sparse24.pattern.mvue import mvue24
from act24.sparse24.pattern.selection import top2_of_4
from act24.sparse24.pattern.soft_threshold import scale_from_sums, scale_sums, soft_threshold24
from act24.sparse24.pattern.transposable import transposable_mask

Method = Literal["transposable", "soft_threshold", "ste", "sr_ste"]
WeightGradient = Literal["mvue", "dense"]


def weight_mask(weight: Tensor, method: Method) -> Tensor:
    """The entries of a weight that its 2:4 form keeps.

    Args:
        weight: `[out, in]`; the groups of four lie along `in`, over which the product reduces.

    Returns:
        boolean `[out, in]`: the best of 90 patterns by block for `"transposable"`, the two largest
        magnitudes of every four else. (Soft thresholding brings the second of two equal ones to zero with
        the third; it counts as kept.)

    Raises:
        ValueError: `in`, or for `"transposable"` either size, is not a multiple of 4.
    """
    return transposable_mask(weight) if method == "transposable" else top2_of_4(weight.detach().abs())


def weight_scale(weight: Tensor) -> Tensor:
    """β of S-STE: the least squared error of the weight before and after soft thresholding; a float32
    scalar, meant to be computed once, at the start of sparse training, and kept."""
    return scale_from_sums(scale_sums(weight.detach(), soft_threshold24(weight.detach())))


class _Linear24(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        scale: Tensor | None,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if mask is not None:
            sparse = torch.where(mask, weight, 0)
        else:
            assert scale is not None
            sparse = soft_threshold24(weight) * scale.to(weight.dtype)
        return F.linear(x, sparse, bias), sparse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, *_, seed = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, output[1], seed)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, sparse, seed = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_weight = None
        if need_weight:
            grad_rows, rows = grad_y.flatten(0, -2), x.flatten(0, -2)
            if seed is not None:
                padded = F.pad(grad_rows, (0, 0, 0, -len(grad_rows) % 4))
                grad_rows = mvue24(padded, seed, 0)[: len(grad_rows)]
            # Straight through: every weight, kept or not, gets the gradient of the sparse one.
            grad_weight = grad_rows.T @ rows
        return (
            grad_y @ sparse if need_x else None,
            grad_weight,
            grad_y.flatten(0, -2).sum(0) if need_bias else None,
            *(None,) * 3,
        )


@operation
def linear24(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """A linear whose weight is 2:4: y = x W₂₄ᵀ + b, dX = G W₂₄, dW = Gᵀ x straight through.

    Args:
        x: `[..., in]`.
        weight: `[out, in]`, dense; `in` a multiple of 4. bias: `[out]` or None.
        mask: boolean `[out, in]`, the entries that stay; W₂₄ is the rest set to zero. None: W₂₄ = β S(W),
            soft thresholding along `in`.
        scale: β, a scalar, for soft thresholding.
        seed: int64 scalar: dW = MVUE₂₄(G)ᵀ x, the output gradient made 2:4 along the tokens by an unbiased
            draw. None: the dense product.

    Returns:
        `[..., out]`. Masked products in dense form, on any device.

    Raises:
        ValueError: neither mask nor scale, or `in` is not a multiple of 4.
    """
    if mask is None and scale is None:
        raise ValueError("a 2:4 linear needs a mask, or a scale for soft thresholding")
    if weight.shape[1] % 4:
        raise ValueError(f"2:4 needs a multiple of 4 inputs, got a weight {tuple(weight.shape)}")
    return _Linear24.apply(*cast_for_autocast(x, weight, bias), mask, scale, seed)[0]


@torch.no_grad()
def masked_decay_(target: Tensor, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
    """target += decay · (1 - mask) ∘ weight, in place; returns target.

    With a gradient as target, before the optimizer normalises it, this is the masked decay of arXiv
    2404.01847, which pulls dropped weights to zero and so keeps masks from flipping to and fro; their λ is
    6e-5 to 2e-4. With the weight itself as target and -lr · λ it is SR-STE's.
    """
    return target.add_(torch.where(mask, 0, weight).to(target.dtype), alpha=decay)


def flip_rate(before: Tensor, after: Tensor) -> Tensor:
    """r_t = ‖m_t - m_{t-1}‖₁ / D: the share of the entries of a mask that changed, a float32 scalar."""
    return (before != after).float().mean()
