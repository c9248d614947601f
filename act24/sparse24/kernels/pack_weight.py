# pyright: reportInvalidTypeForm=false
"""A weight under a transposable 2:4 mask, packed along its rows and along its columns from one read: the 2:4
operands of y = x Wᵀ and of dx = dy W (arXiv 2404.01847).

It runs once an optimizer step, so it is written simply, unlike the kernels for activations, which are tuned
instruction by instruction: weight and mask of a tile are transposed through shared memory, and either
orientation packs the groups of its rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from act24.compiler import jit, tl
from act24.sparse24.format.packed import Packed24, empty_packed, pack
from act24.sparse24.kernels.shared.keys import as_bits, as_signed, group_bytes, metadata_words, sort4
from act24.sparse24.kernels.shared.registry import operator

#: Rows and columns of a tile.
TILE = 64


@jit
def _key(value, kept, code: tl.constexpr):
    """Kept entries first, then by lower position, which is the order that they are stored in: bit 31, then
    3 - position, then the value, which is not compared for the positions differ."""
    value = as_bits(value.to(tl.int32)) & 0xFFFF
    zero = value & 0
    return tl.where(kept != 0, value | 0x80000000, zero) | code << 29


@jit
def _ordered(larger, smaller):
    """Two keys, the lower position first: only a group with fewer than two kept is out of order."""
    swap = (larger << 1) < (smaller << 1)
    return tl.where(swap, smaller, larger), tl.where(swap, larger, smaller)


@jit
def _pack_tile(tile, kept, values, metadata, row, column, columns, TILE: tl.constexpr):
    """Pack a tile [TILE, TILE] along its columns, at (row, column) of a matrix with `columns` columns."""
    groups: tl.constexpr = [TILE, TILE // 4, 2, 2]
    even, odd = tl.split(tl.reshape(tile, groups))
    value0, value2 = tl.split(even)
    value1, value3 = tl.split(odd)
    even, odd = tl.split(tl.reshape(kept, groups))
    kept0, kept2 = tl.split(even)
    kept1, kept3 = tl.split(odd)
    first, second, _, _ = sort4(
        _key(value0, kept0, 3), _key(value1, kept1, 2), _key(value2, kept2, 1), _key(value3, kept3, 0)
    )
    first, second = _ordered(first, second)
    start = row.to(tl.int64) * (columns // 4) + column // 4
    target = tl.arange(0, TILE)[:, None] * (columns // 4) + tl.arange(0, TILE // 4)[None, :]
    tl.store(values + start + target, as_signed((first & 0xFFFF) | second << 16))
    byte = ((first >> 29 & 3) | (second >> 29 & 3) << 2).to(tl.uint8)
    even, odd = group_bytes(byte)
    words = tl.reshape(metadata_words(even, odd), [TILE * 2])
    slab = row.to(tl.int64) // 64 * (2 * columns) + column * 2
    tl.store(metadata + slab + tl.arange(0, TILE * 2), as_signed(words))


@jit
def _pack_weight(
    weight,
    mask,
    values,
    metadata,
    transposed_values,
    transposed_metadata,
    rows,
    columns,
    BOTH_WAYS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0) * TILE
    column = tl.program_id(1) * TILE
    place = row.to(tl.int64) * columns + column
    place += tl.arange(0, TILE)[:, None] * columns + tl.arange(0, TILE)[None, :]
    tile = tl.load(weight + place)
    kept = tl.load(mask + place).to(tl.int8)
    _pack_tile(tile, kept, values, metadata, row, column, columns, TILE)
    if BOTH_WAYS:
        tile, kept = tl.trans(tile), tl.trans(kept)
        _pack_tile(tile, kept, transposed_values, transposed_metadata, column, row, rows, TILE)


def _reference(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return pack(weight, mask).buffer, pack(weight.T.contiguous(), mask.T.contiguous()).buffer


def _fake(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    return empty_packed(rows, columns, weight), empty_packed(columns, rows, weight)


@operator(_reference, _fake)
def pack_weight(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a weight and its transpose.

    Args:
        weight: 16-bit `[O, I]`, O and I multiples of 64.
        mask: boolean, the same shape, at most two True in four consecutive entries of a row, and of a column.

    Returns:
        the buffers of the packed `[O, I]` matrix and of its transpose, `[I, O]`.
    """
    packed, transposed = buffers = _fake(weight, mask)
    _launch(weight, mask, Packed24(packed), Packed24(transposed))
    return buffers


def _rows_reference(weight: Tensor, mask: Tensor) -> Tensor:
    return pack(weight, mask).buffer


def _rows_fake(weight: Tensor, mask: Tensor) -> Tensor:
    rows, columns = weight.shape
    return empty_packed(rows, columns, weight)


@operator(_rows_reference, _rows_fake)
def pack_weight_rows(weight: Tensor, mask: Tensor) -> Tensor:
    """Pack a weight whose mask is 2:4 along its rows only.

    Args:
        weight: 16-bit `[O, I]`, contiguous, O and I multiples of 64.
        mask: boolean, the same shape, at most two True in four consecutive entries of a row.

    Returns:
        the buffer of the packed `[O, I]` matrix.
    """
    buffer = _rows_fake(weight, mask)
    _launch(weight, mask, Packed24(buffer), None)
    return buffer


def _launch(weight: Tensor, mask: Tensor, packed: Packed24, transposed: Packed24 | None) -> None:
    rows, columns = weight.shape
    unused = packed.values.view(torch.int32)
    _pack_weight[(rows // TILE, columns // TILE)](
        weight.view(torch.int16),
        mask,
        packed.values.view(torch.int32),
        packed.metadata.view(torch.int32),
        unused if transposed is None else transposed.values.view(torch.int32),
        unused if transposed is None else transposed.metadata.view(torch.int32),
        rows,
        columns,
        BOTH_WAYS=transposed is not None,
        TILE=TILE,
        num_warps=4,
    )
