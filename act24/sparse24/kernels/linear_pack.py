# pyright: reportInvalidTypeForm=false
"""Forward of a narrow network: relu(x W_inᵀ)² under its 2:4 mask, made inside the product.

Bytes an element of the activation: 2 written, and 1.125 where it is saved for backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from act24.compiler import jit, tl
from act24.relu2 import activation
from act24.sparse24.format.fields import fields_of, kept_entries, to_bytes
from act24.sparse24.kernels.shared.keys import (
    as_bits,
    as_float,
    by_position,
    complement_field,
    signed_keys,
    sort4,
    upper,
)
from act24.sparse24.kernels.shared.registry import operator
from act24.sparse24.kernels.shared.tiled_product import (
    COLUMNS,
    GROUP,
    INNER,
    ROWS,
    field_places,
    interleave,
    kept_value,
    tiles,
    which_tile,
    word_product,
)
from act24.sparse24.pattern.selection import top2_of_4


@jit
def _linear_pack(
    x,
    weight,
    dense,
    values,
    fields,
    tokens,
    features,
    WIDTH: tl.constexpr,
    SAVE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    down, across = which_tile(tokens // ROWS, features // COLUMNS, GROUP)
    row, column = down * ROWS, across * COLUMNS
    even, odd = word_product(x, weight, row, column, features, WIDTH, True, ROWS, COLUMNS, INNER)
    key0, key1, key2, key3 = signed_keys(even, odd)
    largest, next_largest, _, _ = sort4(key0, key1, key2, key3)
    start = row.to(tl.int64) * features + column  # T·F may pass 2^31
    rows = tl.arange(0, ROWS)[:, None]
    x0 = kept_value(key0, next_largest)
    x1 = kept_value(key1, next_largest)
    x2 = kept_value(key2, next_largest)
    x3 = kept_value(key3, next_largest)
    value = interleave(x0 * x0, x1 * x1, x2 * x2, x3 * x3, ROWS, COLUMNS)
    target = rows * features + tl.arange(0, COLUMNS)[None, :]
    tl.store(dense + start + target, value.to(tl.bfloat16))
    if SAVE:
        first, second = by_position(as_bits(largest), as_bits(next_largest))
        x0 = tl.maximum(as_float(upper(first)), 0.0, propagate_nan=tl.PropagateNan.ALL)
        x1 = tl.maximum(as_float(upper(second)), 0.0, propagate_nan=tl.PropagateNan.ALL)
        value = tl.reshape(tl.join(x0 * x0, x1 * x1), [ROWS, COLUMNS // 2])
        target = rows * (features // 2) + tl.arange(0, COLUMNS // 2)[None, :]
        # Said to be contiguous by four only: the columns that a thread has of the dense store.
        tl.store(values + start // 2 + tl.max_contiguous(target, (1, 4)), value.to(tl.bfloat16))
        field = complement_field(first, second) & 15
        low, high = tl.split(tl.reshape(field, [ROWS, COLUMNS // 8, 2]))
        byte = tl.trans((low | high << 4).to(tl.uint8))
        tl.store(fields + start // 8 + field_places(features, ROWS, COLUMNS), byte)


def _reference(x: Tensor, weight: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    positive = torch.relu(x @ weight.T)
    mask = top2_of_4(positive)
    value = torch.where(mask, activation(positive, "relu2"), 0)
    if not save:
        return value, x.new_empty(0), x.new_empty(0, dtype=torch.uint8)
    fields = fields_of(mask)
    return value, kept_entries(value, fields), to_bytes(15 - fields)


def _fake(x: Tensor, weight: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    tokens, features = x.shape[0], weight.shape[0]
    return (
        x.new_empty(tokens, features),
        x.new_empty((tokens, features // 2) if save else 0),
        x.new_empty((tokens, features // 8) if save else 0, dtype=torch.uint8),
    )


@operator(_reference, _fake)
def linear_pack(x: Tensor, weight: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """relu(x Wᵀ)² under its 2:4 mask.

    Args:
        x: bfloat16 `[T, D]`, T a multiple of 128, D of 64.
        weight: W, `[F, D]`, F a multiple of 128.
        save: make the second and third result, which backward reads.

    Returns:
        the activation with its zeros, `[T, F]`; the two kept values of each group, `[T, F/2]`; and their
        places, uint8 `[T, F/8]`, a byte for two groups, 15 less `i | j << 2` for each. Empty what is not
        saved.
    """
    tokens, features = x.shape[0], weight.shape[0]
    outputs = _fake(x, weight, save)
    _linear_pack[tiles(tokens, features, ROWS)](
        x,
        weight,
        *outputs,
        tokens,
        features,
        WIDTH=x.shape[1],
        SAVE=save,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        INNER=INNER,
        GROUP=GROUP,
        num_warps=8,
        num_stages=3,
    )
    return outputs
