"""LoST's split of a dense weight into a low-rank part and some of its own columns (arXiv 2508.02668).

    W ≈ γ · W_out W_in  +  (1 - γ) · W[:, I]

W_out W_in is the best approximation of rank R. What it leaves, W_comp, scores the input channels by the norms
of its columns; the best are kept with their weights from W itself, not from W_comp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from act24.low_rank.truncation import check_rank, factors_of, right_spectrum
from act24.options import Range, in_range


def low_rank_and_scores(dense: Tensor, rank: int, window: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The low-rank part, and what is left of each column.

    Args:
        dense: `[n, out, in]`.
        window: how many singular values behind the first R score the columns; 0: all of them.

    Returns:
        weight_in `[n, R, in]`, weight_out `[n, out, R]`, and the norms `[n, in]`, float64, of the columns of
        Σ s_i u_i v_iᵀ over the window.

    Raises:
        OptionError: `rank` is below 1 or above a side of the weights, or `window` is below 0.
    """
    check_rank("low_rank_and_scores", rank, dense)
    in_range("low_rank_and_scores", "window", window, Range(ge=0))
    singular, scaled = right_spectrum(dense)
    end = rank + window if window else singular.shape[-1]
    return *factors_of(dense, singular, scaled, rank), scaled[..., rank:end, :].norm(dim=-2)


def kept_columns(in_features: int, density: float) -> int:
    """How many input channels a density keeps: at least one.

    Raises:
        OptionError: `in_features` is below 1, or `density` is not above 0 and 1 at most.
    """
    in_range("kept_columns", "in_features", in_features, Range(ge=1))
    in_range("kept_columns", "density", density, Range(gt=0, le=1))
    return max(1, int(density * in_features))


def top_columns(scores: Tensor, count: int) -> Tensor:
    """The `count` columns of highest score, ascending: `[n, in]` to int64 `[n, count]`.

    Raises:
        OptionError: there are no `count` columns.
    """
    in_range("top_columns", "count", count, Range(ge=1, le=scores.shape[-1]))
    return scores.topk(count, dim=-1).indices.sort(dim=-1).values


def random_columns(in_features: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` columns drawn without replacement, ascending: int64 `[count]`.

    Args:
        generator: on the CPU.

    Raises:
        OptionError: there are no `count` columns.
    """
    in_range("random_columns", "count", count, Range(ge=1, le=in_features))
    return torch.randperm(in_features, generator=generator)[:count].sort().values
