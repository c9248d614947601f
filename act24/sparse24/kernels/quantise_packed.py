"""The rows of a packed matrix in e4m3, each over its own scale.

The metadata goes along, from the order of 16-bit values to that of 8-bit ones. Bytes an element of the dense
matrix: 1.125 read and 0.625 written. That is less than a pass for the largest activation of each token before
packing (2 read) and e4m3 from the packing kernel (0.625 written), and holds for every method.
"""

from __future__ import annotations

import torch
from torch import Tensor

from act24.sparse24.format import fp8
from act24.sparse24.format.packed import Packed24, empty_packed, with_values
from act24.sparse24.kernels.shared.quantise import launch
from act24.sparse24.kernels.shared.registry import operator


def _reference(packed: Tensor) -> tuple[Tensor, Tensor]:
    values, scale = fp8.quantise_rows(Packed24(packed).values)
    return with_values(Packed24(packed), values).buffer, scale


def _fake(packed: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = Packed24(packed).shape
    narrow = empty_packed(rows, columns, packed.new_empty(0, dtype=torch.float8_e4m3fn))
    return narrow, packed.new_empty(rows, dtype=torch.float32)


@operator(_reference, _fake, ours=("packed",))
def quantise_packed(packed: Tensor) -> tuple[Tensor, Tensor]:
    """A packed matrix in e4m3.

    Args:
        packed: the buffer of a bfloat16 matrix `[M, K]`, K a multiple of 64.

    Returns:
        the buffer of the matrix in e4m3, and the scales of its rows, float32 `[M]`.
    """
    buffer, scale = _fake(packed)
    wide, narrow = Packed24(packed), Packed24(buffer)
    places = wide.metadata.view(torch.int32), narrow.metadata.view(torch.int32)
    launch(wide.values, narrow.values, scale, *places)
    return buffer, scale
