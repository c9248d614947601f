"""relu²: value and derivative against the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from act24.options import OptionError
from act24.relu2 import FUNCTIONS, activation, relu2, slope, slope_from_value

FINITE = st.floats(-1e6, 1e6, width=32)


@given(st.lists(FINITE, min_size=1, max_size=16))
def test_value_and_derivative(values: list[float]) -> None:
    hidden = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    result = relu2(hidden)
    assert result.tolist() == [max(v, 0.0) ** 2 for v in values]
    result.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [2 * max(v, 0.0) for v in values]


def test_second_derivative() -> None:
    hidden = torch.tensor([-1.5, 0.25, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(relu2, hidden)
    assert torch.autograd.gradgradcheck(relu2, hidden)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_and_shape_stay(dtype: torch.dtype) -> None:
    assert relu2(torch.ones(2, 0, 3, dtype=dtype)).shape == (2, 0, 3)
    assert relu2(torch.ones(2, dtype=dtype, device="meta")).dtype == dtype


def test_one_tensor_is_saved() -> None:
    """relu(h) once, for both factors: the same memory as any other activation function."""
    saved: set[int] = set()
    hidden = torch.randn(4, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.add(t.data_ptr()) or t, lambda t: t):
        relu2(hidden * 1)
    assert len(saved) == 1


@pytest.mark.parametrize("function", FUNCTIONS)
def test_slopes_are_those_of_autograd(function: str) -> None:
    """From relu(h), and from the saved activation: for every bfloat16 number whose square is one too."""
    hidden = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    hidden = hidden[(hidden.abs() > 1e-18) & (hidden.abs() < 1e18)].requires_grad_()
    formula = torch.relu(hidden) ** (2 if function == "relu2" else 1)
    (expected,) = torch.autograd.grad(formula.sum(), hidden)
    positive = torch.relu(hidden.detach())
    value = activation(positive, function)
    assert torch.equal(value, formula)
    assert torch.equal(slope(positive, function), expected)
    assert torch.equal(slope_from_value(value, function), expected)


def test_an_unknown_activation_is_refused() -> None:
    for call in (activation, slope, slope_from_value):
        with pytest.raises(OptionError, match="gelu"):
            call(torch.ones(2), "gelu")
