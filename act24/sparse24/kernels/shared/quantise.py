# pyright: reportInvalidTypeForm=false
"""Rows of bfloat16 in e4m3, each over its own scale, from one read: a program holds a whole row.

The metadata of a packed matrix goes along; its order differs inside blocks of 512 bytes only.
"""

from __future__ import annotations

from torch import Tensor

from act24.compiler import jit, tl, triton
from act24.sparse24.format.fp8 import LEAST, PER_LARGEST
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


def launch(
    values: Tensor,
    narrow: Tensor,
    scale: Tensor,
    metadata: Tensor | None = None,
    narrow_metadata: Tensor | None = None,
) -> None:
    """Fill `narrow`, float8 `[M, K]`, and `scale`, float32 `[M]`, from `values`, bfloat16 `[M, K]`; and
    `narrow_metadata` from `metadata`, both as int32, if given."""
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
