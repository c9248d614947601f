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
def _ends(a0, a1, a2, a3):
    """Sums of the first one, two, three and four."""
    return a0, a0 + a1, a0 + a1 + a2, a0 + a1 + a2 + a3


@jit
def _before(place, ends):
    """Whether a place lies before the end of the first, second and third interval; the one that reaches the
    end of all has none."""
    return (
        (place < ends[0]) | (ends[0] >= ends[3]),
        (place < ends[1]) | (ends[1] >= ends[3]),
        (place < ends[2]) | (ends[2] >= ends[3]),
    )


@jit
def _kept(taken, certain, magnitude, kept):
    return tl.where(taken & (magnitude > 0), tl.where(certain, magnitude, kept), 0.0)


@jit
def _two(taken1, taken2, taken3, x0, x1, x2, x3):
    """Of four, those of the two entries that were taken, in order; where fewer were, the first ones of the
    others fill up."""
    first = tl.where(taken1 & (taken2 | taken3), x1, tl.where(taken2 & taken3, x2, x0))
    return first, tl.where(taken3, x3, tl.where(taken2, x2, x1))


@jit
def draw2(magnitudes, keys, number, seed):
    """Two of four magnitudes, drawn by the minimum-variance unbiased estimator, without a division.

    Args:
        magnitudes: four, float32.
        keys: the four keys at the same positions.
        number: of the group, uint32; seed: pointer to an int64.

    Returns:
        two each: the keys that were drawn, by position; a quarter of the magnitude with which they are kept,
            0
        for a key that only fills up; and a quarter of the magnitude that they had.
    """
    a0, a1, a2, a3 = magnitudes
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
    ends = _ends(
        tl.where(certain0, 0.0, a0),
        tl.where(certain1, 0.0, a1),
        tl.where(certain2, 0.0, a2),
        tl.where(certain3, 0.0, a3),
    )
    kept = tl.where(single, ends[3], ends[3] * 0.5)
    u = random_uniform(number, seed)
    one = _before(u * kept, ends)
    other = _before(tl.where(single, u * kept, (1 + u) * kept), ends)
    taken0 = one[0] | other[0] | certain0
    taken1 = (one[1] & (one[0] == 0)) | (other[1] & (other[0] == 0)) | certain1
    taken2 = (one[2] & (one[1] == 0)) | (other[2] & (other[1] == 0)) | certain2
    taken3 = (one[2] == 0) | (other[2] == 0) | certain3
    kept0 = _kept(taken0, certain0, a0, kept)
    kept1 = _kept(taken1, certain1, a1, kept)
    kept2 = _kept(taken2, certain2, a2, kept)
    kept3 = _kept(taken3, certain3, a3, kept)
    return (
        _two(taken1, taken2, taken3, keys[0], keys[1], keys[2], keys[3]),
        _two(taken1, taken2, taken3, kept0, kept1, kept2, kept3),
        _two(taken1, taken2, taken3, a0, a1, a2, a3),
    )


@jit
def factor_of(kept, magnitude):
    """1/π of a drawn key, 0 of one that fills up."""
    drawn = kept > 0
    return tl.where(drawn, tl.div_rn(kept, tl.where(drawn, magnitude, 1.0)), 0.0)
