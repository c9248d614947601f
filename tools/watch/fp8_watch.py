"""What e4m3 does to the inputs of linears, as the log shows it."""

from __future__ import annotations

import torch

from act24.passes import Pipeline
from act24.passes.activation_statistics import UNDERFLOW
from act24.passes.graph.region import buffers_of


def take_underflow_(pipeline: Pipeline) -> dict[str, float]:
    """Shares of the entries of each linear's input that e4m3 makes zero, of those that are not, since they
    were last taken, by this process; one transfer.

    Returns:
        by weight, without `.weight`; and `mean` and `max`. Empty where nothing was counted.
    """
    found = buffers_of(pipeline.regions, UNDERFLOW)
    if not found:
        return {}
    counts = torch.stack(list(found.values())).tolist()
    for buffer in found.values():
        buffer.zero_()
    shares = {
        name.removesuffix(UNDERFLOW).removesuffix(".weight"): lost / nonzero
        for name, (nonzero, lost) in zip(found, counts, strict=True)
        if nonzero
    }
    if not shares:
        return {}
    return shares | {"mean": sum(shares.values()) / len(shares), "max": max(shares.values())}
