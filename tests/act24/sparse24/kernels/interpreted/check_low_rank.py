"""The kernels of narrow networks against plain products and masks, bit for bit: operands are small multiples
of 1/8, whose products add up exactly in any order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from act24.sparse24.kernels.narrow import linear_gradient, linear_pack, recompute_gradient
from act24.sparse24.pattern.selection import top2_of_4


def exact(*shape: int) -> Tensor:
    return (torch.randint(-4, 5, shape) / 8).bfloat16()


@pytest.mark.parametrize(("tokens", "features", "width"), [(128, 128, 64), (256, 256, 128)])
def test_forward_and_both_backwards(tokens: int, features: int, width: int) -> None:
    x, weight_in = exact(tokens, width), exact(features, width)
    grad, weight_out = exact(tokens, width), exact(width, features)
    positive = torch.relu(x.float() @ weight_in.float().T).bfloat16()
    mask = top2_of_4(positive)
    value = torch.where(mask, positive * positive, 0)
    grad_hidden = torch.where(mask, 2 * positive * (grad.float() @ weight_out.float()).bfloat16(), 0)

    dense = torch.full_like(value, 7)
    values = torch.full((tokens, features // 2), 7.0).bfloat16()
    fields = torch.zeros(tokens, features // 8, dtype=torch.uint8)
    linear_pack(x, weight_in, dense, values, fields)
    assert torch.equal(dense, value)
    outputs = torch.full_like(value, 7), torch.full_like(value, 7)
    linear_gradient(grad, weight_out, values, fields, *outputs)
    assert torch.equal(outputs[0], value)
    assert torch.equal(outputs[1], grad_hidden)
    outputs = torch.full_like(value, 7), torch.full_like(value, 7)
    recompute_gradient(x, weight_in, grad, weight_out, *outputs)
    assert torch.equal(outputs[0], value)
    assert torch.equal(outputs[1], grad_hidden)


def test_without_saving() -> None:
    x, weight_in = exact(128, 64), exact(128, 64)
    dense = torch.full((128, 128), 7.0).bfloat16()
    linear_pack(x, weight_in, dense, x.new_empty(0), torch.empty(0, dtype=torch.uint8))
    positive = torch.relu(x.float() @ weight_in.float().T).bfloat16()
    assert torch.equal(dense, torch.where(top2_of_4(positive), positive * positive, 0))
