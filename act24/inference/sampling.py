"""The next token from logits, without a wait for the device and without a generator's state.

A draw is a function of the row's seed and the token's position alone (`act24.sparse24.pattern.random_bits`).
So a prompt has the same continuation whatever else is in its batch, in a CUDA graph as outside one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from act24.options import Range, check_options
from act24.sparse24.pattern.random_bits import random_bits

#: Below this temperature, logits divided by it may overflow float32; then the largest one is taken.
COLDEST = 1e-5


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Attributes:
        temperature: divides the logits; 0, or less than `COLDEST`, takes the most likely token.
        top_k: draw among the k most likely, and those as likely as the last of them.
        top_p: draw among the most likely tokens that together have this probability, under the temperature
            and after top_k; the first one is always among them.
    """

    temperature: Annotated[float, Range(ge=0)] = 0.8
    top_k: Annotated[int, Range(ge=1)] | None = None
    top_p: Annotated[float, Range(gt=0, le=1)] | None = None

    def __post_init__(self) -> None:
        check_options(self)


def next_token(
    logits: Tensor, sampling: Sampling, seeds: Tensor, positions: Tensor, allowed: Tensor | None = None
) -> Tensor:
    """Choose a token for each row.

    Args:
        logits: `[B, V]`, of any floating dtype.
        seeds: int64 `[B]`; positions: int64 `[B]`, of the tokens that are chosen, counted without padding.
        allowed: boolean `[V]`, which tokens may be taken; None: all.

    Returns:
        int64 `[B]`.
    """
    logits = logits.float()
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    if sampling.temperature < COLDEST:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        logits = _nucleus(logits, sampling.top_p)
    # argmax of logits plus Gumbel noise has the distribution of softmax(logits).
    tokens = torch.arange(logits.shape[-1], device=logits.device)
    # Row i has seed + i. The position is mixed first, else a row would draw what its neighbour draws at
    # another position.
    draw = random_bits(positions, (seeds << 32) | ((seeds >> 32) & 0xFFFFFFFF))
    uniform = (random_bits(tokens, draw[:, None] << 32).double() + 0.5) * 2.0**-32
    return (logits - (-uniform.log()).log().float()).argmax(-1)


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Logits `[B, V]` with -inf outside the smallest set of most likely tokens that has the mass `top_p`."""
    ordered, order = logits.sort(-1, descending=True)
    probability = ordered.softmax(-1)
    before = probability.cumsum(-1) - probability
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
    return logits.masked_fill(dropped, -torch.inf)
