# pyright: reportInvalidTypeForm=false
"""Numbers of e4m3 inside kernels, and the metadata of 2:4 matrices of them."""

from __future__ import annotations

from act24.compiler import jit, jit_arithmetic, tl
from act24.sparse24.format import packed

metadata_field8 = jit_arithmetic(packed.metadata_field8)


@jit
def e4m3_bits(value, LARGEST: tl.constexpr):
    """Float32 in e4m3, as bytes: what is too large becomes the largest number, and NaN stays."""
    value = tl.minimum(value, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    value = tl.maximum(value, -LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@jit
def from_e4m3(byte):
    """A byte in the low bits of a word as the float32 that it stands for."""
    return byte.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)


@jit
def metadata_words8(bytes_of_groups):
    """Words of metadata of 8-bit values, from inverted fields.

    Args:
        bytes_of_groups: uint8 [64, 16], of two matrices: one has its fields in the low bits, the other in the
            high ones.

    Returns:
        two uint32 [4, 8, 2, 2], in the order of the words of a tile in memory.
    """
    # A row is (16s, upper 8 of 16, 8s), a group (32 columns, 16, 8, 4).
    x = tl.reshape(bytes_of_groups, [4, 2, 8, 2, 2, 2, 2])
    even, odd = tl.split(tl.permute(x, (0, 2, 4, 5, 3, 1, 6)))
    return _word8(even & 15 | odd << 4), _word8(even >> 4 | odd & 0xF0)


@jit
def _word8(pairs):
    """Bytes [4, 8, 2, 2, far, lower row] side by side, inverted."""
    row, row_8 = tl.split(pairs)
    halves = row.to(tl.uint32) | row_8.to(tl.uint32) << 8
    near, far = tl.split(halves)
    return (near | far << 16) ^ 0xFFFFFFFF
