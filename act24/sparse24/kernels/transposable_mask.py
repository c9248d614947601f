"""The best transposable mask of every 4 × 4 block of a weight, in one pass: 90 candidates a block in
registers, where plain PyTorch writes them all to memory.

For each element it reads the bytes of the weight and writes one byte. The 90 sums of four pair sums of a
block of 16 elements make about 30 instructions an element. Sums are in float32 and in the order of the
reference, and of equal ones the first pattern wins, so the masks are the same bit for bit.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

import torch
from torch import Tensor

from act24.compiler import jit, tl, triton
from act24.sparse24.kernels.shared.registry import operator
from act24.sparse24.pattern.transposable import choices, transposable_mask

#: Blocks that a program looks at, down and across.
DOWN, ACROSS = 4, 32


@jit
def _pair_sums(weight, place, valid, DOWN: tl.constexpr, ACROSS: tl.constexpr):
    """Of one row of every block the sums of the pairs (0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)."""
    row = tl.abs(tl.load(weight + place, mask=valid, other=0.0).to(tl.float32))
    even, odd = tl.split(tl.reshape(row, [DOWN, ACROSS, 2, 2]))
    a0, a2 = tl.split(even)
    a1, a3 = tl.split(odd)
    return a0 + a1, a0 + a2, a0 + a3, a1 + a2, a1 + a3, a2 + a3


@jit
def _store_row(mask, place, valid, pair, DOWN: tl.constexpr, ACROSS: tl.constexpr):
    """The four entries of one row of every block, from the number of its pair."""
    kept0 = pair < 3
    kept1 = (pair == 0) | (pair == 3) | (pair == 4)
    kept2 = (pair == 1) | (pair == 3) | (pair == 5)
    kept3 = (pair == 2) | (pair > 3)
    even = tl.join(kept0.to(tl.int8), kept2.to(tl.int8))
    odd = tl.join(kept1.to(tl.int8), kept3.to(tl.int8))
    tl.store(mask + place, tl.reshape(tl.join(even, odd), [DOWN, ACROSS * 4]), mask=valid)


@jit
def _transposable_mask(
    weight,
    mask,
    rows,
    columns,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    FOURTH: tl.constexpr,
    PATTERNS: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
):
    row = tl.program_id(0) * (4 * DOWN) + tl.arange(0, DOWN)[:, None] * 4
    column = tl.program_id(1) * (4 * ACROSS) + tl.arange(0, 4 * ACROSS)[None, :]
    valid = (row < rows) & (column < columns)
    place = row.to(tl.int64) * columns + column
    pairs0 = _pair_sums(weight, place, valid, DOWN, ACROSS)
    pairs1 = _pair_sums(weight, place + columns, valid, DOWN, ACROSS)
    pairs2 = _pair_sums(weight, place + 2 * columns, valid, DOWN, ACROSS)
    pairs3 = _pair_sums(weight, place + 3 * columns, valid, DOWN, ACROSS)
    best = pairs0[FIRST[0]] + pairs1[SECOND[0]] + pairs2[THIRD[0]] + pairs3[FOURTH[0]]
    code: tl.constexpr = FIRST[0] + 8 * SECOND[0] + 64 * THIRD[0] + 512 * FOURTH[0]
    chosen = tl.full([DOWN, ACROSS], code, tl.int32)
    for n in tl.static_range(1, PATTERNS):
        total = pairs0[FIRST[n]] + pairs1[SECOND[n]] + pairs2[THIRD[n]] + pairs3[FOURTH[n]]
        chosen = tl.where(total > best, FIRST[n] + 8 * SECOND[n] + 64 * THIRD[n] + 512 * FOURTH[n], chosen)
        best = tl.maximum(best, total)
    _store_row(mask, place, valid, chosen & 7, DOWN, ACROSS)
    _store_row(mask, place + columns, valid, chosen >> 3 & 7, DOWN, ACROSS)
    _store_row(mask, place + 2 * columns, valid, chosen >> 6 & 7, DOWN, ACROSS)
    _store_row(mask, place + 3 * columns, valid, chosen >> 9 & 7, DOWN, ACROSS)


def _reference(weight: Tensor) -> Tensor:
    return transposable_mask(weight)


def _fake(weight: Tensor) -> Tensor:
    return torch.empty_like(weight, dtype=torch.bool, memory_format=torch.contiguous_format)


@operator(_reference, _fake)
def best_transposable_mask(weight: Tensor) -> Tensor:
    """The transposable mask that keeps the largest sum of magnitudes in every 4 × 4 block.

    Args:
        weight: bfloat16, float16 or float32 `[R, C]`, contiguous, both multiples of 4, finite.

    Returns:
        boolean `[R, C]`, that of `act24.sparse24.pattern.transposable.transposable_mask`.
    """
    rows, columns = weight.shape
    if rows % 4 or columns % 4:
        raise ValueError(f"a transposable mask needs multiples of 4, got {tuple(weight.shape)}")
    mask = _fake(weight)
    first, second, third, fourth = zip(*choices(), strict=True)
    _transposable_mask[(triton.cdiv(rows, 4 * DOWN), triton.cdiv(columns, 4 * ACROSS))](
        weight,
        mask.view(torch.int8),
        rows,
        columns,
        FIRST=first,
        SECOND=second,
        THIRD=third,
        FOURTH=fourth,
        PATTERNS=len(first),
        DOWN=DOWN,
        ACROSS=ACROSS,
        num_warps=4,
    )
    return mask
