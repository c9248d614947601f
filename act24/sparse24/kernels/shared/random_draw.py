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
def _finite(magnitudes):
    """Four magnitudes; where some are not finite, 1 for these and 0 for the others."""
    infinity: tl.constexpr = float("inf")
    a0, a1, a2, a3 = magnitudes
    finite = (a0 < infinity) & (a1 < infinity) & (a2 < infinity) & (a3 < infinity)
    return [tl.where(finite, a, tl.where(a < infinity, 0.0, 1.0)) for a in magnitudes]


@jit
def _ends(lengths):
    """Sums of the first one, two, three and four."""
    a0, a1, a2, a3 = lengths
    return a0, a0 + a1, a0 + a1 + a2, a0 + a1 + a2 + a3


@jit
def _interval(place, ends):
    """Which of four intervals that lie end to end a place is in: four booleans. A place is never behind an
    end that all intervals reach."""
    before = [(place < ends[i]) | (ends[i] >= ends[3]) for i in (0, 1, 2)]
    return before[0], before[1] & (before[0] == 0), before[2] & (before[1] == 0), before[2] == 0


@jit
def _two(taken, values):
    """Of four values, those of the two entries that were taken, in order; where fewer were, the first ones of
    the others fill up."""
    _, taken1, taken2, taken3 = taken
    x0, x1, x2, x3 = values
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
            0 for a key that only fills up; and a quarter of the magnitude that they had.
    """
    quarters = [a * 0.25 for a in _finite(magnitudes)]
    largest = tl.maximum(tl.maximum(quarters[0], quarters[1]), tl.maximum(quarters[2], quarters[3]))
    # One entry outweighs the others: it is certain, and they share one draw instead of two.
    single = 2 * largest > quarters[0] + quarters[1] + quarters[2] + quarters[3]
    certain = [single & (a == largest) for a in quarters]
    ends = _ends([tl.where(certain[i], 0.0, quarters[i]) for i in (0, 1, 2, 3)])
    share = tl.where(single, ends[3], ends[3] * 0.5)
    u = random_uniform(number, seed)
    one = _interval(u * share, ends)
    other = _interval(tl.where(single, u * share, (1 + u) * share), ends)
    taken = [one[i] | other[i] | certain[i] for i in (0, 1, 2, 3)]
    kept = [
        tl.where(taken[i] & (quarters[i] > 0), tl.where(certain[i], quarters[i], share), 0.0)
        for i in (0, 1, 2, 3)
    ]
    return _two(taken, keys), _two(taken, kept), _two(taken, quarters)


@jit
def factor_of(kept, magnitude):
    """1/π of a drawn key, 0 of one that fills up."""
    drawn = kept > 0
    return tl.where(drawn, tl.div_rn(kept, tl.where(drawn, magnitude, 1.0)), 0.0)
