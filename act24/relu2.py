"""Squared ReLU, relu(h)² (Primer, arXiv 2109.08668), and relu beside it: the activation and its slope."""

from __future__ import annotations

import torch
from torch import Tensor

from act24.operation import operation
from act24.options import one_of

#: Names of the activations.
FUNCTIONS = ("relu2", "relu")


@operation
def relu2(hidden: Tensor) -> Tensor:
    """relu(h)², elementwise: any shape and floating dtype, kept; the derivative is 2·relu(h)."""
    positive = torch.relu(hidden)
    return positive * positive


def check_function(function: str) -> None:
    """
    Raises:
        OptionError: this is the name of no activation.
    """
    if function not in FUNCTIONS:
        one_of("", "function", function, FUNCTIONS)


def activation(positive: Tensor, function: str) -> Tensor:
    """relu(h)² or relu(h), of the shape and dtype of `positive`, which is relu(h), of any shape.

    Raises:
        OptionError: `function` is neither "relu2" nor "relu".
    """
    check_function(function)
    return positive * positive if function == "relu2" else positive


def slope(positive: Tensor, function: str) -> Tensor:
    """d activation / d h from `positive`, relu(h): 2·relu(h), or 1 and 0; shapes, dtypes and errors as for
    `activation`."""
    check_function(function)
    return 2 * positive if function == "relu2" else (positive > 0).to(positive.dtype)


def slope_from_value(value: Tensor, function: str) -> Tensor:
    """d activation / d h from the activation itself, which backward has saved.

    In 16 bits the root of the rounded square, rounded, is relu(h) again, exactly, so nothing else is saved.
    Any shape, kept as the dtype is; errors as for `activation`.
    """
    check_function(function)
    if function == "relu2":
        return 2 * value.float().sqrt().to(value.dtype)
    return (value != 0).to(value.dtype)
