"""The operators of narrow feed-forward networks: products with the 2:4 activation in them
(`act24.sparse24.kernels.narrow`)."""

from __future__ import annotations

import torch
from torch import Tensor

from act24.sparse24.kernels.shared.registry import operator
from act24.sparse24.pattern.selection import top2_of_4


def _linear_pack_reference(x: Tensor, weight: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    positive = torch.relu(x @ weight.T)
    mask = top2_of_4(positive)
    value = torch.where(mask, positive * positive, 0)
    if not save:
        return value, x.new_empty(0), x.new_empty(0, dtype=torch.uint8)
    a, b, c, d = mask.unflatten(-1, (-1, 4)).unbind(-1)
    first = torch.where(a, 0, torch.where(b, 1, 2))
    second = torch.where(d, 3, torch.where(c, 2, 1))
    kept = value.unflatten(-1, (-1, 4)).gather(-1, torch.stack((first, second), -1)).flatten(-2)
    field = 15 - (first + 4 * second)
    return value, kept, (field[:, 0::2] + 16 * field[:, 1::2]).to(torch.uint8)


def _linear_pack_kernel(x: Tensor, weight: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    from act24.sparse24.kernels.narrow import linear_pack

    outputs = _linear_pack_fake(x, weight, save)
    linear_pack(x, weight, *outputs)
    return outputs


def _linear_pack_fake(x: Tensor, weight: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    tokens, features = x.shape[0], weight.shape[0]
    return (
        x.new_empty(tokens, features),
        x.new_empty((tokens, features // 2) if save else 0),
        x.new_empty((tokens, features // 8) if save else 0, dtype=torch.uint8),
    )


#: relu(x Wᵀ)² under its 2:4 mask, for x `[T, D]` and W `[F, D]`: dense `[T, F]`, and to save it the kept
#: values `[T, F/2]` and their places, uint8 `[T, F/8]`, a byte for two groups, 15 less `i | j << 2` for each.
linear_pack = operator(
    "linear_pack(Tensor x, Tensor weight, bool save) -> (Tensor, Tensor, Tensor)",
    _linear_pack_reference,
    _linear_pack_kernel,
    _linear_pack_fake,
)


def _linear_gradient_reference(
    grad: Tensor, weight: Tensor, values: Tensor, fields: Tensor
) -> tuple[Tensor, Tensor]:
    field = 15 - torch.stack((fields % 16, fields // 16), dim=-1).flatten(-2).long()
    places = torch.stack((field % 4, field // 4), dim=-1)
    groups = values.new_zeros(*field.shape, 4)
    value = groups.scatter(-1, places, values.unflatten(-1, (-1, 2))).flatten(-2)
    # The root of the rounded square, rounded, is relu(h) exactly.
    return value, 2 * value.float().sqrt().to(value.dtype) * (grad @ weight)


def _linear_gradient_kernel(
    grad: Tensor, weight: Tensor, values: Tensor, fields: Tensor
) -> tuple[Tensor, Tensor]:
    from act24.sparse24.kernels.narrow import linear_gradient

    outputs = _linear_gradient_fake(grad, weight, values, fields)
    linear_gradient(grad, weight, values, fields, *outputs)
    return outputs


def _linear_gradient_fake(
    grad: Tensor, weight: Tensor, values: Tensor, fields: Tensor
) -> tuple[Tensor, Tensor]:
    shape = (grad.shape[0], weight.shape[1])
    return grad.new_empty(shape), grad.new_empty(shape)


#: The activation and dZ, dense `[T, F]`, from the gradient of the output `[T, D_out]`, W_out `[D_out, F]` and
#: what `linear_pack` saved.
linear_gradient = operator(
    "linear_gradient(Tensor grad, Tensor weight, Tensor values, Tensor fields) -> (Tensor, Tensor)",
    _linear_gradient_reference,
    _linear_gradient_kernel,
    _linear_gradient_fake,
)


def _recompute_gradient_reference(
    x: Tensor, weight_in: Tensor, grad: Tensor, weight_out: Tensor
) -> tuple[Tensor, Tensor]:
    positive = torch.relu(x @ weight_in.T)
    positive = torch.where(top2_of_4(positive), positive, 0)
    return positive * positive, 2 * positive * (grad @ weight_out)


def _recompute_gradient_kernel(
    x: Tensor, weight_in: Tensor, grad: Tensor, weight_out: Tensor
) -> tuple[Tensor, Tensor]:
    from act24.sparse24.kernels.narrow import recompute_gradient

    outputs = _recompute_gradient_fake(x, weight_in, grad, weight_out)
    recompute_gradient(x, weight_in, grad, weight_out, *outputs)
    return outputs


def _recompute_gradient_fake(
    x: Tensor, weight_in: Tensor, grad: Tensor, weight_out: Tensor
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], weight_in.shape[0])
    return x.new_empty(shape), x.new_empty(shape)


#: The same from x and W_in, with h made again.
recompute_gradient = operator(
    "recompute_gradient(Tensor x, Tensor weight_in, Tensor grad, Tensor weight_out) -> (Tensor, Tensor)",
    _recompute_gradient_reference,
    _recompute_gradient_kernel,
    _recompute_gradient_fake,
)
