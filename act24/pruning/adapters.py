"""Low-rank adapters on a pruned weight: what they add, and what merging them leaves of the zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from act24.operation import operation
from act24.pruning.methods import masked
from act24.pruning.stored import bits_to_mask


def adapter_product(lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """s B A, `[out, in]`, of A `[r, in]` and B `[out, r]`."""
    return scale * (lora_b @ lora_a)


@operation
def masked_adapter_weight(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, bits: Tensor, scale: float
) -> Tensor:
    """W + s M ∘ (B A) (arXiv 2312.15230, 2410.03750): has the zeros of M, and its gradients do not see them.

    Args:
        weight: `[out, in]`, zero where M is False.
        lora_a, lora_b: `[r, in]`, `[out, r]`.
        bits: M, as `act24.pruning.stored.packed_bits` has it.
    """
    # Under autocast the product would lose in bfloat16 what a merge in float32 has.
    with torch.autocast(weight.device.type, enabled=False):
        product = adapter_product(lora_a, lora_b, scale)
    mask = bits_to_mask(bits)[:, : weight.shape[1]]
    return weight + torch.where(mask, product, 0).to(weight.dtype)


@torch.no_grad()
def merged(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """The weight with its adapter in it, computed in float32 and rounded once.

    Args:
        weight: `[out, in]`, any floating dtype.
        lora_a, lora_b: `[r, in]` and `[out, r]`.
        scale: of their product.
        mask: boolean `[out, in]`, that of `masked_adapter_weight`, for an adapter that was trained under it;
            None: a plain one, which fills the zeros.
    """
    product = adapter_product(lora_a.float(), lora_b.float(), scale)
    if mask is None:
        return (weight.float() + product).to(weight.dtype)
    return masked(weight.float() + product, mask).to(weight.dtype)
