"""A network small enough for a CPU that takes every form, and products that are 2:4 whatever they cost."""

from __future__ import annotations

import torch
from torch import Tensor

from act24.sparse24.feed_forward.operation import activation24
from act24.sparse24.feed_forward.options import Options24
from act24.sparse24.format.products import Measured, feed_forward_products

TOKENS, WIDTH, FEATURES, WIDTH_OUT = 128, 64, 128, 128
FORCED = tuple(
    (product, Measured(0, 0.0, 1.0))
    for product in feed_forward_products(TOKENS, WIDTH, FEATURES, WIDTH_OUT, False).values()
)
PACKED = Options24(algorithms=FORCED)


def network(bias: bool = True, features: int = FEATURES, exact: bool = False) -> tuple[Tensor | None, ...]:
    """x, weight_in, bias_in, weight_out, bias_out. Exact: multiples of 1/4, whose products add up exactly in
    any order."""

    def draw(*shape: int) -> Tensor:
        values = torch.randint(-2, 3, shape) / 4 if exact else torch.randn(shape) / shape[-1] ** 0.5
        return values.bfloat16().requires_grad_()

    x, weight_in, weight_out = draw(2, TOKENS // 2, WIDTH), draw(features, WIDTH), draw(WIDTH_OUT, features)
    return x, weight_in, draw(features) if bias else None, weight_out, draw(WIDTH_OUT)


def outcome(tensors: tuple[Tensor | None, ...], options: Options24, *state: Tensor | None) -> list[Tensor]:
    """y, the statistics, and all gradients for one draw of the output's."""
    y, statistics = activation24(*tensors, *state, options=options)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    leaves = [tensor for tensor in tensors if tensor is not None]
    return [y, statistics, *torch.autograd.grad(y, leaves, grad)]
