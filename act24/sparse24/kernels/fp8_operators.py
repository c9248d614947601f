"""The operators that quantise rows to e4m3 (`act24.sparse24.kernels.quantise`): of a matrix, and of a packed
one."""

from __future__ import annotations

import torch
from torch import Tensor

from act24.sparse24.format.fp8 import quantise_rows as quantised
from act24.sparse24.format.packed import Packed24, empty_packed, with_values
from act24.sparse24.kernels.shared.registry import operator


def _quantise_rows_reference(matrix: Tensor) -> tuple[Tensor, Tensor]:
    return quantised(matrix.contiguous())


def _quantise_rows_kernel(matrix: Tensor) -> tuple[Tensor, Tensor]:
    from act24.sparse24.kernels.quantise import quantise_rows

    narrow, scale = _quantise_rows_fake(matrix)
    quantise_rows(matrix.contiguous(), narrow, scale)
    return narrow, scale


def _quantise_rows_fake(matrix: Tensor) -> tuple[Tensor, Tensor]:
    narrow = matrix.new_empty(matrix.shape, dtype=torch.float8_e4m3fn)
    return narrow, matrix.new_empty(matrix.shape[0], dtype=torch.float32)


#: A bfloat16 matrix `[M, K]` in e4m3, and the scales of its rows, float32 `[M]`
#: (`act24.sparse24.format.fp8`).
quantise_rows = operator(
    "quantise_rows(Tensor matrix) -> (Tensor, Tensor)",
    _quantise_rows_reference,
    _quantise_rows_kernel,
    _quantise_rows_fake,
)


def _quantise_packed_reference(packed: Tensor) -> tuple[Tensor, Tensor]:
    values, scale = quantised(Packed24(packed).values)
    return with_values(Packed24(packed), values).buffer, scale


def _quantise_packed_kernel(packed: Tensor) -> tuple[Tensor, Tensor]:
    from act24.sparse24.kernels.quantise import quantise_packed

    narrow, scale = _quantise_packed_fake(packed)
    quantise_packed(Packed24(packed), Packed24(narrow), scale)
    return narrow, scale


def _quantise_packed_fake(packed: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = Packed24(packed).shape
    narrow = empty_packed(rows, columns, packed.new_empty(0, dtype=torch.float8_e4m3fn))
    return narrow, packed.new_empty(rows, dtype=torch.float32)


#: A packed bfloat16 matrix, packed in e4m3, and the scales of its rows.
quantise_packed = operator(
    "quantise_packed(Tensor packed) -> (Tensor, Tensor)",
    _quantise_packed_reference,
    _quantise_packed_kernel,
    _quantise_packed_fake,
)
