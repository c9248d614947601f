"""What is watched of 2:4 training beside the counts in the graph: weight gradients, masks, and alarms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from act24.passes import Activation24, Fp8, OperationalPass, Pipeline, Weight24, weight24
from act24.passes.graph.normal_form import nodes_of, parameter_name
from act24.passes.graph.region import joined
from act24.passes.state import sparse_weights, without_counting
from act24.sparse24.feed_forward.operation import activation24
from act24.tools.watch.statistics import SiteStatistics
from act24.words import counted

#: Share of the squared activations that 2:4 may drop before it is said. About what it drops of activations
#: of which half are zero; at 90% zeros it drops a thirtieth of this.
DROPPED_ENERGY_ALARM = 0.01


def gradient_cosines(pipeline: Pipeline, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """How far 2:4 bends the weight gradients: the cosine to the exact ones of the same forward.

    The input gradients are exact in every backward, so each cosine shows what happens at its own weight.

    Args:
        loss: the loss of one micro-batch; called twice. Statistics do not count it.

    Returns:
        by the weight's name, a scalar on the device; empty where every backward is dense, or no site has a
        linear of its own.
    """
    # Before an update's beginning, what is kept of weights is still of the last one's, and so are masks.
    passes: list[OperationalPass] = [
        replace(p, keep_packed=False)
        if isinstance(p, Weight24)
        else replace(p, keep_cast=False)
        if isinstance(p, Fp8 | Activation24)
        else p
        for p in without_counting(pipeline.active)
    ]
    exact: list[OperationalPass] = [
        replace(p, backward="dense") if isinstance(p, Activation24) else p for p in passes
    ]
    weights = {
        joined(fqn, name): module.get_parameter(name)
        for fqn, module in pipeline.regions.items()
        for node in nodes_of(module.graph, activation24)
        for position in (1, 3)
        if (name := parameter_name(node.args[position]))
    }
    if exact == passes or not weights:
        return {}
    gradients = []
    for chosen in (passes, exact):
        with pipeline.lowered(chosen):
            gradients.append(torch.autograd.grad(loss(), list(weights.values())))
    cosines = [
        torch.nn.functional.cosine_similarity(sparse.float().flatten(), dense.float().flatten(), dim=0)
        for sparse, dense in zip(*gradients, strict=True)
    ]
    return dict(zip(weights, cosines, strict=True))


def alarms(sites: Sequence[SiteStatistics]) -> list[str]:
    """What a person should know: activations of which 2:4 drops more than `DROPPED_ENERGY_ALARM`."""
    texts = []
    for name, what in (
        ("dropped_energy", "of the squared activations"),
        ("feature_dropped_energy", "of the squared activations from weight gradients, along the tokens"),
    ):
        loud = [s for s in sites if (getattr(s, name) or 0) > DROPPED_ENERGY_ALARM]
        if loud:
            worst = max(loud, key=lambda s: getattr(s, name))
            others = ""
            if len(loud) > 1:
                others = f", and more than {DROPPED_ENERGY_ALARM:.0%} at {counted(len(loud) - 1, 'other')}"
            place = f"layer {worst.layer}, {worst.site}" if worst.layer is not None else worst.site
            texts.append(f"2:4 drops {getattr(worst, name):.1%} {what} at {place}{others}")
    return texts


def take_flip_rates_(pipeline: Pipeline, updates: int) -> dict[str, float]:
    """Flip rates of the weight masks that the forward used, since they were last taken, with one transfer.

    The unit is one for all methods: the share of a mask's entries that changed, by optimizer update. A mask
    that is kept for several updates changes at one of them; its changes count for all.

    Args:
        updates: optimizer updates since the last call.

    Returns:
        by module (and factor), and `mean`, `max`, `min`, `total`, their sum; empty without `weight24`.
    """
    found = {
        f"{weight.name}": weight.buffer(weight24.FLIPS)
        for p in pipeline.active
        if isinstance(p, Weight24)
        for weight in sparse_weights(pipeline, p)
    }
    if not found:
        return {}
    rates = [total / max(updates, 1) for total in torch.stack(list(found.values())).tolist()]
    for buffer in found.values():
        buffer.zero_()
    named = {name.removesuffix(".weight"): rate for name, rate in zip(found, rates, strict=True)}
    across = {"mean": sum(rates) / len(rates), "max": max(rates), "min": min(rates), "total": sum(rates)}
    return named | across
