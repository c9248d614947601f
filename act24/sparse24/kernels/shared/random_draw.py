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
def _finite(a0, a1, a2, a3):
    """Four magnitudes; where some are not finite, 1 for these and 0 for the others."""
    infinity: tl.constexpr = float("inf")
    finite = (a0 < infinity) & (a1 < infinity) & (a2 < infinity) & (a3 < infinity)
    return (
        tl.where(finite, a0, tl.where(a0 < infinity, 0.0, 1.0)),
        tl.where(finite, a1, tl.where(a1 < infinity, 0.0, 1.0)),
        tl.where(finite, a2, tl.where(a2 < infinity, 0.0, 1.0)),
        tl.where(finite, a3, tl.where(a3 < infinity, 0.0, 1.0)),
    )


@jit
def _probabilities(a0, a1, a2, a3):
    """π of each, and whether it is certain, as `act24.sparse24.pattern.mvue` has them; and whether one is.

    An entry that outweighs the others is certain, and they share one draw instead of two.
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
    single = (rest < 1) & (largest > 0)
    probabilities = (
        _probability(a0, other0, is0 & single, rest),
        _probability(a1, other1, is1 & single, rest),
        _probability(a2, other2, is2 & single, rest),
        _probability(a3, other3, is3 & single, rest),
    )
    return probabilities, (is0 & single, is1 & single, is2 & single, is3 & single), single


@jit
def _probability(a, other, certain, rest):
    shared = tl.where(certain, 1.0, tl.div_rn(other, tl.where(rest > 0, rest, 1.0)))
    return tl.where(rest < 1, shared, tl.minimum(tl.div_rn(2 * a, 1 + rest), 1.0))


@jit
def _taken(probabilities, certain, single, u):
    """Which entries the number u draws: of their intervals, laid end to end, those that hold u or u + 1."""
    end0 = tl.where(certain[0], 0.0, probabilities[0])
    end1 = end0 + tl.where(certain[1], 0.0, probabilities[1])
    end2 = end1 + tl.where(certain[2], 0.0, probabilities[2])
    end3 = end2 + tl.where(certain[3], 0.0, probabilities[3])
    # The last end is set, not summed, so that rounding can neither lose a draw nor add a third.
    total = tl.where(single, 1.0, 2.0)
    end0 = tl.where(end0 >= end3, total, end0)
    end1 = tl.where(end1 >= end3, total, end1)
    end2 = tl.where(end2 >= end3, total, end2)
    return (
        (_holds(0.0, end0, u) | certain[0]) & (probabilities[0] > 0),
        (_holds(end0, end1, u) | certain[1]) & (probabilities[1] > 0),
        (_holds(end1, end2, u) | certain[2]) & (probabilities[2] > 0),
        (_holds(end2, total, u) | certain[3]) & (probabilities[3] > 0),
    )


@jit
def _holds(start, end, u):
    return ((start <= u) & (u < end)) | ((start <= u + 1) & (u + 1 < end))


@jit
def _two_positions(taken0, taken1, taken2, taken3):
    """The positions of two entries in order, counted from behind (3 is the first): those that were taken,
    then the lowest of the others, which fill up."""
    rank0 = taken0.to(tl.int32) * 4 + 3
    rank1 = taken1.to(tl.int32) * 4 + 2
    rank2 = taken2.to(tl.int32) * 4 + 1
    rank3 = taken3.to(tl.int32) * 4
    high01 = tl.maximum(rank0, rank1)
    high23 = tl.maximum(rank2, rank3)
    best = tl.maximum(high01, high23)
    low = tl.maximum(tl.minimum(rank0, rank1), tl.minimum(rank2, rank3))
    first, second = by_position(as_bits(best), as_bits(tl.maximum(tl.minimum(high01, high23), low)))
    return first & 3, second & 3


@jit
def _factor(taken, probability):
    return tl.where(taken, tl.div_rn(1.0, tl.where(taken, probability, 1.0)), 0.0)


@jit
def _at_first(position, x0, x1, x2):
    return tl.where(position == 3, x0, tl.where(position == 2, x1, x2))


@jit
def _at_second(position, x1, x2, x3):
    return tl.where(position == 0, x3, tl.where(position == 1, x2, x1))


@jit
def draw2(magnitudes, keys, number, seed):
    """Two of four magnitudes, drawn by the minimum-variance unbiased estimator.

    Args:
        magnitudes: four, float32.
        keys: the four keys at the same positions.
        number: of the group, uint32; seed: pointer to an int64.

    Returns:
        the keys that were drawn, by position, and 1/π of each, 0 for a key that only fills up.
    """
    a0, a1, a2, a3 = magnitudes
    a0, a1, a2, a3 = _finite(a0, a1, a2, a3)
    probabilities, certain, single = _probabilities(a0, a1, a2, a3)
    taken0, taken1, taken2, taken3 = _taken(probabilities, certain, single, random_uniform(number, seed))
    first, second = _two_positions(taken0, taken1, taken2, taken3)
    factor0 = _factor(taken0, probabilities[0])
    factor1 = _factor(taken1, probabilities[1])
    factor2 = _factor(taken2, probabilities[2])
    factor3 = _factor(taken3, probabilities[3])
    return (
        as_bits(_at_first(first, keys[0], keys[1], keys[2])),
        as_bits(_at_second(second, keys[1], keys[2], keys[3])),
        _at_first(first, factor0, factor1, factor2),
        _at_second(second, factor1, factor2, factor3),
    )
