"""Backward with dense weight gradients: dZ packed along the features, and the activation and dZ as they are.

Bytes an element: 3.125 read, 1.125 + 4 written.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

import torch
from torch import Tensor

from act24.compiler import jit, tl
from act24.relu2 import check_function
from act24.sparse24.format.packed import Packed24, unpack
from act24.sparse24.kernels.shared.keys import filled, load_bits, metadata_field, upper
from act24.sparse24.kernels.shared.masked_gradient import masked_gradient, masked_gradient_reference
from act24.sparse24.kernels.shared.registry import operator

#: Tokens and features of a tile.
TOKENS, FEATURES = 64, 64


@jit
def _unpack_gradient(
    grad,
    values,
    metadata,
    slopes,
    grad_values,
    grad_metadata,
    value_dense,
    grad_dense,
    features,
    FUNCTION: tl.constexpr,
    SLOPE: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    groups: tl.constexpr = FEATURES // 4
    slab = tl.program_id(1)
    feature = tl.program_id(0) * FEATURES
    row = tl.arange(0, TOKENS)[:, None]
    pair = tl.arange(0, FEATURES // 2)[None, :]
    group = tl.arange(0, groups)[None, :]
    start = slab.to(tl.int64) * TOKENS * (features // 4) + feature // 4  # T·F may pass 2^31
    half_row = start * 2 + (row * (features // 2) + pair)
    quarter_row = start + (row * (features // 4) + group)

    tile = slab.to(tl.int64) * (2 * features) + feature * 2
    field = metadata_field(row, tl.arange(0, FEATURES // 8)[None, :] * 8, features)
    fields = load_bits(metadata + tile + tl.max_contiguous(field // 8, (1, 2)))
    fields >>= (field % 8 * 4).to(tl.uint32)
    fields = tl.reshape(tl.join(fields, fields >> 16), [TOKENS, groups])
    low = fields & 3
    high = fields & 12

    both = load_bits(values + quarter_row) & 0x7FFF7FFF  # as pack_gradient has it
    slope = load_bits(slopes + quarter_row) if SLOPE else both
    rounded = masked_gradient(load_bits(grad + half_row), both, slope, low, high, FUNCTION, SLOPE)
    tl.store(grad_values + half_row, tl.reshape(rounded, [TOKENS, FEATURES // 2]))
    first, second = tl.split(rounded.to(tl.uint16, bitcast=True))

    tl.store(value_dense + half_row, filled(low, high, both << 16, upper(both)))
    tl.store(grad_dense + half_row, filled(low, high, first.to(tl.uint32) << 16, second.to(tl.uint32) << 16))

    words = tl.arange(0, FEATURES * 2)
    tl.store(grad_metadata + tile + words, tl.load(metadata + tile + words))


def _reference(
    grad: Tensor, saved: Tensor, slope: Tensor | None, function: str
) -> tuple[Tensor, Tensor, Tensor]:
    masked = masked_gradient_reference(grad, Packed24(saved), slope, function)
    return masked.buffer, unpack(Packed24(saved)), unpack(masked)


def _fake(grad: Tensor, saved: Tensor, slope: Tensor | None, function: str) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(saved), torch.empty_like(grad), torch.empty_like(grad)


@operator(_reference, _fake, ours=("saved", "slope"))
def unpack_gradient(
    grad: Tensor, saved: Tensor, slope: Tensor | None, function: str
) -> tuple[Tensor, Tensor, Tensor]:
    """From dS and what forward saved to the operands of backward with exact weight gradients.

    Args:
        grad: dS, bfloat16 `[T, F]`, T and F multiples of 64.
        saved: the buffer of the activation, 2:4 along the features, `[T, F]`.
        slope: bfloat16 `[T, F/2]` at the places of the saved values; None to take it from the activation.
        function: "relu2" or "relu".

    Returns:
        the buffer of dZ packed along the features, and the activation and dZ with their zeros filled in,
        bfloat16 `[T, F]`.
    """
    check_function(function)
    tokens, features = grad.shape
    outputs = _fake(grad, saved, slope, function)
    value, packed = Packed24(saved), Packed24(outputs[0])
    unused = words = grad.view(torch.int32)
    _unpack_gradient[(features // FEATURES, tokens // TOKENS)](
        words,
        value.values.view(torch.int32),
        value.metadata.view(torch.int32),
        unused if slope is None else slope.view(torch.int32),
        packed.values,
        packed.metadata.view(torch.int32),
        outputs[1].view(torch.int32),
        outputs[2].view(torch.int32),
        features,
        FUNCTION=function,
        SLOPE=slope is not None,
        TOKENS=TOKENS,
        FEATURES=FEATURES,
        num_warps=8,
    )
    return outputs
