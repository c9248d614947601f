"""The kernels of narrow networks against plain products and masks, bit for bit: operands are small multiples
of 1/8, whose products add up exactly in any order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import act24.sparse24.kernels.linear_gradient
import act24.sparse24.kernels.linear_pack
import act24.sparse24.kernels.recompute_gradient  # noqa: F401  (fill OPERATORS)
from act24.sparse24.kernels.shared.registry import OPERATORS
from act24.sparse24.kernels.shared.self_check import _CASES
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

    dense, values, fields = OPERATORS["linear_pack"].launch(x, weight_in, True)
    assert torch.equal(dense, value)
    for name, arguments in (
        ("linear_gradient", (grad, weight_out, values, fields)),
        ("recompute_gradient", (x, weight_in, grad, weight_out)),
    ):
        outputs = OPERATORS[name].launch(*arguments)
        assert torch.equal(outputs[0], value)
        assert torch.equal(outputs[1], grad_hidden)


@pytest.mark.parametrize("name", ["linear_pack", "linear_gradient", "recompute_gradient"])
def test_on_what_the_self_check_of_a_gpu_runs(name: str) -> None:
    """At the least and the greatest width, with what is saved among the results."""
    operator, arguments = OPERATORS[name], [case.arguments for case in _CASES[name](torch.device("cpu"))]
    for given in arguments:
        for ours, expected in zip(operator.launch(*given), operator.reference(*given), strict=True):
            assert torch.equal(ours, expected)
            assert not ours.numel() or ours.count_nonzero()
    assert {given[0].shape[1] for given in arguments} == {64, 256}


def test_without_saving() -> None:
    x, weight_in = exact(128, 64), exact(128, 64)
    dense, values, fields = OPERATORS["linear_pack"].launch(x, weight_in, False)
    assert values.numel() == fields.numel() == 0
    positive = torch.relu(x.float() @ weight_in.float().T).bfloat16()
    assert torch.equal(dense, torch.where(top2_of_4(positive), positive * positive, 0))
