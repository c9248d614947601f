# pyright: reportInvalidTypeForm=false
"""The product of a dense weight with one token, where the weight's bytes are the time.

A program has one row of the weight and reads many of its entries at once, with many warps, so that enough
reads are on their way; no row waits for another's. On an H200 it read weights of 4,096 inputs at 3.5 TB/s
(4,096 rows) to 4.4 TB/s (32,000 rows), where cuBLAS read them at 2.7 and 3.95.
"""

from __future__ import annotations

import torch
from torch import Tensor

from act24.compiler import jit, tl, triton
from act24.sparse24.kernels.shared.registry import operator

#: Entries of a row that a program reads at once, and its warps: the fastest of some fifty on an H200.
ENTRIES, WARPS = 2048, 8


@jit
def _row(x, weight, y, inputs, ENTRIES: tl.constexpr):
    row, entry = tl.program_id(0).to(tl.int64), tl.arange(0, ENTRIES)
    sums = tl.zeros([ENTRIES], dtype=tl.float32)
    for start in range(0, inputs, ENTRIES):
        inside = start + entry < inputs
        value = tl.load(weight + row * inputs + start + entry, inside, other=0.0).to(tl.float32)
        sums += value * tl.load(x + start + entry, inside, other=0.0).to(tl.float32)
    tl.store(y + row, tl.sum(sums, 0))


def _reference(x: Tensor, weight: Tensor) -> Tensor:
    _refuse(x, weight)
    return x.float() @ weight.float().T


def _fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((1, weight.shape[0]), dtype=torch.float32)


def _refuse(x: Tensor, weight: Tensor) -> None:
    if x.shape != (1, weight.shape[1]) or x.dtype is not weight.dtype or x.dtype.itemsize != 2:
        raise ValueError(
            f"dense_decode: {tuple(x.shape)} {x.dtype} with a weight {tuple(weight.shape)} {weight.dtype}: "
            "one token, and both of one 16-bit dtype"
        )


@operator(_reference, _fake)
def dense_decode(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ of one token.

    Args:
        x: 16-bit `[1, K]`.
        weight: `[N, K]` of the same dtype.

    Returns:
        float32 `[1, N]`.

    Raises:
        ValueError: more tokens, or other shapes and dtypes.
    """
    _refuse(x, weight)
    y = x.new_empty((1, len(weight)), dtype=torch.float32)
    _row[(len(weight),)](
        x,
        weight,
        y,
        weight.shape[1],
        ENTRIES=min(ENTRIES, triton.next_power_of_2(weight.shape[1])),
        num_warps=WARPS,
    )
    return y
