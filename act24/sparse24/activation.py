"""2:4 activations behind relu² (arXiv 2503.16672): the operations that `activation24` puts into a graph.

Of every 4 consecutive features of relu(h)² the 2 largest stay. Squaring keeps the order of non-negative
numbers, so the selection is made on relu(h): kept values r serve both the product, through r², and the
derivative 2·r, and a dropped position, whose r is stored as 0, has no gradient by itself.

This is the plain-PyTorch reference: masked dense products, on any device.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from act24.operation import cast_for_autocast, operation
from act24.relu2 import describe
from act24.sparse24.selection import top2_of_4

Method = Literal["naive"]
Backward = Literal["dense"]


class _Relu2Sparse24(torch.autograd.Function):
    @staticmethod
    def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        positive = torch.relu(hidden)
        mask = top2_of_4(positive)
        kept = torch.where(mask, positive, 0)
        return kept * kept, describe(positive, mask), kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, statistics, kept = output
        ctx.mark_non_differentiable(statistics, kept)
        ctx.save_for_backward(kept)

    @staticmethod
    def backward(ctx: Any, grad_sparse: Tensor, *_: Any) -> Tensor:
        (kept,) = ctx.saved_tensors
        return 2 * kept * grad_sparse


@operation
def relu2_24(hidden: Tensor, method: Method = "naive") -> tuple[Tensor, Tensor]:
    """relu² and 2:4 along the features, for a pre-activation that has no single linear before it, or
    an activation with several consumers.

    Args:
        hidden: pre-activation `[..., F]`, F a multiple of 4.
        method: `"naive"`, the two largest stay as they are.

    Returns:
        the 2:4 activation `[..., F]`, stored dense, and its statistics (`act24.relu2.STATISTICS`).
        The gradient is that of the masked function: dropped positions get zero.
    """
    return _Relu2Sparse24.apply(hidden)[:2]


class _Relu2Linear24(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_out: Tensor, bias_out: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        positive = torch.relu(F.linear(x, weight_in, bias_in))
        mask = top2_of_4(positive)
        kept = torch.where(mask, positive, 0)
        return F.linear(kept * kept, weight_out, bias_out), describe(positive, mask), kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight_in, _, weight_out, _ = inputs
        _, statistics, kept = output
        ctx.mark_non_differentiable(statistics, kept)
        ctx.save_for_backward(x, weight_in, weight_out, kept)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight_in, weight_out, kept = ctx.saved_tensors
        need_x, need_weight_in, need_bias_in, need_weight_out, need_bias_out = ctx.needs_input_grad
        # The mask is in `kept` itself, so this gradient is 2:4 along the features like the activation.
        grad_hidden = 2 * kept * (grad_output @ weight_out)
        tokens = lambda tensor: tensor.flatten(0, -2)  # noqa: E731
        return (
            grad_hidden @ weight_in if need_x else None,
            tokens(grad_hidden).T @ tokens(x) if need_weight_in else None,
            tokens(grad_hidden).sum(0) if need_bias_in else None,
            tokens(grad_output).T @ tokens(kept * kept) if need_weight_out else None,
            tokens(grad_output).sum(0) if need_bias_out else None,
        )


@operation
def relu2_linear24(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    method: Method = "naive",
    backward: Backward = "dense",
) -> tuple[Tensor, Tensor]:
    """A feed-forward network linear → relu² → linear whose activation is 2:4 along the features.

        y = (M ∘ relu(x W_inᵀ + b_in)²) W_outᵀ + b_out

    with M the two largest of every 4 features. Saved for backward: x, the weights, and relu(h) under the
    mask, one F-wide tensor where the dense network keeps two.

    Args:
        x: `[..., D]`.
        weight_in: `[F, D]`, F a multiple of 4; bias_in: `[F]` or None.
        weight_out: `[D_out, F]`; bias_out: `[D_out]` or None.
        method: `"naive"`, the two largest stay as they are.
        backward: `"dense"`, the exact gradient of the masked function (M taken as constant).

    Returns:
        y `[..., D_out]` and the statistics of the activation (`act24.relu2.STATISTICS`).

    Source: arXiv 2503.16672, Fig. 4, with all products of the backward dense.
    """
    tensors = cast_for_autocast(x, weight_in, bias_in, weight_out, bias_out)
    return _Relu2Linear24.apply(*tensors)[:2]
