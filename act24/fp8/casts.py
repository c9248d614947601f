"""A matrix in e4m3 for the products that read it: as it lies, and transposed, each over its own scales."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from torch import Tensor

from act24.options import one_of
from act24.sparse24.format.fp8 import scales_of
from act24.sparse24.kernels.shared.registry import form

#: One scale a matrix, or one for each row of an operand, which is what a product does not sum over.
Scaling = Literal["tensorwise", "rowwise"]
SCALINGS: tuple[Scaling, ...] = get_args(Scaling)

#: What casts and multiplies; whether they are right on a device is looked at on first use (`self_check`).
OPERATORS_E4M3 = ("largest_magnitudes", "cast_e4m3", "product_e4m3")


class CastE4m3(NamedTuple):
    """A matrix `[M, N]` in e4m3.

    Attributes:
        narrow, scale: `[M, N]` over `scale`, float32 `[1]` or `[M]`.
        turned, turned_scale: `[N, M']` over `turned_scale`, float32 `[1]` or `[N]`; M' is M filled up to a
            multiple of 16. Empty where it was not asked for.
    """

    narrow: Tensor
    scale: Tensor
    turned: Tensor
    turned_scale: Tensor


def cast_both_ways(
    matrix: Tensor,
    scaling: Scaling,
    turned_scaling: Scaling,
    narrow: bool = True,
    turned: bool = True,
    kernels: bool = True,
    counter: Tensor | None = None,
) -> CastE4m3:
    """Cast a matrix to e4m3. Each scale is made from the values themselves and brings the largest magnitude
    to 448, the largest number of e4m3, so that nothing overflows and no state is kept between calls.

    The matrix is read twice: once to find the scales, and once to write its entries divided by them. Scales
    of the last step would save the first read, which takes at most a tenth of the time of the product that
    the cast is for.

    Args:
        matrix: `[M, N]`, of a floating dtype.
        scaling, turned_scaling: how many scales the matrix has, and its transpose.
        narrow, turned: which of the two to make.
        kernels: by kernels, where the device has them.
        counter: float32 `[2]`, to which is added, in place, how many entries that are not zero were cast, and
            how many of them became zero.

    Raises:
        OptionError: there is no such scaling.
    """
    for name, value in (("scaling", scaling), ("turned_scaling", turned_scaling)):
        one_of("cast_both_ways", name, value, SCALINGS)
    find, cast = form("largest_magnitudes", kernels), form("cast_e4m3", kernels)
    by_row = narrow and scaling == "rowwise"
    by_column = turned and turned_scaling == "rowwise"
    rows, columns = find(matrix, by_row, by_column or not by_row)
    found = rows if by_row else columns
    one = scales_of(found.amax(0, keepdim=True) if len(found) else found.new_zeros(1))
    scale = scales_of(rows) if by_row else one
    turned_scale = scales_of(columns) if by_column else one
    made = cast(matrix, scale if narrow else None, turned_scale if turned else None, counter is not None)
    if counter is not None:
        counter.add_(made[2])
    return CastE4m3(made[0], scale, made[1], turned_scale)
