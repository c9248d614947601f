"""Backward around dense products: dZ from dS and the 2:4 activation with its zeros.

Bytes an element: 4 read, 2 written. torch.compile would fuse this too, but it would not round the square root
to 16 bits, and only the rounded root is exactly relu(h).
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

import torch
from torch import Tensor

from act24.compiler import jit, tl, triton
from act24.relu2 import check_function, slope_from_value
from act24.sparse24.kernels.shared.keys import round16
from act24.sparse24.kernels.shared.registry import operator

#: Entries of a program.
BLOCK = 4096


@jit
def _activation_gradient(grad, value, result, number, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < number
    kept = tl.load(value + place, inside, other=0.0).to(tl.float32)
    incoming = tl.load(grad + place, inside, other=0.0).to(tl.float32)
    if FUNCTION == "relu2":
        made = incoming * (2 * round16(tl.sqrt(kept), tl.bfloat16))
    else:
        made = tl.where(kept != 0, incoming, 0.0)
    tl.store(result + place, made.to(tl.bfloat16), inside)


def _reference(grad: Tensor, value: Tensor, function: str) -> Tensor:
    return grad * slope_from_value(value, function)


def _fake(grad: Tensor, value: Tensor, function: str) -> Tensor:
    return torch.empty_like(grad)


@operator(_reference, _fake)
def activation_gradient(grad: Tensor, value: Tensor, function: str) -> Tensor:
    """dZ from dS and the activation with its zeros.

    Args:
        grad: dS, bfloat16 `[T, F]`.
        value: the activation, 2:4 along the features, the same.
        function: "relu2" or "relu".

    Returns:
        bfloat16 `[T, F]`.
    """
    check_function(function)
    result, number = torch.empty_like(grad), grad.numel()
    _activation_gradient[(triton.cdiv(number, BLOCK),)](
        grad, value, result, number, FUNCTION=function, BLOCK=BLOCK, num_warps=8
    )
    return result
