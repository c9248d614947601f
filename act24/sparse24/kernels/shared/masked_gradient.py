# pyright: reportInvalidTypeForm=false
"""The gradient of the pre-activation at the places that 2:4 kept, inside a kernel and in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from act24.compiler import jit, tl
from act24.relu2 import slope_from_value
from act24.sparse24.format.packed import Packed24, pack, unpack, with_values
from act24.sparse24.kernels.shared.keys import as_float, round16, upper


@jit
def masked_gradient(pairs, both, slope, low, high, FUNCTION: tl.constexpr, SLOPE: tl.constexpr):
    """dZ at the kept places.

    Args:
        pairs: dS, words [rows, features / 2].
        both, slope: the saved activation and its slope, words [rows, features / 4], of no negative numbers.
        low, high: the metadata of every group, in its bits 0 to 1 and 2 to 3.

    Returns:
        bfloat16 [rows, features / 4, 2].
    """
    even, odd = tl.split(tl.reshape(pairs, [both.shape[0], both.shape[1], 2]))
    grad0 = as_float(even << 16)
    grad1 = as_float(upper(even))
    grad2 = as_float(odd << 16)
    grad3 = as_float(upper(odd))
    first = tl.where(low == 0, grad0, tl.where(low == 1, grad1, grad2))
    second = tl.where(high == 12, grad3, tl.where(high == 8, grad2, grad1))
    if SLOPE:
        first *= as_float(slope << 16)
        second *= as_float(upper(slope))
    elif FUNCTION == "relu2":
        # `both` is relu(h)², rounded to 16 bits. Its square root, rounded to 16 bits, is exactly relu(h), so
        # the slope need not be saved.
        first *= 2 * round16(tl.sqrt(as_float(both << 16)), tl.bfloat16)
        second *= 2 * round16(tl.sqrt(as_float(upper(both))), tl.bfloat16)
    else:
        first = tl.where(both << 16 != 0, first, 0.0)
        second = tl.where(upper(both) != 0, second, 0.0)
    return tl.join(first, second).to(tl.bfloat16)


def masked_gradient_reference(grad: Tensor, saved: Packed24, slope: Tensor | None, function: str) -> Packed24:
    """slope ∘ grad under the mask of `saved`.

    Args:
        grad: dS, `[T, F]`.
        saved: the activation `[T, F]`.
        slope: `[T, F/2]` at the places of `saved.values`; None to take it from the activation.
        function: "relu2" or "relu".

    Returns:
        dZ `[T, F]`, with the places of `saved`.
    """
    kept = unpack(with_values(saved, torch.ones_like(saved.values))) != 0
    slope = slope_from_value(saved.values, function) if slope is None else slope
    return with_values(saved, pack(grad, kept).values * slope)
