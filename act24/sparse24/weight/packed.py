"""`linear24` on packed operands: up to three 2:4 products of three.

    yᵀ = W₂₄ xᵀ         dXᵀ = W₂₄ᵀ Gᵀ         dW = MVUE₂₄(G)ᵀ x

cuSPARSELt wants the 2:4 matrix on the left, so it computes the transposes of y and dX, and writes them
transposed. Packed weights are handed in where a training loop packs them once an update. Else they are packed
here, in forward and for dX again in backward: nothing is kept between the two, and each time 5.25 bytes a
weight are read and written.

It computes the same function as the reference in `act24.sparse24.weight.linear24`, with the same selections
and draws; only sums are rounded differently.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from act24.operation import once_differentiable
from act24.sparse24.kernels.pack_drawn import pack_drawn
from act24.sparse24.kernels.pack_weight import pack_weight, pack_weight_rows
from act24.sparse24.kernels.product24 import product24
from act24.sparse24.pattern.selection import top2_of_4
from act24.sparse24.weight.forms import Linear, LinearOptions24, LinearState, product_algorithms
from act24.sparse24.weight.methods import LinearProduct, sparse_weight


def packed_weight(weight: Tensor, mask: Tensor | None, scale: Tensor | None) -> Tensor:
    """W₂₄ packed along its rows.

    Args:
        weight: bfloat16 `[out, in]`, multiples of 64; mask, scale: as for
            `act24.sparse24.weight.methods.sparse_weight`.

    Returns:
        the buffer of the packed `[out, in]` matrix.
    """
    if mask is None:
        return pack_weight_rows(sparse_weight(weight, None, scale), top2_of_4(weight.abs()))
    return pack_weight_rows(weight, mask)


def packed_operands(
    weight: Tensor, mask: Tensor | None, scale: Tensor | None, both_ways: bool
) -> tuple[Tensor, Tensor | None]:
    """What 2:4 products read of a weight, for `linear24` to be handed in.

    Args:
        weight: `[out, in]`, multiples of 64, of any floating dtype; packed as bfloat16.
        mask, scale: as for `act24.sparse24.weight.methods.sparse_weight`.
        both_ways: the mask is 2:4 along `out` too.

    Returns:
        the buffers of the packed W₂₄ `[out, in]` and, with `both_ways`, of W₂₄ᵀ `[in, out]`.
    """
    weight = weight.to(torch.bfloat16)
    if both_ways:
        assert mask is not None
        return pack_weight(weight, mask)
    return packed_weight(weight, mask, scale), None


class _PackedLinear24(torch.autograd.Function):
    """On rows `[T, in]`."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        scale: Tensor | None,
        seed: Tensor | None,
        packed: Tensor | None,
        transposed: Tensor | None,
        options: LinearOptions24,
    ) -> Tensor:
        algorithms = _algorithms(x, weight, seed, options)
        if "y" not in algorithms:
            return F.linear(x, sparse_weight(weight, mask, scale), bias)
        packed = packed_weight(weight, mask, scale) if packed is None else packed
        y = product24(packed, x.T, algorithms["y"], True, None, None)
        return y if bias is None else y + bias

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, mask, scale, seed, _, transposed, options = inputs
        ctx.save_for_backward(x, weight, mask, scale, seed, transposed)
        ctx.options = options

    @staticmethod
    @once_differentiable  # straight through: a derivative of this would be that of another function
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask, scale, seed, transposed = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        algorithms = _algorithms(x, weight, seed, ctx.options)
        grad_y = grad_y.contiguous()
        grad_x = grad_weight = None
        if need_x and "grad_x" in algorithms:
            transposed = pack_weight(weight, mask)[1] if transposed is None else transposed
            grad_x = product24(transposed, grad_y.T, algorithms["grad_x"], True, None, None)
        elif need_x:
            grad_x = grad_y @ sparse_weight(weight, mask, scale)
        if need_weight and seed is not None:
            drawn = pack_drawn(grad_y, seed)
            grad_weight = product24(drawn, x, algorithms["grad_weight"], False, None, None)
        elif need_weight:
            grad_weight = grad_y.T @ x
        return grad_x, grad_weight, grad_y.sum(0) if need_bias else None, *(None,) * 6


def _algorithms(
    rows: Tensor, weight: Tensor, seed: Tensor | None, options: LinearOptions24
) -> dict[LinearProduct, int]:
    return product_algorithms(linear_of(rows, weight, seed), options)


def linear_of(x: Tensor, weight: Tensor, seed: Tensor | None) -> Linear:
    """The linear of an operation's tensors: x `[..., in]`, weight `[out, in]`."""
    tokens, (out_features, in_features) = x.numel() // max(x.shape[-1], 1), weight.shape
    return Linear(tokens, out_features, in_features, x.dtype, x.device, seed is not None)


def packed_linear24(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: LinearState, options: LinearOptions24
) -> Tensor:
    """`act24.sparse24.weight.linear24.linear24` where `forms.why_not_packed` has nothing to say: its shapes,
    all of one dtype."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    mask, scale, seed, packed, transposed, _ = state
    y = _PackedLinear24.apply(rows, weight, bias, mask, scale, seed, packed, transposed, options)
    return y.view(*x.shape[:-1], len(weight))
