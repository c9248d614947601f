# pyright: reportInvalidTypeForm=false
"""Backward of a narrow network: dZ and the activation, made inside the product G W_out from what forward
saved.

Bytes an element of the activation: 1.125 read and 4 written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from act24.compiler import jit, tl
from act24.relu2 import slope_from_value
from act24.sparse24.format.fields import from_bytes, with_zeros
from act24.sparse24.kernels.shared.keys import filled, load_bits, upper
from act24.sparse24.kernels.shared.masked_gradient import masked_gradient
from act24.sparse24.kernels.shared.registry import operator
from act24.sparse24.kernels.shared.tiled_product import (
    COLUMNS,
    GROUP,
    INNER,
    ROWS,
    field_places,
    tiles,
    which_tile,
    word_product,
)


@jit
def _linear_gradient(
    grad,
    weight,
    values,
    fields,
    value_dense,
    grad_dense,
    tokens,
    features,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    down, across = which_tile(tokens // ROWS, features // COLUMNS, GROUP)
    row, column = down * ROWS, across * COLUMNS
    start = row.to(tl.int64) * features + column
    rows = tl.arange(0, ROWS)[:, None]
    # Loaded before the product, which then hides how long that takes.
    target = rows * (features // 4) + tl.arange(0, COLUMNS // 4)[None, :]
    both = load_bits(values + start // 4 + tl.max_contiguous(target, (1, 2))) & 0x7FFF7FFF
    byte = tl.trans(tl.load(fields + start // 8 + field_places(features, ROWS, COLUMNS)))
    even, odd = word_product(grad, weight, row, column, features, WIDTH, False, ROWS, COLUMNS, INNER)
    byte = byte.to(tl.uint32) ^ 0xFF
    named = tl.reshape(tl.join(byte, byte >> 4), [ROWS, COLUMNS // 4])
    low = named & 3
    high = named & 12
    pairs = tl.reshape(tl.join(even, odd), [ROWS, COLUMNS // 2])
    rounded = masked_gradient(pairs, both, both, low, high, "relu2", False)
    first, second = tl.split(rounded.to(tl.uint16, bitcast=True))
    half_row = start // 2 + (rows * (features // 2) + tl.arange(0, COLUMNS // 2)[None, :])
    tl.store(value_dense + half_row, filled(low, high, both << 16, upper(both)))
    tl.store(grad_dense + half_row, filled(low, high, first.to(tl.uint32) << 16, second.to(tl.uint32) << 16))


def _reference(grad: Tensor, weight: Tensor, values: Tensor, fields: Tensor) -> tuple[Tensor, Tensor]:
    value = with_zeros(values, 15 - from_bytes(fields))
    return value, slope_from_value(value, "relu2") * (grad @ weight)


def _fake(grad: Tensor, weight: Tensor, values: Tensor, fields: Tensor) -> tuple[Tensor, Tensor]:
    shape = (grad.shape[0], weight.shape[1])
    return grad.new_empty(shape), grad.new_empty(shape)


@operator(_reference, _fake, ours=("values", "fields"))
def linear_gradient(grad: Tensor, weight: Tensor, values: Tensor, fields: Tensor) -> tuple[Tensor, Tensor]:
    """The activation and dZ for backward.

    Args:
        grad: bfloat16 `[T, D_out]`, the gradient of the output; T a multiple of 128, D_out of 64.
        weight: of the output, `[D_out, F]`, F a multiple of 128.
        values, fields: as `linear_pack` left them.

    Returns:
        both with their zeros, `[T, F]`.
    """
    tokens, features = grad.shape[0], weight.shape[1]
    value, grad_hidden = _fake(grad, weight, values, fields)
    # Half a tile's rows: three of these fit on a multiprocessor, and one's loads hide behind the others.
    rows = ROWS // 2
    _linear_gradient[tiles(tokens, features, rows)](
        grad,
        weight,
        values.view(torch.int32),
        fields,
        value.view(torch.int32),
        grad_hidden.view(torch.int32),
        tokens,
        features,
        WIDTH=grad.shape[1],
        ROWS=rows,
        COLUMNS=COLUMNS,
        INNER=INNER,
        GROUP=GROUP,
        num_warps=4,
        num_stages=3,
    )
    return value, grad_hidden
