"""A region: one traced module as data, and the module that stands in its place when all is planned.

A `Region` holds a graph and a table of what the graph's names mean. Passes rewrite both; a new parameter
is only a shape and a rule for its first value until `materialise` builds the module, so that planning
allocates nothing and a failed plan leaves nothing behind.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import PythonCode

#: First values of new parameters: (old values by local name, generator by local name) -> new values.
Initialise = Callable[[Mapping[str, Tensor], Callable[[str], torch.Generator]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter as a pass sees it.

    Attributes:
        shape, dtype, device, requires_grad: as of the tensor.
        shared: other places, fully qualified, that hold the same parameter.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool = True
    shared: tuple[str, ...] = ()

    def numel(self) -> int:
        return self.shape.numel()


@dataclass(frozen=True)
class BufferSpec:
    """A buffer that an operation needs.

    Attributes:
        initial: its first value, from the region's parameters by local name; None: zeros.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    persistent: bool
    initial: Callable[[Mapping[str, Tensor]], Tensor] | None = None


@dataclass(frozen=True)
class NewParameters:
    """Parameters that a pass creates: `initialise` makes the values of `names` from those of `sources`.

    It may make first values of persistent buffers as well. Where `scored` is set it finds, beside each
    source, what the shell measured of it, under `column_scores_key`.
    """

    sources: tuple[str, ...]
    names: tuple[str, ...]
    initialise: Initialise
    scored: bool = False


def column_scores_key(weight: str) -> str:
    """Where `initialise` finds the scores of a weight's input channels."""
    return f"{weight}:column_scores"


@dataclass
class Region:
    """One traced module.

    Attributes:
        fqns: every place in the model where it stands; more than one for a shared module.
        module: the module that was traced; the source of parameters, buffers and leaf modules.
        graph: the normal form (`act24.passes.graph.normal_form`).
        parameters: by local name. Passes add and remove.
        created: what to build, in order.
        buffers: by local name, those that passes add.
        classes: class name of every module that stood inside, by local path.
    """

    fqns: tuple[str, ...]
    module: nn.Module
    graph: fx.Graph
    parameters: dict[str, ParameterSpec]
    created: list[NewParameters] = field(default_factory=list)
    buffers: dict[str, BufferSpec] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)

    @property
    def fqn(self) -> str:
        """The first place where the region stands."""
        return self.fqns[0]

    def name(self, path: str) -> str:
        """The fully qualified name of a local path."""
        return f"{self.fqn}.{path}" if path else self.fqn

    def names(self, path: str) -> Iterator[str]:
        """All fully qualified names of a local path."""
        return (f"{fqn}.{path}" if path else fqn for fqn in self.fqns)

    def class_name(self, path: str) -> str:
        """The class that stood at a local path before tracing, or the empty string."""
        return self.classes.get(path, "")

    def numel(self) -> int:
        """Elements in all parameters of the region."""
        return sum(spec.numel() for spec in self.parameters.values())

    def copy(self) -> Region:
        """The same region with a graph and tables of its own; tensors are shared."""
        return replace(
            self,
            graph=copy_graph(self.graph),
            parameters=dict(self.parameters),
            created=list(self.created),
            buffers=dict(self.buffers),
        )

    def create(
        self,
        specs: Mapping[str, ParameterSpec],
        initialise: Initialise,
        replaces: tuple[str, ...] = (),
        scored: bool = False,
    ) -> None:
        """Add parameters, and take away those that they replace; a name may be in both."""
        self.created.append(NewParameters(replaces, tuple(specs), initialise, scored))
        for name in replaces:
            del self.parameters[name]
        self.parameters.update(specs)

    def add_buffer(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        persistent: bool,
        initial: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
    ) -> None:
        """Add a buffer (`BufferSpec`); several passes may ask for the same one."""
        self.buffers[name] = BufferSpec(shape, dtype, persistent, initial)


class RegionModule(fx.GraphModule):
    """The graph module that stands where a region was traced.

    Regions with equal code share one class (`share_class`), so that torch.compile sees one function and
    compiles it once, not once a layer. A copy keeps the class; `recompile` after editing the graph of one
    region by hand leaves the shared class first.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> RegionModule:
        # GraphModule's own copy makes a class for each module, leaves out what the graph does not read, and
        # makes every buffer persistent.
        duplicate = nn.Module.__new__(type(self))
        memo[id(self)] = duplicate
        vars(duplicate).update(copy.deepcopy(self.__getstate__(), memo))
        duplicate._graph.owning_module = duplicate
        return duplicate

    def recompile(self) -> Any:
        if vars(type(self)).get("_shared", False):
            code = self._graph.python_code("self")
            if code.src == self._code:  # as when pickle asks for the code
                return code
            self.__class__ = type("GraphModuleImpl", (RegionModule,), {"__module__": __name__})  # type: ignore[assignment]
        return super().recompile()


def materialise(
    region: Region,
    generator: Callable[[str], torch.Generator],
    column_scores: Mapping[str, Tensor] | None = None,
) -> RegionModule:
    """Build the module of a region: old tensors as they are, new ones from `generator(fqn)`.

    Args:
        column_scores: by fully qualified name, of the weights that a pass wants them of.
    """
    old = dict(region.module.named_parameters(remove_duplicate=False))
    values: dict[str, Tensor] = dict(old)
    with torch.no_grad():
        for new in region.created:
            # On the meta device what an earlier pass created has no value.
            sources = {name: values.pop(name) for name in new.sources if name in values}
            if len(sources) == len(new.sources) and not any(t.is_meta for t in sources.values()):
                if new.scored:
                    scores = column_scores or {}
                    sources |= {column_scores_key(n): scores[region.name(n)] for n in new.sources}
                values.update(new.initialise(sources, lambda name: generator(region.name(name))))
    module = RegionModule(nn.Module(), fx.Graph())
    module.train(region.module.training)
    for name, spec in region.parameters.items():
        if name in old and values.get(name) is old[name]:
            tensor = old[name]
        else:
            value = torch.empty(spec.shape, dtype=spec.dtype, device=spec.device)
            if name in values:  # not on the meta device, where there is no value to give
                value.copy_(values[name])
            tensor = nn.Parameter(value, requires_grad=spec.requires_grad)
        parent, leaf = _namespace(module, name)
        parent.register_parameter(leaf, tensor)
    for name, buffer in region.module.named_buffers(remove_duplicate=False):
        path, _, leaf = name.rpartition(".")
        persistent = leaf not in region.module.get_submodule(path)._non_persistent_buffers_set
        parent, leaf = _namespace(module, name)
        parent.register_buffer(leaf, buffer, persistent=persistent)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    device = next((p.device for p in parameters.values()), torch.device("cpu"))
    for name, spec in region.buffers.items():
        buffer = torch.zeros(spec.shape, dtype=spec.dtype, device=device)
        if name in values:
            buffer.copy_(values[name])
        elif spec.initial is not None and not buffer.is_meta:
            buffer.copy_(spec.initial(parameters))
        parent, leaf = _namespace(module, name)
        parent.register_buffer(leaf, buffer, persistent=spec.persistent)
    for node in region.graph.nodes:
        if node.op == "call_module":
            parent, leaf = _namespace(module, node.target)
            parent._modules[leaf] = region.module.get_submodule(node.target)
    module.graph = region.graph
    return module


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
    """Give a region's module another graph over the same tensors; `classes` as for `lowering`."""
    _set_class(module, to.region_class, classes)
    module._graph = to.graph
    module._code = to.code.src
    module._lineno_map = to.code._lineno_map
    to.graph.owning_module = module


def _set_class(module: RegionModule, region_class: type, classes: dict[tuple[Any, ...], type]) -> None:
    """Change the class, also where a wrapper derived its own from it: FSDP2 puts a subclass of itself and
    of the module's class in place, which has to stay on top."""
    wrapper = type(module)
    if not vars(wrapper).get("_shared", False) and wrapper.__bases__ != (RegionModule,):
        key = (wrapper.__bases__[:-1], region_class)
        if key not in classes:
            bases = (*wrapper.__bases__[:-1], region_class)
            members = {name: value for name, value in vars(wrapper).items() if name == "__deepcopy__"}
            classes[key] = type(wrapper.__name__, bases, members)
        region_class = classes[key]
    module.__class__ = region_class


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A graph of its own with the same nodes and names."""
    duplicate = fx.Graph(tracer_cls=graph._tracer_cls)
    mapping: dict[fx.Node, fx.Node] = {}
    output = duplicate.graph_copy(graph, mapping)
    duplicate.output(output)
    for old, new in mapping.items():
        new.meta = copy.copy(old.meta)
    return duplicate


def _namespace(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the last part of a dotted name, made of plain modules where missing."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module().train(root.training))
        root = root._modules[part]  # type: ignore[assignment]
    return root, leaf
