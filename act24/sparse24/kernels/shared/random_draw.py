"""The draw of two of four, inside a kernel: `act24.sparse24.pattern.mvue` and
`act24.sparse24.pattern.random_bits`, step by step and rounding by rounding, so that both draw the same from
the same seed."""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

from act24.compiler import jit, tl
from act24.sparse24.kernels.shared.keys import as_bits, by_position


@jit
def _mix(h):
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@jit
def random_uniform(index, seed):
    """float32 in [0, 1) for every uint32 index; `seed` points to an int64."""
    bits = tl.load(seed)
    low = (bits & 0xFFFFFFFF).to(tl.uint32)
    high = (bits >> 32 & 0xFFFFFFFF).to(tl.uint32)
    return (_mix(_mix(index ^ low) ^ high) >> 8).to(tl.float32) * 5.9604644775390625e-08


@jit
def _taken(start, end, u):
    return ((start <= u) & (u < end)) | ((start <= u + 1) & (u + 1 < end))


@jit
def draw2(a0, a1, a2, a3, key0, key1, key2, key3, number, seed):
    """Two of four magnitudes, drawn by the minimum-variance unbiased estimator.

    Args:
        a0, a1, a2, a3: magnitudes, float32.
        key0, key1, key2, key3: the keys at the same positions.
        number: of the group, uint32; seed: pointer to an int64.

    Returns:
        the keys that were drawn, by position, and 1/π of each, 0 for a key that only fills up.
    """
    largest = tl.maximum(tl.maximum(a0, a1), tl.maximum(a2, a3))
    unit = tl.where(largest > 0, largest, 1.0)
    # The first of the largest entries, as `Tensor.max` has it on a CPU.
    is0 = a0 == largest
    is1 = (a1 == largest) & (a0 != largest)
    is2 = (a2 == largest) & (a0 != largest) & (a1 != largest)
    is3 = (a0 != largest) & (a1 != largest) & (a2 != largest)
    a0 = tl.div_rn(a0, unit)
    a1 = tl.div_rn(a1, unit)
    a2 = tl.div_rn(a2, unit)
    a3 = tl.div_rn(a3, unit)
    other0 = tl.where(is0, 0.0, a0)
    other1 = tl.where(is1, 0.0, a1)
    other2 = tl.where(is2, 0.0, a2)
    other3 = tl.where(is3, 0.0, a3)
    rest = other0 + other1 + other2 + other3
    dominated = rest < 1
    # One entry outweighs the others: it is certain, and they share one draw instead of two.
    single = dominated & (largest > 0)
    # Divisions are what this costs: one for either case, with what is divided by chosen before.
    whole = tl.where(dominated, tl.where(rest > 0, rest, 1.0), 1 + rest)
    p0 = _probability(tl.where(dominated, other0, 2 * a0), whole, is0 & single)
    p1 = _probability(tl.where(dominated, other1, 2 * a1), whole, is1 & single)
    p2 = _probability(tl.where(dominated, other2, 2 * a2), whole, is2 & single)
    p3 = _probability(tl.where(dominated, other3, 2 * a3), whole, is3 & single)
    end0 = tl.where(is0 & single, 0.0, p0)
    end1 = end0 + tl.where(is1 & single, 0.0, p1)
    end2 = end1 + tl.where(is2 & single, 0.0, p2)
    end3 = end2 + tl.where(is3 & single, 0.0, p3)
    total = tl.where(single, 1.0, 2.0)
    end0, end1, end2 = (
        tl.where(end0 >= end3, total, end0),
        tl.where(end1 >= end3, total, end1),
        tl.where(end2 >= end3, total, end2),
    )
    u = random_uniform(number, seed)
    taken0 = (_taken(0.0, end0, u) | (is0 & single)) & (p0 > 0)
    taken1 = (_taken(end0, end1, u) | (is1 & single)) & (p1 > 0)
    taken2 = (_taken(end1, end2, u) | (is2 & single)) & (p2 > 0)
    taken3 = (_taken(end2, total, u) | (is3 & single)) & (p3 > 0)
    # Keys that were drawn come first, then by position: two pairs of (key, factor) in order.
    rank0 = taken0.to(tl.int32) * 4 + 3
    rank1 = taken1.to(tl.int32) * 4 + 2
    rank2 = taken2.to(tl.int32) * 4 + 1
    rank3 = taken3.to(tl.int32) * 4
    high01 = tl.maximum(rank0, rank1)
    high23 = tl.maximum(rank2, rank3)
    best = tl.maximum(high01, high23)
    low = tl.maximum(tl.minimum(rank0, rank1), tl.minimum(rank2, rank3))
    first, second = by_position(as_bits(best), as_bits(tl.maximum(tl.minimum(high01, high23), low)))
    first = first & 3
    second = second & 3
    drawn0 = tl.where(taken0, p0, 0.0)
    drawn1 = tl.where(taken1, p1, 0.0)
    drawn2 = tl.where(taken2, p2, 0.0)
    drawn3 = tl.where(taken3, p3, 0.0)
    return (
        as_bits(tl.where(first == 3, key0, tl.where(first == 2, key1, key2))),
        as_bits(tl.where(second == 0, key3, tl.where(second == 1, key2, key1))),
        _inverse(tl.where(first == 3, drawn0, tl.where(first == 2, drawn1, drawn2))),
        _inverse(tl.where(second == 0, drawn3, tl.where(second == 1, drawn2, drawn1))),
    )


@jit
def _probability(part, whole, certain):
    """Never above 1: in the case where one entry outweighs the others a part is no larger than the whole."""
    return tl.where(certain, 1.0, tl.minimum(tl.div_rn(part, whole), 1.0))


@jit
def _inverse(probability):
    return tl.where(probability > 0, tl.div_rn(1.0, tl.where(probability > 0, probability, 1.0)), 0.0)
