# pyright: reportInvalidTypeForm=false
"""The product of a packed 2:4 weight with one to sixteen tokens, where the weight's bytes are the time.

The layout is our own, 9/16 of the dense bytes, in plain row order. A group is four neighbours along the
inputs, of which two are kept:

    values  [N, K / 2]  the kept ones, group after group
    codes   [N, K / 8]  a byte for two groups, g in the low and K/8 + g in the high half; of the four bits of
                        a group two say where the first one stands (0, 1, 2), two the second (1, 2, 3, less 1)

So one load of values and one of codes have the same shape, and no lane waits for another's. One token is
multiplied by selecting, for each kept value, its input among the three that it can stand at. More go through
tensor cores: the groups' first, second, third and fourth entries are four dense matrices, each multiplied
with every fourth input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from act24.compiler import jit, tl, triton
from act24.sparse24.kernels.shared.registry import operator
from act24.sparse24.pattern.selection import top2_of_4

#: Most tokens.
TOKENS = 16

#: Inputs are a multiple of this many, so that values are whole words, 16 bytes at a time.
INPUTS = 64


def packed_for_decode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A 2:4 weight in the layout of `packed_decode`.

    Args:
        weight: 16-bit `[N, K]`, K a multiple of `INPUTS`, at most two non-zeros of four along K.

    Returns:
        values `[N, K / 2]` of its dtype, codes uint8 `[N, K / 8]`.
    """
    groups = weight.unflatten(-1, (-1, 4))
    kept = top2_of_4(weight.abs()).unflatten(-1, (-1, 4))
    places = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :2]
    values = groups.gather(-1, places).flatten(1)
    code = (places[..., 0] | ((places[..., 1] - 1) << 2)).to(torch.uint8)
    low, high = code.chunk(2, dim=-1)
    return values.contiguous(), (low | (high << 4)).contiguous()


def unpacked(values: Tensor, codes: Tensor) -> Tensor:
    """The dense weight `[N, K]` of a packed one."""
    code = torch.cat((codes & 15, codes >> 4), dim=-1)
    places = torch.stack((code & 3, (code >> 2) + 1), dim=-1).long()
    groups = values.new_zeros((*code.shape, 4))
    return groups.scatter_(-1, places, values.unflatten(-1, (-1, 2))).flatten(1)


@jit
def _halves(word):
    """Two bfloat16 in 32 bits as float32."""
    return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)


@jit
def _group_product(word, code, x0, x1, x2, x3):
    first, second = _halves(word)
    at_first = tl.where((code & 2) != 0, x2, tl.where((code & 1) != 0, x1, x0))
    at_second = tl.where((code & 8) != 0, x3, tl.where((code & 4) != 0, x2, x1))
    return first * at_first + second * at_second


@jit
def _one_token(
    x,
    values,
    codes,
    y,
    outputs,
    half,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < outputs
    group = tl.arange(0, GROUPS)
    total = tl.zeros([ROWS, GROUPS], dtype=tl.float32)
    for start in range(0, half, GROUPS):
        low = start + group
        real = low < half
        mask = inside[:, None] & real[None, :]
        words = values + row.to(tl.int64)[:, None] * (2 * half) + low[None, :]
        word = tl.load(words, mask, other=0)
        other_word = tl.load(words + half, mask, other=0)
        code = tl.load(codes + row.to(tl.int64)[:, None] * half + low[None, :], mask, other=0).to(tl.int32)
        at = x + 4 * low
        x0 = tl.load(at, real, other=0).to(tl.float32)[None, :]
        x1 = tl.load(at + 1, real, other=0).to(tl.float32)[None, :]
        x2 = tl.load(at + 2, real, other=0).to(tl.float32)[None, :]
        x3 = tl.load(at + 3, real, other=0).to(tl.float32)[None, :]
        total += _group_product(word, code, x0, x1, x2, x3)
        at = at + 4 * half
        x0 = tl.load(at, real, other=0).to(tl.float32)[None, :]
        x1 = tl.load(at + 1, real, other=0).to(tl.float32)[None, :]
        x2 = tl.load(at + 2, real, other=0).to(tl.float32)[None, :]
        x3 = tl.load(at + 3, real, other=0).to(tl.float32)[None, :]
        total += _group_product(other_word, code >> 4, x0, x1, x2, x3)
    tl.store(y + row, tl.sum(total, 1).to(y.dtype.element_ty), inside)


@jit
def _group_products(word, code, at, real, sums):
    first, second = _halves(word)
    one, two = (code & 1) != 0, (code & 2) != 0
    three, four = (code & 4) != 0, (code & 8) != 0
    entry = tl.where(one | two, 0.0, first)
    sums = tl.dot(entry.to(tl.bfloat16), tl.load(at, real, other=0), sums)
    entry = tl.where(one, first, tl.where(three | four, 0.0, second))
    sums = tl.dot(entry.to(tl.bfloat16), tl.load(at + 1, real, other=0), sums)
    entry = tl.where(two, first, tl.where(three, second, 0.0))
    sums = tl.dot(entry.to(tl.bfloat16), tl.load(at + 2, real, other=0), sums)
    entry = tl.where(four, second, 0.0)
    return tl.dot(entry.to(tl.bfloat16), tl.load(at + 3, real, other=0), sums)


@jit
def _some_tokens(
    x,
    values,
    codes,
    y,
    outputs,
    half,
    tokens,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < outputs
    group = tl.arange(0, GROUPS)
    token = tl.arange(0, TOKENS)
    sums = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
    for start in range(0, half, GROUPS):
        low = start + group
        real = low < half
        mask = inside[:, None] & real[None, :]
        words = values + row.to(tl.int64)[:, None] * (2 * half) + low[None, :]
        word = tl.load(words, mask, other=0)
        other_word = tl.load(words + half, mask, other=0)
        code = tl.load(codes + row.to(tl.int64)[:, None] * half + low[None, :], mask, other=0).to(tl.int32)
        # [GROUPS, TOKENS]: every fourth input of each token.
        at = x + token[None, :] * (8 * half) + 4 * low[:, None]
        given = real[:, None] & (token < tokens)[None, :]
        sums = _group_products(word, code, at, given, sums)
        sums = _group_products(other_word, code >> 4, at + 4 * half, given, sums)
    to = y + token[None, :] * outputs + row[:, None]
    tl.store(to, sums.to(y.dtype.element_ty), inside[:, None] & (token < tokens)[None, :])


def _reference(x: Tensor, values: Tensor, codes: Tensor) -> Tensor:
    return (x.float() @ unpacked(values, codes).float().T).to(x.dtype)


def _fake(x: Tensor, values: Tensor, codes: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], values.shape[0]))


@operator(_reference, _fake, ours=("values", "codes"))
def packed_decode(x: Tensor, values: Tensor, codes: Tensor) -> Tensor:
    """x W₂₄ᵀ.

    Args:
        x: bfloat16 `[T, K]`, T at most `TOKENS`.
        values: bfloat16 `[N, K / 2]`; codes: uint8 `[N, K / 8]`, as `packed_for_decode` makes them.

    Returns:
        bfloat16 `[T, N]`.

    Raises:
        ValueError: other dtypes or shapes.
    """
    (tokens, inputs), outputs = x.shape, len(values)
    fits = values.shape[1] * 2 == codes.shape[1] * 8 == inputs and inputs % INPUTS == 0
    if not fits or tokens > TOKENS or x.dtype is not torch.bfloat16 or values.dtype is not torch.bfloat16:
        raise ValueError(
            f"packed_decode: {tuple(x.shape)} {x.dtype} with values {tuple(values.shape)} {values.dtype}: "
            f"bfloat16, at most {TOKENS} tokens, and inputs a multiple of {INPUTS}"
        )
    y = x.new_empty((tokens, outputs))
    words, half = values.view(torch.int32), inputs // 8
    if tokens == 1:
        rows = 4 if outputs * inputs <= 2**25 else 8
        _one_token[(triton.cdiv(outputs, rows),)](
            x, words, codes, y, outputs, half, ROWS=rows, GROUPS=256, num_warps=4
        )
    else:
        _some_tokens[(triton.cdiv(outputs, 32),)](
            x, words, codes, y, outputs, half, tokens, ROWS=32, GROUPS=64, TOKENS=16, num_warps=4
        )
    return y
