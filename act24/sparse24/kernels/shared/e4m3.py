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
def metadata_words8(near, far):
    """Words of metadata of 8-bit values from the two results of `keys.group_bytes` for 64 rows and 16 groups,
    whose bytes hold inverted fields in their low bits.

    Returns:
        uint32 [4, 8, 2, 2], in the order of the words of a tile in memory.
    """
    # [32 columns, 16 rows, row, 8 columns], in bytes the rows r and r + 8, there and 16 columns on.
    near0, near1 = tl.split(tl.permute(near & 0x0F0F0F0F, (1, 2, 3, 0)))
    far0, far1 = tl.split(tl.permute(far & 0x0F0F0F0F, (1, 2, 3, 0)))
    bytes0 = near0 | far0 << 4
    bytes1 = near1 | far1 << 4
    words = tl.join((bytes0 & 0xFFFF) | bytes1 << 16, bytes0 >> 16 | (bytes1 & 0xFFFF0000))
    return tl.permute(words, (0, 1, 3, 2)) ^ 0xFFFFFFFF
