"""Low-rank adapters on a pruned weight: what they add, and what merging them leaves of the zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from act24.operation import operation
from act24.pruning.methods import masked


def adapter_product(lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """s B A, `[out, in]`, of A `[r, in]` and B `[out, r]`."""
    return scale * (lora_b @ lora_a)


@operation
def masked_adapter_weight(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """W + s M ∘ (B A) (arXiv 2312.15230, 2410.03750): has the zeros of M, and its gradients do not see them.

    Args:
        weight: `[out, in]`, zero where `mask` is False.
        lora_a, lora_b: `[r, in]`, `[out, r]`.
        mask: boolean `[out, in]`.
    """
    product = adapter_product(lora_a, lora_b, scale)
    return weight + torch.where(mask, product, 0).to(weight.dtype)


@torch.no_grad()
def merged(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """The weight with its adapter in it, computed in float32 and rounded once.

    Args:
        mask: as of `masked_adapter_weight`, for an adapter that was trained under it; None: a plain one,
            which fills the zeros.
    """
    product = adapter_product(lora_a.float(), lora_b.float(), scale)
    if mask is None:
        return (weight.float() + product).to(weight.dtype)
    return masked(weight.float() + product, mask).to(weight.dtype)
