"""The operator that keeps the order in which tokens are grouped (`act24.sparse24.pattern.feature_wise`)."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from act24.sparse24.kernels.shared.registry import operator
from act24.sparse24.pattern.feature_wise import token_permutation


def _reference(like: Tensor, shape: list[int], kind: str) -> tuple[Tensor, Tensor]:
    order = token_permutation(tuple(shape), kind, like.device)  # type: ignore[arg-type]
    assert order is not None
    return order, torch.argsort(order)


def _fake(like: Tensor, shape: list[int], kind: str) -> tuple[Tensor, Tensor]:
    order = like.new_empty(math.prod(shape), dtype=torch.int64)
    return order, torch.empty_like(order)


@functools.lru_cache(maxsize=16)
def _kept_order(shape: tuple[int, ...], kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    return _reference(torch.empty(0, device=device), list(shape), kind)


@operator(_reference, _fake)
def token_order(like: Tensor, shape: list[int], kind: str) -> tuple[Tensor, Tensor]:
    """The order in which tokens are grouped, kept for each shape.

    Sorting random keys takes 0.13 ms for 16,384 tokens on an H200, in every layer and step, for an order that
    never changes.

    Args:
        like: any tensor on the device that is wanted. It has to be in memory when this runs, so give one that
            is there anyway.
        shape: of the tokens, `(B, S)` or `(T,)`.
        kind: "batch" or "sequence" (`act24.sparse24.pattern.feature_wise.token_permutation`).

    Returns:
        the order and its inverse, int64 `[T]`.
    """
    order, inverse = _kept_order(tuple(shape), kind, like.device)
    # Copies: the compiler may reuse the memory of what an operator returns.
    return order.clone(), inverse.clone()
