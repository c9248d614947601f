"""Masks and pruned weights as they are stored, and the check that each save makes."""

from __future__ import annotations

import torch
from torch import Tensor

from act24.errors import Act24Error
from act24.pruning.pattern import Pattern, follows
from act24.words import counted


def packed_bits(mask: Tensor) -> Tensor:
    """A mask `[out, in]` as uint8 `[out, ⌈in / 8⌉]`: bit k of a byte is input 8 b + k, 1 where it stays."""
    rows, columns = mask.shape
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -columns % 8)).view(rows, -1, 8)
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded << places).sum(-1, dtype=torch.uint8)


def bits_to_mask(bits: Tensor) -> Tensor:
    """The mask of `packed_bits`, boolean `[out, 8 ⌈in / 8⌉]`. No check, so no wait for the device."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[..., None] >> places) & 1).flatten(-2).bool()


def unpacked_bits(bits: Tensor, columns: int) -> Tensor:
    """The mask `[out, columns]` of `packed_bits`.

    Raises:
        Act24Error: the bits are not those of so many columns.
    """
    if bits.dtype != torch.uint8 or bits.ndim != 2 or bits.shape[1] != -(-columns // 8):
        raise Act24Error(f"bits of a mask of {columns} columns cannot be {bits.dtype} {list(bits.shape)}")
    unpacked = bits_to_mask(bits)
    if unpacked[:, columns:].any():
        raise Act24Error(f"bits of a mask say that inputs behind the {columns} that there are stay")
    return unpacked[:, :columns]


def compressed(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What is kept, row by row, and where it stands: for 2:4 in 16 bits 9/16 of the dense weight.

    Args:
        weight: `[out, in]`, zero where `mask` is False.

    Returns:
        `[kept]` in the weight's dtype, and uint8 `[out, ⌈in / 8⌉]`.
    """
    return weight[mask], packed_bits(mask)


def expanded(values: Tensor, bits: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """The weight `[out, columns]` and the mask of `compressed`.

    Raises:
        Act24Error: there are not as many values as the bits keep.
    """
    mask = unpacked_bits(bits, columns)
    if values.ndim != 1 or values.numel() != int(mask.sum()):
        raise Act24Error(f"{values.numel()} values for {int(mask.sum())} weights that stay")
    weight = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    weight[mask] = values
    return weight, mask


def fault(weight: Tensor, mask: Tensor, pattern: Pattern | None) -> str:
    """What is wrong with a pruned weight that is to be stored; empty if nothing is.

    Args:
        weight, mask: `[out, in]`.
        pattern: that the mask has to have; None: any.
    """
    if weight.shape != mask.shape:
        return f"its mask is {list(mask.shape)}, and it is {list(weight.shape)}"
    if not torch.isfinite(weight).all():
        return "it is not finite"
    if (lost := int((weight[~mask] != 0).sum())) > 0:
        return counted(lost, "weight that was pruned is not zero", "weights that were pruned are not zero")
    if torch.signbit(weight[weight == 0]).any():
        return "it has -0.0, which packed products do not take"
    if pattern is not None and not follows(mask, pattern):
        return f"its mask does not follow {pattern}"
    return ""
