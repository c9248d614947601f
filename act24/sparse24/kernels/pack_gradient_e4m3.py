"""Backward in e4m3: `act24.sparse24.kernels.pack_gradient` from an activation that was saved in e4m3, with
all that it writes in e4m3.

Entries are selected in bfloat16: the saved activation has scales that are powers of two, so it is exact in
bfloat16.
Bytes an element: 2.625 read, 0.625 written for each of the three, together 4.5. Without 2:4 along the tokens
both matrices are written as they are, transposed: 2.625 read, 2.625 written.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

import torch
from torch import Tensor

from act24.compiler import jit, tl, triton
from act24.relu2 import check_function
from act24.sparse24.format.fp8 import LARGEST, narrowed
from act24.sparse24.format.packed import Packed24, empty_packed, with_values
from act24.sparse24.kernels import pack_gradient  # noqa: F401  (the reference of what this narrows)
from act24.sparse24.kernels.pack_gradient import (
    _along_tokens,
    _field_bytes,
    _of_feature,
    _rotate_left,
    _rotate_right,
    _select,
)
from act24.sparse24.kernels.shared.e4m3 import e4m3_bits, from_e4m3, metadata_field8, metadata_words8
from act24.sparse24.kernels.shared.keys import (
    as_bits,
    as_float,
    as_signed,
    load_bits,
    spread,
    upper,
)
from act24.sparse24.kernels.shared.masked_gradient import masked_gradient
from act24.sparse24.kernels.shared.registry import OPERATORS, operator

#: Tokens and features of a tile, which is that of the metadata.
TOKENS, FEATURES = 64, 64

#: Tiles a program walks along the tokens, the loads of the next one under way while it works.
STEPS, STAGES = 8, 2

#: Most registers a thread may have. For 16384×16384 on an H200 0.72 ms, and 0.94 with 819 dense features; the
#: other way round 0.80 and 1.13.
REGISTERS, REGISTERS_WITH_DENSE = 168, 255


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
        where packed rows begin, in words; dS, words [tokens / 4, features / 2]; the saved activation, words
        of two groups [.., features / 8]; its slope, words [.., features / 4]; its metadata, that of two
        groups in the low bits of words [.., features / 8]; the factors of the rows [.., 1], of what was saved
        and of what is written. Activation and slope of tokens that are not real are zeros.
    """
    grad, values, metadata, scales, slopes, real, grad_scales = inputs
    rows: tl.constexpr = TOKENS // 4
    pair = tl.arange(0, FEATURES // 2)[None, :]
    group = tl.arange(0, FEATURES // 4)[None, :]
    word = tl.arange(0, FEATURES // 8)[None, :]
    row = (tl.arange(0, rows) * 4 + nth)[:, None]
    start = token.to(tl.int64) * (features // 4) + feature // 4
    half_row = start * 2 + (row * (features // 2) + pair)
    quarter_row = start + (row * (features // 4) + group)
    packed_row = token.to(tl.int64) * (features // 8) + feature // 8 + (row * (features // 8) + word)
    tile = token.to(tl.int64) * (features // 32) + feature * 2
    byte = metadata_field8(row, word * 8, FEATURES) // 2
    pairs = load_bits(grad + half_row)
    both = load_bits(values + packed_row)
    fields = load_bits(metadata + tile + byte // 4) >> (byte % 4 * 8).to(tl.uint32)
    slope = load_bits(slopes + quarter_row) if SLOPE else both
    scale = tl.load(scales + token + row)
    grad_scale = tl.load(grad_scales + token + row)
    if PADS:
        is_real = tl.load(real + token + row)
        both = tl.where(is_real, both, both & 0)
        slope = tl.where(is_real, slope, slope & 0)
        scale = tl.where(is_real, scale, 1.0)
    return packed_row, pairs, both, slope, fields, scale, grad_scale


@jit
def _masked_keys(
    grad_values,
    fetched,
    nth: tl.constexpr,
    FUNCTION: tl.constexpr,
    SLOPE: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Store dZ of the nth of every four tokens; keys as `pack_gradient._masked_keys` has them."""
    packed_row, pairs, narrow, slope, fields, scale, grad_scale = fetched
    groups: tl.constexpr = [pairs.shape[0], pairs.shape[1] // 2]
    fields = tl.reshape(tl.join(fields, fields >> 4), groups)
    narrow = tl.reshape(tl.join(narrow, narrow >> 16), groups)
    low = fields & 3
    high = fields & 12
    # Exact in bfloat16; a -0 would sort above everything.
    first = as_bits(from_e4m3(narrow & 0xFF) * scale) & 0x7FFFFFFF
    second = as_bits(from_e4m3(narrow >> 8 & 0xFF) * scale) & 0x7FFFFFFF
    both = first >> 16 | upper(second)
    masked = masked_gradient(pairs, both, slope if SLOPE else both, low, high, FUNCTION, SLOPE)
    grad0, grad1 = tl.split(masked.to(tl.uint16, bitcast=True))
    grad0 = grad0.to(tl.uint32) << 16
    grad1 = grad1.to(tl.uint32) << 16
    written = _narrow_pair(grad0 >> 16 | grad1, tl.div_rn(1.0, grad_scale), LARGEST)
    even, odd = tl.split(tl.reshape(written, [pairs.shape[0], pairs.shape[1] // 4, 2]))
    tl.store(grad_values + packed_row, as_signed(even | odd << 16))
    grad0 = _rotate_left(grad0)
    grad1 = _rotate_left(grad1)
    value_keys = spread(low, high, both << 16, upper(both), 3 - nth)
    grad_keys = spread(low, high, grad0, grad1, 6 - 2 * nth)
    return value_keys, grad_keys


@jit
def _store_selected(
    target,
    factors,
    keys,
    ROTATED: tl.constexpr,
    LARGEST: tl.constexpr,
    rows: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Of the keys of four tokens store the two largest in each feature, in e4m3; their metadata by
    feature."""
    words, fields = _select(keys, ROTATED)
    words = [_narrow_pair(words[nth], factors[nth], LARGEST) for nth in (0, 1, 2, 3)]
    # In words on their way across threads, as `pack_gradient` has them: in 16 bits some came out wrong on an
    # H200 under Triton 3.6.
    even, odd = tl.split(tl.reshape(_along_tokens(words, rows, FEATURES), [FEATURES, rows // 2, 2]))
    tl.store(target, as_signed(even | odd << 16))
    return fields


@jit
def _narrow_pair(word, factor, LARGEST: tl.constexpr):
    """Two values of bfloat16 in a word as two of e4m3, in its lower half."""
    low = e4m3_bits(as_float(word << 16) * factor, LARGEST).to(tl.uint32)
    return low | e4m3_bits(as_float(upper(word)) * factor, LARGEST).to(tl.uint32) << 8


@jit
def _store_dense(dense, place, target, tokens, factor, keys, ROTATED: tl.constexpr, LARGEST: tl.constexpr):
    """Of one feature of every group the four tokens, a word, in rows of their own where the feature stays
    dense."""
    if ROTATED:
        keys = [_rotate_right(key) for key in keys]
    b0, b1, b2, b3 = [e4m3_bits(as_float(upper(key)) * factor, LARGEST).to(tl.uint32) for key in keys]
    word = b0 | b1 << 8 | b2 << 16 | b3 << 24
    words = place.to(tl.int64)[:, None] * (tokens // 4) + target
    tl.store(dense + words, as_signed(tl.trans(word)), mask=(place >= 0)[:, None])


@jit
def _factors(scales, feature, FEATURES: tl.constexpr):
    """One over the scale of each feature, [1, features / 4] for each of the four of a group."""
    group = feature + tl.arange(0, FEATURES // 4)[None, :] * 4
    return [tl.div_rn(1.0, tl.load(scales + group + nth)) for nth in (0, 1, 2, 3)]


@jit
def _pack_gradient_e4m3(
    grad,
    values,
    metadata,
    scales,
    slopes,
    real,
    places,
    grad_scales,
    value_row_scales,
    grad_row_scales,
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
    SPARSE: tl.constexpr,
    LARGEST: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    rows: tl.constexpr = TOKENS // 4
    feature = tl.program_id(0) * FEATURES
    first_tile = tl.program_id(1) * STEPS
    inputs = (grad, values, metadata, scales, slopes, real, grad_scales)
    value_factors = _factors(value_row_scales, feature, FEATURES)
    grad_factors = _factors(grad_row_scales, feature, FEATURES)
    for step in tl.range(0, tl.minimum(STEPS, tokens // TOKENS - first_tile), num_stages=STAGES):
        token = (first_tile + step) * TOKENS
        # All loads come first: the compiler moves none of them over a store.
        fetched = [
            _fetch(inputs, features, token, feature, nth, SLOPE, PADS, TOKENS, FEATURES)
            for nth in (0, 1, 2, 3)
        ]
        keys = [
            _masked_keys(grad_values, fetched[nth], nth, FUNCTION, SLOPE, LARGEST) for nth in (0, 1, 2, 3)
        ]
        value_keys = [of_token[0] for of_token in keys]
        grad_keys = [of_token[1] for of_token in keys]

        if DENSE:
            target = token // 4 + tl.arange(0, rows)[None, :]
            for nth in tl.static_range(4):
                place = tl.load(places + feature + nth + tl.arange(0, FEATURES // 4) * 4)
                if tl.max(place) >= 0:
                    of_values = _of_feature(value_keys, nth)
                    of_grads = _of_feature(grad_keys, nth)
                    _store_dense(
                        value_dense, place, target, tokens, value_factors[nth], of_values, False, LARGEST
                    )
                    _store_dense(
                        grad_dense, place, target, tokens, grad_factors[nth], of_grads, True, LARGEST
                    )

        if SPARSE:
            start = feature.to(tl.int64) * (tokens // 8) + token // 8
            start += tl.arange(0, FEATURES)[:, None] * (tokens // 8) + tl.arange(0, rows // 2)[None, :]
            value_fields = _store_selected(
                value_rows + start, value_factors, value_keys, False, LARGEST, rows, FEATURES
            )
            grad_fields = _store_selected(
                grad_rows + start, grad_factors, grad_keys, True, LARGEST, rows, FEATURES
            )
            near, far = _field_bytes(value_fields, grad_fields, rows, FEATURES)
            value_words = metadata_words8(near, far)
            grad_words = metadata_words8(near >> 4, far >> 4)
            place = feature.to(tl.int64) * (tokens // 32) + token * 2 + tl.arange(0, FEATURES * 2)
            tl.store(value_row_metadata + place, as_signed(tl.reshape(value_words, [FEATURES * 2])))
            tl.store(grad_row_metadata + place, as_signed(tl.reshape(grad_words, [FEATURES * 2])))

        # Along the features dZ lies where the activation does.
        slab = token.to(tl.int64) * (features // 32) + feature * 2
        words = tl.arange(0, TOKENS * FEATURES // 32)
        tl.store(grad_metadata + slab + words, tl.load(metadata + slab + words))


def _reference(
    grad: Tensor,
    saved: Tensor,
    scale: Tensor,
    slope: Tensor | None,
    real: Tensor | None,
    index: Tensor | None,
    grad_scale: Tensor,
    value_row_scale: Tensor,
    grad_row_scale: Tensor,
    function: str,
    sparse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    matrix = Packed24(saved)
    wide = with_values(matrix, (matrix.values.float() * scale[:, None]).bfloat16()).buffer
    chosen = index if sparse else torch.arange(grad.shape[1], device=grad.device)
    packed, *dense = OPERATORS["pack_gradient"].reference(grad, wide, slope, real, chosen, function)
    value_rows, grad_rows = dense[:2]
    results = [
        with_values(Packed24(each), narrowed(Packed24(each).values, over[:, None])).buffer
        for each, over in ((packed, grad_scale), (value_rows, value_row_scale), (grad_rows, grad_row_scale))
    ]
    for each, over in ((dense[2], value_row_scale), (dense[3], grad_row_scale)):
        over = over[:0] if chosen is None else over[chosen]
        results.append(narrowed(each, over[:, None]))
    empty = saved.new_empty(0)
    return (results[0], *(results[1:3] if sparse else (empty, empty.clone())), *results[3:])  # type: ignore[return-value]


def _fake(
    grad: Tensor,
    saved: Tensor,
    scale: Tensor,
    slope: Tensor | None,
    real: Tensor | None,
    index: Tensor | None,
    grad_scale: Tensor,
    value_row_scale: Tensor,
    grad_row_scale: Tensor,
    function: str,
    sparse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, features = grad.shape
    number = features if not sparse else 0 if index is None else index.shape[0]
    rows = [empty_packed(features, tokens, saved) if sparse else saved.new_empty(0) for _ in range(2)]
    dense = [saved.new_empty(number, tokens) for _ in range(2)]
    return torch.empty_like(saved), rows[0], rows[1], dense[0], dense[1]


@operator(_reference, _fake, ours=("saved", "slope"))
def pack_gradient_e4m3(
    grad: Tensor,
    saved: Tensor,
    scale: Tensor,
    slope: Tensor | None,
    real: Tensor | None,
    index: Tensor | None,
    grad_scale: Tensor,
    value_row_scale: Tensor,
    grad_row_scale: Tensor,
    function: str,
    sparse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """From dS and what forward saved to the operands of backward, in e4m3.

    Args:
        grad: dS, bfloat16 `[T, F]`, T and F multiples of 64.
        saved: the buffer of the activation in e4m3, 2:4 along the features, `[T, F]`.
        scale: float32 `[T]`, powers of two, which it is over.
        slope: bfloat16 `[T, F/2]` at the places of the saved values; None to take it from the activation.
        real: boolean `[T]`, False for tokens to leave out; None for none.
        index: int64 `[n]`, all different, the features that are wanted dense too; None for none.
        grad_scale: float32 `[T]`, over which dZ is written along the features.
        value_row_scale, grad_row_scale: float32 `[F]`, over which the activation and dZ are written along the
            tokens.
        function: "relu2" or "relu".
        sparse: whether the two are wanted 2:4 along the tokens; else all features are dense.

    Returns:
        the buffers of dZ packed along the features, `[T, F]`, and of the activation and dZ packed along the
        tokens, `[F, T]`: the two largest magnitudes of every four tokens, empty without `sparse`; and both as
        they are in the chosen features, `[n, T]`, all of them without `sparse`. Tokens that are not real are
        zeros in all of them.
    """
    check_function(function)
    tokens, features = grad.shape
    arguments = (grad_scale, value_row_scale, grad_row_scale, function, sparse)
    outputs = _fake(grad, saved, scale, slope, real, index, *arguments)
    value, packed = Packed24(saved), Packed24(outputs[0])
    unused = words = grad.view(torch.int32)
    places = unused
    chosen = index if sparse else torch.arange(features, device=grad.device)
    if chosen is not None:  # the row that each feature goes to, -1 for none
        places = torch.full((features,), -1, dtype=torch.int32, device=grad.device)
        places[chosen] = torch.arange(len(chosen), dtype=torch.int32, device=grad.device)
    rows = [unused] * 4
    if sparse:
        matrices = [Packed24(output) for output in outputs[1:3]]
        rows = [part.view(torch.int32) for m in matrices for part in (m.values, m.metadata)]
    _pack_gradient_e4m3[(features // FEATURES, triton.cdiv(tokens // TOKENS, STEPS))](
        words,
        value.values.view(torch.int32),
        value.metadata.view(torch.int32),
        scale,
        unused if slope is None else slope.view(torch.int32),
        unused if real is None else real,
        places,
        grad_scale,
        value_row_scale,
        grad_row_scale,
        packed.values.view(torch.int32),
        packed.metadata.view(torch.int32),
        *rows,
        outputs[3].view(torch.int32),
        outputs[4].view(torch.int32),
        tokens,
        features,
        FUNCTION=function,
        SLOPE=slope is not None,
        PADS=real is not None,
        DENSE=chosen is not None,
        SPARSE=sparse,
        LARGEST=LARGEST,
        TOKENS=TOKENS,
        FEATURES=FEATURES,
        STEPS=STEPS,
        STAGES=STAGES,
        num_warps=4,
        maxnreg=REGISTERS if index is None else REGISTERS_WITH_DENSE,
    )
    return outputs
