"""The scale β of soft thresholding, where it is applied."""

from __future__ import annotations

import torch
from torch import Tensor

from act24.operation import cast


def times_scale(tensor: Tensor, scale: Tensor | None) -> Tensor:
    """β · tensor in the tensor's dtype, rounded once: β itself keeps its precision, so that what is applied
    is what is logged. (PyTorch would round a scalar tensor to bfloat16 first.)

    Args:
        tensor: any shape.
        scale: float32 scalar; None for 1.
    """
    if scale is None:
        return tensor
    wide = torch.promote_types(tensor.dtype, scale.dtype)
    return cast(tensor.to(wide) * scale, tensor.dtype)
