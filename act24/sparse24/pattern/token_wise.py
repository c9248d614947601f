"""2:4 along the features: from relu(h) to the activation that stays, and its derivative.

A *sparsifier* is a pure function that says which two of every four features stay, with which value and which
slope. Methods of `activation24` name the one that they use (`act24.sparse24.feed_forward.methods`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from act24.relu2 import activation, slope
from act24.sparse24.pattern.mvue import mvue_factor
from act24.sparse24.pattern.selection import top2_of_4
from act24.sparse24.pattern.soft_threshold import third_largest

Function = Literal["relu2", "relu"]


class Dense(NamedTuple):
    """An activation before 2:4, each `[..., F]` in the dtype of h.

    Attributes:
        positive: relu(h). It has the order of the activation, so selections can be made on it.
        value: relu(h)² or relu(h).
        derivative: d value / d h.
    """

    positive: Tensor
    value: Tensor
    derivative: Tensor


class Selected(NamedTuple):
    """What a sparsifier makes of an activation, each `[..., F]`.

    Attributes:
        mask: boolean, what stays: two of every four at most.
        value: the activation after 2:4; zero where the mask is False.
        slope: d value / d h; zero there too.
    """

    mask: Tensor
    value: Tensor
    slope: Tensor


#: From an activation and a seed (an int64 scalar, None for one that does not draw) to what stays of it.
Sparsifier = Callable[[Dense, Tensor | None], Selected]


class Sparse24(NamedTuple):
    """A 2:4 activation, each `[..., F]`.

    Attributes:
        dense: the activation before 2:4.
        mask: what stays, boolean.
        value: the activation after 2:4, without the scale.
        slope: d value / d h where the mask is True, zero elsewhere.
        derivative: d dense / d h.
    """

    dense: Tensor
    mask: Tensor
    value: Tensor
    slope: Tensor
    derivative: Tensor


def dense_activation(positive: Tensor, function: Function) -> Dense:
    """The activation and its derivative, from relu(h) of any shape.

    Raises:
        OptionError: there is no such function.
    """
    return Dense(positive, activation(positive, function), slope(positive, function))


def naive(dense: Dense, seed: Tensor | None = None) -> Selected:
    """The two largest of four stay as they are; all shapes are `[..., F]`, F a multiple of 4."""
    mask = top2_of_4(dense.positive)
    return Selected(mask, torch.where(mask, dense.value, 0), torch.where(mask, dense.derivative, 0))


def soft_threshold(dense: Dense, seed: Tensor | None = None) -> Selected:
    """The two largest of four stay, less the third largest, which counts as a constant in the slope
    (arXiv 2409.09099). Shapes as for `naive`."""
    mask = top2_of_4(dense.positive)
    value = dense.value - third_largest(dense.value, mask)
    return Selected(mask, torch.where(mask, value, 0), torch.where(mask, dense.derivative, 0))


def mvue(dense: Dense, seed: Tensor | None = None) -> Selected:
    """Two of four are drawn at random and divided by their probability, which is unbiased
    (`act24.sparse24.pattern.mvue`). Shapes as for `naive`.

    Raises:
        ValueError: there is no seed.
    """
    if seed is None:
        raise ValueError("mvue draws at random: give a seed")
    factor = mvue_factor(dense.value, seed)
    value, slope = ((part * factor).to(part.dtype) for part in (dense.value, dense.derivative))
    return Selected(factor > 0, value, slope)


#: The sparsifiers that the operator `pack_activation` knows, under the names that it takes.
SPARSIFIERS: Mapping[str, Sparsifier] = {"naive": naive, "soft_threshold": soft_threshold, "mvue": mvue}


def sparsify_token_wise(
    positive: Tensor, seed: Tensor | None, function: Function, sparsifier: Sparsifier
) -> Sparse24:
    """Make an activation 2:4 along the features.

    Args:
        positive: relu(h), `[..., F]`, F a multiple of 4.
        seed: int64 scalar; None for a sparsifier that does not draw.
        function: the activation, relu(h)² or relu(h).
        sparsifier: what stays of it.

    Raises:
        OptionError: there is no such function.
        ValueError: F is not a multiple of 4, or the sparsifier draws and there is no seed.
    """
    dense = dense_activation(positive, function)
    selected = sparsifier(dense, seed)
    return Sparse24(dense.value, *selected, dense.derivative)
