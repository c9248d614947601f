# pyright: reportInvalidTypeForm=false
"""Rows of bfloat16 in e4m3, each over its own scale, from one read: a program holds a whole row.

Of a packed matrix the metadata goes along, from the order of 16-bit values to that of 8-bit ones, which
differ inside blocks of 512 bytes only. Bytes an element of the dense matrix: 1.125 read and 0.625 written.
That is less than a pass for the largest activation of each token before packing (2 read) and e4m3 from the
packing kernel (0.625 written), and holds for every method, whatever it makes of the largest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from act24.compiler import jit, tl, triton
from act24.sparse24.format.fp8 import LEAST, PER_LARGEST
from act24.sparse24.format.packed import Packed24
from act24.sparse24.kernels.shared.keys import as_bits, as_signed


@jit
def _field_bytes(words):
    """Of a word of metadata of 16-bit values, whose bytes hold one group in the rows r and r + 8, the first
    byte and the third: two groups next to each other, as 8-bit values have them, a byte for each row."""
    low = words & 0x000F000F
    high = words & 0x00F000F0
    return (low & 0xFFFF) | low >> 12 | (high & 0xFFFF) << 4 | high >> 8


@jit
def _quantise(
    values,
    metadata,
    narrow,
    narrow_metadata,
    scales,
    columns,
    blocks,
    share,
    LEAST: tl.constexpr,
    PER_LARGEST: tl.constexpr,
    ROW: tl.constexpr,
    SHARE: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, ROW)
    place = row.to(tl.int64) * columns + column
    value = tl.load(values + place, mask=column < columns, other=0.0)
    if SHARE:  # of the metadata, for every program
        # 16 bytes are the fields of 64 columns in two rows: 8 bytes of either 16-bit tile there.
        part = tl.arange(0, SHARE)
        block = row * share + part
        inside = (part < share) & (block < blocks)
        near = metadata + (block // 32 * 128 + block % 32 * 2)
        near0 = as_bits(tl.load(near, mask=inside))
        near1 = as_bits(tl.load(near + 1, mask=inside))
        far0 = as_bits(tl.load(near + 64, mask=inside))
        far1 = as_bits(tl.load(near + 65, mask=inside))
        word0 = _field_bytes(near0) | _field_bytes(far0) << 16
        word1 = _field_bytes(near1) | _field_bytes(far1) << 16
        word2 = _field_bytes(near0 >> 8) | _field_bytes(far0 >> 8) << 16
        word3 = _field_bytes(near1 >> 8) | _field_bytes(far1 >> 8) << 16
        target = narrow_metadata + block * 4
        tl.store(target, as_signed(word0), mask=inside)
        tl.store(target + 1, as_signed(word1), mask=inside)
        tl.store(target + 2, as_signed(word2), mask=inside)
        tl.store(target + 3, as_signed(word3), mask=inside)

    value = value.to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value)), LEAST) * PER_LARGEST
    tl.store(scales + row, scale)
    value = value * tl.div_rn(1.0, scale)
    tl.store(narrow + place, value.to(tl.float8e4nv), mask=column < columns)


def quantise_rows(matrix: Tensor, narrow: Tensor, scale: Tensor) -> None:
    """Launch the kernel: fill `narrow`, float8 `[M, K]`, and `scale`, float32 `[M]`, from bfloat16 `[M, K]`,
    contiguous."""
    _launch(matrix, narrow, scale)


def quantise_packed(packed: Packed24, narrow: Packed24, scale: Tensor) -> None:
    """Launch the kernel: fill `narrow`, of e4m3, and `scale`, float32 `[M]`, from a bfloat16 matrix `[M, K]`,
    K a multiple of 64."""
    places = packed.metadata.view(torch.int32), narrow.metadata.view(torch.int32)
    _launch(packed.values, narrow.values, scale, *places)


def _launch(
    values: Tensor,
    narrow: Tensor,
    scale: Tensor,
    metadata: Tensor | None = None,
    narrow_metadata: Tensor | None = None,
) -> None:
    rows, columns = values.shape
    blocks = 0 if metadata is None else metadata.numel() // 4
    share = triton.cdiv(blocks, rows)
    row = triton.next_power_of_2(columns)
    _quantise[(rows,)](
        values,
        values if metadata is None else metadata,
        narrow,
        values if narrow_metadata is None else narrow_metadata,
        scale,
        columns,
        blocks,
        share,
        LEAST=LEAST,
        PER_LARGEST=PER_LARGEST,
        ROW=row,
        SHARE=triton.next_power_of_2(share) if share else 0,
        num_warps=min(max(row // 1024, 1), 16),
    )
