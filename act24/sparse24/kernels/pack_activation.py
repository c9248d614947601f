"""Forward: activation, selection and packing along the features in one pass.

Bytes: 2 read and 1.125 written an element (1 more where the slope is kept; 2 instead of 1.125 with the zeros
filled in, for a dense product; none where all that is wanted are counts), and nothing else as wide as F. A
program owns a strip of features and walks down some slabs of 64 tokens, so that the counts of a feature stay
in registers until its end.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

import torch
from torch import Tensor

from act24.compiler import jit, tl, triton
from act24.options import one_of
from act24.relu2 import check_function
from act24.sparse24.format.fp8 import LARGEST, narrowed
from act24.sparse24.format.packed import Packed24, empty_packed, pack, with_values
from act24.sparse24.kernels.shared.e4m3 import e4m3_bits
from act24.sparse24.kernels.shared.keys import (
    as_bits,
    as_float,
    as_signed,
    by_position,
    complement_field,
    load_bits,
    metadata_field,
    one_if_positive,
    round16,
    signed_keys,
    sort4,
    spread,
    upper,
)
from act24.sparse24.kernels.shared.random_draw import draw2, factor_of
from act24.sparse24.kernels.shared.registry import operator
from act24.sparse24.pattern.token_wise import SPARSIFIERS, Sparse24, sparsify_token_wise

#: Features a program owns, and slabs of 64 tokens it walks down at most, loads two slabs ahead.
STRIP, SLABS = 64, 8

#: The methods that the kernel knows.
METHODS = ("naive", "soft_threshold", "mvue")

#: Sums that a program writes: groups with more than two non-zeros, non-zeros dropped, energy, energy dropped.
SUMS = 4


@jit
def _relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@jit
def _activation(hidden, FUNCTION: tl.constexpr):
    """f(h); NaN stays NaN, and no result is -0, which would sort above everything."""
    positive = _relu(hidden)
    return positive * positive if FUNCTION == "relu2" else positive


@jit
def _slope(hidden, FUNCTION: tl.constexpr):
    """f'(h)."""
    return 2 * _relu(hidden) if FUNCTION == "relu2" else tl.where(hidden > 0, 1.0, 0.0)


@jit
def _largest(keys, FUNCTION: tl.constexpr, SOFT: tl.constexpr):
    """The two largest of four, less the third if SOFT.

    Returns:
        two each: keys by position, values and slopes, float32 [rows, groups].
    """
    largest, next_largest, third, _ = sort4(keys[0], keys[1], keys[2], keys[3])
    first, second = by_position(as_bits(largest), as_bits(next_largest))
    x0 = as_float(upper(first))
    x1 = as_float(upper(second))
    value0 = _activation(x0, FUNCTION)
    value1 = _activation(x1, FUNCTION)
    if SOFT:
        threshold = _activation(as_float(upper(as_bits(third))), FUNCTION)
        threshold = round16(threshold, tl.bfloat16)
        value0 = _relu(round16(value0, tl.bfloat16) - threshold)
        value1 = _relu(round16(value1, tl.bfloat16) - threshold)
    return (first, second), (value0, value1), (_slope(x0, FUNCTION), _slope(x1, FUNCTION))


@jit
def _drawn(keys, number, seed, FUNCTION: tl.constexpr):
    """Two of four, drawn; as `_largest`, and the two factors: 1/π, 0 for a key that only fills up."""
    key0, key1, key2, key3 = keys
    a0 = round16(_activation(as_float(upper(as_bits(key0))), FUNCTION), tl.bfloat16)
    a1 = round16(_activation(as_float(upper(as_bits(key1))), FUNCTION), tl.bfloat16)
    a2 = round16(_activation(as_float(upper(as_bits(key2))), FUNCTION), tl.bfloat16)
    a3 = round16(_activation(as_float(upper(as_bits(key3))), FUNCTION), tl.bfloat16)
    chosen, kept, magnitudes = draw2((a0, a1, a2, a3), keys, number, seed)
    first = as_bits(chosen[0])
    second = as_bits(chosen[1])
    factor0 = factor_of(kept[0], magnitudes[0])
    factor1 = factor_of(kept[1], magnitudes[1])
    x0 = as_float(upper(first))
    x1 = as_float(upper(second))
    value0 = round16(_activation(x0, FUNCTION), tl.bfloat16) * factor0
    value1 = round16(_activation(x1, FUNCTION), tl.bfloat16) * factor1
    slopes = (_slope(x0, FUNCTION) * factor0, _slope(x1, FUNCTION) * factor1)
    return (first, second), (value0, value1), slopes, (factor0, factor1)


@jit
def _largest_statistics(keys, FUNCTION: tl.constexpr):
    """Of every group, float32: whether it has more than two non-zeros, how many the two largest leave out,
    the energy, and the energy left out."""
    largest, next_largest, third, smallest = sort4(keys[0], keys[1], keys[2], keys[3])
    a0 = _activation(as_float(largest), FUNCTION)
    a1 = _activation(as_float(next_largest), FUNCTION)
    a2 = _activation(as_float(third), FUNCTION)
    a3 = _activation(as_float(smallest), FUNCTION)
    more = one_if_positive(as_float(third))
    lower = a2 * a2 + a3 * a3
    return more, more + one_if_positive(as_float(smallest)), a0 * a0 + a1 * a1 + lower, lower


@jit
def _drawn_statistics(keys, chosen, factors, gone, total, FUNCTION: tl.constexpr):
    """The second and fourth result of `_largest_statistics` for a draw, from the second and third of
    these."""
    largest, next_largest, _, _ = sort4(keys[0], keys[1], keys[2], keys[3])
    drawn0 = one_if_positive(factors[0])
    drawn1 = one_if_positive(factors[1])
    a0 = _activation(as_float(upper(chosen[0])), FUNCTION) * drawn0
    a1 = _activation(as_float(upper(chosen[1])), FUNCTION) * drawn1
    gone += one_if_positive(as_float(largest)) + one_if_positive(as_float(next_largest))
    return gone - drawn0 - drawn1, total - (a0 * a0 + a1 * a1)


@jit
def _filled(field, pair):
    """Two values of every group in a row of four with zeros: words of two columns, [rows, 2 · groups]."""
    bits0 = as_bits(round16(pair[0], tl.bfloat16))
    bits1 = as_bits(round16(pair[1], tl.bfloat16))
    y0, y1, y2, y3 = spread(field & 3 ^ 3, field & 12 ^ 12, bits0, bits1, 0)
    return as_signed(tl.reshape(tl.join(y0 >> 16 | y1, y2 >> 16 | y3), [field.shape[0], field.shape[1] * 2]))


@jit
def _side_by_side(pair, dtype: tl.constexpr):
    """The two values of every group next to each other, [rows, 2 · groups]."""
    return tl.reshape(tl.join(pair[0], pair[1]), [pair[0].shape[0], pair[0].shape[1] * 2]).to(dtype)


@jit
def _pack_activation(
    hidden,
    values,
    metadata,
    slopes,
    counts,
    sums,
    real,
    order,
    scales,
    seed,
    features,
    slabs,
    FUNCTION: tl.constexpr,
    METHOD: tl.constexpr,
    LARGEST: tl.constexpr,
    STRIP: tl.constexpr,
    SLABS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Pointers that are None stand for what is not wanted, or not there; without `metadata` the values are
    written with their zeros, and with `scales` in e4m3."""
    strip = tl.program_id(0) * STRIP
    pair = tl.arange(0, STRIP // 2)[None, :]
    group = tl.arange(0, STRIP // 4)[None, :]
    # The rows of a slab that hold the low four bits of a metadata byte; those of the high bits are 8 further.
    row = (tl.arange(0, 32) // 8 * 16 + tl.arange(0, 32) % 8)[:, None]
    shift = metadata_field(0, group * 4, features) % 8 * 4
    word = tl.arange(0, STRIP // 16)[None, :]
    place = metadata_field(row, word // 2 * 32 + word % 2 * 8, features) // 8
    if scales is not None:
        shift = group % 2 * 4 + group % 16 // 8 * 16
        place = (tl.arange(0, 32) * 4)[:, None] + word // 4 * 128 + word % 4

    zero = tl.zeros([32, STRIP // 4], tl.float32)
    count0 = zero
    count1 = zero
    count2 = zero
    count3 = zero
    crowded = zero
    dropped = zero
    energy = zero
    lost = zero
    first_slab = tl.program_id(1) * SLABS
    for step in tl.range(0, tl.minimum(SLABS, slabs - first_slab), num_stages=STAGES):
        slab = first_slab + step
        start = slab.to(tl.int64) * 64 * features + strip  # T·F may pass 2^31
        fields = tl.zeros([32, STRIP // 4], tl.uint32)
        # Both loads come first: the compiler moves none of them over a store.
        lower_rows = load_bits(hidden + start // 2 + (row * (features // 2) + pair))
        upper_rows = load_bits(hidden + start // 2 + ((row + 8) * (features // 2) + pair))
        for half in tl.static_range(2):
            rows = row + 8 * half
            bits = lower_rows if half == 0 else upper_rows
            even, odd = tl.split(tl.reshape(bits, [32, STRIP // 4, 2]))
            keys = signed_keys(even, odd)
            if METHOD == "mvue":
                token = slab * 64 + rows
                if order is not None:
                    token = tl.load(order + token)
                number = token.to(tl.uint32) * (features // 4) + strip // 4 + group
                chosen, value, slope, factor = _drawn(keys, number, seed, FUNCTION)
            else:
                chosen, value, slope = _largest(keys, FUNCTION, METHOD == "soft_threshold")
            target = start // 2 + (rows * (features // 2) + pair)
            # The lowest two bits of a key are all that this adds up.
            field = complement_field(chosen[0], chosen[1]) & 15
            if values is not None:
                if metadata is None:
                    tl.store(values + target, _filled(field, value))
                elif scales is not None:
                    over = tl.div_rn(1.0, tl.load(scales + slab * 64 + rows))
                    wide = _side_by_side(value, tl.bfloat16).to(tl.float32)
                    tl.store(values + target, e4m3_bits(wide * over, LARGEST))
                else:
                    tl.store(values + target, _side_by_side(value, values.dtype.element_ty))
            if slopes is not None:
                tl.store(slopes + target, _side_by_side(slope, slopes.dtype.element_ty))
            # 4 bits of a byte in each of two rows; in e4m3 a byte for each.
            fields |= field << (4 * half if scales is None else 8 * half)
            if counts is not None:
                weight = tl.full([32, 1], 1.0, tl.float32)
                if real is not None:
                    weight = tl.load(real + slab * 64 + rows).to(tl.float32)
                count0 += one_if_positive(as_float(keys[0])) * weight
                count1 += one_if_positive(as_float(keys[1])) * weight
                count2 += one_if_positive(as_float(keys[2])) * weight
                count3 += one_if_positive(as_float(keys[3])) * weight
                if sums is not None:
                    more, gone, total, lower = _largest_statistics(keys, FUNCTION)
                    if METHOD == "mvue":
                        gone, lower = _drawn_statistics(keys, chosen, factor, gone, total, FUNCTION)
                    crowded += more * weight
                    dropped += gone * weight
                    energy += total * weight
                    lost += lower * weight
        if metadata is not None:
            # A word: the fields of two rows (8 bits), of groups 16 columns apart, of groups 4 columns apart.
            fields = fields << shift.to(tl.uint32)
            if scales is None:
                words = tl.sum(tl.sum(tl.reshape(fields, [32, STRIP // 32, 2, 2, 2]), 4), 2)
            else:  # of two rows, 32 columns apart, 4 columns apart
                words = tl.sum(tl.sum(tl.reshape(fields, [32, STRIP // 64, 2, 4, 2]), 4), 2)
            words = words ^ 0xFFFFFFFF
            words = tl.reshape(words, [32, STRIP // 16]).to(tl.int32, bitcast=True)
            tile = slab.to(tl.int64) * (2 * features) + strip * 2
            tl.store(metadata + tile + tl.max_contiguous(place, (1, 2)), words)

    if counts is not None:
        count = tl.reshape(tl.join(tl.join(count0, count2), tl.join(count1, count3)), [32, STRIP])
        tl.atomic_add(counts + strip + tl.arange(0, STRIP), tl.sum(count, 0).to(tl.int32), sem="relaxed")
    if sums is not None:
        program = sums + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * 4
        tl.store(program, tl.sum(crowded))
        tl.store(program + 1, tl.sum(dropped))
        tl.store(program + 2, tl.sum(energy))
        tl.store(program + 3, tl.sum(lost))


def activation_counts(positive: Tensor, sparse: Sparse24, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Non-zeros before 2:4 by feature, int32 `[F]`, and float32 `[4]`: groups with more than
    two non-zeros, non-zeros dropped, energy, energy dropped. `positive` is relu(h) `[T, F]`; tokens that are
    not `real`, boolean `[T]`, count nowhere."""
    nonzero = positive > 0 if real is None else (positive > 0) & real[:, None]
    energy = sparse.dense.float().square()
    energy = energy if real is None else torch.where(real[:, None], energy, 0)
    sums = (
        (nonzero.unflatten(-1, (-1, 4)).sum(-1) > 2).sum(),
        (nonzero & ~sparse.mask).sum(),
        energy.sum(),
        torch.where(sparse.mask, 0, energy).sum(),
    )
    return nonzero.sum(0, dtype=torch.int32), torch.stack([s.float() for s in sums])


def _reference(
    hidden: Tensor,
    seed: Tensor | None,
    real: Tensor | None,
    function: str,
    method: str,
    slope: bool,
    dense: bool,
    counts: bool,
    statistics: bool,
    order: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    positive = torch.relu(hidden)
    by_token = positive if order is None else positive[torch.argsort(order)]
    sparse = sparsify_token_wise(by_token, seed, function, SPARSIFIERS[method])  # type: ignore[arg-type]
    sparse = sparse if order is None else Sparse24(*(part[order] for part in sparse))
    packed = pack(sparse.value, sparse.mask)
    if scale is not None:
        packed = with_values(packed, narrowed(packed.values, scale[:, None]))
    number, sums = activation_counts(positive, sparse, real)
    return (
        sparse.value if dense else packed.buffer,
        pack(sparse.slope, sparse.mask).values.clone() if slope else hidden.new_empty(0),
        number if counts else number[:0].clone(),
        sums if statistics else sums[:0].clone(),
    )


def _fake(
    hidden: Tensor,
    seed: Tensor | None,
    real: Tensor | None,
    function: str,
    method: str,
    slope: bool,
    dense: bool,
    counts: bool,
    statistics: bool,
    order: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, features = hidden.shape
    like = hidden if scale is None else hidden.new_empty(0, dtype=torch.float8_e4m3fn)
    return (
        torch.empty_like(hidden) if dense else empty_packed(tokens, features, like),
        hidden.new_empty(tokens, features // 2) if slope else hidden.new_empty(0),
        hidden.new_empty(features if counts else 0, dtype=torch.int32),
        hidden.new_empty(SUMS if statistics else 0, dtype=torch.float32),
    )


@operator(_reference, _fake)
def pack_activation(
    hidden: Tensor,
    seed: Tensor | None,
    real: Tensor | None,
    function: str,
    method: str,
    slope: bool,
    dense: bool,
    counts: bool,
    statistics: bool,
    order: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Activation, selection and packing along the features.

    Args:
        hidden: bfloat16 `[T, F]`, T and F multiples of 64.
        seed: int64 scalar, for mvue.
        real: boolean `[T]`, the tokens that count; None for all.
        function: "relu2" or "relu".
        method: "naive", "soft_threshold" or "mvue".
        slope, counts, statistics: whether to make the second, third and fourth result.
        dense: return the activation with its zeros, not packed.
        order: int64 `[T]`, the token of every row, which is what mvue draws by; None for the row's number.
        scale: float32 `[T]`, over which the rows are packed in e4m3; None to pack them in bfloat16.

    Returns:
        the activation, the buffer of a packed matrix or `[T, F]`; its slope at the kept places, `[T, F/2]`;
        non-zeros before 2:4 by feature, int32 `[F]`; and float32 `[4]`: groups with more than two non-zeros,
        non-zeros dropped, energy, energy dropped. What was not asked for is empty.
    """
    result, slopes, number, _ = _fake(
        hidden, seed, real, function, method, slope, dense, counts or statistics, statistics, order, scale
    )
    number.zero_()
    sums = launch(
        hidden,
        result if dense else Packed24(result),
        slopes if slope else None,
        number if counts or statistics else None,
        statistics,
        seed,
        real,
        function,
        method,
        order,
        scale,
    )
    return result, slopes, number if counts else number[:0].clone(), sums


def launch(
    hidden: Tensor,
    result: Packed24 | Tensor | None,
    slope: Tensor | None,
    counts: Tensor | None,
    statistics: bool,
    seed: Tensor | None,
    real: Tensor | None,
    function: str,
    method: str,
    order: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Launch the kernel for `pack_activation` and `count_activation`: fill `result`, `slope` and `counts`,
    those that are there, and return the sums, float32 `[4]`, or empty without statistics. `counts` begins as
    zeros, and has to be there for statistics."""
    check_function(function)
    if method not in METHODS:
        one_of("pack_activation", "method", method, METHODS)
    tokens, features = hidden.shape
    grid = (features // STRIP, triton.cdiv(tokens // 64, SLABS))
    sums = hidden.new_empty((grid[0] * grid[1], SUMS) if statistics else 0, dtype=torch.float32)
    values = metadata = None
    if isinstance(result, Packed24):
        values, metadata = result.values, result.metadata.view(torch.int32)
        values = values if scale is None else values.view(torch.uint8)
    elif result is not None:
        values = result.view(torch.int32)
    _pack_activation[grid](
        hidden.view(torch.int32),
        values,
        metadata,
        slope,
        counts,
        sums if statistics else None,
        real,
        order,
        scale,
        seed,
        features,
        tokens // 64,
        FUNCTION=function,
        METHOD=method,
        LARGEST=LARGEST,
        STRIP=STRIP,
        SLABS=SLABS,
        STAGES=3,
        num_warps=8,
    )
    return sums.sum(0) if statistics else sums
