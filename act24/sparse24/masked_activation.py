"""`activation24` by kernels around dense products, where 2:4 products are no faster: naive, with exact weight
gradients.

The same function as the reference, to the last bit where the products are the same. Saved for backward are x,
the weights and the 2:4 activation with its zeros, 2 bytes a feature, from which the slope is a root away. A
dense relu² network keeps twice as much, and moves as many bytes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from act24.sparse24 import operators
from act24.sparse24.forms import Tensors
from act24.sparse24.packed_activation import token_statistics
from act24.sparse24.statistics import STATISTICS
from act24.sparse24.token_wise import Options24


class _MaskedActivation24(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight_in: Tensor,
        bias_in: Tensor | None,
        weight_out: Tensor,
        bias_out: Tensor | None,
        real: Tensor | None,
        options: Options24,
    ) -> tuple[Tensor, ...]:
        hidden = F.linear(x.reshape(-1, x.shape[-1]), weight_in, bias_in)
        count = options.statistics
        value, _, counts, sums = operators.pack_activation(
            hidden, None, real, options.function, "naive", False, True, count, count
        )
        y = F.linear(value, weight_out)
        y = y if bias_out is None else y + bias_out  # two roundings, as in the reference
        return y.view(*x.shape[:-1], len(weight_out)), value, counts, sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight_in, _, weight_out, _, _, options = inputs
        _, value, counts, sums = output
        ctx.mark_non_differentiable(value, counts, sums)
        ctx.save_for_backward(x, weight_in, weight_out, value)
        ctx.function = options.function

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight_in, weight_out, value = ctx.saved_tensors
        need_x, need_weight_in, need_bias_in, need_weight_out, need_bias_out = ctx.needs_input_grad[:5]
        rows, grad = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1])
        grad_hidden = operators.activation_gradient(grad @ weight_out, value, ctx.function)
        return (
            (grad_hidden @ weight_in).view(x.shape) if need_x else None,
            grad_hidden.T @ rows if need_weight_in else None,
            grad_hidden.sum(0) if need_bias_in else None,
            grad.T @ value if need_weight_out else None,
            grad.sum(0) if need_bias_out else None,
            None,
            None,
        )


def masked_activation24(tensors: Tensors, real: Tensor | None, options: Options24) -> tuple[Tensor, Tensor]:
    """`act24.sparse24.activation.activation24` without a scale, where `forms.why_not_masked` says nothing.

    Args:
        real: boolean `[T]`, the tokens that the statistics count; None for all.
    """
    y, value, counts, sums = _MaskedActivation24.apply(*tensors, real, options)
    if not options.statistics:
        return y, y.new_zeros(len(STATISTICS), dtype=torch.float32)
    with torch.no_grad():
        return y, token_statistics(len(value), counts, sums, real)
