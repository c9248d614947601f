"""The output gradient of a linear, drawn 2:4 along the tokens without bias and packed: the 2:4 operand of
dW = MVUE₂₄(G)ᵀ x (arXiv 2404.01847).

Bytes an element: 2 read, 1.125 written. A thread holds 4 tokens of some features, so that a group lies inside
it; only the results cross threads, on their way to rows that run along the tokens.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

import torch
from torch import Tensor

from act24.compiler import jit, tl, triton
from act24.sparse24.format.packed import Packed24, empty_packed, pack
from act24.sparse24.kernels.shared.keys import (
    as_bits,
    as_float,
    as_signed,
    complement_field,
    group_bytes,
    load_bits,
    metadata_words,
    round16,
    upper,
)
from act24.sparse24.kernels.shared.random_draw import draw2
from act24.sparse24.kernels.shared.registry import operator
from act24.sparse24.pattern.mvue import mvue24, mvue_factor

#: Tokens and features of a tile, and tiles that a program walks along the tokens.
TOKENS, FEATURES, STEPS = 64, 64, 8

#: Most registers a thread may have: with all that it would take, few CTAs run at a time.
WARPS, REGISTERS = 8, 64

#: The largest bfloat16, where 1/π would carry a value beyond it.
LARGEST = 3.3895313892515355e38


@jit
def _value(key, kept, finite, LARGEST: tl.constexpr):
    """A drawn entry as it is kept, in bfloat16, as the upper half of a word."""
    value = as_bits(round16(tl.minimum(4 * kept, LARGEST), tl.bfloat16)) | (key & 0x80000000)
    return tl.where(kept > 0, tl.where(finite, value, upper(key)), key & 0)


@jit
def _drawn(tokens, number, seed, LARGEST: tl.constexpr):
    """Of four tokens, whose values are in the upper halves of words: the two drawn values in one word, and
    the metadata (inverted)."""
    a0, a1, a2, a3 = [as_float(bits & 0x7FFFFFFF) for bits in tokens]
    infinity: tl.constexpr = float("inf")
    finite = (a0 < infinity) & (a1 < infinity) & (a2 < infinity) & (a3 < infinity)
    keys, kept, _ = draw2((a0, a1, a2, a3), [tokens[i] | (3 - i) for i in (0, 1, 2, 3)], number, seed)
    low, high = [_value(keys[i], kept[i], finite, LARGEST) for i in (0, 1)]
    return low >> 16 | upper(high), complement_field(*keys)


@jit
def _pack_drawn(
    grad,
    values,
    metadata,
    seed,
    tokens,
    features,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    STEPS: tl.constexpr,
    LARGEST: tl.constexpr,
):
    rows: tl.constexpr = TOKENS // 4
    feature = tl.program_id(0) * FEATURES
    first_tile = tl.program_id(1) * STEPS
    row = tl.arange(0, rows)[:, None]
    pair = tl.arange(0, FEATURES // 2)[None, :]
    # Numbers of groups, as the reference counts them: along the tokens first.
    group = ((feature + 2 * pair) * (tokens // 4) + row).to(tl.uint32)
    for step in tl.range(0, tl.minimum(STEPS, tokens // TOKENS - first_tile), num_stages=2):
        token = (first_tile + step) * TOKENS
        place = token.to(tl.int64) * (features // 2) + feature // 2
        place += row * (4 * (features // 2)) + pair
        words = [load_bits(grad + place + nth * (features // 2)) for nth in (0, 1, 2, 3)]
        number = group + (token // 4).to(tl.uint32)
        even, even_field = _drawn([word << 16 for word in words], number, seed, LARGEST)
        number += (tokens // 4).to(tl.uint32)
        odd, odd_field = _drawn([upper(word) for word in words], number, seed, LARGEST)
        both = tl.trans(tl.reshape(tl.join(even, odd), [rows, FEATURES]))
        start = feature.to(tl.int64) * (tokens // 4) + token // 4
        tile = tl.arange(0, FEATURES)[:, None] * (tokens // 4) + tl.arange(0, rows)[None, :]
        tl.store(values + start + tile, as_signed(both))

        byte = tl.trans(tl.reshape(tl.join(even_field, odd_field), [rows, FEATURES]))
        near, far = group_bytes((byte & 15).to(tl.uint8))
        words = tl.reshape(metadata_words(near, far), [TOKENS // 32, FEATURES])
        slab = feature.to(tl.int64) * (tokens // 32) + token * 2
        place = slab + tl.arange(0, TOKENS // 32)[:, None] * 64 + tl.arange(0, FEATURES)[None, :]
        tl.store(metadata + place, as_signed(words))


def _reference(grad: Tensor, seed: Tensor) -> Tensor:
    taken = mvue_factor(grad, seed, 0) > 0
    return pack(mvue24(grad, seed, 0).T.contiguous(), taken.T.contiguous()).buffer


def _fake(grad: Tensor, seed: Tensor) -> Tensor:
    tokens, features = grad.shape
    return empty_packed(features, tokens, grad)


@operator(_reference, _fake)
def pack_drawn(grad: Tensor, seed: Tensor) -> Tensor:
    """Draw a gradient 2:4 along the tokens (`act24.sparse24.pattern.mvue.mvue24` along dimension 0), and pack
    it.

    Args:
        grad: bfloat16 `[T, N]`, contiguous, T and N multiples of 64. NaN and infinity stay, up to two in a
            group.
        seed: int64 scalar on the same device.

    Returns:
        the buffer of the packed `[N, T]` matrix.
    """
    tokens, features = grad.shape
    buffer = _fake(grad, seed)
    packed = Packed24(buffer)
    _pack_drawn[(features // FEATURES, triton.cdiv(tokens // TOKENS, STEPS))](
        grad.view(torch.int32),
        packed.values.view(torch.int32),
        packed.metadata.view(torch.int32),
        seed,
        tokens,
        features,
        TOKENS=TOKENS,
        FEATURES=FEATURES,
        STEPS=STEPS,
        LARGEST=LARGEST,
        num_warps=WARPS,
        maxnreg=REGISTERS,
    )
    return buffer
