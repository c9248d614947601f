"""`activation24` for narrow linears, where 2:4 products lose to dense ones
(`act24.sparse24.kernels.linear_pack`): the activation and its derivative are made inside the products around
them, and nothing F-wide is kept but the packed activation, 1.125 bytes a feature, or nothing at all.

The same function as the reference in `act24.sparse24.feed_forward.operation` up to the rounding of sums.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from act24.sparse24.feed_forward.forms import Tensors
from act24.sparse24.feed_forward.statistics import STATISTICS, token_wise_statistics
from act24.sparse24.kernels.linear_gradient import linear_gradient
from act24.sparse24.kernels.linear_pack import linear_pack
from act24.sparse24.kernels.recompute_gradient import recompute_gradient
from act24.sparse24.pattern.token_wise import Options24, sparsify_token_wise

#: Statistics look at every 16th token: the pre-activation, which they need, is nowhere in memory.
_SAMPLE = 16


class _NarrowActivation24(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight_in: Tensor,
        weight_out: Tensor,
        bias_out: Tensor | None,
        options: Options24,
        training: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = x.reshape(-1, x.shape[-1])
        save = training and not options.recompute
        value, values, fields = linear_pack(rows, weight_in, save)
        y = F.linear(value, weight_out)
        y = y if bias_out is None else y + bias_out  # two roundings, as in the reference
        return y.view(*x.shape[:-1], len(weight_out)), values, fields

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight_in, weight_out, _, options, _ = inputs
        _, values, fields = output
        ctx.mark_non_differentiable(values, fields)
        ctx.save_for_backward(x, weight_in, weight_out, values, fields)
        ctx.options = options

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight_in, weight_out, values, fields = ctx.saved_tensors
        need_x, need_weight_in, need_weight_out, need_bias_out = ctx.needs_input_grad[:4]
        rows, grad = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1]).contiguous()
        if ctx.options.recompute:
            value, grad_hidden = recompute_gradient(rows, weight_in, grad, weight_out)
        else:
            value, grad_hidden = linear_gradient(grad, weight_out, values, fields)
        return (
            (grad_hidden @ weight_in).view(x.shape) if need_x else None,
            grad_hidden.T @ rows if need_weight_in else None,
            grad.T @ value if need_weight_out else None,
            grad.sum(0) if need_bias_out else None,
            None,
            None,
        )


def narrow_activation24(tensors: Tensors, real: Tensor | None, options: Options24) -> tuple[Tensor, Tensor]:
    """`act24.sparse24.feed_forward.operation.activation24` where `forms.why_not_narrow` has nothing to say.

    Args:
        real: boolean `[T]`, the tokens that the statistics count; None for all.
    """
    x, weight_in, _, weight_out, bias_out = tensors
    assert x is not None
    assert weight_in is not None
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, _, _ = _NarrowActivation24.apply(x, weight_in, weight_out, bias_out, options, training)
    if not options.statistics:
        return y, y.new_zeros(len(STATISTICS), dtype=torch.float32)
    with torch.no_grad():
        rows = x.reshape(-1, x.shape[-1])[::_SAMPLE]
        sparse = sparsify_token_wise(torch.relu(F.linear(rows, weight_in)), None, options)
        sampled = None if real is None else real[::_SAMPLE]
        return y, _SAMPLE * token_wise_statistics(sparse.dense, sparse.mask, sampled)
