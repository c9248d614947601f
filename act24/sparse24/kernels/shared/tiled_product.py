# pyright: reportInvalidTypeForm=false
"""Dense products whose tiles come out as sort keys, for feed-forward networks with narrow linears (low-rank
factors). There the F-wide traffic costs more than the products, and 2:4 products lose to dense ones, so the
elementwise passes go into the products around them:

    forward     h = x W_inᵀ         leaves as the 2:4 activation, dense, and packed for backward
    backward    dS = G W_out        leaves as dZ and the activation, dense

or, with nothing saved, backward makes h again beside dS. Bytes an element: forward 2 and 1.125 written;
backward 1.125 read and 4 written, or 4 written. No library reads what is packed here, so its metadata is
plain: a byte for two groups, row-major."""

from __future__ import annotations

from act24.compiler import jit, tl
from act24.sparse24.kernels.shared.keys import (
    as_bits,
    as_float,
    upper,
)

#: Tile of the result, the step of the reduction, and how many tiles of rows share a strip of the weight.
ROWS, COLUMNS, INNER, GROUP = 128, 128, 64, 8


@jit
def which_tile(tiles_down, tiles_across, GROUP: tl.constexpr):
    """Which tile a program works on: GROUP tiles down, then the next strip, so both operands stay cached."""
    program = tl.program_id(0)
    group = program // (GROUP * tiles_across)
    inside = program % (GROUP * tiles_across)
    height = tl.minimum(tiles_down - group * GROUP, GROUP)
    return group * GROUP + inside % height, inside // height


@jit
def word_product(
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
def kept_value(key, next_largest):
    """relu(h) where it is one of the two largest, else 0; NaN stays."""
    positive = tl.maximum(as_float(upper(as_bits(key))), 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(key >= next_largest, positive, 0.0)


@jit
def interleave(x0, x1, x2, x3, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [ROWS, COLUMNS])


@jit
def field_places(features, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of a tile's bytes of metadata; transposed and said to be scattered, else Triton would give a thread 16
    of them, and carry everything else into that layout first."""
    place = tl.arange(0, ROWS)[None, :] * (features // 8) + tl.arange(0, COLUMNS // 8)[:, None]
    return tl.max_contiguous(place, (1, 1))


def tiles(tokens: int, features: int, rows: int) -> tuple[int]:
    """The grid of programs for results `[tokens, features]`, in tiles of so many rows."""
    return (tokens // rows * (features // COLUMNS),)
