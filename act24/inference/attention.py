"""Attention over a static cache of keys and values: buffers of a fixed length, written slot by slot."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right


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


class ChunkPlace(NamedTuple):
    """Where in the cache a chunk of prompts goes, and what it sees. Of one shape wherever the chunk begins:
    code that is compiled for a chunk's tokens serves all of them.

    Attributes:
        slots, seen: as for `Place`, of all slots; of a chunk that needs no mask, `seen` is memory that nobody
            wrote or reads.
        host: int64 `[2]` on the CPU, where nothing waits to read it: the slot of the chunk's first token, and
            whether it needs the mask.
    """

    slots: Tensor
    seen: Tensor
    host: Tensor


def chunk_place(start: int, new: int, first: Tensor, padded: bool, length: int, kernel: bool) -> ChunkPlace:
    """The place of a chunk of prompts.

    Args:
        start: slot of its first token.
        new: S, its tokens.
        first: int64 `[B]`, the slot of each row's first token.
        padded: one of them is not 0.
        length: L, slots of the cache.
        kernel: the device has one for causal attention in the model's dtype (`causal`).
    """
    slots = torch.arange(start, start + new, device=first.device)
    masked = padded or not kernel
    seen = slots.new_empty((len(first), 1, new, length), dtype=torch.bool)
    if masked:
        seen = place_of(slots, first, length).seen
    return ChunkPlace(slots, seen, torch.tensor([start, masked]))


def attend(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, place: Place | ChunkPlace
) -> Tensor:
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
    if isinstance(place, ChunkPlace):
        return chunk_attention(query, keys, values, place.seen, place.host).transpose(1, 2)
    return _masked(query, keys, values, place.seen)


def _masked(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    batch, heads, new, width = query.shape
    # The queries of a group share their keys: they are rows of one product, and nothing is repeated.
    group = heads // keys.shape[1]
    seen = seen.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(2, 3)
    folded = query.reshape(batch, keys.shape[1], group * new, width)
    return F.scaled_dot_product_attention(folded, keys, values, attn_mask=seen).reshape(query.shape)


@torch.library.custom_op("act24::chunk_attention", mutates_args=())
def chunk_attention(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, host: Tensor) -> Tensor:
    """Attention of a chunk of prompts to the slots up to its end. It is one node of a compiled graph, because
    the number of slots grows from chunk to chunk.

    Args:
        query: `[B, H, S, d]`.
        keys, values: `[B, H_kv, L, d]`, the cache, in which the chunk's are.
        seen, host: as for `ChunkPlace`.

    Returns:
        `[B, S, H, d]`, contiguous, as the linear behind it reads it.
    """
    start, masked = host.tolist()
    end = start + query.shape[2]
    keys, values = (cache[:, :, :end] for cache in (keys, values))
    y = _masked(query, keys, values, seen[..., :end]) if masked else causal(query, keys, values)
    return y.transpose(1, 2).contiguous()


@chunk_attention.register_fake
def _(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, host: Tensor) -> Tensor:
    batch, heads, new, width = query.shape
    return query.new_empty((batch, new, heads, width))


def causal(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of the last S of L tokens, by flash attention, which a GPU has in 16 bits; PyTorch's
    other kernels for grouped heads would write all scores to memory. Shapes as for `attend`."""
    new, length = query.shape[2], keys.shape[2]
    groups = query.shape[1] != keys.shape[1]
    if new == length:
        return F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=groups)
    mask = causal_lower_right(new, length)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=groups)
