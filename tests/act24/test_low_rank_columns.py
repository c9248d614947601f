"""Selecting channels equals indexing, values and gradients, for distinct indices in any order."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from act24.low_rank.columns import select_columns


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
