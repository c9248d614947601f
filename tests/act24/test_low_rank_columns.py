"""Selecting channels equals indexing, values and gradients, for distinct indices in any order."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from act24.low_rank.columns import low_rank_beside_columns, select_columns


@given(st.integers(1, 12), st.data())
def test_values_and_gradients_are_those_of_indexing(width: int, data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, width - 1), unique=True, min_size=1))
    shape = data.draw(st.lists(st.integers(0, 3), max_size=2))
    indices = torch.tensor(chosen)
    x = torch.randn(*shape, width, dtype=torch.float64, requires_grad=True)
    ours, reference = select_columns(x, indices), x[..., indices]
    assert torch.equal(ours, reference)
    weight = torch.randn_like(reference)
    grad = torch.autograd.grad((ours * weight).sum(), x)[0]
    assert torch.equal(grad, torch.autograd.grad((reference * weight).sum(), x)[0])


@pytest.mark.parametrize("activation", ["silu", "relu2", "none"])
@pytest.mark.parametrize(("width", "rank", "out", "columns"), [(12, 4, 7, 3), (8, 8, 8, 8), (5, 1, 3, 1)])
def test_both_branches_in_two_products(
    activation: Literal["silu", "relu2", "none"], width: int, rank: int, out: int, columns: int
) -> None:
    """Against the branches one by one, values and gradients."""
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    indices = torch.randperm(width)[:columns]
    tensors = x, weight_in, weight_out, weight_columns = (
        draw(2, 3, width),
        draw(rank, width),
        draw(out, rank),
        draw(out, columns),
    )
    ours = low_rank_beside_columns(*tensors, indices, 0.7, activation)
    hidden = x @ weight_in.T
    hidden = {"silu": F.silu(hidden), "relu2": hidden.relu().square(), "none": hidden}[activation]
    reference = 0.7 * hidden @ weight_out.T + 0.3 * x[..., indices] @ weight_columns.T
    torch.testing.assert_close(ours, reference)
    grad = torch.randn_like(reference)
    for a, b in zip(*(torch.autograd.grad(y, tensors, grad) for y in (ours, reference)), strict=True):
        torch.testing.assert_close(a, b)
