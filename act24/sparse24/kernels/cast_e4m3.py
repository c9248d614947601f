# pyright: reportInvalidTypeForm=false
"""A matrix in e4m3, as it lies and transposed, from one read.

A product in e4m3 wants both operands with the dimension that it sums over innermost, and a linear sums over a
tensor's rows in one product and over its columns in another. Bytes an element: 2 read, 1 written for each.
A thread holds four rows, so that four transposed entries are one word on their way through shared memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from act24.compiler import jit, tl, triton
from act24.sparse24.format.fp8 import LARGEST, SMALLEST, narrowed
from act24.sparse24.kernels.shared.e4m3 import e4m3_bits
from act24.sparse24.kernels.shared.registry import operator

#: Rows and columns of a tile.
ROWS, COLUMNS = 128, 128

#: What the number of columns of a transposed matrix is filled up to, with zeros: products want multiples.
MULTIPLE = 16


@jit
def _cast_e4m3(
    matrix,
    narrow,
    turned,
    row_scales,
    column_scales,
    counts,
    rows,
    columns,
    turned_words,
    BY_ROW: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Pointers that are None stand for what is not wanted, `counts` for two int32. Scales are one number, or
    one for each row of `narrow` (BY_ROW) and for each row of `turned` (BY_COLUMN)."""
    four = tl.program_id(1) * (ROWS // 4) + tl.arange(0, ROWS // 4)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (column < columns)[None, :]
    if counts is not None:
        # Float32 is exact up to 2^24. What is lost is told by its size, not by its byte: on Hopper Triton
        # 3.6 made other counts of `(byte & 0x7F) == 0`, and with sums of int32 ptxas crashed.
        nonzero = tl.zeros([ROWS // 4, COLUMNS], tl.float32)
        lost = tl.zeros([ROWS // 4, COLUMNS], tl.float32)
    if turned is not None:
        if BY_COLUMN:
            scale = tl.load(column_scales + column, mask=column < columns, other=1.0)[None, :]
        else:
            scale = tl.load(column_scales)
        column_factor = tl.div_rn(1.0, scale)
        words = tl.zeros([ROWS // 4, COLUMNS], tl.uint32)
    for nth in tl.static_range(4):
        row = four * 4 + nth
        mask = (row < rows)[:, None] & inside
        place = row.to(tl.int64)[:, None] * columns + column[None, :]
        value = tl.load(matrix + place, mask=mask, other=0.0).to(tl.float32)
        if narrow is not None:
            if BY_ROW:
                scale = tl.load(row_scales + row, mask=row < rows, other=1.0)[:, None]
            else:
                scale = tl.load(row_scales)
            row_factor = tl.div_rn(1.0, scale)
            byte = e4m3_bits(value * row_factor, LARGEST)
            tl.store(narrow + place, byte, mask=mask)
            if counts is not None:
                nonzero += (value != 0).to(tl.float32)
                lost += ((value != 0) & (tl.abs(value * row_factor) <= SMALLEST / 2)).to(tl.float32)
        if turned is not None:
            byte = e4m3_bits(value * column_factor, LARGEST)
            words |= byte.to(tl.uint32) << (8 * nth)
            if counts is not None:
                nonzero += (value != 0).to(tl.float32)
                lost += ((value != 0) & (tl.abs(value * column_factor) <= SMALLEST / 2)).to(tl.float32)
    if counts is not None:
        tl.atomic_add(counts, tl.sum(nonzero).to(tl.int32), sem="relaxed")
        tl.atomic_add(counts + 1, tl.sum(lost).to(tl.int32), sem="relaxed")
    if turned is not None:
        target = column.to(tl.int64)[:, None] * turned_words + four[None, :]
        mask = (column < columns)[:, None] & (four < turned_words)[None, :]
        tl.store(turned + target, tl.trans(words).to(tl.int32, bitcast=True), mask=mask)


def _reference(
    matrix: Tensor, scale: Tensor | None, turned_scale: Tensor | None, count: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    narrow, turned, counts = _fake(matrix, scale, turned_scale, count)
    if scale is not None:
        narrow = narrowed(matrix, scale[:, None])
    if turned_scale is not None:
        turned = narrowed(F.pad(matrix.T, (0, -len(matrix) % MULTIPLE)), turned_scale[:, None]).contiguous()
    if count:
        nonzero = matrix != 0
        made = [] if scale is None else [narrow]
        made += [] if turned_scale is None else [turned[:, : len(matrix)].T]
        lost = [(nonzero & (each.float() == 0)).sum() for each in made]
        counts = torch.stack((nonzero.sum() * len(made), sum(lost, nonzero.new_zeros((), dtype=torch.int64))))
    return narrow, turned, counts.to(torch.int32)


def _fake(
    matrix: Tensor, scale: Tensor | None, turned_scale: Tensor | None, count: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = matrix.shape
    filled = (rows + MULTIPLE - 1) // MULTIPLE * MULTIPLE
    return (
        matrix.new_empty((0,) if scale is None else (rows, columns), dtype=torch.float8_e4m3fn),
        matrix.new_empty((0,) if turned_scale is None else (columns, filled), dtype=torch.float8_e4m3fn),
        matrix.new_empty(2 if count else 0, dtype=torch.int32),
    )


@operator(_reference, _fake)
def cast_e4m3(
    matrix: Tensor, scale: Tensor | None, turned_scale: Tensor | None, count: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix over its scales in e4m3, as it lies and transposed.

    Args:
        matrix: `[M, N]`, bfloat16, float16 or float32.
        scale: float32 `[1]`, or `[M]`, one for each row; None: the first result is not wanted.
        turned_scale: float32 `[1]`, or `[N]`, one for each column; None: nor is the second.
        count: count what becomes zero.

    Returns:
        e4m3 `[M, N]`, and e4m3 `[N, M']`, where M' is M filled up to a multiple of 16 with zeros; and int32
        `[2]`: entries that are not zero, and those of them that are zero in e4m3, of both results together.
        What was not asked for is empty. What is above 448 over its scale is 448. Over a scale that is NaN
        all is NaN.
    """
    narrow, turned, _ = _fake(matrix, scale, turned_scale)
    counts = matrix.new_zeros(2 if count else 0, dtype=torch.int32)
    rows, columns = matrix.shape
    if matrix.numel():
        words = None if turned_scale is None else turned.view(torch.int32)
        _cast_e4m3[(triton.cdiv(columns, COLUMNS), triton.cdiv(rows, ROWS))](
            matrix,
            None if scale is None else narrow.view(torch.uint8),
            words,
            scale,
            turned_scale,
            counts if count else None,
            rows,
            columns,
            0 if words is None else words.shape[1],
            BY_ROW=scale is not None and len(scale) > 1,
            BY_COLUMN=turned_scale is not None and len(turned_scale) > 1,
            LARGEST=LARGEST,
            SMALLEST=SMALLEST,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            num_warps=4,
        )
    return narrow, turned, counts
