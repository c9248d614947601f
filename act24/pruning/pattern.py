"""The zeros that pruning leaves: a share of each row, or N of every M stay. Masks are True where a weight
stays.

Counts are exact, and of equal scores the lower index stays, so that a mask depends on its scores alone.
N:M says how many stay, as hardware and the literature have it; the public Wanda code calls the number that
goes N, which is the same for 2:4 and 4:8 and nothing else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from act24.errors import Act24Error
from act24.options import OptionError, Range, check_options


@dataclass(frozen=True)
class Pattern:
    """What is kept.

    Attributes:
        sparsity: share of the weights that goes, in [0, 1]; 1 of a matrix of zeros alone.
        keep, of: `keep` of every `of` consecutive inputs stay; 0: no such groups.

    Raises:
        OptionError: a number is out of range.
    """

    sparsity: Annotated[float, Range(ge=0, le=1)]
    keep: Annotated[int, Range(ge=0)] = 0
    of: Annotated[int, Range(ge=0)] = 0

    def __post_init__(self) -> None:
        check_options(self)
        if self.keep > self.of:
            raise OptionError(f"Pattern: keep has to be of ({self.of}) at most, got {self.keep}")

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}" if self.of else repr(self.sparsity).removesuffix(".0")

    def check(self, shape: tuple[int, int], name: str) -> None:
        """
        Raises:
            Act24Error: groups of M do not divide the inputs of a weight `[out, in]`.
        """
        if self.of and shape[1] % self.of:
            raise Act24Error(
                f"{name}: pattern {self} needs a number of inputs that is a multiple of {self.of}, "
                f"not {shape[1]}; leave the module out, or use a share such as 0.5"
            )


def parse_pattern(text: str) -> Pattern:
    """`"0.5"`: half of each row goes. `"2:4"`: two of every four stay.

    Raises:
        Act24Error: neither.
    """
    if groups := re.fullmatch(r"(\d{1,4}):(\d{1,4})", text.strip()):
        keep, of = int(groups[1]), int(groups[2])
        if 1 <= keep < of:
            return Pattern(1 - keep / of, keep, of)
    else:
        try:
            sparsity = float(text)
        except ValueError:
            sparsity = -1.0
        if 0 <= sparsity < 1:
            return Pattern(sparsity)
    raise Act24Error(
        f"pattern {text!r}: write the share that goes, 0 or more and below 1 (0.5), or N:M for N of M that "
        "stay (2:4)"
    )


def stored_pattern(text: str) -> Pattern:
    """What `str` made of a pattern; of a matrix of zeros, whose mask keeps nothing, that is `"1"`.

    Raises:
        Act24Error: it is none.
    """
    return Pattern(1.0) if text == "1" else parse_pattern(text)


def dropped(length: int, sparsity: float) -> int:
    """How many of `length` weights go: floor(length × sparsity), whatever 0.7 × 10 is in binary."""
    return int(length * sparsity + 1e-9)


def largest(scores: Tensor, keep: int) -> Tensor:
    """The `keep` largest along the last dimension; of equal ones the lower index.

    Args:
        scores: `[..., n]`, without NaN.

    Returns:
        boolean, the same shape, True exactly `keep` times along the last dimension.
    """
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :keep]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def mask_by_row(scores: Tensor, pattern: Pattern) -> Tensor:
    """Compare within a row, or within groups of M consecutive inputs.

    Args:
        scores: `[out, in]`, finite.

    Returns:
        boolean `[out, in]`: in each row `dropped(in, sparsity)` go, or N of every M stay.
    """
    if pattern.of:
        return largest(scores.unflatten(-1, (-1, pattern.of)), pattern.keep).flatten(-2)
    columns = scores.shape[-1]
    return largest(scores, columns - dropped(columns, pattern.sparsity))


def mask_by_layer(scores: Tensor, pattern: Pattern) -> Tensor:
    """Compare within the whole matrix `[out, in]`: of it `dropped(out × in, sparsity)` go. Groups of M as by
    row."""
    if pattern.of:
        return mask_by_row(scores, pattern)
    count = scores.numel()
    return largest(scores.flatten(), count - dropped(count, pattern.sparsity)).view_as(scores)


def mask_cumulative(scores: Tensor, pattern: Pattern) -> Tensor:
    """Wanda's variant: in each row of `[out, in]` the smallest scores go whose sum is at most α of the row's,
    with one α for the matrix, found by bisection, so that rows differ and the matrix has the sparsity within
    0.001.

    Where equal scores keep bisection from that, it ends below, by less than one weight a row. Where more
    scores are zero than shall go, only such go, of equal ones the higher index first.

    Source: `--use_variant` of the public code of arXiv 2306.11695.

    Raises:
        Act24Error: a pattern N:M, which leaves rows no choice.
    """
    if pattern.of:
        raise Act24Error(
            f"wanda_cumulative gives each row its own share, which pattern {pattern} fixes: give a share, "
            "such as 0.5, or the method wanda"
        )
    ascending = scores.double().sort(dim=-1, stable=True, descending=True)
    # From the least: the last of a descending order, so that of equal scores the higher index goes first.
    order = ascending.indices.flip(-1)
    sums = ascending.values.flip(-1).cumsum(-1)
    total = sums[:, -1:].clamp(min=torch.finfo(sums.dtype).tiny)

    def share(alpha: float) -> tuple[float, Tensor]:
        goes = sums <= alpha * total
        return float(goes.double().mean()), goes

    low, high, best = 0.0, 1.0, share(0.0)
    if best[0] > pattern.sparsity:
        return mask_by_layer(scores, pattern)
    for _ in range(60):
        alpha = (low + high) / 2
        found = share(alpha)
        if best[0] < found[0] <= pattern.sparsity + 0.0005:
            best = found
        if abs(best[0] - pattern.sparsity) <= 0.0005:
            break
        low, high = (alpha, high) if found[0] < pattern.sparsity else (low, alpha)
    return torch.ones_like(scores, dtype=torch.bool).scatter_(-1, order, ~best[1])


def follows(mask: Tensor, pattern: Pattern) -> bool:
    """Whether a mask `[out, in]` keeps N of every M, or, of a share, drops as many as the matrix has to lose
    by rows, as a whole, or within 0.001 of it."""
    if pattern.of:
        if mask.shape[-1] % pattern.of:
            return False
        kept = mask.unflatten(-1, (-1, pattern.of)).sum(-1)
        return bool((kept == pattern.keep).all())
    share = 1 - float(mask.double().mean())
    # Rows round down, each by less than one weight.
    return -0.001 <= pattern.sparsity - share <= max(1 / mask.shape[-1], 0.001)
