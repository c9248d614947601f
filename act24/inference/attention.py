"""Attention over a static cache of keys and values: buffers of a fixed length, written slot by slot."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Place(NamedTuple):
    """Where in the cache new tokens go, and what they see of it.

    Attributes:
        slots: int64 `[S]`, where the new tokens' keys and values are written; the same in every row.
        seen: boolean `[B, 1, S, L]`, which slots each new token attends to.
    """

    slots: Tensor
    seen: Tensor


def place_of(slots: Tensor, first: Tensor, length: int) -> Place:
    """The place of tokens that follow each other.

    A prompt shorter than the longest of its batch is padded from the left, and its tokens never see the
    padding. A slot of padding sees itself alone, because attention to nothing is NaN on some devices; nobody
    reads the result.

    Args:
        slots: int64 `[S]`.
        first: int64 `[B]`, the slot of each row's first token.
        length: L, slots of the cache that are looked at.
    """
    key = torch.arange(length, device=slots.device)
    causal = key <= slots[:, None]
    real = key >= first[:, None, None]
    itself = key == slots[:, None]
    return Place(slots, ((causal & real) | itself)[:, None])


def attend(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, place: Place) -> Tensor:
    """Write new keys and values into the cache, and attend to what each new token sees of it.

    Args:
        query: `[B, H, S, d]`; key, value: `[B, H_kv, S, d]`, H a multiple of H_kv.
        keys, values: `[B, H_kv, L, d]`, the cache; changed in place.
        place: for S new tokens and L slots.

    Returns:
        `[B, H, S, d]`.
    """
    keys.index_copy_(2, place.slots, key)
    values.index_copy_(2, place.slots, value)
    batch, heads, new, width = query.shape
    # The queries of a group share their keys: they are rows of one product, and nothing is repeated.
    group = heads // keys.shape[1]
    seen = place.seen.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(2, 3)
    folded = query.reshape(batch, keys.shape[1], group * new, width)
    return F.scaled_dot_product_attention(folded, keys, values, attn_mask=seen).reshape(query.shape)
