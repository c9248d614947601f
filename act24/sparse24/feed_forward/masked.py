"""`activation24` by kernels around dense products, where 2:4 products are no faster or a linear is missing:
naive, with exact weight gradients.

It computes the same function as the reference, bit for bit where the products are the same. For backward it
saves the 2:4 activation with its zeros, 2 bytes a feature, which the second linear saves anyway; relu(h), and
with it the slope, is the square root of that. A dense relu² network saves twice as much and reads and writes
as many bytes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from act24.operation import once_differentiable
from act24.sparse24.feed_forward.forms import Form, Network, State, Tensors, why_never_packed
from act24.sparse24.feed_forward.options import Options24
from act24.sparse24.feed_forward.statistics import no_statistics, token_wise_from_counts
from act24.sparse24.kernels.activation_gradient import activation_gradient
from act24.sparse24.kernels.pack_activation import pack_activation
from act24.sparse24.pattern.token_wise import Function


class _MaskedActivation24(torch.autograd.Function):
    """The activation alone, on rows `[T, F]`."""

    @staticmethod
    def forward(
        hidden: Tensor, real: Tensor | None, function: Function, count: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        value, _, counts, sums = pack_activation(
            hidden, None, real, function, "naive", False, True, count, count
        )
        return value, counts, sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        value, counts, sums = output
        ctx.mark_non_differentiable(counts, sums)
        ctx.save_for_backward(value)
        ctx.function = inputs[2]

    @staticmethod
    @once_differentiable  # the slope is made from a constant
    def backward(ctx: Any, grad_value: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (value,) = ctx.saved_tensors
        return activation_gradient(grad_value.contiguous(), value, ctx.function), None, None, None


def masked_activation24(tensors: Tensors, state: State, options: Options24) -> tuple[Tensor, Tensor]:
    """`act24.sparse24.feed_forward.operation.activation24` where `MASKED` can run it.

    Args:
        tensors: in bfloat16, of the shapes that the operation has.
        state: without a scale.
        options: naive, with exact weight gradients.
    """
    x, weight_in, bias_in, weight_out, bias_out = tensors
    assert x is not None
    rows = x.reshape(-1, x.shape[-1])
    hidden = rows.contiguous() if weight_in is None else F.linear(rows, weight_in, bias_in)
    value, counts, sums = _MaskedActivation24.apply(hidden, state.real, options.function, options.statistics)
    y = value if weight_out is None else F.linear(value, weight_out)
    y = y if bias_out is None else y + bias_out  # two roundings, as in the reference
    y = y.view(*x.shape[:-1], y.shape[-1])
    if not options.statistics:
        return y, no_statistics(y)
    return y, token_wise_from_counts(len(value), counts, sums, state.real)


def _condition(network: Network, options: Options24) -> str:
    return why_never_packed(network.tokens, network.features, (network.width, network.width_out))


MASKED = Form(
    name="masked",
    says="2:4 by kernels around dense products",
    sparsifiers=("naive",),
    functions=("relu2", "relu"),
    estimators=("masked",),
    backwards=("dense",),
    precisions=("bfloat16",),
    linears=False,
    scales=False,
    operators=("pack_activation", "activation_gradient"),
    condition=_condition,
    run=masked_activation24,
)
