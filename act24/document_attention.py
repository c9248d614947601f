"""Causal attention that stays within documents, where a row holds several, one behind the other.

A token sees the tokens from the beginning of its document to itself. So a row gives what its documents give
as rows of their own, up to rounding: rotary embeddings tell tokens apart by their distance alone, and
nothing else in a block mixes tokens.

It is scaled_dot_product_attention with a mask `[B, 1, S, S]`, of which PyTorch takes its memory-efficient
kernel on GPUs; no host waits for anything, so a CUDA graph can be captured of it. Flex attention (arXiv
2412.05496), which skips the blocks of scores in which nothing is seen, gave the same values and gradients on
an H200 under torch 2.11, but a training step with it ended there in a CUDA error (an invalid address space).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from act24.errors import Act24Error
from act24.operation import operation


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
    if starts.ndim == 0:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    if starts.shape != (query.shape[0], query.shape[2]):
        raise Act24Error(
            f"attention within documents: their beginnings are of rows {tuple(starts.shape)}, and these are "
            f"{(query.shape[0], query.shape[2])}"
        )
    if grouped:  # the memory-efficient kernel takes no groups, and without it all scores would be kept
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen(starts)[:, None])


def seen(starts: Tensor) -> Tensor:
    """Boolean `[B, S, S]`: which key, by the last dimension, each query sees. starts: integer `[B, S]`."""
    position = torch.arange(starts.shape[1], device=starts.device)
    return (position >= starts[:, :, None]) & (position <= position[:, None])
