"""Random numbers that are a function of a seed and a position, and of nothing else.

What uses them can be run again, by activation checkpointing, on another device or after a resume, and draws
the same; no generator has to be stored, restored or kept apart between processes. The mixing is the 32-bit
finaliser of MurmurHash3 (public domain) over both halves of the seed: integer arithmetic that a kernel can
repeat bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _mix(h: Tensor) -> Tensor:
    # int64 arithmetic on 32-bit values: products wrap, their low 32 bits are right.
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _MASK
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _MASK
    return h ^ (h >> 16)


def random_bits(index: Tensor, seed: Tensor | int) -> Tensor:
    """32 random bits for every position.

    Args:
        index: int64, any shape, below 2^32.
        seed: an int64 scalar, or an int; all 64 bits count.

    Returns:
        int64 in [0, 2^32), the shape of `index`.
    """
    return _mix(_mix((index & _MASK) ^ (seed & _MASK)) ^ ((seed >> 32) & _MASK))


def random_uniform(index: Tensor, seed: Tensor | int) -> Tensor:
    """float32 in [0, 1), multiples of 2^-24, the shape of `index`; arguments as for `random_bits`."""
    return (random_bits(index, seed) >> 8).float() * 2.0**-24


def random_permutation(length: int, seed: int, device: torch.device) -> Tensor:
    """A permutation of range(length), int64, that depends on length and seed alone.

    A sort of `length` keys each time it is called; keeping it instead would be state.
    """
    keys = random_bits(torch.arange(length, device=device), seed)
    return torch.argsort(keys, stable=True)
