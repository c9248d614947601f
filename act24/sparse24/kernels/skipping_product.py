# pyright: reportInvalidTypeForm=false
"""The product of a mostly zero activation with a weight, reading only the rows of features that are active.

For one token up to a few the time is that of reading the weight, and 80 to 93% of a trained relu² activation
are zeros. A program has a split of the features and some columns of the weight. It compacts the
active features of its split, those of any of the tokens, into a list of its own, and adds their rows up.
Neighbouring features belong to different splits, so that clusters of active ones spread evenly. Each split's
sum is written in float32, and the caller adds the splits in a fixed order. So there are no atomics, and the
result is the same bit for bit every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from act24.compiler import jit, tl, triton
from act24.sparse24.kernels.shared.registry import operator

#: Most tokens. Their active features add up, and dense products win long before.
TOKENS = 16

#: What may be done to the activation first.
FUNCTIONS = ("relu2", "relu", "none")

#: Features of a split at most, and how many neighbours go to one: a sector of memory.
LENGTH, NEIGHBOURS = 512, 16

#: By tokens at most: rows and columns of the weight at a time, warps and stages of Triton's; the fastest of
#: some twenty on an H200, at F 16512 and D 4096.
TILES = {1: (32, 512, 8, 3), 16: (32, 256, 4, 3)}


@jit
def _skip(
    hidden,
    weight,
    index,
    value,
    partial,
    features,
    width,
    tokens,
    splits,
    LENGTH: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    TOKENS: tl.constexpr,
    PADDED: tl.constexpr,
    FUNCTION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    block, split = tl.program_id(0), tl.program_id(1)
    nth = tl.arange(0, LENGTH)
    feature = ((nth // NEIGHBOURS) * splits + split) * NEIGHBOURS + nth % NEIGHBOURS
    inside = feature < features
    own = (split * tl.num_programs(0) + block) * LENGTH
    active = tl.zeros([LENGTH], dtype=tl.int32)
    for token in tl.static_range(TOKENS):
        x = tl.load(hidden + token * features + feature, inside & (token < tokens), other=0).to(tl.float32)
        kept = (x != 0) if FUNCTION == "none" else ~(x <= 0)  # NaN is active
        active = active | kept.to(tl.int32)
    place = tl.cumsum(active, 0) - 1
    count = tl.sum(active, 0)
    tl.store(index + own + place, feature, mask=active != 0)
    for token in tl.static_range(TOKENS):
        x = tl.load(hidden + token * features + feature, inside & (token < tokens), other=0).to(tl.float32)
        if FUNCTION != "none":
            x = tl.where(x <= 0, 0.0, x)
        if FUNCTION == "relu2":
            x = x * x
        tl.store(
            value + own * TOKENS + token * LENGTH + place, x.to(value.dtype.element_ty), mask=active != 0
        )
    tl.debug_barrier()  # the list is read by other threads of the program than wrote it

    column = block * COLUMNS + tl.arange(0, COLUMNS)
    real_column = column < width
    row_of = tl.arange(0, ROWS)
    if TOKENS == 1:
        total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for start in range(0, count, ROWS):
            real = start + row_of < count
            row = tl.load(index + own + start + row_of, real, other=0)
            factor = tl.load(value + own + start + row_of, real, other=0).to(tl.float32)
            at = weight + row.to(tl.int64)[:, None] * width + column[None, :]
            tile = tl.load(at, real[:, None] & real_column[None, :], other=0).to(tl.float32)
            total += tile * factor[:, None]
        tl.store(partial + split * width + column, tl.sum(total, 0), real_column)
    else:
        token = tl.arange(0, PADDED)
        sums = tl.zeros([PADDED, COLUMNS], dtype=tl.float32)
        for start in range(0, count, ROWS):
            real = start + row_of < count
            row = tl.load(index + own + start + row_of, real, other=0)
            at = value + own * TOKENS + token[:, None] * LENGTH + (start + row_of)[None, :]
            factor = tl.load(at, (token < TOKENS)[:, None] & real[None, :], other=0)
            at = weight + row.to(tl.int64)[:, None] * width + column[None, :]
            tile = tl.load(at, real[:, None] & real_column[None, :], other=0)
            sums = tl.dot(factor, tile, sums)
        at = partial + (split * tokens + token[:, None]) * width + column[None, :]
        tl.store(at, sums, (token < tokens)[:, None] & real_column[None, :])


def split_number(features: int) -> int:
    """Splits of the features."""
    return -(-features // LENGTH)


def split_of(features: int) -> Tensor:
    """int64 `[F]`: the split of each feature."""
    return torch.arange(features) // NEIGHBOURS % split_number(features)


def _activation(hidden: Tensor, function: str) -> Tensor:
    if function == "none":
        return hidden
    positive = torch.relu(hidden)
    return positive * positive if function == "relu2" else positive


def _reference(hidden: Tensor, weight: Tensor, function: str) -> Tensor:
    value = _activation(hidden, function).float()
    split = split_of(len(weight)).to(weight.device)
    parts = [value[:, split == n] @ weight[split == n].float() for n in range(split_number(len(weight)))]
    return torch.stack(parts)


def _fake(hidden: Tensor, weight: Tensor, function: str) -> Tensor:
    shape = (split_number(len(weight)), hidden.shape[0], weight.shape[1])
    return hidden.new_empty(shape, dtype=torch.float32)


@operator(_reference, _fake)
def skipping_product(hidden: Tensor, weight: Tensor, function: str) -> Tensor:
    """f(h) W, split over the features.

    Args:
        hidden: 16-bit `[T, F]`, T at most `TOKENS`.
        weight: `[F, D]` of the same dtype, a row a feature.
        function: f, "relu2", "relu", or "none" where the activation is given itself. Its values are rounded
            to the dtype of `hidden`.

    Returns:
        float32 `[S, T, D]`, whose sum over S is the product.

    Raises:
        ValueError: more tokens, another function, or a weight that lies otherwise in memory.
    """
    (tokens, features), width = hidden.shape, weight.shape[1]
    if tokens > TOKENS or function not in FUNCTIONS:
        raise ValueError(f"skipping_product: {tokens} tokens, {function!r}: at most {TOKENS}, of {FUNCTIONS}")
    if not (hidden.is_contiguous() and weight.is_contiguous()):
        raise ValueError("skipping_product: activation and weight have to be contiguous")
    partial = hidden.new_empty((split_number(features), tokens, width), dtype=torch.float32)
    launch(hidden, weight, partial, function, *TILES[1 if tokens == 1 else 16])
    return partial


def launch(
    hidden: Tensor,
    weight: Tensor,
    partial: Tensor,
    function: str,
    rows: int,
    columns: int,
    warps: int,
    stages: int,
) -> None:
    """Launch the kernel.

    Args:
        hidden: 16-bit `[T, F]`; weight: `[F, D]`.
        partial: float32 `[S, T, D]`; changed in place.
        rows, columns: of the weight at a time.
        warps, stages: of Triton's.
    """
    (tokens, features), width, splits = hidden.shape, weight.shape[1], len(partial)
    padded, blocks = triton.next_power_of_2(tokens), triton.cdiv(width, columns)
    index = hidden.new_empty((splits, blocks, LENGTH), dtype=torch.int32)
    value = hidden.new_empty((splits, blocks, padded, LENGTH))
    _skip[(blocks, splits)](
        hidden,
        weight,
        index,
        value,
        partial,
        features,
        width,
        tokens,
        splits,
        LENGTH=LENGTH,
        NEIGHBOURS=NEIGHBOURS,
        TOKENS=padded,
        PADDED=max(padded, 16),
        FUNCTION=function,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=warps,
        num_stages=stages,
    )
