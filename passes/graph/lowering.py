"""Graphs made ready to run, and the module of a region running another one of its graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.fx.graph import PythonCode

from act24.passes.graph.frozen import standing
from act24.passes.graph.region import RegionModule, copy_graph


@dataclass(frozen=True)
class Lowering:
    """A graph ready to run: with its code, and the class whose forward that is."""

    graph: fx.Graph
    code: PythonCode
    region_class: type


def lowering(graph: fx.Graph, classes: dict[tuple[Any, ...], type]) -> Lowering:
    """Make a graph ready to run.

    Args:
        classes: the classes by code, filled here: equal code gets the class of the first.
    """
    code = graph.python_code("self")
    key = (code.src, tuple(sorted((name, id(value)) for name, value in code.globals.items())))
    if key not in classes:
        prototype = RegionModule(nn.Module(), fx.Graph())
        prototype.graph = copy_graph(graph)
        type(prototype)._shared = True  # type: ignore[attr-defined]
        classes[key] = type(prototype)
    return Lowering(graph, code, classes[key])


def lower_(module: RegionModule, to: Lowering, classes: dict[tuple[Any, ...], type]) -> None:
    """Give a region's module another graph over the same tensors.

    Args:
        classes: as for `lowering`.
    """
    _set_class(module, to.region_class, classes)
    module._graph = to.graph
    module._code = to.code.src
    module._lineno_map = to.code._lineno_map
    to.graph.owning_module = module


def _set_class(module: RegionModule, region_class: type, classes: dict[tuple[Any, ...], type]) -> None:
    """Change the class, also where others derived theirs from it: the model's own, and FSDP2's, which puts
    a subclass of itself and of the module's class in place and has to stay on top."""
    module.__class__ = _derived(type(module), region_class, classes)


def _derived(cls: type, region_class: type, classes: dict[tuple[Any, ...], type]) -> type:
    """A class like another, with the forward of a region's."""
    stock = vars(cls).get("_stock")
    if stock is None and (vars(cls).get("_shared", False) or cls.__bases__ == (RegionModule,)):
        return region_class
    key = (stock, cls.__bases__[:-1] if stock is None else (), region_class)
    if key not in classes:
        if stock is not None:
            classes[key] = standing(region_class, stock)
        else:
            bases = (*cls.__bases__[:-1], _derived(cls.__bases__[-1], region_class, classes))
            members = {name: value for name, value in vars(cls).items() if name == "__deepcopy__"}
            classes[key] = type(cls.__name__, bases, members)
    return classes[key]
