# pyright: reportInvalidTypeForm=false
"""The product of a mostly zero activation with a weight, reading only the rows of features that are active.

Bound by memory, for one token up to a few: the weight's bytes are the time, and 80 to 93% of a trained relu²
activation are zeros. First the active features are compacted, those of any of the tokens; then programs read
their rows and add them up. Feature f belongs to split f mod S, so that clusters of active features spread
evenly. Each split's sum goes to memory in float32, and whoever reads adds the splits in a fixed order: no
atomics, and the same bits every time.
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

#: Rows of the weight at a time, and columns a program.
ROWS, COLUMNS = 16, 256


@jit
def _compact(
    hidden,
    index,
    value,
    number,
    features,
    length,
    tokens,
    SPLITS: tl.constexpr,
    LENGTH: tl.constexpr,
    TOKENS: tl.constexpr,
    FUNCTION: tl.constexpr,
):
    split = tl.program_id(0)
    feature = tl.arange(0, LENGTH) * SPLITS + split
    inside = feature < features
    active = tl.zeros([LENGTH], dtype=tl.int32)
    for token in tl.static_range(TOKENS):
        x = tl.load(hidden + token * features + feature, inside & (token < tokens), other=0).to(tl.float32)
        kept = (x != 0) if FUNCTION == "none" else ~(x <= 0)  # NaN is active
        active = active | kept.to(tl.int32)
    place = tl.cumsum(active, 0) - 1
    tl.store(index + split * length + place, feature, mask=active != 0)
    tl.store(number + split, tl.sum(active, 0))
    for token in tl.static_range(TOKENS):
        x = tl.load(hidden + token * features + feature, inside & (token < tokens), other=0)
        wide = x.to(tl.float32)
        if FUNCTION != "none":
            wide = tl.where(wide <= 0, 0.0, wide)
        if FUNCTION == "relu2":
            wide = wide * wide
        place_of_value = value + (split * TOKENS + token) * length + place
        tl.store(place_of_value, wide.to(value.dtype.element_ty), mask=active != 0)


@jit
def _add_rows(
    index,
    value,
    number,
    weight,
    partial,
    width,
    length,
    tokens,
    SPLITS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
):
    split = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    count = tl.load(number + split)
    nth = tl.arange(0, ROWS)
    if TOKENS == 1:
        total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for start in range(0, count, ROWS):
            real = start + nth < count
            row = tl.load(index + split * length + start + nth, real, other=0)
            factor = tl.load(value + split * length + start + nth, real, other=0).to(tl.float32)
            place = weight + row.to(tl.int64)[:, None] * width + column[None, :]
            tile = tl.load(place, real[:, None] & inside[None, :], other=0).to(tl.float32)
            total += tile * factor[:, None]
        tl.store(partial + split * width + column, tl.sum(total, 0), inside)
    else:
        token = tl.arange(0, PADDED)
        sums = tl.zeros([PADDED, COLUMNS], dtype=tl.float32)
        for start in range(0, count, ROWS):
            real = start + nth < count
            row = tl.load(index + split * length + start + nth, real, other=0)
            places = value + (split * TOKENS + token[:, None]) * length + (start + nth)[None, :]
            factor = tl.load(places, (token < TOKENS)[:, None] & real[None, :], other=0)
            place = weight + row.to(tl.int64)[:, None] * width + column[None, :]
            tile = tl.load(place, real[:, None] & inside[None, :], other=0)
            sums = tl.dot(factor, tile, sums)
        to = partial + (split * tokens + token[:, None]) * width + column[None, :]
        tl.store(to, sums, (token < tokens)[:, None] & inside[None, :])


def split_number(width: int) -> int:
    """Splits of the features: with `COLUMNS` columns a program, some four programs for each of a GPU's cores,
    and no more partial sums than that takes."""
    columns = -(-width // COLUMNS)
    return max(8, min(64, 1 << max(0, (512 // columns).bit_length() - 1)))


def _activation(hidden: Tensor, function: str) -> Tensor:
    if function == "none":
        return hidden
    positive = torch.relu(hidden)
    return positive * positive if function == "relu2" else positive


def _reference(hidden: Tensor, weight: Tensor, function: str) -> Tensor:
    value = _activation(hidden, function).float()
    splits = split_number(weight.shape[1])
    parts = [value[:, split::splits] @ weight[split::splits].float() for split in range(splits)]
    return torch.stack(parts)


def _fake(hidden: Tensor, weight: Tensor, function: str) -> Tensor:
    shape = (split_number(weight.shape[1]), hidden.shape[0], weight.shape[1])
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
        ValueError: more tokens, or another function.
    """
    (tokens, features), width = hidden.shape, weight.shape[1]
    if tokens > TOKENS or function not in FUNCTIONS:
        raise ValueError(f"skipping_product: {tokens} tokens, {function!r}: at most {TOKENS}, of {FUNCTIONS}")
    splits = split_number(width)
    length = -(-features // splits)
    padded = triton.next_power_of_2(tokens)
    index = hidden.new_empty((splits, length), dtype=torch.int32)
    value = hidden.new_empty((splits, padded, length))
    number = hidden.new_empty(splits, dtype=torch.int32)
    _compact[(splits,)](
        hidden,
        index,
        value,
        number,
        features,
        length,
        tokens,
        SPLITS=splits,
        LENGTH=triton.next_power_of_2(length),
        TOKENS=padded,
        FUNCTION=function,
        num_warps=4,
    )
    partial = hidden.new_empty((splits, tokens, width), dtype=torch.float32)
    _add_rows[(triton.cdiv(width, COLUMNS), splits)](
        index,
        value,
        number,
        weight,
        partial,
        width,
        length,
        tokens,
        SPLITS=splits,
        TOKENS=padded,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        PADDED=max(padded, 16),
        num_warps=4,
    )
    return partial
