"""The linear that runs under a 2:4 weight, what training does to the dropped weights, and how masks flip.

How a weight becomes 2:4 is a method (`act24.sparse24.weight.methods`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from act24.errors import Act24Error
from act24.operation import (
    cast_for_autocast,
    is_mapped,
    once_differentiable,
    operation,
    refuse_second_derivatives,
)
from act24.options import in_range
from act24.sparse24.format.device import why_no_fp8
from act24.sparse24.pattern.mvue import mvue24
from act24.sparse24.weight.forms import PLAIN, Form, LinearOptions24, LinearState, why_not_packed
from act24.sparse24.weight.fp8 import linear24_fp8
from act24.sparse24.weight.methods import sparse_weight
from act24.sparse24.weight.packed import linear_of, packed_linear24

#: The forms, in the order in which they are asked; what none of them serves runs the reference.
FORMS = (Form(name="packed", condition=why_not_packed, run=packed_linear24),)


def _rows(tensor: Tensor) -> Tensor:
    """`[..., n]` as `[T, n]`; a single token `[n]` is one row."""
    return tensor.reshape(-1, tensor.shape[-1])


class _Linear24(torch.autograd.Function):
    """In plain PyTorch, with products in dense form, on any device; x is `[T, in]`."""

    generate_vmap_rule = True  # per-sample gradients: torch.func.vmap over torch.func.grad

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        scale: Tensor | None,
        seed: Tensor | None,
    ) -> Tensor:
        return F.linear(x, sparse_weight(weight, mask, scale), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, mask, scale, seed = inputs
        ctx.save_for_backward(x, weight, mask, scale, seed)

    @staticmethod
    @once_differentiable  # straight through: a derivative of this would be that of another function
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask, scale, seed = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_weight = None
        if need_weight:
            drawn = grad_y
            if seed is not None:
                padded = F.pad(grad_y, (0, 0, 0, -len(grad_y) % 4))
                drawn = mvue24(padded, seed, 0)[: len(grad_y)]
            # Straight through: every weight, kept or not, gets the gradient of the sparse one.
            grad_weight = drawn.T @ x
        return (
            grad_y @ sparse_weight(weight, mask, scale) if need_x else None,
            grad_weight,
            grad_y.sum(0) if need_bias else None,
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
    packed: Tensor | None = None,
    transposed: Tensor | None = None,
    options: LinearOptions24 = PLAIN,
    counter: Tensor | None = None,
) -> Tensor:
    """A linear whose weight is 2:4: y = x W₂₄ᵀ + b, dX = G W₂₄, dW = Gᵀ x straight through.

    Args:
        x: `[..., in]`, of a floating dtype.
        weight: `[out, in]`, dense, of the dtype of x (or any under autocast); `in` a multiple of 4.
        bias: `[out]` or None.
        mask: boolean `[out, in]`, the entries that stay; W₂₄ is the rest set to zero. None: W₂₄ = β S(W),
            soft thresholding along `in`.
        scale: β, a scalar, for soft thresholding.
        seed: int64 scalar: dW = MVUE₂₄(G)ᵀ x, the output gradient made 2:4 along the tokens by an unbiased
            draw. None: the dense product.
        packed, transposed: buffers of the packed W₂₄ `[out, in]` and W₂₄ᵀ `[in, out]`, of this very weight,
            mask and scale, which 2:4 products then read. None, or no elements, and they are packed where they
            are needed.
        options: see `LinearOptions24`.
        counter: in fp8, as in `act24.fp8.linear.linear_fp8`.

    Returns:
        `[..., out]`. It can be differentiated once.

    Raises:
        ValueError: neither mask nor scale, `in` is not a multiple of 4, or in fp8 a side not one of 16.
        Act24Error: fp8 on a GPU that has none.

    Sources: those of `act24.sparse24.weight.methods`.
    """
    if mask is None and scale is None:
        raise ValueError("a 2:4 linear needs a mask, or a scale for soft thresholding")
    if weight.shape[1] % 4:
        raise ValueError(f"2:4 needs a multiple of 4 inputs, got a weight {tuple(weight.shape)}")
    refuse_second_derivatives(x, weight)
    cast_x, cast_weight, cast_bias = cast_for_autocast(x, weight, bias)
    assert cast_x is not None
    assert cast_weight is not None
    if options.precision == "fp8":
        if reason := why_no_fp8(cast_x.device):
            raise Act24Error(reason)
        if is_mapped():
            raise Act24Error('weight24: its fp8 has no rule for torch.func.vmap: set precision = "bfloat16"')
        state = LinearState(mask, scale, seed, counter=counter)
        return linear24_fp8(cast_x, cast_weight, cast_bias, state, options)
    if not is_mapped():
        linear = linear_of(cast_x, cast_weight, seed)
        for form in FORMS:
            if not form.why_not(linear, options):
                state = LinearState(mask, scale, seed, _or_none(packed), _or_none(transposed))
                return form.run(cast_x, cast_weight, cast_bias, state, options)
    # A view that is made inside could not be written to in place, as y of F.linear can.
    rows = _Linear24.apply(_rows(cast_x), cast_weight, cast_bias, mask, scale, seed)
    return rows.view(*cast_x.shape[:-1], len(cast_weight))


def _or_none(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None or not buffer.numel() else buffer


@torch.no_grad()
def masked_decay_(target: Tensor, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
    """target += decay · (1 - mask) ∘ weight, in place, which pulls dropped weights to zero and so keeps masks
    from flipping to and fro.

    Args:
        target: the gradient of the weight, `[out, in]`. Added before the optimizer normalises it, the decay
            holds in bfloat16 too, where lr · λ · W is less than half a unit in the last place of W and does
            nothing.
        weight: `[out, in]`, of any floating dtype.
        mask: boolean `[out, in]`, True for what is kept.
        decay: λ, 6e-5 to 2e-4 in arXiv 2404.01847, 2e-4 in arXiv 2102.04010.

    Returns:
        target.

    Raises:
        OptionError: `decay` is not finite.
    """
    in_range("masked_decay_", "decay", decay)
    return target.add_(torch.where(mask, 0, weight).to(target.dtype), alpha=decay)


def flip_rate(before: Tensor, after: Tensor) -> Tensor:
    """r_t = ‖m_t - m_{t-1}‖₁ / D (arXiv 2404.01847): the share of the entries of a mask that changed.

    Args:
        before, after: boolean, of one shape.

    Returns:
        a float32 scalar on their device.
    """
    return (before != after).float().mean()
