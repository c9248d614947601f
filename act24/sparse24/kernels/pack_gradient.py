"""Backward: one pass over the incoming gradient and what forward saved, to the 2:4 operands of three
products.

    dZ = f'(h) ∘ dS under the forward's mask      packed along the features, with the forward's metadata
    f(h) and dZ, 2:4 along the tokens on top      packed along the tokens, for the two weight gradients

Bytes an element: 3.125 read (dS and the saved activation), 1.125 written for each of the three, together 6.5.
A thread holds 4 tokens × 8 features, so that a group of four along either side lies within one thread. To
this end every fourth token is loaded into a tensor of its own, four tensors in all, and entries are selected
by comparing these tensors. Only results move between threads, when they are written as rows along the tokens.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

import torch
from torch import Tensor

from act24.compiler import jit, tl, triton
from act24.relu2 import check_function
from act24.sparse24.format.packed import Packed24, empty_packed, pack, unpack
from act24.sparse24.kernels.shared.keys import (
    as_signed,
    by_position,
    complement_field,
    group_bytes,
    load_bits,
    metadata_field,
    metadata_words,
    sort4,
    spread,
    upper,
)
from act24.sparse24.kernels.shared.masked_gradient import masked_gradient, masked_gradient_reference
from act24.sparse24.kernels.shared.registry import operator

#: Tokens and features of a tile.
TOKENS, FEATURES = 64, 64

#: Tiles a program walks along the tokens, the loads of the next one under way while it works.
STEPS, STAGES = 8, 2

#: Most registers a thread may have. With fewer registers more CTAs run at a time, which is worth a handful of
#: spilled registers, but not a few dozen.
REGISTERS, REGISTERS_WITH_DENSE = 128, 168


@jit
def _rotate_left(bits):
    return bits << 1 | bits >> 31


@jit
def _rotate_right(bits):
    return bits >> 1 | bits << 31


@jit
def _fetch(
    inputs,
    features,
    token,
    feature,
    nth: tl.constexpr,
    SLOPE: tl.constexpr,
    PADS: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """All that is read of the nth of every four tokens.

    Returns:
        where in dS the rows begin, dS, the saved activation, its slope, and its metadata: words [tokens / 4,
        features / 2], the same, [.., features / 4] twice, [.., features / 8]. Activation and slope of tokens
        that are not real are zeros, and with them all that comes of these tokens.
    """
    grad, values, metadata, slopes, real = inputs
    rows: tl.constexpr = TOKENS // 4
    pair = tl.arange(0, FEATURES // 2)[None, :]
    group = tl.arange(0, FEATURES // 4)[None, :]
    word = tl.arange(0, FEATURES // 8)[None, :]
    row = (tl.arange(0, rows) * 4 + nth)[:, None]
    # T·F may pass 2^31: one 64-bit number does for the tile.
    slab = token.to(tl.int64) // 64 * (2 * features) + feature * 2
    field = metadata_field(row, word * 8, features)
    start = token.to(tl.int64) * (features // 4) + feature // 4
    half_row = start * 2 + (row * (features // 2) + pair)
    quarter_row = start + (row * (features // 4) + group)
    pairs = load_bits(grad + half_row)
    both = load_bits(values + quarter_row)
    fields = load_bits(metadata + slab + tl.max_contiguous(field // 8, (1, 2)))
    slope = load_bits(slopes + quarter_row) if SLOPE else both
    if PADS:
        is_real = tl.load(real + token + row)
        both = tl.where(is_real, both, both & 0)
        slope = tl.where(is_real, slope, slope & 0)
    fields >>= (field % 8 * 4).to(tl.uint32)
    return half_row, pairs, both, slope, fields


@jit
def _masked_keys(grad_values, fetched, nth: tl.constexpr, FUNCTION: tl.constexpr, SLOPE: tl.constexpr):
    """Store dZ of the nth of every four tokens.

    Returns:
        keys of f(h), and keys of |dZ|, for the four features of every group: four words [rows, groups] each.
        A key of |dZ| has its magnitude in the 15 upper bits, and its sign below the position.
    """
    half_row, pairs, both, slope, fields = fetched
    fields = tl.reshape(tl.join(fields, fields >> 16), both.shape)
    low = fields & 3
    high = fields & 12
    both &= 0x7FFF7FFF  # a -0 would sort above everything
    masked = masked_gradient(pairs, both, slope, low, high, FUNCTION, SLOPE)
    first, second = tl.split(masked.to(tl.uint16, bitcast=True))
    first = _rotate_left(first.to(tl.uint32) << 16)
    second = _rotate_left(second.to(tl.uint32) << 16)
    value_keys = spread(low, high, both << 16, upper(both), 3 - nth)
    grad_keys = spread(low, high, first, second, 6 - 2 * nth)
    tl.store(grad_values + half_row, tl.reshape(masked, pairs.shape))
    return value_keys, grad_keys


@jit
def _pair(keys, ROTATED: tl.constexpr):
    """The two largest of four keys: their values in one word, and their metadata (inverted)."""
    larger, smaller, _, _ = sort4(*keys)
    if ROTATED:
        larger = _rotate_right(larger)
        smaller = _rotate_right(smaller)
    first, second = by_position(larger, smaller)
    return first >> 16 | upper(second), complement_field(first, second)


@jit
def _of_feature(by_token, nth: tl.constexpr):
    """What four tokens have of the nth feature of every group."""
    return [of_token[nth] for of_token in by_token]


@jit
def _select(keys, ROTATED: tl.constexpr):
    """Of the keys of four tokens the two largest in each of the four features of every group: the pairs of
    values by feature, and their metadata by feature."""
    pairs = [_pair(_of_feature(keys, nth), ROTATED) for nth in (0, 1, 2, 3)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


@jit
def _along_tokens(by_feature, rows: tl.constexpr, FEATURES: tl.constexpr):
    """Four tensors [tokens / 4, features / 4], one for each feature of a group, as [features, tokens / 4]."""
    x0, x1, x2, x3 = by_feature
    return tl.trans(tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [rows, FEATURES]))


@jit
def _field_bytes(value_fields, grad_fields, rows: tl.constexpr, FEATURES: tl.constexpr):
    """The metadata of both matrices along the tokens, as `group_bytes` has it: one byte a group holds both
    fields on the way to where the eight groups of a word meet."""
    both = [value_fields[nth] + grad_fields[nth] * 16 for nth in (0, 1, 2, 3)]
    return group_bytes(_along_tokens(both, rows, FEATURES).to(tl.uint8))


@jit
def _store_dense(dense, places, target, tokens, values, grads, rows: tl.constexpr, FEATURES: tl.constexpr):
    """Of one feature of every group the four tokens, in rows of their own where the feature stays dense.

    Few do, so the work hangs on a branch for 8 features at a time: those of the even groups, then of the odd
    ones, as a thread has them. Transposed, since that is the layout that Triton picks for such a store by
    itself; any other would carry all the data through shared memory first.
    """
    value_dense, grad_dense = dense
    grads = [_rotate_right(grad) for grad in grads]
    words = (
        values[0] >> 16 | upper(values[1]),
        values[2] >> 16 | upper(values[3]),
        grads[0] >> 16 | upper(grads[1]),
        grads[2] >> 16 | upper(grads[3]),
    )
    split = [tl.split(tl.reshape(word, [rows, FEATURES // 8, 2])) for word in words]
    for odd in tl.static_range(2):
        place = tl.load(places + odd * 4 + tl.arange(0, FEATURES // 8)[:, None] * 8)
        if tl.max(place) >= 0:
            row = place.to(tl.int64) * (tokens // 2) + target
            tl.store(value_dense + row, as_signed(tl.trans(split[0][odd])), mask=place >= 0)
            tl.store(value_dense + row + 1, as_signed(tl.trans(split[1][odd])), mask=place >= 0)
            tl.store(grad_dense + row, as_signed(tl.trans(split[2][odd])), mask=place >= 0)
            tl.store(grad_dense + row + 1, as_signed(tl.trans(split[3][odd])), mask=place >= 0)


@jit
def _pack_gradient(
    grad,
    values,
    metadata,
    slopes,
    real,
    places,
    grad_values,
    grad_metadata,
    value_rows,
    value_row_metadata,
    grad_rows,
    grad_row_metadata,
    value_dense,
    grad_dense,
    tokens,
    features,
    FUNCTION: tl.constexpr,
    SLOPE: tl.constexpr,
    PADS: tl.constexpr,
    DENSE: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    rows: tl.constexpr = TOKENS // 4
    feature = tl.program_id(0) * FEATURES
    first_tile = tl.program_id(1) * STEPS
    inputs = (grad, values, metadata, slopes, real)
    for step in tl.range(0, tl.minimum(STEPS, tokens // TOKENS - first_tile), num_stages=STAGES):
        token = (first_tile + step) * TOKENS
        # All loads come first: the compiler moves none of them over a store.
        fetched = [
            _fetch(inputs, features, token, feature, nth, SLOPE, PADS, TOKENS, FEATURES)
            for nth in (0, 1, 2, 3)
        ]
        keys = [_masked_keys(grad_values, fetched[nth], nth, FUNCTION, SLOPE) for nth in (0, 1, 2, 3)]
        value_keys = [of_token[0] for of_token in keys]
        grad_keys = [of_token[1] for of_token in keys]

        if DENSE:
            target = token // 2 + tl.arange(0, rows)[None, :] * 2
            for nth in tl.static_range(4):
                _store_dense(
                    (value_dense, grad_dense),
                    places + feature + nth,
                    target,
                    tokens,
                    _of_feature(value_keys, nth),
                    _of_feature(grad_keys, nth),
                    rows,
                    FEATURES,
                )

        start = feature.to(tl.int64) * (tokens // 4) + token // 4
        tile = tl.arange(0, FEATURES)[:, None] * (tokens // 4) + tl.arange(0, rows)[None, :]
        words, value_fields = _select(value_keys, False)
        tl.store(value_rows + start + tile, as_signed(_along_tokens(words, rows, FEATURES)))
        words, grad_fields = _select(grad_keys, True)
        tl.store(grad_rows + start + tile, as_signed(_along_tokens(words, rows, FEATURES)))

        near, far = _field_bytes(value_fields, grad_fields, rows, FEATURES)
        value_words = tl.reshape(metadata_words(near, far), [rows // 8, FEATURES])
        grad_words = tl.reshape(metadata_words(near >> 4, far >> 4), [rows // 8, FEATURES])
        slab = feature.to(tl.int64) * (tokens // 32) + token * 2
        place = slab + tl.arange(0, TOKENS // 32)[:, None] * 64 + tl.arange(0, FEATURES)[None, :]
        tl.store(value_row_metadata + place, as_signed(value_words))
        tl.store(grad_row_metadata + place, as_signed(grad_words))

        # Along the features dZ lies where the activation does.
        slab = token.to(tl.int64) * (features // 32) + feature * 2
        words = tl.arange(0, TOKENS // 64)[:, None] * (2 * features) + tl.arange(0, FEATURES * 2)[None, :]
        tl.store(grad_metadata + slab + words, tl.load(metadata + slab + words))


def _reference(
    grad: Tensor,
    saved: Tensor,
    slope: Tensor | None,
    real: Tensor | None,
    index: Tensor | None,
    function: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    value = Packed24(saved)
    grad = grad if real is None else torch.where(real[:, None], grad, 0)
    masked = masked_gradient_reference(grad, value, slope, function)
    rows = []
    for matrix in (unpack(value), unpack(masked)):
        matrix = matrix if real is None else torch.where(real[:, None], matrix, 0)
        rows.append(matrix.T.contiguous())
    chosen = grad.new_empty(0, dtype=torch.int64) if index is None else index
    return masked.buffer, pack(rows[0]).buffer, pack(rows[1]).buffer, rows[0][chosen], rows[1][chosen]


def _fake(
    grad: Tensor,
    saved: Tensor,
    slope: Tensor | None,
    real: Tensor | None,
    index: Tensor | None,
    function: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, features = grad.shape
    dense = (0 if index is None else index.shape[0], tokens)
    return (
        torch.empty_like(saved),
        empty_packed(features, tokens, grad),
        empty_packed(features, tokens, grad),
        grad.new_empty(dense),
        grad.new_empty(dense),
    )


@operator(_reference, _fake, ours=("saved", "slope"))
def pack_gradient(
    grad: Tensor,
    saved: Tensor,
    slope: Tensor | None,
    real: Tensor | None,
    index: Tensor | None,
    function: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """From dS and what forward saved to the operands of backward.

    Args:
        grad: dS, bfloat16 `[T, F]`, T and F multiples of 64.
        saved: the buffer of the activation, 2:4 along the features, `[T, F]`.
        slope: bfloat16 `[T, F/2]` at the places of the saved values; None to take it from the activation.
        real: boolean `[T]`, False for tokens to leave out; None for none.
        index: int64 `[n]`, all different, the features that are wanted dense too; None for none.
        function: "relu2" or "relu".

    Returns:
        the buffers of dZ packed along the features, `[T, F]`, and of the activation and dZ packed along the
        tokens, `[F, T]`: the two largest magnitudes of every four tokens; and both as they are in the chosen
        features, bfloat16 `[n, T]`. Tokens that are not real are zeros in all of them.
    """
    check_function(function)
    tokens, features = grad.shape
    outputs = _fake(grad, saved, slope, real, index, function)
    value, grad_packed, value_rows, grad_rows = map(Packed24, (saved, *outputs[:3]))
    unused = words = grad.view(torch.int32)
    places = unused
    if index is not None:  # the row that each feature goes to, -1 for none
        places = torch.full((features,), -1, dtype=torch.int32, device=grad.device)
        places[index] = torch.arange(len(index), dtype=torch.int32, device=grad.device)
    _pack_gradient[(features // FEATURES, triton.cdiv(tokens // TOKENS, STEPS))](
        words,
        value.values.view(torch.int32),
        value.metadata.view(torch.int32),
        unused if slope is None else slope.view(torch.int32),
        unused if real is None else real,
        places,
        grad_packed.values,
        grad_packed.metadata.view(torch.int32),
        value_rows.values.view(torch.int32),
        value_rows.metadata.view(torch.int32),
        grad_rows.values.view(torch.int32),
        grad_rows.metadata.view(torch.int32),
        outputs[3].view(torch.int32),
        outputs[4].view(torch.int32),
        tokens,
        features,
        FUNCTION=function,
        SLOPE=slope is not None,
        PADS=real is not None,
        DENSE=index is not None,
        TOKENS=TOKENS,
        FEATURES=FEATURES,
        STEPS=STEPS,
        STAGES=STAGES,
        num_warps=4,
        maxnreg=REGISTERS if index is None else REGISTERS_WITH_DENSE,
    )
    return outputs
