"""A state dict of a rewritten model without what only operational passes have in it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from act24.passes import weight24
from act24.passes.graph.region import RegionModule, joined
from act24.passes.rewriting import Rewriting
from act24.passes.state import new_places, sparse_weights
from act24.passes.weight24 import Weight24
from act24.sparse24.weight.methods import sparse_weight, weight_mask, weight_scale


@torch.no_grad()
def as_multiplied(pipeline: Rewriting, state: Mapping[str, Tensor], made: int | None) -> dict[str, Tensor]:
    """A state dict of the rewritten model in which weights that a `weight24` in force makes 2:4 are as their
    linears multiply with them in evaluation mode, in the orientation in which they are stored: those whose
    masks lie beside them. What comes without masks is so already, or is meant to be dense.

    Args:
        made: updates; None: not known, and all scales are set.
    """
    result, places = dict(state), _places(pipeline)
    for p in pipeline.active:
        if not isinstance(p, Weight24):
            continue
        new = new_places(pipeline, p, made)
        for weight in sparse_weights(pipeline, p):
            for name in (joined(fqn, weight.local) for fqn in places[weight.module]):
                if name in state and name + weight24.MASK in state:
                    scale = None if weight.name in new else state.get(name + weight24.SCALE)
                    result[name] = _sparse(state[name], weight.transposed, p, scale)
    return result


def without_operational_state(pipeline: Rewriting, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the rewritten model without the state of operational passes."""
    structural = {
        joined(fqn, name)
        for change in pipeline.changes
        for fqn in change.region.fqns
        for name in change.state.creates
    }
    operational = buffer_kinds(pipeline).keys() - structural
    return {name: value for name, value in state.items() if name not in operational}


def _places(pipeline: Rewriting) -> dict[RegionModule, list[str]]:
    """The regions, each with all names that it has in the model."""
    places: dict[RegionModule, list[str]] = {}
    for name, module in pipeline.model.named_modules(remove_duplicate=False):
        if isinstance(module, RegionModule):
            places.setdefault(module, []).append(name)
    return places


def buffer_kinds(pipeline: Rewriting) -> dict[str, str]:
    """The buffers that passes added, each with its kind, by all full names."""
    return {
        joined(fqn, name): kind
        for module, fqns in _places(pipeline).items()
        for fqn in fqns
        for name, (kind, _) in module.buffer_kinds.items()
    }


def _sparse(stored: Tensor, transposed: bool, p: Weight24, scale: Tensor | None) -> Tensor:
    """A weight as its linear multiplies with it.

    Args:
        scale: of soft thresholding; None: no update has set it.
    """
    dense = stored.T if transposed else stored
    mask = None
    if p.record.soft:
        scale = weight_scale(dense) if scale is None else scale
    else:
        mask, scale = weight_mask(dense, p.method), None
    sparse = sparse_weight(dense, mask, scale)
    return sparse.T if transposed else sparse
