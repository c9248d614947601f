"""The operator that keeps the order in which tokens are grouped (`act24.sparse24.pattern.feature_wise`)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from act24.sparse24.kernels.shared.registry import operator
from act24.sparse24.pattern.feature_wise import TokenPermutation, shape_numel, token_permutation


def _token_order_reference(like: Tensor, shape: list[int], kind: TokenPermutation) -> tuple[Tensor, Tensor]:
    order = token_permutation(tuple(shape), kind, like.device)
    assert order is not None
    return order, torch.argsort(order)


@functools.lru_cache(maxsize=16)
def _kept_order(
    shape: tuple[int, ...], kind: TokenPermutation, device: torch.device
) -> tuple[Tensor, Tensor]:
    return _token_order_reference(torch.empty(0, device=device), list(shape), kind)


def _token_order_kernel(like: Tensor, shape: list[int], kind: TokenPermutation) -> tuple[Tensor, Tensor]:
    order, inverse = _kept_order(tuple(shape), kind, like.device)
    # Copies: the compiler may reuse the memory of what an operator returns.
    return order.clone(), inverse.clone()


def _token_order_fake(like: Tensor, shape: list[int], kind: TokenPermutation) -> tuple[Tensor, Tensor]:
    order = like.new_empty(shape_numel(tuple(shape)), dtype=torch.int64)
    return order, torch.empty_like(order)


#: `token_permutation` for tokens of a shape on the device of `like`, and its inverse; `kind` is not "none".
#: Sorting random keys takes 0.13 ms for 16,384 tokens on an H200, in every layer and step, for an order that
#: never changes. `like` has to be in memory when this runs, so give it what is there anyway.
token_order = operator(
    "token_order(Tensor like, int[] shape, str kind) -> (Tensor, Tensor)",
    _token_order_reference,
    _token_order_kernel,
    _token_order_fake,
)
