"""Transposable 2:4 masks (arXiv 2404.01847): 2:4 along the rows and along the columns, so that the weight is
a 2:4 operand in the forward and, transposed, in the gradient of the input.

Of all 0/1 matrices of size 4 × 4 with two ones in each row and column, of which there are 90, every block
keeps the one that saves the most magnitude. The search is exact: pair sums of each row are looked up for all
90, without a matrix product that TF32 could round.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

_PAIRS = tuple(itertools.combinations(range(4), 2))

#: Blocks searched at once; each holds 90 candidates in float32.
_CHUNK = 2**18


@functools.cache
def choices() -> tuple[tuple[int, ...], ...]:
    """For each of the 90 patterns the pair that each of its four rows keeps, as an index into the pairs (0,
    1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)."""
    rows = itertools.product(range(6), repeat=4)
    return tuple(
        pairs
        for pairs in rows
        if all(sum(column in _PAIRS[pair] for pair in pairs) == 2 for column in range(4))
    )


def patterns(device: torch.device | str = "cpu") -> Tensor:
    """The 90 patterns, boolean `[90, 4, 4]`."""
    rows = torch.tensor([[column in pair for column in range(4)] for pair in _PAIRS], device=device)
    return rows[torch.tensor(choices(), device=device)]


def transposable_mask(weight: Tensor) -> Tensor:
    """The transposable mask that keeps the largest sum of magnitudes in every 4 × 4 block.

    Args:
        weight: `[R, C]`, both multiples of 4, finite.

    Returns:
        boolean `[R, C]`, two of four along rows and along columns. Of equally good patterns the first.

    Raises:
        ValueError: a size that is not a multiple of 4.
    """
    rows, columns = weight.shape
    if rows % 4 or columns % 4:
        raise ValueError(f"a transposable mask needs multiples of 4, got {tuple(weight.shape)}")
    magnitude = weight.detach().abs().to(torch.promote_types(weight.dtype, torch.float32))
    blocks = magnitude.unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).transpose(1, 2).flatten(0, 1)
    chosen = torch.tensor(choices(), device=weight.device)
    first, second = torch.tensor(_PAIRS, device=weight.device).T
    best = []
    for chunk in blocks.split(_CHUNK):
        pair_sums = chunk[:, :, first] + chunk[:, :, second]
        totals = sum(pair_sums[:, row, chosen[:, row]] for row in range(4))
        best.append(totals.argmax(dim=1))  # type: ignore[union-attr]
    mask = patterns(weight.device)[torch.cat(best)]
    return mask.unflatten(0, (rows // 4, columns // 4)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
