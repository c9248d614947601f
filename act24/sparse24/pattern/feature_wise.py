"""2:4 along the tokens, for weight gradients. Tensor cores need the 2:4 zeros along the dimension that a
product sums over, and weight gradients sum over tokens (arXiv 2503.16672, section on split GEMM).

Neighbouring tokens tend to be non-zero in the same features. A fixed permutation of the tokens of a
micro-batch puts them into different groups of four, so that fewer non-zeros are dropped. Features with the
most non-zeros may stay dense.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from act24.options import one_of
from act24.sparse24.pattern.random_bits import random_permutation
from act24.sparse24.pattern.selection import top2_of_4

TokenPermutation = Literal["batch", "sequence", "none"]

#: Seed of the one permutation: the same for every layer, process and run, so that nothing has to be stored.
_PERMUTATION_SEED = 0x2503_16672


def token_permutation(shape: tuple[int, ...], kind: TokenPermutation, device: torch.device) -> Tensor | None:
    """The order in which tokens are grouped.

    Args:
        shape: of the tokens, `(B, S)` or `(T,)`, without features; `()` of a single one.
        kind: `"batch"` over all tokens, `"sequence"` within each sequence, the same in all; `"none"`.

    Returns:
        int64 `[T]`, or None for the order as it is. Depends on its arguments alone.

    Raises:
        OptionError: there is no such kind.
    """
    one_of("token_permutation", "kind", kind, get_args(TokenPermutation))
    if kind == "none":
        return None
    length = shape[-1] if shape else 1
    count = math.prod(shape)
    if kind == "batch":
        return random_permutation(count, _PERMUTATION_SEED, device)
    within = random_permutation(length, _PERMUTATION_SEED, device)
    starts = torch.arange(0, count, length, device=device)
    return (starts[:, None] + within).flatten()


def sparsify_feature_wise(x: Tensor, dense: Tensor | None) -> Tensor:
    """In every feature keep the two largest magnitudes of every four consecutive tokens.

    Args:
        x: `[T, F]`, in the order in which tokens are grouped; a short last group counts as filled up with
            zeros.
        dense: boolean `[F]`, features that stay as they are; None for none of them.

    Returns:
        `[T, F]`.
    """
    short = -len(x) % 4
    mask = top2_of_4(F.pad(x.abs(), (0, 0, 0, short)), dim=0)[: len(x)]
    return torch.where(mask if dense is None else mask | dense, x, 0)
