"""Single features of a packed matrix, each as one row along the tokens: a sample of them for statistics.

Reads whole 32-byte sectors for single features, so it moves nearly all of what it reads from.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

import torch
from torch import Tensor

from act24.compiler import jit, tl, triton
from act24.sparse24.format.packed import Packed24, unpack
from act24.sparse24.kernels.shared.e4m3 import from_e4m3, metadata_field8
from act24.sparse24.kernels.shared.keys import as_bits, load_bits, metadata_field
from act24.sparse24.kernels.shared.registry import operator

#: Features and tokens of a tile.
FEATURES, TOKENS = 16, 128


@jit
def _gather_features(
    values,
    metadata,
    index,
    real,
    scales,
    rows,
    number,
    tokens,
    features,
    PADS: tl.constexpr,
    FEATURES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    nth = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    inside = (nth < number)[:, None] & (token < tokens)[None, :]
    feature = tl.load(index + nth, mask=nth < number, other=0).to(tl.int32)[:, None]
    row = token[None, :]
    group = row.to(tl.int64) * (features // 4) + feature // 4
    if scales is None:
        field = metadata_field(row % 64, feature, features)
    else:
        field = metadata_field8(row % 64, feature, features)
    words = (row // 64).to(tl.int64) * (2 * features) + field // 8
    named = load_bits(metadata + words, inside) >> (field % 8 * 4).to(tl.uint32)
    first = (named & 3) == feature % 4
    second = (named >> 2 & 3) == feature % 4
    if PADS:
        counts = tl.load(real + token, mask=token < tokens, other=0)[None, :]
        first = first & counts
        second = second & counts
    out = nth.to(tl.int64)[:, None] * tokens + row
    if scales is None:
        both = load_bits(values + group, inside)
        entry = tl.where(first, both, tl.where(second, both >> 16, both & 0))
    else:
        both = tl.load(values + group, inside, other=0).to(tl.uint16, bitcast=True).to(tl.uint32)
        entry = tl.where(first, both & 0xFF, tl.where(second, both >> 8, both & 0))
        scale = tl.load(scales + token, mask=token < tokens, other=0)[None, :]
        entry = as_bits(from_e4m3(entry) * scale) >> 16  # exact, as the scale is a power of two
    tl.store(rows + out, entry.to(tl.uint16).to(tl.int16, bitcast=True), inside)


def _reference(
    packed: Tensor, index: Tensor, real: Tensor | None, tokens: int, scale: Tensor | None = None
) -> Tensor:
    matrix = unpack(Packed24(packed))[:tokens, index]
    if scale is not None:
        matrix = (matrix.float() * scale[:tokens, None]).bfloat16()
    matrix = matrix if real is None else torch.where(real[:tokens, None], matrix, 0)
    return matrix.T.contiguous()


def _fake(
    packed: Tensor, index: Tensor, real: Tensor | None, tokens: int, scale: Tensor | None = None
) -> Tensor:
    dtype = packed.dtype if scale is None else torch.bfloat16
    return packed.new_empty(index.shape[0], tokens, dtype=dtype)


@operator(_reference, _fake, ours=("packed",))
def gather_features(
    packed: Tensor, index: Tensor, real: Tensor | None, tokens: int, scale: Tensor | None = None
) -> Tensor:
    """Some features of the first rows of a packed matrix, each as a row.

    Args:
        packed: the buffer of a matrix `[T, F]`, packed along the features, of 16 bits, or e4m3 with `scale`.
        index: int64 `[n]`, the features to take.
        real: boolean `[T]`, False for tokens to set to zero; None for none.
        tokens: how many of the rows.
        scale: float32 `[T]`, powers of two, which rows in e4m3 are over; None for 16-bit ones.

    Returns:
        16-bit `[n, tokens]`, bfloat16 of what was in e4m3.
    """
    matrix, rows = Packed24(packed), _fake(packed, index, real, tokens, scale)
    features = matrix.shape[1]
    words = matrix.values.view(torch.int32 if scale is None else torch.int16)
    _gather_features[(triton.cdiv(len(index), FEATURES), triton.cdiv(tokens, TOKENS))](
        words,
        matrix.metadata.view(torch.int32),
        index,
        words if real is None else real,
        scale,
        rows.view(torch.int16),
        len(index),
        tokens,
        features,
        PADS=real is not None,
        FEATURES=FEATURES,
        TOKENS=TOKENS,
        num_warps=4,
    )
    return rows
