"""What e4m3 does to the inputs of linears and to the gradients of their outputs, as the log shows it."""

from __future__ import annotations

import torch

from act24.passes import Pipeline
from act24.passes.activation_statistics import GRADIENT_UNDERFLOW, UNDERFLOW
from act24.passes.graph.region import buffers_of

#: What the names in the log add to the weight's, by the kind of the buffer.
_OF = {UNDERFLOW: "", GRADIENT_UNDERFLOW: "gradient"}


def take_underflow_(pipeline: Pipeline) -> dict[str, float]:
    """Shares of the entries that e4m3 makes zero, of those that are not, since they were last taken, by this
    process: of each linear's input, and of the gradient of its output; one transfer.

    Returns:
        by weight, without `.weight`, and `mean` and `max`; of gradients below `gradient/`. Empty where
        nothing was counted.
    """
    found = {(kind, name): b for kind in _OF for name, b in buffers_of(pipeline.regions, kind).items()}
    if not found:
        return {}
    counts = torch.stack(list(found.values())).tolist()
    for buffer in found.values():
        buffer.zero_()
    shares: dict[str, float] = {}
    for kind, prefix in _OF.items():
        of_kind = {
            name.removesuffix(".weight"): lost / nonzero
            for (own, name), (nonzero, lost) in zip(found, counts, strict=True)
            if own == kind and nonzero
        }
        if of_kind:
            of_kind |= {"mean": sum(of_kind.values()) / len(of_kind), "max": max(of_kind.values())}
        shares |= {f"{prefix}/{name}" if prefix else name: share for name, share in of_kind.items()}
    return shares
