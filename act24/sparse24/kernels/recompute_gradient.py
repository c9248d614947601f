# pyright: reportInvalidTypeForm=false
"""Backward of a narrow network that saved nothing F-wide: h is made again beside the product G W_out.

Bytes an element of the activation: 4 written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from act24.compiler import jit, tl
from act24.relu2 import activation, slope
from act24.sparse24.kernels.shared.keys import (
    as_float,
    signed_keys,
    sort4,
    upper,
)
from act24.sparse24.kernels.shared.registry import operator
from act24.sparse24.kernels.shared.tiled_product import (
    COLUMNS,
    GROUP,
    INNER,
    ROWS,
    interleave,
    kept_value,
    tiles,
    which_tile,
    word_product,
)
from act24.sparse24.pattern.selection import top2_of_4


@jit
def _recompute_gradient(
    x,
    weight_in,
    grad,
    weight_out,
    value_dense,
    grad_dense,
    tokens,
    features,
    WIDTH_IN: tl.constexpr,
    WIDTH_OUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    down, across = which_tile(tokens // ROWS, features // COLUMNS, GROUP)
    row, column = down * ROWS, across * COLUMNS
    even, odd = word_product(x, weight_in, row, column, features, WIDTH_IN, True, ROWS, COLUMNS, INNER)
    key0, key1, key2, key3 = signed_keys(even, odd)
    _, next_largest, _, _ = sort4(key0, key1, key2, key3)
    even, odd = word_product(grad, weight_out, row, column, features, WIDTH_OUT, False, ROWS, COLUMNS, INNER)
    target = tl.arange(0, ROWS)[:, None] * features + tl.arange(0, COLUMNS)[None, :]
    target += row.to(tl.int64) * features + column
    x0 = kept_value(key0, next_largest)
    x1 = kept_value(key1, next_largest)
    x2 = kept_value(key2, next_largest)
    x3 = kept_value(key3, next_largest)
    value = interleave(x0 * x0, x1 * x1, x2 * x2, x3 * x3, ROWS, COLUMNS)
    tl.store(value_dense + target, value.to(tl.bfloat16))
    x0 *= 2 * as_float(even << 16)
    x1 *= 2 * as_float(upper(even))
    x2 *= 2 * as_float(odd << 16)
    x3 *= 2 * as_float(upper(odd))
    tl.store(grad_dense + target, interleave(x0, x1, x2, x3, ROWS, COLUMNS).to(tl.bfloat16))


def _reference(x: Tensor, weight_in: Tensor, grad: Tensor, weight_out: Tensor) -> tuple[Tensor, Tensor]:
    positive = torch.relu(x @ weight_in.T)
    positive = torch.where(top2_of_4(positive), positive, 0)
    return activation(positive, "relu2"), slope(positive, "relu2") * (grad @ weight_out)


def _fake(x: Tensor, weight_in: Tensor, grad: Tensor, weight_out: Tensor) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], weight_in.shape[0])
    return x.new_empty(shape), x.new_empty(shape)


@operator(_reference, _fake)
def recompute_gradient(
    x: Tensor, weight_in: Tensor, grad: Tensor, weight_out: Tensor
) -> tuple[Tensor, Tensor]:
    """The activation and dZ for backward, from nothing that was saved.

    Args:
        x: bfloat16 `[T, D]`, T a multiple of 128, D of 64.
        weight_in: `[F, D]`, F a multiple of 128.
        grad: `[T, D_out]`, the gradient of the output; D_out a multiple of 64.
        weight_out: `[D_out, F]`.

    Returns:
        both with their zeros, `[T, F]`.
    """
    tokens, features = x.shape[0], weight_in.shape[0]
    outputs = _fake(x, weight_in, grad, weight_out)
    _recompute_gradient[tiles(tokens, features, ROWS)](
        x,
        weight_in,
        grad,
        weight_out,
        *outputs,
        tokens,
        features,
        WIDTH_IN=x.shape[1],
        WIDTH_OUT=grad.shape[1],
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        INNER=INNER,
        GROUP=GROUP,
        num_warps=8,
        num_stages=3,
    )
    return outputs
