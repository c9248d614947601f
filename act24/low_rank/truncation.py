"""The singular value decomposition of dense weights, cut off at a rank, through one eigendecomposition.

The smaller of the two Gram matrices, W Wᵀ or WᵀW, is decomposed. Its eigenvalues are the squares of the
singular values; in float64 that loses less than the rounding of float32 weights. For `[5461, 2048]` this is
about a tenth of the work of a full decomposition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from act24.options import Range, in_range


def right_spectrum(dense: Tensor) -> tuple[Tensor, Tensor]:
    """The right singular vectors times their singular values, largest first.

    Args:
        dense: `[n, out, in]`, any floating dtype.

    Returns:
        float64: s `[n, k]` and the rows s_i v_i `[n, k, in]`, with k = min(out, in). Their column norms over
        a window of rows are the column norms of that part of `dense`.
    """
    dense = dense.double()
    if dense.shape[-2] >= dense.shape[-1]:
        values, vectors = torch.linalg.eigh(dense.mT @ dense)
        singular = values.flip(-1).clamp(min=0).sqrt()
        return singular, singular[..., None] * vectors.flip(-1).mT
    values, vectors = torch.linalg.eigh(dense @ dense.mT)
    return values.flip(-1).clamp(min=0).sqrt(), vectors.flip(-1).mT @ dense


def truncated_factors(dense: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of rank R, with √s on each side.

    Args:
        dense: `[n, out, in]`.

    Returns:
        float32 or wider, as `dense`: weight_in `[n, R, in]` and weight_out `[n, out, R]`.

    Raises:
        OptionError: `rank` is below 1 or above a side of the weights.
    """
    check_rank("truncated_factors", rank, dense)
    return factors_of(dense, *right_spectrum(dense), rank)


def check_rank(owner: str, rank: int, dense: Tensor) -> None:
    """Raises OptionError unless weights `[..., out, in]` have approximations of this rank."""
    in_range(owner, "rank", rank, Range(ge=1, le=min(dense.shape[-2:])))


def factors_of(dense: Tensor, singular: Tensor, scaled: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`truncated_factors` from a spectrum that `right_spectrum` gave.

    Args:
        dense: `[..., out, in]`.
        singular, scaled: float64 `[..., min(out, in)]` and `[..., min(out, in), in]`, as `right_spectrum` has
            them.
        rank: R, at most the smaller side of `dense`.

    Returns:
        `[..., R, in]` and `[..., out, R]`, in the dtype of `dense`, at least float32.
    """
    singular, scaled = singular[..., :rank, None], scaled[..., :rank, :]
    # W v_i / √s_i = √s_i u_i; where s_i is zero the row is, and both factors get zeros.
    root = torch.where(singular > 0, singular, torch.inf).sqrt()
    weight_in = scaled / root
    weight_out = dense.double() @ (scaled / root**3).mT
    dtype = torch.promote_types(dense.dtype, torch.float32)
    return weight_in.to(dtype), weight_out.to(dtype)


def trainable_factors(
    weight_in: Tensor, weight_out: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The same factors, but for singular directions that are zero: where both factors are, no gradient
    reaches either, ever. There the rows of weight_in are drawn, normal with xavier's variance 2 / (in + R),
    and the columns of weight_out are zero, so that the product stays what it is.

    Args:
        weight_in, weight_out: `[R, in]` and `[out, R]`, of `truncated_factors`. Zero is what float32 cannot
            tell from it, beside the largest.
        generator: on the CPU.
    """
    (rank, width), (height, _) = weight_in.shape, weight_out.shape
    singular = weight_in.double().square().sum(dim=1)  # √s on each side
    rounding = torch.finfo(torch.float32).eps * max(height, width) ** 0.5
    dead = singular <= singular.max() * rounding
    if not dead.any():
        return weight_in, weight_out
    drawn = torch.empty(rank, width).normal_(std=(2 / (width + rank)) ** 0.5, generator=generator)
    weight_in = torch.where(dead[:, None], drawn.to(weight_in), weight_in)
    return weight_in, weight_out.masked_fill(dead, 0)
