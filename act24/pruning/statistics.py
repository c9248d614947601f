"""What a pruning method knows of the inputs of a linear: sums over calibration tokens.

Sums are of tokens, so that the order and the batches in which they come do not matter; what is summed is
float32 before it is squared, so that float16 does not overflow.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

#: None; the sum of squares of each input feature; or of all products of two, XᵀX.
StatisticName = Literal["none", "squares", "gram"]


def kept_tokens(inputs: Tensor, pads: Tensor | None) -> Tensor:
    """The inputs of a linear as `[T, in]`, float32, without padding.

    Args:
        inputs: `[..., in]`.
        pads: boolean, the shape of `inputs` without features, True for padding; None: there is none.
    """
    tokens = inputs.detach().flatten(0, -2)
    return (tokens if pads is None else tokens[~pads.flatten()]).float()


def squares(tokens: Tensor) -> Tensor:
    """Σ_t x²_tj of `[T, in]`, float64 `[in]`."""
    return tokens.square().sum(0, dtype=torch.float64)


def gram(tokens: Tensor) -> Tensor:
    """XᵀX of `[T, in]`, float32 `[in, in]`."""
    return tokens.T @ tokens


STATISTICS = {"squares": squares, "gram": gram}
