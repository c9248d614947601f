"""relu²: value and derivative against the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from act24.relu2 import relu2

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
