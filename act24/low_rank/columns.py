"""Some input channels of an activation: LoST's sparse branch reads x[..., I]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from act24.operation import operation


class _SelectColumns(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, indices: Tensor) -> Tensor:
        return x.index_select(-1, indices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, indices = inputs
        ctx.save_for_backward(indices)
        ctx.width = x.shape[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (indices,) = ctx.saved_tensors
        # The indices are distinct, so each place is written once: a copy, where autograd's own backward of a
        # selection has to add, and a GPU adds with atomics.
        empty = grad.new_zeros(*grad.shape[:-1], ctx.width)
        return empty.index_copy(-1, indices, grad), None


@operation
def select_columns(x: Tensor, indices: Tensor) -> Tensor:
    """x[..., I] for distinct channels.

    Args:
        x: `[..., D]`.
        indices: int64 `[k]`, no two equal; equal ones would get the gradient of one of them.

    Returns:
        `[..., k]`.
    """
    return _SelectColumns.apply(x, indices)
