"""The packed 2:4 format that cuSPARSELt multiplies on Hopper, for 16-bit values: layout, pack, unpack.

One buffer holds the values, row-major, two for every group of four columns, and right behind them the
metadata: four bits a group, `i | j << 2` with i < j the positions of the two values in the group. A group
with fewer than two non-zeros still names two positions. The order of those four-bit fields in memory is
`metadata_field`, which the kernels compile as it stands.

NVIDIA documents none of this. The layout was read off cuSPARSELt 0.8 (and agrees with the packers of
FlagGems and xformers); `act24.sparse24.products.layout_error` compares it with the library at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from act24.sparse24.selection import top2_of_4

#: What the shape of a packed matrix must be a multiple of: the metadata comes in tiles of this size.
TILE_ROWS, TILE_COLUMNS = 64, 32

#: 16-bit elements of the buffer per column of the dense matrix: 1/2 for values and 1/16 for metadata.
NUMERATOR, DENOMINATOR = 9, 16


def metadata_field(row, column, columns):
    """Where in the metadata the group at (row, column // 4) of a matrix with `columns` columns lies,
    counted in four-bit fields: two to a byte, the even one in the low bits.

    A tile of 64 rows × 32 columns fills 256 bytes, and tiles follow each other along the columns first.
    A byte holds the same group of the rows r and r + 8; an aligned 32-bit word holds 2 × 2 groups, 4 and
    16 columns apart, of these two rows.

    Only `//`, `%`, `*` and `+`: the arguments may be integers, integer tensors or tensors inside a kernel.
    """
    byte = (
        row // 64 * 8 * columns
        + column // 32 * 256
        + row % 64 // 16 * 64
        + row % 8 * 8
        + column % 16 // 4 * 2
        + column % 32 // 16
    )
    return byte * 2 + row % 16 // 8


@dataclass(frozen=True)
class Packed24:
    """A 2:4 matrix `[rows, columns]` in packed form.

    Attributes:
        buffer: 16-bit, contiguous, `[rows, 9·columns/16]`: what `torch._cslt_sparse_mm` takes. A flat
            view of values and metadata; its rows are not those of the matrix.
    """

    buffer: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the dense matrix."""
        return self.buffer.shape[0], self.buffer.shape[1] * DENOMINATOR // NUMERATOR

    @property
    def values(self) -> Tensor:
        """`[rows, columns / 2]`, a view: the two kept entries of each group, in order."""
        rows, columns = self.shape
        return self.buffer.flatten()[: rows * columns // 2].view(rows, columns // 2)

    @property
    def metadata(self) -> Tensor:
        """uint8 `[rows · columns / 8]`, a view, in the order of `metadata_field`."""
        rows, columns = self.shape
        return self.buffer.flatten()[rows * columns // 2 :].view(torch.uint8)


def packable(rows: int, columns: int) -> bool:
    """Whether the layout has a place for a matrix of this shape."""
    return rows > 0 and columns > 0 and rows % TILE_ROWS == 0 and columns % TILE_COLUMNS == 0


def empty_packed(rows: int, columns: int, like: Tensor) -> Tensor:
    """An unwritten buffer for a packed `[rows, columns]` matrix, in the dtype and on the device of `like`."""
    return like.new_empty(rows, columns * NUMERATOR // DENOMINATOR)


def top2_of_4_with_nan(scores: Tensor) -> Tensor:
    """`top2_of_4` that counts NaN as infinite, so that a NaN stays in and is seen."""
    return top2_of_4(torch.where(scores.isnan(), torch.inf, scores))


def pack(dense: Tensor, mask: Tensor | None = None) -> Packed24:
    """Pack a matrix, two entries of every four columns.

    Args:
        dense: `[rows, columns]`, 16-bit, rows a multiple of 64, columns of 32.
        mask: boolean, the same shape, at most two True in a group: the entries that stay. None: the two
            of largest magnitude, the lower column first on ties, NaN before infinity.

    Returns:
        the packed matrix. Entries outside the mask that fill up a group are stored as zero.

    Raises:
        ValueError: the layout has no place for the shape, the dtype is not 16-bit, or the mask keeps more
            than two of four.
    """
    if dense.ndim != 2 or not packable(*dense.shape) or dense.element_size() != 2:
        raise ValueError(
            f"a packed 2:4 matrix is 16-bit, with rows a multiple of {TILE_ROWS} and columns of "
            f"{TILE_COLUMNS}; got {dense.dtype} {tuple(dense.shape)}"
        )
    rows, columns = dense.shape
    if mask is None:
        named = mask = top2_of_4_with_nan(dense.abs())
    else:
        if mask.unflatten(-1, (-1, 4)).sum(-1).max() > 2:
            raise ValueError("the mask keeps more than two of four consecutive columns")
        named = top2_of_4(mask.to(torch.uint8))  # two positions a group, those of the mask first
    a, b, c, d = named.unflatten(-1, (-1, 4)).unbind(-1)
    first = torch.where(a, 0, torch.where(b, 1, 2))
    second = torch.where(d, 3, torch.where(c, 2, 1))
    positions = torch.stack((first, second), dim=-1)
    kept = torch.where(mask, dense, 0).unflatten(-1, (-1, 4))
    packed = Packed24(empty_packed(rows, columns, dense))
    packed.values.copy_(kept.gather(-1, positions).flatten(-2))
    fields = torch.empty(rows * columns // 4, dtype=torch.uint8, device=dense.device)
    fields[_fields(rows, columns, dense.device)] = (first + 4 * second).to(torch.uint8)
    packed.metadata.copy_(fields[0::2] + 16 * fields[1::2])
    return packed


def unpack(packed: Packed24) -> Tensor:
    """The dense `[rows, columns]` matrix, zeros filled in."""
    rows, columns = packed.shape
    metadata = packed.metadata
    fields = torch.stack((metadata % 16, metadata // 16), dim=-1).flatten()
    named = fields[_fields(rows, columns, metadata.device)]
    positions = torch.stack((named % 4, named // 4), dim=-1).long()
    dense = packed.values.new_zeros(rows, columns // 4, 4)
    return dense.scatter_(-1, positions, packed.values.unflatten(-1, (-1, 2))).flatten(-2)


def random_packed(rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator) -> Packed24:
    """A packed matrix of normal values in random places, on the device of the generator."""
    device = generator.device
    legal = torch.tensor([0x4, 0x8, 0xC, 0x9, 0xD, 0xE], dtype=torch.uint8, device=device)
    draws = torch.randint(6, (2, rows * columns // 8), generator=generator, device=device)
    packed = Packed24(torch.empty(rows, columns * NUMERATOR // DENOMINATOR, dtype=dtype, device=device))
    packed.values.normal_(generator=generator)
    packed.metadata.copy_(legal[draws[0]] + 16 * legal[draws[1]])
    return packed


def _fields(rows: int, columns: int, device: torch.device) -> Tensor:
    """`metadata_field` of every group, `[rows, columns / 4]`."""
    row = torch.arange(rows, device=device)[:, None]
    column = torch.arange(0, columns, 4, device=device)[None]
    return metadata_field(row, column, columns)
