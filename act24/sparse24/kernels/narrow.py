# pyright: reportInvalidTypeForm=false
"""Feed-forward networks with narrow linears (low-rank factors): there the F-wide traffic costs more than the
products, and 2:4 products lose to dense ones, so the elementwise passes go into the products around them.

    forward     h = x W_inᵀ         leaves as the 2:4 activation, dense, and packed for backward
    backward    dS = G W_out        leaves as dZ and the activation, dense

or, with nothing saved, backward makes h again beside dS. Bytes an element: forward 2 and 1.125 written;
backward 1.125 read and 4 written, or 4 written. What is packed here no library reads, so its metadata is
plain: a byte for two groups, row-major.
"""

from __future__ import annotations

import torch
from torch import Tensor

from act24.compiler import jit, tl
from act24.sparse24.kernels.pack_gradient import masked_gradient
from act24.sparse24.kernels.shared.keys import (
    as_bits,
    as_float,
    as_signed,
    by_position,
    complement_field,
    load_bits,
    sort4,
    spread,
    upper,
)

#: Tile of the result, the step of the reduction, and how many tiles of rows share a strip of the weight.
ROWS, COLUMNS, INNER, GROUP = 128, 128, 64, 8


@jit
def _tile(tiles_down, tiles_across, GROUP: tl.constexpr):
    """Which tile a program works on: GROUP tiles down, then the next strip, so both operands stay cached."""
    program = tl.program_id(0)
    group = program // (GROUP * tiles_across)
    inside = program % (GROUP * tiles_across)
    height = tl.minimum(tiles_down - group * GROUP, GROUP)
    return group * GROUP + inside % height, inside // height


@jit
def _product(
    left,
    right,
    row,
    column,
    right_stride,
    WIDTH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """A tile of left [T, WIDTH] times right [WIDTH, F], or its transpose [F, WIDTH], rounded to bfloat16, as
    words of two columns: the even and the odd words of every group, [ROWS, COLUMNS / 4] each."""
    rows = (row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = (column + tl.arange(0, COLUMNS))[None, :]
    inner = tl.arange(0, INNER)
    left += rows * WIDTH + inner[None, :]
    right += columns * WIDTH + inner[:, None] if TRANSPOSED else columns + inner[:, None] * right_stride
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for _ in range(0, WIDTH, INNER):
        total = tl.dot(tl.load(left), tl.load(right), total)
        left += INNER
        right += INNER if TRANSPOSED else INNER * right_stride
    bits = total.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
    even, odd = tl.split(tl.reshape(bits, [ROWS, COLUMNS // 2, 2]))
    return tl.split(tl.reshape(even | odd << 16, [ROWS, COLUMNS // 4, 2]))


@jit
def _keys(even, odd):
    """Signed keys of the four columns of every group."""
    return (
        as_signed(even << 16 | 3),
        as_signed(upper(even) | 2),
        as_signed(odd << 16 | 1),
        as_signed(upper(odd)),
    )


@jit
def _kept(key, next_largest):
    """relu(h) where it is one of the two largest, else 0; NaN stays."""
    positive = tl.maximum(as_float(upper(as_bits(key))), 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(key >= next_largest, positive, 0.0)


@jit
def _interleave(x0, x1, x2, x3, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [ROWS, COLUMNS])


@jit
def _field_places(features, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of a tile's bytes of metadata; transposed and said to be scattered, else Triton would give a thread 16
    of them, and carry everything else into that layout first."""
    place = tl.arange(0, ROWS)[None, :] * (features // 8) + tl.arange(0, COLUMNS // 8)[:, None]
    return tl.max_contiguous(place, (1, 1))


@jit
def _linear_pack(
    x,
    weight,
    dense,
    values,
    fields,
    tokens,
    features,
    WIDTH: tl.constexpr,
    SAVE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    down, across = _tile(tokens // ROWS, features // COLUMNS, GROUP)
    row, column = down * ROWS, across * COLUMNS
    even, odd = _product(x, weight, row, column, features, WIDTH, True, ROWS, COLUMNS, INNER)
    key0, key1, key2, key3 = _keys(even, odd)
    largest, next_largest, _, _ = sort4(key0, key1, key2, key3)
    start = row.to(tl.int64) * features + column  # T·F may pass 2^31
    rows = tl.arange(0, ROWS)[:, None]
    x0 = _kept(key0, next_largest)
    x1 = _kept(key1, next_largest)
    x2 = _kept(key2, next_largest)
    x3 = _kept(key3, next_largest)
    value = _interleave(x0 * x0, x1 * x1, x2 * x2, x3 * x3, ROWS, COLUMNS)
    target = rows * features + tl.arange(0, COLUMNS)[None, :]
    tl.store(dense + start + target, value.to(tl.bfloat16))
    if SAVE:
        first, second = by_position(as_bits(largest), as_bits(next_largest))
        x0 = tl.maximum(as_float(upper(first)), 0.0, propagate_nan=tl.PropagateNan.ALL)
        x1 = tl.maximum(as_float(upper(second)), 0.0, propagate_nan=tl.PropagateNan.ALL)
        value = tl.reshape(tl.join(x0 * x0, x1 * x1), [ROWS, COLUMNS // 2])
        target = rows * (features // 2) + tl.arange(0, COLUMNS // 2)[None, :]
        # Said to be contiguous by four only: the columns that a thread has of the dense store.
        tl.store(values + start // 2 + tl.max_contiguous(target, (1, 4)), value.to(tl.bfloat16))
        field = complement_field(first, second) & 15
        low, high = tl.split(tl.reshape(field, [ROWS, COLUMNS // 8, 2]))
        byte = tl.trans((low | high << 4).to(tl.uint8))
        tl.store(fields + start // 8 + _field_places(features, ROWS, COLUMNS), byte)


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
    down, across = _tile(tokens // ROWS, features // COLUMNS, GROUP)
    row, column = down * ROWS, across * COLUMNS
    start = row.to(tl.int64) * features + column
    rows = tl.arange(0, ROWS)[:, None]
    # Loaded before the product, which then hides how long that takes.
    target = rows * (features // 4) + tl.arange(0, COLUMNS // 4)[None, :]
    both = load_bits(values + start // 4 + tl.max_contiguous(target, (1, 2))) & 0x7FFF7FFF
    byte = tl.trans(tl.load(fields + start // 8 + _field_places(features, ROWS, COLUMNS)))
    even, odd = _product(grad, weight, row, column, features, WIDTH, False, ROWS, COLUMNS, INNER)
    byte = byte.to(tl.uint32) ^ 0xFF
    named = tl.reshape(tl.join(byte, byte >> 4), [ROWS, COLUMNS // 4])
    low = named & 3
    high = named & 12
    pairs = tl.reshape(tl.join(even, odd), [ROWS, COLUMNS // 2])
    rounded = masked_gradient(pairs, both, both, low, high, "relu2", False)
    first, second = tl.split(rounded.to(tl.uint16, bitcast=True))
    half_row = start // 2 + (rows * (features // 2) + tl.arange(0, COLUMNS // 2)[None, :])
    x0, x1, x2, x3 = spread(low, high, both << 16, upper(both), 0)
    words = tl.reshape(tl.join(x0 >> 16 | x1, x2 >> 16 | x3), [ROWS, COLUMNS // 2])
    tl.store(value_dense + half_row, as_signed(words))
    x0, x1, x2, x3 = spread(low, high, first.to(tl.uint32) << 16, second.to(tl.uint32) << 16, 0)
    words = tl.reshape(tl.join(x0 >> 16 | x1, x2 >> 16 | x3), [ROWS, COLUMNS // 2])
    tl.store(grad_dense + half_row, as_signed(words))


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
    down, across = _tile(tokens // ROWS, features // COLUMNS, GROUP)
    row, column = down * ROWS, across * COLUMNS
    even, odd = _product(x, weight_in, row, column, features, WIDTH_IN, True, ROWS, COLUMNS, INNER)
    key0, key1, key2, key3 = _keys(even, odd)
    _, next_largest, _, _ = sort4(key0, key1, key2, key3)
    even, odd = _product(grad, weight_out, row, column, features, WIDTH_OUT, False, ROWS, COLUMNS, INNER)
    target = tl.arange(0, ROWS)[:, None] * features + tl.arange(0, COLUMNS)[None, :]
    target += row.to(tl.int64) * features + column
    x0 = _kept(key0, next_largest)
    x1 = _kept(key1, next_largest)
    x2 = _kept(key2, next_largest)
    x3 = _kept(key3, next_largest)
    value = _interleave(x0 * x0, x1 * x1, x2 * x2, x3 * x3, ROWS, COLUMNS)
    tl.store(value_dense + target, value.to(tl.bfloat16))
    x0 *= 2 * as_float(even << 16)
    x1 *= 2 * as_float(upper(even))
    x2 *= 2 * as_float(odd << 16)
    x3 *= 2 * as_float(upper(odd))
    tl.store(grad_dense + target, _interleave(x0, x1, x2, x3, ROWS, COLUMNS).to(tl.bfloat16))


def _grid(tokens: int, features: int, rows: int) -> tuple[int]:
    return (tokens // rows * (features // COLUMNS),)


def linear_pack(x: Tensor, weight: Tensor, dense: Tensor, values: Tensor, fields: Tensor) -> None:
    """Launch the forward kernel.

    Args:
        x: bfloat16 `[T, D]`, T a multiple of 128, D of 64.
        weight: `[F, D]`, F a multiple of 128.
        dense: relu(h)² under its 2:4 mask, `[T, F]`, unwritten.
        values: the two kept entries of each group, `[T, F/2]`, unwritten; empty not to save them.
        fields: uint8 `[T, F/8]`, their places, inverted; unwritten, or empty.
    """
    tokens, features = dense.shape
    _linear_pack[_grid(tokens, features, ROWS)](
        x,
        weight,
        dense,
        values,
        fields,
        tokens,
        features,
        WIDTH=x.shape[1],
        SAVE=values.numel() > 0,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        INNER=INNER,
        GROUP=GROUP,
        num_warps=8,
        num_stages=3,
    )


def linear_gradient(
    grad: Tensor, weight: Tensor, values: Tensor, fields: Tensor, value_dense: Tensor, grad_dense: Tensor
) -> None:
    """Launch the backward kernel.

    Args:
        grad: bfloat16 `[T, D_out]`, the gradient of the output; T a multiple of 128, D_out of 64.
        weight: of the output, `[D_out, F]`, F a multiple of 128.
        values, fields: as `linear_pack` left them.
        value_dense, grad_dense: the activation and dZ, `[T, F]`, unwritten.
    """
    tokens, features = value_dense.shape
    # Half a tile's rows: three of these fit on a multiprocessor, and one's loads hide behind the others.
    rows = ROWS // 2
    _linear_gradient[_grid(tokens, features, rows)](
        grad,
        weight,
        values.view(torch.int32),
        fields,
        value_dense.view(torch.int32),
        grad_dense.view(torch.int32),
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


def recompute_gradient(
    x: Tensor, weight_in: Tensor, grad: Tensor, weight_out: Tensor, value_dense: Tensor, grad_dense: Tensor
) -> None:
    """Launch the backward kernel that makes h again; arguments as for the two above."""
    tokens, features = value_dense.shape
    _recompute_gradient[_grid(tokens, features, ROWS)](
        x,
        weight_in,
        grad,
        weight_out,
        value_dense,
        grad_dense,
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
