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
    filled,
    load_bits,
    metadata_field,
    one_if_positive,
    round16,
    signed_keys,
    sort4,
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
    largest, next_largest, third, _ = sort4(*keys)
    chosen = by_position(as_bits(largest), as_bits(next_largest))
    kept = [as_float(upper(key)) for key in chosen]
    values = [_activation(x, FUNCTION) for x in kept]
    if SOFT:
        threshold = _activation(as_float(upper(as_bits(third))), FUNCTION)
        threshold = round16(threshold, tl.bfloat16)
        values = [_relu(round16(value, tl.bfloat16) - threshold) for value in values]
    return chosen, values, [_slope(x, FUNCTION) for x in kept]


@jit
def _drawn(keys, number, seed, FUNCTION: tl.constexpr):
    """Two of four, drawn; as `_largest`, and the two factors: 1/π, 0 for a key that only fills up."""
    magnitudes = [round16(_activation(as_float(upper(as_bits(key))), FUNCTION), tl.bfloat16) for key in keys]
    chosen, kept, magnitudes = draw2(magnitudes, keys, number, seed)
    chosen = [as_bits(key) for key in chosen]
    factors = [factor_of(kept[i], magnitudes[i]) for i in (0, 1)]
    hidden = [as_float(upper(key)) for key in chosen]
    values = [round16(_activation(hidden[i], FUNCTION), tl.bfloat16) * factors[i] for i in (0, 1)]
    return chosen, values, [_slope(hidden[i], FUNCTION) * factors[i] for i in (0, 1)], factors


@jit
def _largest_statistics(keys, FUNCTION: tl.constexpr):
    """Of every group, float32: whether it has more than two non-zeros, how many the two largest leave out,
    the energy, and the energy left out."""
    largest, next_largest, third, smallest = [as_float(key) for key in sort4(*keys)]
    a0 = _activation(largest, FUNCTION)
    a1 = _activation(next_largest, FUNCTION)
    a2 = _activation(third, FUNCTION)
    a3 = _activation(smallest, FUNCTION)
    more = one_if_positive(third)
    lower = a2 * a2 + a3 * a3
    return more, more + one_if_positive(smallest), a0 * a0 + a1 * a1 + lower, lower


@jit
def _drawn_statistics(keys, chosen, factors, FUNCTION: tl.constexpr):
    """`_largest_statistics` with what a draw leaves out in the place of what the two largest do."""
    more, gone, energy, _ = _largest_statistics(keys, FUNCTION)
    largest, next_largest, _, _ = sort4(*keys)
    drawn0, drawn1 = [one_if_positive(factor) for factor in factors]
    a0 = _activation(as_float(upper(chosen[0])), FUNCTION) * drawn0
    a1 = _activation(as_float(upper(chosen[1])), FUNCTION) * drawn1
    gone += one_if_positive(as_float(largest)) + one_if_positive(as_float(next_largest))
    return more, gone - drawn0 - drawn1, energy, energy - (a0 * a0 + a1 * a1)


@jit
def _added(totals, of_tile, weight):
    """Four running totals, with what a tile adds to each."""
    return [totals[i] + of_tile[i] * weight for i in (0, 1, 2, 3)]


@jit
def _side_by_side(pair, dtype: tl.constexpr):
    """The two values of every group next to each other, [rows, 2 · groups]."""
    return tl.reshape(tl.join(pair[0], pair[1]), [pair[0].shape[0], pair[0].shape[1] * 2]).to(dtype)


@jit
def _store_values(values, metadata, scales, target, token, field, pair, LARGEST: tl.constexpr):
    """The two values of every group at `target`: with their zeros where there is no metadata, over the scales
    of their tokens in e4m3 where there are scales."""
    if metadata is None:
        bits0, bits1 = [as_bits(round16(value, tl.bfloat16)) for value in pair]
        tl.store(values + target, filled(field & 3 ^ 3, field & 12 ^ 12, bits0, bits1))
    elif scales is not None:
        over = tl.div_rn(1.0, tl.load(scales + token))
        wide = _side_by_side(pair, tl.bfloat16).to(tl.float32)
        tl.store(values + target, e4m3_bits(wide * over, LARGEST))
    else:
        tl.store(values + target, _side_by_side(pair, values.dtype.element_ty))


@jit
def _metadata_places(row, features, WIDE: tl.constexpr, STRIP: tl.constexpr):
    """Where the metadata of values goes that are WIDE (16 bits) or in e4m3: by how much the fields of a group
    are shifted in their word, and the place of the words in a slab."""
    group = tl.arange(0, STRIP // 4)[None, :]
    word = tl.arange(0, STRIP // 16)[None, :]
    if WIDE:
        shift = metadata_field(0, group * 4, features) % 8 * 4
        place = metadata_field(row, word // 2 * 32 + word % 2 * 8, features) // 8
    else:
        shift = group % 2 * 4 + group % 16 // 8 * 16
        place = (tl.arange(0, 32) * 4)[:, None] + word // 4 * 128 + word % 4
    return shift, place


@jit
def _metadata_words(fields, WIDE: tl.constexpr, STRIP: tl.constexpr):
    """Words of shifted fields, int32 [32, strip / 16]: a word holds those of two rows (8 bits), and of groups
    16 and 4 columns apart where values are WIDE, 32 and 4 columns apart in e4m3."""
    if WIDE:
        words = tl.sum(tl.sum(tl.reshape(fields, [32, STRIP // 32, 2, 2, 2]), 4), 2)
    else:
        words = tl.sum(tl.sum(tl.reshape(fields, [32, STRIP // 64, 2, 4, 2]), 4), 2)
    words = words ^ 0xFFFFFFFF
    return as_signed(tl.reshape(words, [32, STRIP // 16]))


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
    # The rows of a slab that hold the low four bits of a metadata byte; those of the high bits are 8 further.
    row = (tl.arange(0, 32) // 8 * 16 + tl.arange(0, 32) % 8)[:, None]
    shift, place = _metadata_places(row, features, scales is None, STRIP)

    zero = tl.zeros([32, STRIP // 4], tl.float32)
    counted = (zero, zero, zero, zero)
    summed = (zero, zero, zero, zero)
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
            token = slab * 64 + rows
            bits = lower_rows if half == 0 else upper_rows
            keys = signed_keys(*tl.split(tl.reshape(bits, [32, STRIP // 4, 2])))
            if METHOD == "mvue":
                drawn_by = token if order is None else tl.load(order + token)
                group = tl.arange(0, STRIP // 4)[None, :]
                number = drawn_by.to(tl.uint32) * (features // 4) + strip // 4 + group
                chosen, value, slope, factors = _drawn(keys, number, seed, FUNCTION)
            else:
                chosen, value, slope = _largest(keys, FUNCTION, METHOD == "soft_threshold")
            target = start // 2 + (rows * (features // 2) + pair)
            # The lowest two bits of a key are all that this adds up.
            field = complement_field(*chosen) & 15
            if values is not None:
                _store_values(values, metadata, scales, target, token, field, value, LARGEST)
            if slopes is not None:
                tl.store(slopes + target, _side_by_side(slope, slopes.dtype.element_ty))
            # 4 bits of a byte in each of two rows; in e4m3 a byte for each.
            fields |= field << (4 * half if scales is None else 8 * half)
            if counts is not None:
                weight = tl.full([32, 1], 1.0, tl.float32)
                if real is not None:
                    weight = tl.load(real + token).to(tl.float32)
                counted = _added(counted, [one_if_positive(as_float(key)) for key in keys], weight)
                if sums is not None:
                    if METHOD == "mvue":
                        of_tile = _drawn_statistics(keys, chosen, factors, FUNCTION)
                    else:
                        of_tile = _largest_statistics(keys, FUNCTION)
                    summed = _added(summed, of_tile, weight)
        if metadata is not None:
            words = _metadata_words(fields << shift.to(tl.uint32), scales is None, STRIP)
            tile = slab.to(tl.int64) * (2 * features) + strip * 2
            tl.store(metadata + tile + tl.max_contiguous(place, (1, 2)), words)

    if counts is not None:
        even, odd = tl.join(counted[0], counted[2]), tl.join(counted[1], counted[3])
        count = tl.sum(tl.reshape(tl.join(even, odd), [32, STRIP]), 0)
        tl.atomic_add(counts + strip + tl.arange(0, STRIP), count.to(tl.int32), sem="relaxed")
    if sums is not None:
        program = sums + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * 4
        for nth in tl.static_range(4):
            tl.store(program + nth, tl.sum(summed[nth]))


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
