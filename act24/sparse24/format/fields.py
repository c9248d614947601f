"""The four bits that say where the two kept entries of a group of four lie: `i | j << 2` with i < j.

A group with fewer than two non-zeros still names two positions. In memory two fields share a byte, the even
one in the low bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: The six fields that name two different positions in order.
LEGAL = (0x4, 0x8, 0xC, 0x9, 0xD, 0xE)


def fields_of(mask: Tensor) -> Tensor:
    """The fields of a mask.

    Args:
        mask: boolean `[..., K]`, two True in every four.

    Returns:
        uint8 `[..., K / 4]`.
    """
    a, b, c, d = mask.unflatten(-1, (-1, 4)).unbind(-1)
    first = torch.where(a, 0, torch.where(b, 1, 2))
    second = torch.where(d, 3, torch.where(c, 2, 1))
    return (first + 4 * second).to(torch.uint8)


def kept_entries(dense: Tensor, fields: Tensor) -> Tensor:
    """The two entries that each field names: `[..., K / 2]` from `dense` `[..., K]` and uint8 `[..., K /
    4]`."""
    return dense.unflatten(-1, (-1, 4)).gather(-1, _positions(fields)).flatten(-2)


def with_zeros(values: Tensor, fields: Tensor) -> Tensor:
    """The inverse of `kept_entries`: `[..., K]` with zeros at the positions that no field names."""
    groups = values.new_zeros(*fields.shape, 4)
    return groups.scatter(-1, _positions(fields), values.unflatten(-1, (-1, 2))).flatten(-2)


def to_bytes(fields: Tensor) -> Tensor:
    """Two fields to a byte: uint8 `[..., n / 2]` from uint8 `[..., n]`."""
    return fields[..., 0::2] + 16 * fields[..., 1::2]


def from_bytes(bytes_: Tensor) -> Tensor:
    """The inverse of `to_bytes`: uint8 `[..., n]` from uint8 `[..., n / 2]`."""
    return torch.stack((bytes_ % 16, bytes_ // 16), dim=-1).flatten(-2)


def _positions(fields: Tensor) -> Tensor:
    """int64 `[..., 2]`."""
    return torch.stack((fields % 4, fields // 4), dim=-1).long()
