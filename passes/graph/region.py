"""A region: one traced module as data, and the module that stands in its place when all is planned.

A `Region` holds a graph and a table of what the graph's names mean. Passes rewrite both; a new parameter
is only a shape and a rule for its first value until `materialise` builds the module, so that planning
allocates nothing and a failed plan leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.package.importer import ObjNotFoundError

from act24.errors import PassError
from act24.passes.graph.frozen import SIZES, Inside, Interpreted, Remains, as_copied, remember, standing
from act24.passes.graph.measurements import Measurement
from act24.passes.graph.normal_form import asks_kind
from act24.passes.graph.roles import Role
from act24.passes.graph.watched import NOTHING, Frozen

#: Parts of a dense weight (`ParameterSpec.factor`).
Factor = Literal["in", "out", "columns"]

#: First values of new parameters: (old values by local name, generator by local name) -> new values.
Initialise = Callable[[Mapping[str, Tensor], Callable[[str], torch.Generator]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter as a pass sees it.

    Attributes:
        shape, dtype, device, requires_grad: as of the tensor.
        shared: other places, fully qualified, that hold the same parameter.
        factor: which part of a dense weight it is, where a pass has made it one: `"in"` and `"out"` are the
            two factors, `"columns"` some columns beside them. None: a parameter of its own.
        read_by: the class of what outside reads it too, with `.forward` if that was replaced; or empty.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool = True
    shared: tuple[str, ...] = ()
    factor: Factor | None = None
    read_by: str = ""

    def numel(self) -> int:
        return self.shape.numel()


@dataclass(frozen=True)
class BufferSpec:
    """A buffer that an operation needs.

    Attributes:
        initial: its first value, from the region's parameters by local name; None: zeros.
        kind: what it is for, a constant of the pass that asks for it.
        of: the local name of what it belongs to, a site or a weight.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    persistent: bool
    initial: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    kind: str = ""
    of: str = ""

    @torch.no_grad()
    def reset_(self, buffer: Tensor, parameters: Mapping[str, Tensor]) -> None:
        """Give the buffer its first value."""
        buffer.zero_() if self.initial is None else buffer.copy_(self.initial(parameters))


@dataclass(frozen=True)
class NewParameters:
    """Parameters that a pass creates.

    Attributes:
        sources: parameters that go, local names.
        names: parameters that come.
        initialise: makes the values of `names`, and of persistent buffers, from `sources` and `measured`.
        measured: by a local name of the pass's choice.
    """

    sources: tuple[str, ...]
    names: tuple[str, ...]
    initialise: Initialise
    measured: Mapping[str, Measurement] = field(default_factory=dict)


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
        classes, modules: the classes of the model's modules by full name; what makes those that passes add.
        frozen: the plain values in its graph, and what its forward names.
        roles, adapters: by local name, what a weight is for, and what a factor of LoRA's adapts, in a word.
    """

    fqns: tuple[str, ...]
    module: nn.Module
    graph: fx.Graph
    parameters: dict[str, ParameterSpec]
    created: list[NewParameters] = field(default_factory=list)
    buffers: dict[str, BufferSpec] = field(default_factory=dict)
    classes: Mapping[str, str] = field(default_factory=dict)
    modules: dict[str, Callable[[], nn.Module]] = field(default_factory=dict)
    frozen: Frozen = NOTHING
    roles: dict[str, Role] = field(default_factory=dict)
    adapters: Mapping[str, str] = field(default_factory=dict)

    @property
    def fqn(self) -> str:
        """The first place where the region stands."""
        return self.fqns[0]

    def name(self, path: str) -> str:
        """The fully qualified name of a local path."""
        return joined(self.fqn, path)

    def names(self, path: str) -> Iterator[str]:
        """All fully qualified names of a local path."""
        return (joined(fqn, path) for fqn in self.fqns)

    def class_name(self, path: str) -> str:
        """The class that stood at a local path before tracing, or the empty string."""
        return self.classes.get(self.name(path), "")

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
            modules=dict(self.modules),
            roles=dict(self.roles),
        )

    def create(
        self,
        specs: Mapping[str, ParameterSpec],
        initialise: Initialise,
        replaces: tuple[str, ...] = (),
        measured: Mapping[str, Measurement] | None = None,
    ) -> None:
        """Add parameters, and take away those that they replace. A name may be in both.

        Args:
            specs: of the new ones, by local name.
            initialise, replaces, measured: as `NewParameters` has them.

        Raises:
            PassError: the module has another parameter of a new name.
        """
        for name in specs:
            if name in self.parameters and name not in replaces:
                raise PassError(
                    f"{self.name(name)} is there already, and a pass needs a parameter so named: rename it"
                )
            asked = name in self.frozen.sized or not self.frozen.names.isdisjoint(SIZES)
            if asked and name in self.parameters and self.parameters[name].shape != specs[name].shape:
                left = f'it out, ignore = ["{self.fqn}"]' if self.fqn else "the pass out"
                raise PassError(
                    f"{self.fqn or 'the model'} [{self.class_name('')}] asks in forward for the shape of "
                    f"{name}, which a pass would change: ask where the module is made, let the pass keep its "
                    f"width, or leave {left}"
                )
        self.created.append(NewParameters(replaces, tuple(specs), initialise, measured or {}))
        known: list[Role] = [self.roles[name] for name in replaces if name in self.roles]
        self.roles.update({name: known[0] for name in specs if known and name not in self.roles})
        for node in self.graph.nodes:
            gone = node.op == "get_attr" and node.target in {*replaces} - specs.keys()
            if gone and all(map(asks_kind, node.users)):
                node.target = next(iter(specs))
        for name in replaces:
            del self.parameters[name]
        self.parameters.update(specs)

    @property
    def measurements(self) -> dict[str, Measurement]:
        """What has to be measured before the region can be built; all names fully qualified."""
        return {
            self.name(name): replace(wanted, parameter=self.name(wanted.parameter))
            for new in self.created
            for name, wanted in new.measured.items()
        }

    def add_buffer(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        persistent: bool,
        initial: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
        kind: str = "",
        of: str = "",
    ) -> None:
        """Add a buffer (`BufferSpec`). Several passes may ask for the same one.

        Raises:
            PassError: the module has something else of this name.
        """
        taken = name in self.parameters or name in dict(self.module.named_buffers(remove_duplicate=False))
        if taken and name not in self.buffers:
            raise PassError(
                f"{self.name(name)} is there already, and a pass needs a buffer of this name: rename it"
            )
        self.buffers[name] = BufferSpec(shape, dtype, persistent, initial, kind, of)


class RegionModule(Remains, Interpreted):
    """The graph module that stands where a region was traced.

    Regions with equal code share one class (`share_class`), so that torch.compile sees one function and
    compiles it once, not once a layer. A copy keeps the class; `recompile` after editing the graph of one
    region by hand leaves the shared class first.

    Attributes:
        buffer_kinds: of the buffers that passes added, by local name: their kind, and what they belong to.
    """

    buffer_kinds: dict[str, tuple[str, str]]
    _unfilled: dict[str, Tensor | None]  # first values of what passes added on meta; None: zeros

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RegionModule:
        """As PyTorch does it. What `to_empty` makes of buffers on meta has their first values."""
        # Not those that were assigned since: they are what somebody loaded.
        waiting = [name for name in vars(self).get("_unfilled", ()) if self.get_buffer(name).is_meta]
        super()._apply(fn, recurse)
        for name in [name for name in waiting if not self.get_buffer(name).is_meta]:
            value = self._unfilled[name]
            self.get_buffer(name).copy_(torch.zeros(()) if value is None else value)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> RegionModule:
        # GraphModule's own copy makes a class for each module, leaves out what the graph does not read, and
        # makes every buffer persistent.
        duplicate = nn.Module.__new__(type(self))
        memo[id(self)] = duplicate
        vars(duplicate).update(copy.deepcopy(as_copied(self.__getstate__()), memo))
        duplicate._graph.owning_module = duplicate
        return duplicate

    def __reduce__(self) -> tuple[Any, ...]:
        made = [node.target.made_by for node in self._graph.nodes if hasattr(node.target, "made_by")]
        try:
            rebuild, (held, imports) = super().__reduce__()
        except ObjNotFoundError as error:
            raise PassError(
                f"the graph of this region calls what no other process can import ({error}): save the "
                "state_dict() of the model instead"
            ) from error
        return _rebuilt, (tuple(made), rebuild, (as_copied(held), imports), vars(type(self)).get("_stock"))

    def recompile(self) -> Any:
        if vars(type(self)).get("_shared", False):
            code = self._graph.python_code("self")
            if code.src == self._code:  # as when pickle asks for the code
                return code
            self.__class__ = _own_class(vars(type(self)).get("_stock"))  # type: ignore[assignment]
        return super().recompile()

    def __init_subclass__(cls, **_: Any) -> None:
        """Nothing: a model's own class may keep a list of its subclasses, of which a region's is none."""


def _rebuilt(
    made: tuple[tuple[Callable[..., object], tuple[Any, ...]], ...],
    rebuild: Callable[..., RegionModule],
    arguments: tuple[Any, ...],
    stock: type | None = None,
) -> RegionModule:
    """Unpickle a module, once the functions are made that its code imports (`made_by` of a target).

    Args:
        stock: the model's own class, where the region was the model.
    """
    for make, of in made:
        make(*of)
    held, imports = arguments
    graph = rebuild(dict(held), imports).graph  # of a module that has only what the graph reads
    module = object.__new__(_own_class(stock))
    vars(module).update(held)
    module.graph = graph
    return module


def _own_class(stock: type | None) -> type[RegionModule]:
    """A class for one module."""
    own = type("GraphModuleImpl", (RegionModule,), {"__module__": __name__})
    return own if stock is None else standing(own, stock)


def materialise(
    region: Region, generator: Callable[[str], torch.Generator], measured: Mapping[str, Tensor] | None = None
) -> RegionModule:
    """Build the module of a region. Tensors that no pass replaced are the traced module's own.

    Args:
        generator: of the first values of a new parameter, by its fully qualified name.
        measured: the results of `region.measurements`, by the same names.
    """
    old = dict(region.module.named_parameters(remove_duplicate=False))
    values = _first_values(region, old, generator, measured or {})
    module = RegionModule(nn.Module(), fx.Graph())
    module.train(region.module.training)
    for name, spec in region.parameters.items():
        kept = name in old and values.get(name) is old[name]
        parameter = old[name] if kept else _new_parameter(spec, values.get(name))
        _namespace(module, name).register_parameter(_leaf(name), parameter)
    _adopt_buffers(region, module)
    _add_buffers(region, module, values)
    for node in region.graph.nodes:
        if node.op == "call_module":
            added = region.modules.get(node.target)
            stands = added() if added else region.module.get_submodule(node.target)
            _namespace(module, node.target)._modules[_leaf(node.target)] = stands
    module._graph = region.graph  # which is compiled when it is lowered
    remember(module, region.module, region.frozen)
    return module


def _first_values(
    region: Region,
    old: Mapping[str, Tensor],
    generator: Callable[[str], torch.Generator],
    measured: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The values of all parameters by local name, and of the buffers that a pass makes along with them.

    What a pass creates on the meta device has none, and neither has what a later pass makes of that.
    """
    values = dict(old)
    with torch.no_grad():
        for new in region.created:
            sources = {name: values.pop(name) for name in new.sources if name in values}
            if len(sources) < len(new.sources) or any(tensor.is_meta for tensor in sources.values()):
                continue
            sources |= {name: measured[region.name(name)] for name in new.measured}
            values.update(new.initialise(sources, lambda name: generator(region.name(name))))
    return values


def _new_parameter(spec: ParameterSpec, value: Tensor | None) -> nn.Parameter:
    """A parameter as a pass described it; on the meta device there is no value to give."""
    tensor = torch.empty(spec.shape, dtype=spec.dtype, device=spec.device)
    if value is not None:
        with torch.no_grad():
            tensor.copy_(value)
    return nn.Parameter(tensor, requires_grad=spec.requires_grad)


def _adopt_buffers(region: Region, module: RegionModule) -> None:
    """Register the traced module's buffers, the same tensors, as persistent as they were."""
    for name, buffer in region.module.named_buffers(remove_duplicate=False):
        owner = region.module.get_submodule(name.rpartition(".")[0])
        persistent = _leaf(name) not in owner._non_persistent_buffers_set
        _namespace(module, name).register_buffer(_leaf(name), buffer, persistent=persistent)


def _add_buffers(region: Region, module: RegionModule, values: Mapping[str, Tensor]) -> None:
    """Register the buffers that passes ask for, with their first values."""
    parameters, module._unfilled = dict(module.named_parameters(remove_duplicate=False)), {}
    device = next((p.device for p in parameters.values()), torch.device("cpu"))
    for name, spec in region.buffers.items():
        buffer = torch.zeros(spec.shape, dtype=spec.dtype, device=device)
        if name in values:
            buffer.copy_(values[name])
        elif not buffer.is_meta:
            spec.reset_(buffer, parameters)
        else:
            with contextlib.suppress(KeyError), torch.device("cpu"):  # of parameters, which are to come
                module._unfilled[name] = spec.initial and spec.initial({})
        _namespace(module, name).register_buffer(_leaf(name), buffer, persistent=spec.persistent)
    module.buffer_kinds = {name: (spec.kind, spec.of) for name, spec in region.buffers.items()}


def reset_buffers_(module: RegionModule, specs: Mapping[str, BufferSpec]) -> None:
    """Give buffers that passes added their first values, as far as parameters tell.

    Args:
        specs: by local name, as in `Region.buffers`.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, spec in specs.items():
        spec.reset_(module.get_buffer(name), parameters)


def buffers_of(modules: Mapping[str, nn.Module], kind: str) -> dict[str, Tensor]:
    """The buffers of one kind in the regions among some modules, by the full name of what they belong to.

    Args:
        modules: by full name: a pipeline's regions, or `dict(model.named_modules())`.
    """
    return {
        joined(fqn, of): module.get_buffer(name)
        for fqn, module in modules.items()
        if isinstance(module, RegionModule)
        for name, (its_kind, of) in module.buffer_kinds.items()
        if its_kind == kind
    }


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A graph of its own with the same nodes and names."""
    duplicate = fx.Graph(tracer_cls=graph._tracer_cls)
    mapping: dict[fx.Node, fx.Node] = {}
    output = duplicate.graph_copy(graph, mapping)
    duplicate.output(output)
    for old, new in mapping.items():
        new.meta = copy.copy(old.meta)
    return duplicate


def _namespace(root: nn.Module, name: str) -> nn.Module:
    """The module that holds the tensor or module of a dotted name, made of plain modules where missing."""
    for part in name.split(".")[:-1]:
        if part not in root._modules:
            root.add_module(part, Inside().train(root.training))
        root = root._modules[part]  # type: ignore[assignment]
    return root


def joined(fqn: str, path: str) -> str:
    """The full name of what has a local one; the model itself has the empty name."""
    return ".".join(part for part in (fqn, path) if part)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
