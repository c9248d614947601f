"""Squared ReLU, relu(h)² (Primer, arXiv 2109.08668)."""

from __future__ import annotations

import torch
from torch import Tensor

from act24.operation import operation


@operation
def relu2(hidden: Tensor) -> Tensor:
    """relu(h)², elementwise; the derivative is 2·relu(h)."""
    positive = torch.relu(hidden)
    return positive * positive
