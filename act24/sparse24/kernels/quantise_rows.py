"""The rows of a matrix in e4m3, each over its own scale."""

from __future__ import annotations

import torch
from torch import Tensor

from act24.sparse24.format import fp8
from act24.sparse24.kernels.shared.quantise import launch
from act24.sparse24.kernels.shared.registry import operator


def _reference(matrix: Tensor) -> tuple[Tensor, Tensor]:
    return fp8.quantise_rows(matrix)


def _fake(matrix: Tensor) -> tuple[Tensor, Tensor]:
    narrow = matrix.new_empty(matrix.shape, dtype=torch.float8_e4m3fn)
    return narrow, matrix.new_empty(matrix.shape[0], dtype=torch.float32)


@operator(_reference, _fake)
def quantise_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`act24.sparse24.format.fp8.quantise_rows` in one pass.

    Args:
        matrix: bfloat16 `[M, K]`.

    Returns:
        float8 `[M, K]`, and the scales of its rows, float32 `[M]`.
    """
    narrow, scale = _fake(matrix)
    launch(matrix, narrow, scale)
    return narrow, scale
