"""`linear24` in e4m3: y = x W₂₄ᵀ and dX = G W₂₄, and dW = Gᵀ x where its gradient is not drawn.

The products are dense ones, those of `act24.fp8.linear`, because 2:4 products of weights were measured in
bfloat16 only. Zero stays zero in e4m3, so W₂₄ is still 2:4. A drawn gradient is multiplied in bfloat16, as a
2:4 operand.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from act24.fp8.casts import cast_both_ways
from act24.fp8.linear import MULTIPLE, uses_kernels
from act24.operation import cast, once_differentiable
from act24.sparse24.kernels.pack_drawn import pack_drawn
from act24.sparse24.kernels.product24 import product24
from act24.sparse24.kernels.shared.registry import form
from act24.sparse24.pattern.mvue import mvue24
from act24.sparse24.weight.forms import LinearOptions24, LinearState, product_algorithms, why_not_packed
from act24.sparse24.weight.methods import sparse_weight
from act24.sparse24.weight.packed import linear_of


class _Linear24Fp8(torch.autograd.Function):
    """On rows `[T, in]`."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        scale: Tensor | None,
        seed: Tensor | None,
        options: LinearOptions24,
        training: bool,
        kernels: bool,
        counter: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = cast_both_ways(x, "rowwise", "rowwise", turned=training and seed is None, kernels=kernels)
        sparse = sparse_weight(weight, mask, scale)
        narrow = cast_both_ways(sparse, "rowwise", "rowwise", turned=False, kernels=kernels)
        y = form("product_e4m3", kernels)(rows.narrow, narrow.narrow, rows.scale, narrow.scale)
        y = cast(y, x.dtype)
        return y if bias is None else y + bias, rows.turned, rows.turned_scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, _, mask, scale, seed, ctx.options, _, ctx.kernels, ctx.counter = inputs
        _, turned, turned_scale = output
        ctx.mark_non_differentiable(turned, turned_scale)
        # A drawn gradient multiplies x itself.
        ctx.save_for_backward(
            weight, mask, scale, seed, x if seed is not None else None, turned, turned_scale
        )
        ctx.dtypes = x.dtype, weight.dtype

    @staticmethod
    @once_differentiable  # straight through: a derivative of this would be that of another function
    def backward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        weight, mask, scale, seed, x, turned, turned_scale = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_y, multiply = grad_y.contiguous(), form("product_e4m3", ctx.kernels)
        narrow_weight_gradient = need_weight and seed is None  # else it is drawn, in bfloat16
        given = ("rowwise", "rowwise", need_x, narrow_weight_gradient, ctx.kernels, ctx.counter)
        grad = cast_both_ways(grad_y, *given)
        grad_x = grad_weight = None
        if need_x:
            sparse = sparse_weight(weight, mask, scale)
            columns = cast_both_ways(sparse, "rowwise", "rowwise", narrow=False, kernels=ctx.kernels)
            grad_x = multiply(grad.narrow, columns.turned, grad.scale, columns.turned_scale)
            grad_x = cast(grad_x, ctx.dtypes[0])
        if narrow_weight_gradient:
            grad_weight = multiply(grad.turned, turned, grad.turned_scale, turned_scale)
            grad_weight = cast(grad_weight, ctx.dtypes[1])
        elif need_weight:
            assert seed is not None
            grad_weight = _drawn_weight_gradient(grad_y, x, weight, seed, ctx.options)
        return grad_x, grad_weight, grad_y.sum(0) if need_bias else None, *(None,) * 7


def _drawn_weight_gradient(
    grad_y: Tensor, x: Tensor, weight: Tensor, seed: Tensor, options: LinearOptions24
) -> Tensor:
    """MVUE₂₄(G)ᵀ x, by the kernel and the 2:4 product where there are any."""
    linear = linear_of(x, weight, seed)
    if options.kernels and not why_not_packed(linear, options):
        algorithm = product_algorithms(linear, options)["grad_weight"]
        return product24(pack_drawn(grad_y, seed), x, algorithm, False, None, None)
    padded = F.pad(grad_y, (0, 0, 0, -len(grad_y) % 4))
    return mvue24(padded, seed, 0)[: len(grad_y)].T @ x


def linear24_fp8(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: LinearState, options: LinearOptions24
) -> Tensor:
    """`act24.sparse24.weight.linear24.linear24` in e4m3: its shapes, all of one dtype.

    Raises:
        ValueError: the weight has a side that is no multiple of 16.
    """
    if any(size % MULTIPLE for size in weight.shape):
        raise ValueError(f"e4m3 needs sides that are multiples of {MULTIPLE}, got {tuple(weight.shape)}")
    training = torch.is_grad_enabled() and weight.requires_grad
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    given = (rows, weight, bias, state.mask, state.scale, state.seed)
    kernels = uses_kernels(x.device, options.kernels)
    y, _, _ = _Linear24Fp8.apply(*given, options, training, kernels, state.counter)
    return y.view(*x.shape[:-1], len(weight))
