"""Single features of a packed matrix, each as one row along the tokens: a sample of them for statistics.

Reads whole 32-byte sectors for single features, so it moves nearly all of what it reads from.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

import torch
from torch import Tensor

from act24.compiler import jit, tl, triton
from act24.sparse24.format.packed import Packed24
from act24.sparse24.kernels.shared.keys import load_bits, metadata_field

#: Features and tokens of a tile.
FEATURES, TOKENS = 16, 128


@jit
def _gather_features(
    values,
    metadata,
    index,
    real,
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
    field = metadata_field(row % 64, feature, features)
    words = (row // 64).to(tl.int64) * (2 * features) + field // 8
    named = load_bits(metadata + words, inside) >> (field % 8 * 4).to(tl.uint32)
    first = (named & 3) == feature % 4
    second = (named >> 2 & 3) == feature % 4
    if PADS:
        counts = tl.load(real + token, mask=token < tokens, other=0)[None, :]
        first = first & counts
        second = second & counts
    out = nth.to(tl.int64)[:, None] * tokens + row
    both = load_bits(values + group, inside)
    entry = tl.where(first, both, tl.where(second, both >> 16, both & 0))
    tl.store(rows + out, entry.to(tl.uint16).to(tl.int16, bitcast=True), inside)


def gather_features(packed: Packed24, index: Tensor, real: Tensor | None, rows: Tensor) -> None:
    """Launch the kernel.

    Args:
        packed: `[T, F]`, packed along the features.
        index: int64 `[n]`, the features to take.
        real: boolean `[T]`, False for tokens to set to zero; None for none.
        rows: 16-bit `[n, T]`, unwritten.
    """
    tokens, features = packed.shape
    words = packed.values.view(torch.int32)
    _gather_features[(triton.cdiv(len(index), FEATURES), triton.cdiv(tokens, TOKENS))](
        words,
        packed.metadata.view(torch.int32),
        index,
        words if real is None else real,
        rows.view(torch.int16),
        len(index),
        tokens,
        features,
        PADS=real is not None,
        FEATURES=FEATURES,
        TOKENS=TOKENS,
        num_warps=4,
    )
