"""Into PyTorch's own 2:4 tensors, and out of them: for inference, and for whoever multiplies by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from act24.errors import Act24Error
from act24.sparse24.pattern.mvue import mvue24
from act24.sparse24.pattern.selection import top2_of_4


def prune24(x: Tensor, mask: Tensor | None = None, seed: Tensor | int | None = None) -> Tensor:
    """A 2:4 form of `x` along the last dimension, stored dense.

    Args:
        x: `[..., K]`, K a multiple of 4.
        mask: boolean, the entries to keep, at most two of four. None: the two of largest magnitude.
        seed: draw an unbiased estimate (`act24.sparse24.pattern.mvue.mvue24`) instead; not together with a
            mask.

    Raises:
        ValueError: mask and seed, or a mask that keeps more than two of four.
    """
    if mask is not None and seed is not None:
        raise ValueError("a mask says what to keep, a seed draws it: give one of the two")
    if seed is not None:
        return mvue24(x, seed)
    if mask is None:
        mask = top2_of_4(x.abs())
    elif int(mask.unflatten(-1, (-1, 4)).sum(-1).max()) > 2:
        raise ValueError("the mask keeps more than two of four entries along the last dimension")
    return torch.where(mask, x, 0)


def to_semi_structured(x: Tensor, mask: Tensor | None = None, seed: Tensor | int | None = None) -> Tensor:
    """`prune24`, packed as a `torch.sparse.SparseSemiStructuredTensor` of the dtype of `x`.

    Args:
        x: `[M, K]` on a CUDA device, a dtype and shape that PyTorch packs (bfloat16, float16, …; multiples of
            32 and 64 are safe).

    Raises:
        Act24Error: not on a CUDA device, or PyTorch does not pack it, with its reason.
    """
    if not x.is_cuda:
        raise Act24Error("PyTorch packs 2:4 tensors on CUDA devices only; `prune24` gives them in dense form")
    try:
        return torch.sparse.to_sparse_semi_structured(prune24(x, mask, seed).contiguous())
    except (RuntimeError, NotImplementedError) as error:
        raise Act24Error(f"PyTorch cannot pack this {tuple(x.shape)} {x.dtype} tensor: {error}") from error
