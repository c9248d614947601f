"""`activation24` for narrow linears, for which dense products are faster than 2:4 ones
(`act24.sparse24.kernels.shared.tiled_product`). The kernels of the products compute the activation and its
derivative too. Of all tensors with F columns backward keeps the packed activation alone, 1.125 bytes a
feature, or with `recompute` none.

The same function as the reference in `act24.sparse24.feed_forward.operation` up to the rounding of sums.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from act24.operation import once_differentiable
from act24.sparse24.feed_forward.forms import Form, Network, State, Tensors
from act24.sparse24.feed_forward.options import Options24
from act24.sparse24.feed_forward.statistics import no_statistics, token_wise_from_some_tokens
from act24.sparse24.kernels.linear_gradient import linear_gradient
from act24.sparse24.kernels.linear_pack import linear_pack
from act24.sparse24.kernels.recompute_gradient import recompute_gradient

#: Of the kernels: the tile, the step of a reduction, and the greatest width measured.
_TILE, _STEP, _WIDEST = 128, 64, 256


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


def narrow_activation24(tensors: Tensors, state: State, options: Options24) -> tuple[Tensor, Tensor]:
    """`act24.sparse24.feed_forward.operation.activation24` where `NARROW` can run it.

    Args:
        tensors: in bfloat16, of the shapes that the operation has, without a bias before the activation.
        state: without a scale.
        options: naive relu², with exact weight gradients.
    """
    x, weight_in, _, weight_out, bias_out = tensors
    assert x is not None
    assert weight_in is not None
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, _, _ = _NarrowActivation24.apply(x, weight_in, weight_out, bias_out, options, training)
    if not options.statistics:
        return y, no_statistics(y)
    return y, token_wise_from_some_tokens(x, weight_in, state.real, options)


def _condition(network: Network, options: Options24) -> str:
    if network.biased:
        return "the kernels have no bias before the activation"
    if network.tokens == 0 or network.tokens % _TILE or network.features % _TILE:
        return f"T {network.tokens} and F {network.features} have to be multiples of {_TILE}"
    widths = (network.width, network.width_out)
    if any(width % _STEP for width in widths) or max(widths) > _WIDEST:
        return f"fused products take widths that are multiples of {_STEP}, {_WIDEST} at most"
    return ""


NARROW = Form(
    name="narrow",
    says="2:4 inside dense products",
    sparsifiers=("naive",),
    functions=("relu2",),
    estimators=("masked",),
    backwards=("dense",),
    precisions=("bfloat16",),
    linears=True,
    scales=False,
    operators=("linear_pack", "linear_gradient", "recompute_gradient"),
    condition=_condition,
    run=narrow_activation24,
)
