"""Causal attention that stays within documents, where a row holds several, one behind the other.

A token sees the tokens from the beginning of its document to itself. So a row gives what its documents give
as rows of their own, up to rounding: rotary embeddings tell tokens apart by their distance alone, and
nothing else in a block mixes tokens.

Compiled for a GPU it is PyTorch's flex attention (arXiv 2412.05496), which skips the blocks of scores in
which nothing is seen. Elsewhere it is scaled_dot_product_attention with a mask `[B, 1, S, S]`: flex attention
has no backward on a CPU, and uncompiled it would hold all scores.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from act24.errors import Act24Error
from act24.operation import cast_for_autocast, operation

#: Queries, and keys, of a block that is skipped or not. Flex attention's own default.
BLOCK = 128


@operation
def document_attention(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, grouped: bool = False
) -> Tensor:
    """Attention of every token to those of its document that do not come behind it.

    Args:
        query: `[B, H, S, d]`.
        key, value: `[B, H_kv, S, d]`.
        starts: integer `[B, S]`, the position in the row at which each token's document begins; a scalar:
            each row is one document.
        grouped: H is a multiple of H_kv, whose heads serve several queries.

    Returns:
        `[B, H, S, d]`, in the dtype of the arguments, under autocast in autocast's.

    Raises:
        Act24Error: `starts` is of other rows.
    """
    query, key, value = cast_for_autocast(query, key, value)  # pyright: ignore[reportAssignmentType]
    if starts.ndim == 0:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    if starts.shape != (query.shape[0], query.shape[2]):
        raise Act24Error(
            f"attention within documents: their beginnings are of rows {tuple(starts.shape)}, and these are "
            f"{(query.shape[0], query.shape[2])}"
        )
    if uses_flex(query.device, torch.compiler.is_compiling()):
        return _flex(query, key, value, starts, grouped)
    mask = seen(starts)[:, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)


def uses_flex(device: torch.device, compiled: bool) -> bool:
    """Whether attention is flex attention, or else one with a mask of all pairs."""
    return compiled and device.type == "cuda"


def seen(starts: Tensor) -> Tensor:
    """Boolean `[B, S, S]`: which key, by the last dimension, each query sees. starts: integer `[B, S]`."""
    position = torch.arange(starts.shape[1], device=starts.device)
    return (position >= starts[:, :, None]) & (position <= position[:, None])


def block_mask(starts: Tensor) -> Any:
    """`seen` as flex attention's BlockMask, of which no part is made for all pairs. starts: integer `[B, S]`.

    Documents follow each other, so the blocks of keys that a block of queries sees are neighbours, and so are
    the blocks of queries that see a block of keys: of each the first and their number are enough.
    """
    from torch.nn.attention.flex_attention import BlockMask

    length = starts.shape[1]
    blocks = torch.arange(-(-length // BLOCK), device=starts.device, dtype=torch.int32)
    last_block = len(blocks) - 1
    first_key = starts[:, None, ::BLOCK].to(torch.int32) // BLOCK  # of a block's first query; they ascend
    queries = (blocks[:, None] + blocks).clamp(max=last_block)
    last_query = (first_key[:, :, None] <= blocks[:, None]).sum(-1, dtype=torch.int32) - 1

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= starts[row, query]) & (key <= query)

    return BlockMask(
        seq_lengths=(length, length),
        kv_num_blocks=blocks - first_key + 1,
        kv_indices=(first_key[..., None] + blocks).clamp(max=last_block),
        full_kv_num_blocks=None,
        full_kv_indices=None,
        q_num_blocks=last_query - blocks + 1,
        q_indices=queries.expand(len(starts), 1, -1, -1).contiguous(),
        full_q_num_blocks=None,
        full_q_indices=None,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=sees,
    )


def _flex(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, grouped: bool) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    mixed: Any = flex_attention(query, key, value, block_mask=block_mask(starts), enable_gqa=grouped)
    return mixed
