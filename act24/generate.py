"""Sampling from a language model, as plainly as can be: the whole context is run again for every token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from act24.errors import Act24Error


@torch.no_grad()
def generate(
    model: Callable[[Tensor], Tensor],
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    allowed: Tensor | None = None,
) -> Tensor:
    """Continue `input_ids` [B, S] by `max_new_tokens`; returns [B, S + max_new_tokens].

    `model` maps token ids [B, S] to logits [B, S, V]. `temperature` 0 takes the most likely token; `top_k`
    samples among the k most likely. `generator` lives on the device of `input_ids` and alone decides the
    draw. `allowed`, boolean [V], says which ids may be taken, None that all may. There is no key-value cache,
    so n tokens cost n forward passes: meant for looking at samples, not for serving. Raises Act24Error for a
    negative temperature, a `top_k` below 1, or where nothing is allowed.
    """
    if temperature < 0:
        raise Act24Error(f"temperature must not be negative, got {temperature}")
    if top_k is not None and top_k < 1:
        raise Act24Error(f"top_k must be at least 1, got {top_k}")
    if allowed is not None and not allowed.any():
        raise Act24Error("no token id is allowed, so there is none to draw")
    for _ in range(max_new_tokens):
        logits = model(input_ids)[:, -1].float()
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        if temperature == 0:
            token = logits.argmax(-1, keepdim=True)
        else:
            if top_k is not None:
                logits, candidates = logits.topk(min(top_k, logits.shape[-1]))
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            if top_k is not None:
                token = candidates.gather(-1, token)
        input_ids = torch.cat((input_ids, token), dim=-1)
    return input_ids
