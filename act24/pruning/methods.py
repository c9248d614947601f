"""The pruning methods: statistics → score → mask, one record a method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from act24.options import check_options
from act24.pruning.pattern import Pattern, mask_by_layer, mask_by_row, mask_cumulative
from act24.pruning.sparsegpt import inverse_factor, sparsegpt
from act24.pruning.statistics import StatisticName
from act24.records import Table

#: Scores of a weight `[out, in]`, from it and its statistic.
Score = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class PruneMethod:
    """A method.

    Attributes:
        name: as the command line has it.
        statistic: what it has to know of the inputs.
        score: how much each weight matters, float32 `[out, in]`.
        mask: of the scores, which stay.
        update: changes what is kept while it prunes: the weight, its statistic and the pattern to the new
            weight and the mask. None: what is kept stays as it is, and `mask` of `score` says what it is.
        source: where it was published.
    """

    name: str
    statistic: StatisticName
    score: Score
    mask: Callable[[Tensor, Pattern], Tensor]
    update: Callable[[Tensor, Tensor, Pattern], tuple[Tensor, Tensor]] | None = None
    source: str = ""

    def __post_init__(self) -> None:
        check_options(self, f"pruning method {self.name}")


def magnitude_score(weight: Tensor, statistic: Tensor | None) -> Tensor:
    """|W|, elementwise: float32 `[out, in]` of a weight of that shape and any floating dtype; `statistic` is
    not read. Source: Han et al., 2015 (arXiv 1506.02626)."""
    return weight.float().abs()


def wanda_score(weight: Tensor, statistic: Tensor | None) -> Tensor:
    """|W_ij| ‖X_j‖₂.

    Args:
        statistic: Σ x² of each input, `[in]`.
    """
    assert statistic is not None
    return weight.float().abs() * statistic.sqrt().float()


def sparsegpt_score(weight: Tensor, statistic: Tensor | None) -> Tensor:
    """W²_ij / U²_jj: what dropping one weight costs, before any other is dropped.

    Args:
        statistic: XᵀX, `[in, in]`.
    """
    assert statistic is not None
    return weight.float().square() / inverse_factor(statistic).diagonal().square()


METHODS: Table[PruneMethod] = Table(
    "pruning method",
    PruneMethod("magnitude", "none", magnitude_score, mask_by_layer, source="Han et al., arXiv 1506.02626"),
    PruneMethod("wanda", "squares", wanda_score, mask_by_row, source="Sun et al., arXiv 2306.11695"),
    PruneMethod(
        "wanda_cumulative", "squares", wanda_score, mask_cumulative, source="the same, --use_variant"
    ),
    PruneMethod(
        "sparsegpt",
        "gram",
        sparsegpt_score,
        mask_by_row,
        update=sparsegpt,
        source="Frantar and Alistarh, arXiv 2301.00774",
    ),
)


@dataclass(frozen=True)
class Pruned:
    """A pruned weight.

    Attributes:
        weight: `[out, in]` in the dtype it had, +0 where it is pruned.
        mask: boolean `[out, in]`, True where it stays.
        score_kept: the share of the sum of all scores that stays.
    """

    weight: Tensor
    mask: Tensor
    score_kept: float


@torch.no_grad()
def prune_weight(weight: Tensor, statistic: Tensor | None, method: PruneMethod, pattern: Pattern) -> Pruned:
    """One weight through a method.

    Args:
        weight: `[out, in]`, finite.
        statistic: what `method.statistic` names, of its inputs.
    """
    score = method.score(weight, statistic)
    if method.update is not None:
        assert statistic is not None
        changed, mask = method.update(weight, statistic, pattern)
    else:
        changed, mask = weight, method.mask(score, pattern)
    kept = float((score * mask).sum(dtype=torch.float64) / score.sum(dtype=torch.float64).clamp(min=1e-300))
    return Pruned(masked(changed, mask).to(weight.dtype), mask, kept)


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """The weight, of any shape, with +0 where the mask is False; multiplying would leave -0. What is kept and
    is -0 becomes +0 too: packed products have returned garbage for it (vLLM 13198)."""
    return torch.where(mask, weight, 0) + 0.0
