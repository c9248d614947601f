"""Write some rows of a matrix, or columns of one stored transposed: the features that stay dense, into the
result of the 2:4 product.

PyTorch's index_copy_ takes 0.10 ms for 820 rows of 4096 on an H200, either way; the bytes take 0.01.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

import torch
from torch import Tensor

from act24.compiler import jit, tl, triton

#: Rows and entries of a tile.
ROWS, ENTRIES = 16, 128


@jit
def _replace_rows(
    result,
    rows,
    index,
    number,
    length,
    stride_row,
    stride_entry,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    nth = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    entry = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    inside = (nth < number)[:, None] & (entry < length)[None, :]
    row = tl.load(index + nth, mask=nth < number, other=0)
    value = tl.load(rows + nth.to(tl.int64)[:, None] * length + entry[None, :], inside)
    target = row.to(tl.int64)[:, None] * stride_row + entry.to(tl.int64)[None, :] * stride_entry
    tl.store(result + target, value, inside)


def replace_rows(result: Tensor, rows: Tensor, index: Tensor, transposed: bool) -> None:
    """Launch the kernel.

    Args:
        result: 16-bit `[M, N]`, or `[N, M]` if transposed, contiguous; changed in place.
        rows: 16-bit `[n, N]`, contiguous.
        index: int64 `[n]`, all different, below M.
    """
    number, length = rows.shape
    strides = (1, result.shape[1]) if transposed else (length, 1)
    _replace_rows[(triton.cdiv(number, ROWS), triton.cdiv(length, ENTRIES))](
        result.view(torch.int16),
        rows.view(torch.int16),
        index,
        number,
        length,
        *strides,
        ROWS=ROWS,
        ENTRIES=ENTRIES,
        num_warps=4,
    )
