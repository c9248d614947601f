"""Some input channels of an activation: LoST's sparse branch reads x[..., I]."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from act24.low_rank.activations import ACTIVATIONS
from act24.operation import operation
from act24.options import one_of


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
        # The indices are distinct, so the gradient can be copied to its places. Autograd's own backward would
        # have to add it, which a GPU does with atomics.
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


#: Products run at full speed where inner sizes are multiples of this.
_MULTIPLE = 8


@operation
def low_rank_beside_columns(
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    weight_columns: Tensor,
    indices: Tensor,
    gamma: float,
    activation: Literal["silu", "relu2", "none"],
) -> Tensor:
    """γ · f(x W_inᵀ) W_outᵀ + (1 - γ) · x[..., I] W_Iᵀ in two products.

        [h, x_I] = x [W_in; E_I]ᵀ        y = [f(h), x_I] [γ W_out, (1 - γ) W_I]ᵀ

    E_I are the rows I of the identity. Written as two branches, the function would gather x, scatter its
    gradient, add the branches and scale two gradients, and each of these takes about as long as a product
    with a narrow bottleneck. Here they are additional rows and columns of the two products, and a column I
    costs as much as a channel of the bottleneck.

    Args:
        x: `[..., D]`.
        weight_in: `[R, D]`; weight_out: `[out, R]`; weight_columns: `[out, k]`.
        indices: int64 `[k]`.
        activation: f.

    Returns:
        `[..., out]`.

    Raises:
        OptionError: there is no such activation.
    """
    one_of("low_rank_beside_columns", "activation", activation, ACTIVATIONS)
    rank, (count,) = weight_in.shape[0], indices.shape
    short = -(rank + count) % _MULTIPLE
    places = torch.arange(x.shape[-1], device=indices.device)
    identity = F.pad((indices[:, None] == places).to(weight_in.dtype), (0, 0, 0, short))
    columns = F.pad((1 - gamma) * weight_columns, (0, short))
    hidden, kept = F.linear(x, torch.cat((weight_in, identity))).split((rank, count + short), -1)
    function = ACTIVATIONS[activation]
    bottleneck = hidden if function is None else function(hidden)
    return F.linear(torch.cat((bottleneck, kept), -1), torch.cat((gamma * weight_out, columns), -1))
