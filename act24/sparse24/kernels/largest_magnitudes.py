# pyright: reportInvalidTypeForm=false
"""The largest magnitude of every row and of every column of a matrix, from one read.

Bit patterns of magnitudes sort as the numbers do, infinity above all of them and NaN above infinity, so one
integer maximum finds the largest and hides nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from act24.compiler import jit, tl, triton
from act24.sparse24.format.fp8 import largest_of
from act24.sparse24.kernels.shared.registry import operator

#: Rows and columns of a tile, and tiles that a program walks down.
ROWS, COLUMNS, STEPS = 32, 256, 8


@jit
def _largest_magnitudes(
    matrix,
    by_row,
    by_column,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Pointers that are None stand for what is not wanted."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    best = tl.zeros([ROWS, COLUMNS], tl.int32)
    for step in tl.range(0, STEPS, num_stages=3):
        row = (tl.program_id(1) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        place = row.to(tl.int64)[:, None] * columns + column[None, :]
        value = tl.load(matrix + place, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        bits = value.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        best = tl.maximum(best, bits)
        if by_row is not None:
            tl.atomic_max(by_row + row, tl.max(bits, 1), mask=row < rows, sem="relaxed")
    if by_column is not None:
        tl.atomic_max(by_column + column, tl.max(best, 0), mask=inside, sem="relaxed")


def _reference(matrix: Tensor, by_row: bool, by_column: bool) -> tuple[Tensor, Tensor]:
    rows, columns = _fake(matrix, by_row, by_column)
    return largest_of(matrix, 1) if by_row else rows, largest_of(matrix, 0) if by_column else columns


def _fake(matrix: Tensor, by_row: bool, by_column: bool) -> tuple[Tensor, Tensor]:
    rows, columns = matrix.shape
    return (
        matrix.new_empty(rows if by_row else 0, dtype=torch.float32),
        matrix.new_empty(columns if by_column else 0, dtype=torch.float32),
    )


@operator(_reference, _fake)
def largest_magnitudes(matrix: Tensor, by_row: bool, by_column: bool) -> tuple[Tensor, Tensor]:
    """The largest magnitudes of rows and columns; NaN where one holds NaN.

    Args:
        matrix: `[M, N]`, bfloat16, float16 or float32.
        by_row, by_column: whether to make the first and the second result.

    Returns:
        float32 `[M]` and `[N]`; what was not asked for is empty.
    """
    rows, columns = matrix.shape
    largest = [
        matrix.new_zeros(size if wanted else 0, dtype=torch.int32)
        for size, wanted in ((rows, by_row), (columns, by_column))
    ]
    if matrix.numel():
        _largest_magnitudes[(triton.cdiv(columns, COLUMNS), triton.cdiv(rows, ROWS * STEPS))](
            matrix,
            largest[0] if by_row else None,
            largest[1] if by_column else None,
            rows,
            columns,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            STEPS=STEPS,
            num_warps=4,
        )
    return largest[0].view(torch.float32), largest[1].view(torch.float32)
