"""Where a region's module stands: in the place of what was traced, which may be the model itself."""

from __future__ import annotations

from torch import nn

from act24.passes.graph.frozen import become_
from act24.passes.graph.region import Region, RegionModule


def put(model: nn.Module, region: Region, module: nn.Module) -> None:
    """Let a module stand wherever a region was traced."""
    for fqn in region.fqns:
        parent, _, leaf = fqn.rpartition(".")
        if fqn:
            setattr(model.get_submodule(parent), leaf, module)
        elif isinstance(module, RegionModule):
            become_(model, module, region.module, region.frozen)
        else:
            vars(model).clear()
            vars(model).update(vars(module))
            model.__class__ = type(module)


def twin(module: nn.Module) -> nn.Module:
    """Another object with the same attributes."""
    twin = object.__new__(type(module))
    vars(twin).update(vars(module))
    return twin
