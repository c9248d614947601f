"""Which two of four entries stay."""

from __future__ import annotations

import torch
from torch import Tensor


def top2_of_4(scores: Tensor) -> Tensor:
    """The mask of the two largest scores in every four consecutive entries of the last dimension.

    Exactly two stay in every group: of equal scores the one with the lower index wins, so that groups
    with fewer than two distinct scores, all-zero ones too, still name two positions. The order is by
    value, not magnitude; pass `x.abs()` for magnitudes.

    Args:
        scores: `[..., K]`, K a multiple of 4, finite.

    Returns:
        boolean `[..., K]`.

    Raises:
        ValueError: K is not a multiple of 4.
    """
    if scores.shape[-1] % 4:
        raise ValueError(f"2:4 needs a last dimension that is a multiple of 4, got {tuple(scores.shape)}")
    a, b, c, d = scores.unflatten(-1, (-1, 4)).unbind(-1)
    # A tournament of six comparisons instead of a sort: `>=` lets the lower index win a tie, and an
    # entry stays when it loses at most one of its three games.
    ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d
    keep_a = (ab & ac) | (ab & ad) | (ac & ad)
    keep_b = (~ab & bc) | (~ab & bd) | (bc & bd)
    keep_c = (~ac & ~bc) | (~ac & cd) | (~bc & cd)
    keep_d = (~ad & ~bd) | (~ad & ~cd) | (~bd & ~cd)
    return torch.stack((keep_a, keep_b, keep_c, keep_d), dim=-1).flatten(-2)
