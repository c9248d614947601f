"""The draw of two of four, inside a kernel: `act24.sparse24.pattern.mvue` and
`act24.sparse24.pattern.random_bits`, step by step and rounding by rounding, so that both draw the same from
the same seed."""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

from act24.compiler import jit, tl


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
def draw2(a0, a1, a2, a3, key0, key1, key2, key3, number, seed):
    """Two of four magnitudes, drawn by the minimum-variance unbiased estimator, without a division.

    Args:
        a0, a1, a2, a3: magnitudes, float32.
        key0, key1, key2, key3: the keys at the same positions.
        number: of the group, uint32; seed: pointer to an int64.

    Returns:
        the keys that were drawn, by position; for each a quarter of the magnitude with which it is kept, 0
        for a key that only fills up; and for each a quarter of the magnitude that it had.
    """
    a0, a1, a2, a3 = _finite(a0, a1, a2, a3)
    a0 *= 0.25
    a1 *= 0.25
    a2 *= 0.25
    a3 *= 0.25
    largest = tl.maximum(tl.maximum(a0, a1), tl.maximum(a2, a3))
    # One entry outweighs the others: it is certain, and they share one draw instead of two.
    single = 2 * largest > a0 + a1 + a2 + a3
    certain0 = single & (a0 == largest)
    certain1 = single & (a1 == largest)
    certain2 = single & (a2 == largest)
    certain3 = single & (a3 == largest)
    end0 = tl.where(certain0, 0.0, a0)
    end1 = end0 + tl.where(certain1, 0.0, a1)
    end2 = end1 + tl.where(certain2, 0.0, a2)
    total = end2 + tl.where(certain3, 0.0, a3)
    kept = tl.where(single, total, total * 0.5)
    u = random_uniform(number, seed)
    one = u * kept
    other = tl.where(single, one, (1 + u) * kept)
    # The interval that reaches the total has no end.
    taken0 = _before(one, end0, total)
    taken1 = _before(one, end1, total)
    taken2 = _before(one, end2, total)
    again0 = _before(other, end0, total)
    again1 = _before(other, end1, total)
    again2 = _before(other, end2, total)
    taken3 = (taken2 == 0) | (again2 == 0) | certain3
    taken2 = (taken2 & (taken1 == 0)) | (again2 & (again1 == 0)) | certain2
    taken1 = (taken1 & (taken0 == 0)) | (again1 & (again0 == 0)) | certain1
    taken0 = taken0 | again0 | certain0
    kept0 = _kept(taken0, certain0, a0, kept)
    kept1 = _kept(taken1, certain1, a1, kept)
    kept2 = _kept(taken2, certain2, a2, kept)
    kept3 = _kept(taken3, certain3, a3, kept)
    # Two of four in order, with a position that fills up where fewer were drawn.
    first1 = taken1 & (taken2 | taken3)
    first2 = taken2 & taken3
    return (
        tl.where(first1, key1, tl.where(first2, key2, key0)),
        tl.where(taken3, key3, tl.where(taken2, key2, key1)),
        tl.where(first1, kept1, tl.where(first2, kept2, kept0)),
        tl.where(taken3, kept3, tl.where(taken2, kept2, kept1)),
        tl.where(first1, a1, tl.where(first2, a2, a0)),
        tl.where(taken3, a3, tl.where(taken2, a2, a1)),
    )


@jit
def _before(place, end, total):
    return (place < end) | (end >= total)


@jit
def _kept(taken, certain, magnitude, kept):
    return tl.where(taken & (magnitude > 0), tl.where(certain, magnitude, kept), 0.0)


@jit
def factor_of(kept, magnitude):
    """1/π of a drawn key, 0 of one that fills up."""
    drawn = kept > 0
    return tl.where(drawn, tl.div_rn(kept, tl.where(drawn, magnitude, 1.0)), 0.0)
