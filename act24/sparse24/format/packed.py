"""The packed 2:4 format that cuSPARSELt multiplies on Hopper, for 16-bit and 8-bit values: layout, pack,
unpack.

One buffer holds the values, row-major, two for every group of four columns, and right behind them the
metadata: four bits a group (`act24.sparse24.format.fields`). The order of those fields in memory is
`metadata_field`, which the kernels compile as it stands, and for 8-bit values `metadata_field8`.

NVIDIA documents none of this. The layouts were read off cuSPARSELt 0.8 (the 16-bit one agrees with the
packers of FlagGems and xformers); `act24.sparse24.format.device.layout_error` compares them with the
library at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from act24.sparse24.format.fields import LEGAL, fields_of, from_bytes, kept_entries, to_bytes, with_zeros
from act24.sparse24.pattern.selection import top2_of_4

#: What the shape of a packed matrix must be a multiple of: the metadata comes in tiles of this size. The
#: columns by the bytes of a value.
TILE_ROWS, TILE_COLUMNS = 64, {2: 32, 1: 64}

#: Elements of the buffer for 16 columns of the dense matrix, 8 values and 2 bytes of metadata, by the bytes
#: of a value; and integers that hold its bits.
_SIXTEENTHS, _BITS = {2: 9, 1: 10}, {2: torch.int16, 1: torch.uint8}


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


def metadata_field8(row, column, columns):
    """`metadata_field` for 8-bit values.

    A tile of 64 rows × 64 columns fills 512 bytes. A byte holds two groups next to each other, an aligned
    32-bit word those of the rows r and r + 8, there and 32 columns on. A tile has the same 512 bytes as the
    two tiles of 16-bit values that cover it, and each 16 of them the fields of two times 8 of theirs.
    """
    byte = (
        row // 64 * 8 * columns
        + column // 64 * 512
        + row % 64 // 16 * 128
        + row % 8 * 16
        + column % 32 // 16 * 8
        + column % 16 // 8 * 4
        + column % 64 // 32 * 2
        + row % 16 // 8
    )
    return byte * 2 + column % 8 // 4


@dataclass(frozen=True)
class Packed24:
    """A 2:4 matrix `[rows, columns]` in packed form.

    Attributes:
        buffer: contiguous, 16-bit `[rows, 9·columns/16]` or 8-bit `[rows, 10·columns/16]`: what
            `torch._cslt_sparse_mm` takes. A flat view of values and metadata; its rows are not those of the
            matrix.
    """

    buffer: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the dense matrix."""
        return self.buffer.shape[0], self.buffer.shape[1] * 16 // _SIXTEENTHS[self.buffer.element_size()]

    @property
    def values(self) -> Tensor:
        """`[rows, columns / 2]`, a view: the two kept entries of each group, in order."""
        rows, columns = self.shape
        return self.buffer.flatten()[: rows * columns // 2].view(rows, columns // 2)

    @property
    def metadata(self) -> Tensor:
        """uint8 `[rows · columns / 8]`, a view, in the order of `metadata_field` or `metadata_field8`."""
        rows, columns = self.shape
        return self.buffer.flatten()[rows * columns // 2 :].view(torch.uint8)


def packable(rows: int, columns: int, size: int = 2) -> bool:
    """Whether the layout has a place for a matrix of this shape, of values of `size` bytes."""
    return rows > 0 and columns > 0 and rows % TILE_ROWS == 0 and columns % TILE_COLUMNS[size] == 0


def empty_packed(rows: int, columns: int, like: Tensor) -> Tensor:
    """An unwritten buffer for a packed `[rows, columns]` matrix, in the dtype and on the device of `like`."""
    return like.new_empty(rows, columns * _SIXTEENTHS[like.element_size()] // 16)


def pack(dense: Tensor, mask: Tensor | None = None) -> Packed24:
    """Pack a matrix, two entries of every four columns.

    Args:
        dense: `[rows, columns]`, 16-bit or 8-bit, rows a multiple of 64, columns of 32 or 64.
        mask: boolean, the same shape, at most two True in a group: the entries that stay. None: the two
            of largest magnitude, the lower column first on ties, NaN above infinity.

    Returns:
        the packed matrix. Entries outside the mask that fill up a group are stored as zero.

    Raises:
        ValueError: the layout has no place for the shape, the dtype has another size, or the mask keeps more
            than two of four.
    """
    size = dense.element_size()
    if dense.ndim != 2 or size not in TILE_COLUMNS or not packable(dense.shape[0], dense.shape[1], size):
        raise ValueError(
            f"a packed 2:4 matrix is 16-bit, with rows a multiple of {TILE_ROWS} and columns of "
            f"{TILE_COLUMNS[2]}, or 8-bit, with columns of {TILE_COLUMNS[1]}; got {dense.dtype} "
            f"{tuple(dense.shape)}"
        )
    if mask is None:
        named = mask = top2_of_4(dense.float().abs())
    else:
        if mask.unflatten(-1, (-1, 4)).sum(-1).max() > 2:
            raise ValueError("the mask keeps more than two of four consecutive columns")
        named = top2_of_4(mask.to(torch.uint8))  # two positions a group, those of the mask first
    fields = fields_of(named)
    kept = torch.where(mask, dense.view(_BITS[size]), 0)
    return _packed(kept_entries(kept, fields).view(dense.dtype), fields)


def unpack(packed: Packed24) -> Tensor:
    """The dense matrix `[rows, columns]` in the dtype of the buffer, zeros filled in."""
    values = packed.values.view(_BITS[packed.buffer.element_size()])
    return with_zeros(values, _fields(packed)).view(packed.buffer.dtype)


def with_values(packed: Packed24, values: Tensor) -> Packed24:
    """A packed matrix that keeps its values where another one does.

    Args:
        packed: `[rows, columns]`, 16-bit or 8-bit.
        values: `[rows, columns / 2]`, in the order of `packed.values`. They may have the other size, which
            the result then has.
    """
    return _packed(values, _fields(packed))


def random_packed(rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator) -> Packed24:
    """A packed matrix `[rows, columns]` of normal values in random places, on the device of the generator."""
    device = generator.device
    legal = torch.tensor(LEGAL, dtype=torch.uint8, device=device)
    draws = torch.randint(len(LEGAL), (2, rows * columns // 8), generator=generator, device=device)
    packed = Packed24(empty_packed(rows, columns, torch.empty(0, dtype=dtype, device=device)))
    packed.values.copy_(torch.empty_like(packed.values, dtype=torch.float32).normal_(generator=generator))
    packed.metadata.copy_(to_bytes(legal[draws.T.flatten()]))
    return packed


def _packed(values: Tensor, fields: Tensor) -> Packed24:
    """Values `[rows, columns / 2]` with the fields of their groups, uint8 `[rows, columns / 4]`."""
    rows, columns = fields.shape[0], fields.shape[1] * 4
    packed = Packed24(empty_packed(rows, columns, values))
    packed.values.copy_(values)
    in_memory = torch.empty_like(fields).flatten()
    in_memory[_places(packed)] = fields
    packed.metadata.copy_(to_bytes(in_memory))
    return packed


def _fields(packed: Packed24) -> Tensor:
    """The field of every group, uint8 `[rows, columns / 4]`."""
    return from_bytes(packed.metadata)[_places(packed)]


def _places(packed: Packed24) -> Tensor:
    """Where the field of every group is, counted in fields, int64 `[rows, columns / 4]`."""
    rows, columns = packed.shape
    row = torch.arange(rows, device=packed.buffer.device)[:, None]
    column = torch.arange(0, columns, 4, device=packed.buffer.device)[None]
    return (metadata_field if packed.buffer.element_size() == 2 else metadata_field8)(row, column, columns)
