"""Which entries stay: two of every four, and the features that stay dense."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from act24.options import Range, in_range

_SHARE = Range(ge=0, le=1)


def top2_of_4(scores: Tensor, dim: int = -1) -> Tensor:
    """The mask of the two largest scores in every four consecutive entries along `dim`.

    Exactly two stay in every group: of equal scores the one with the lower index wins, so that groups
    with fewer than two distinct scores, all-zero ones too, still name two positions. The order is by
    value, not magnitude; pass `x.abs()` for magnitudes.

    Args:
        scores: size K along `dim`, K a multiple of 4. NaN is above infinity, so that it stays and is seen.

    Returns:
        boolean, the shape of `scores`.

    Raises:
        ValueError: K is not a multiple of 4.
    """
    if scores.shape[dim] % 4:
        raise ValueError(f"2:4 needs a multiple of 4 along dimension {dim}, got {tuple(scores.shape)}")
    dim %= scores.ndim
    a, b, c, d = scores.unflatten(dim, (-1, 4)).unbind(dim + 1)
    # A tournament of six comparisons instead of a sort: `>=` lets the lower index win a tie, and an
    # entry stays when it loses at most one of its three games. NaN wins all of them, and loses to an earlier
    # one.
    a_nan, b_nan, c_nan = a != a, b != b, c != c
    ab, ac, ad = (a >= b) | a_nan, (a >= c) | a_nan, (a >= d) | a_nan
    bc, bd, cd = (b >= c) | b_nan, (b >= d) | b_nan, (c >= d) | c_nan
    keep_a = (ab & ac) | (ab & ad) | (ac & ad)
    keep_b = (~ab & bc) | (~ab & bd) | (bc & bd)
    keep_c = (~ac & ~bc) | (~ac & cd) | (~bc & cd)
    keep_d = (~ad & ~bd) | (~ad & ~cd) | (~bd & ~cd)
    return torch.stack((keep_a, keep_b, keep_c, keep_d), dim=dim + 1).flatten(dim, dim + 1)


def densest_features(counts: Tensor, ratio: float) -> Tensor:
    """The ⌈ratio · F⌉ features with the highest counts; of equal ones the lower index wins.

    Args:
        counts: `[F]`, non-zeros of each feature.
        ratio: share of the features, 0 to 1.

    Returns:
        their indices, int64, from the highest count down.

    Raises:
        OptionError: `ratio` is below 0 or above 1.
    """
    in_range("densest_features", "ratio", ratio, _SHARE)
    return torch.argsort(counts, descending=True, stable=True)[: math.ceil(ratio * len(counts))]


def are_densest(counts: Tensor, index: Tensor, ratio: float) -> Tensor:
    """Which of some features `densest_features` names, without sorting: by how many go before each.

    Args:
        counts: `[F]`; ratio: as there.
        index: int64 `[n]`, the features asked about.

    Returns:
        boolean `[n]`.

    Raises:
        OptionError: `ratio` is below 0 or above 1.
    """
    in_range("are_densest", "ratio", ratio, _SHARE)
    own, place = counts[index][:, None], index[:, None]
    everyone = torch.arange(len(counts), device=counts.device)
    before = (counts > own) | ((counts == own) & (everyone < place))
    return before.sum(1) < math.ceil(ratio * len(counts))


def densest(counts: Tensor, ratio: float) -> Tensor:
    """`densest_features` as a mask: boolean `[F]` for counts `[F]`, and its errors."""
    chosen = densest_features(counts, ratio)
    return torch.zeros_like(counts, dtype=torch.bool).scatter(0, chosen, True)
