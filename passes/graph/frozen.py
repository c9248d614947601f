"""What tracing has read and a graph no longer reads: numbers, flags and settings of the opened modules.

Plain values of a module stay readable where the module stood. To write them raises, since nothing would come
of it; those that lie elsewhere, in an object that a module holds, in its class, in a closure or in a global
(`act24.passes.graph.watched`), or in a module that stands where it was and that a pass computes as a function
(`opened_values`), are compared whenever the model or a region is called (`act24.passes.compared`), the
model lowered, or an update begun. A model that torch.compile made one graph of compares when it is lowered or
an update begins, for a comparison would break the graph. A copy of the model compares nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from act24.errors import PassError
from act24.passes.graph.classes import class_attributes
from act24.passes.graph.watched import INTERNAL, PLAIN, Fact, Frozen


def as_copied(held: Mapping[str, Any]) -> dict[str, Any]:
    """What a copy of a region holds: where a hook of its state has one that follows a copy (`of_copy`), it
    comes before every forward.

    Args:
        held: what the region itself holds, by name.
    """
    before = OrderedDict(held["_forward_pre_hooks"])
    for hook in held["_state_dict_pre_hooks"].values():
        if (instead := hook.of_copy() if hasattr(hook, "of_copy") else None) is not None:
            before[RemovableHandle(before).id] = instead
    return {**held, "_forward_pre_hooks": before}


def plain_values(module: nn.Module) -> dict[str, Any]:
    """The plain values among the attributes of a module and its class, by name."""
    held = {**dict(reversed([*class_attributes(type(module))])), **vars(module)}
    return {name: v for name, v in held.items() if name not in INTERNAL and isinstance(v, PLAIN)}


#: Of torch's modules, the dictionaries of hooks that a call runs.
_RUN = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def opened_values(region: nn.Module, path: str, name: str) -> Iterator[Fact]:
    """What a pass has read in a module that stays where it is, and that the graph around it does not call:
    which module it is, its plain values, its forward, and that it has no hooks.

    Args:
        path: of the module in the region.
        name: its full one.
    """
    module = region.get_submodule(path)
    yield Fact(name, region, tuple(("attribute", part) for part in path.split(".")), module)
    shapes = {n: v for n, v in vars(module).items() if n not in INTERNAL and isinstance(v, tuple)}
    absent = dict.fromkeys(n for n, p in module._parameters.items() if p is None)
    for n, value in {**plain_values(module), **shapes, **absent, "forward": module.forward}.items():
        yield Fact(f"{name}.{n}", module, (("attribute", n),), value)
    for n in _RUN:
        text = f"the number of {n.strip('_')} of {name}"
        yield Fact(text, module, (("attribute", n), ("length", "")), 0)


def attribute_names(module: nn.Module) -> set[str]:
    """The names of everything that a module and its class hold."""
    held = {*vars(module), *module._modules, *module._parameters}
    return {*held, *(name for name, _ in class_attributes(type(module)))} - INTERNAL


#: How linears call the sizes of their weight, which a pass may change.
SIZES = ("out_features", "in_features")


class Remains(nn.Module):
    """What stands where a module was opened: its tensors, the modules in it that stayed, and its plain
    values, which can be read, not written. It is a region, or lies inside of one (`Inside`)."""

    def forward(self, *_: Any, **__: Any) -> Any:
        """Refuse: a graph reads these tensors in another way."""
        raise PassError(
            f"a {vars(self).get('_kind', 'module')} that a pass has opened cannot be called by itself: the "
            "module around it is one graph, which may compute something else with its tensors. Call that "
            "one, or leave it out with ignore=[…]"
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in vars(self).get("_opened", ()):
                raise
            raise AttributeError(
                f"{name} of a {vars(self)['_kind']} is not there: a pass has made one graph of the module, "
                "which has its parameters and is called as before. Use it before apply_, or leave the module "
                "out with ignore=[…]"
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self._refuse_to_hold(name, value)
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As a module does it.

        Raises:
            PassError: the graph does not read it.
        """
        self._refuse_to_hold(name, param)
        super().register_parameter(name, param)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As a module does it.

        Raises:
            PassError: the graph does not read it.
        """
        self._refuse_to_hold(name, tensor)
        super().register_buffer(name, tensor, persistent)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As a module does it, and `register_module` too.

        Raises:
            PassError: the graph does not call it.
        """
        self._refuse_to_hold(name, module)
        super().add_module(name, module)

    def _replicate_for_data_parallel(self) -> NoReturn:
        """As nn.DataParallel calls it.

        Raises:
            PassError: no pipeline would know the replicas, which are others in every forward.
        """
        kind = vars(self).get("_kind", "module")
        raise PassError(
            f"nn.DataParallel copies a {kind} of a model that passes have rewritten in every forward, and no "
            "pipeline knows the copies: take torch.nn.parallel.DistributedDataParallel, one process a GPU"
        )

    def _refuse_to_hold(self, name: str, value: Any) -> None:
        """Check that a graph sees what is to have a name here."""
        stood = vars(self).get("_modules", {}).get(name)
        if isinstance(stood, Remains) and isinstance(value, nn.Module) and value is not stood:
            kind = vars(self).get("_kind", "module")
            raise PassError(
                f"a {type(value).__name__} in the place of {name} would not be called: a pass has made one "
                f"graph of the {kind} around it, which reads the tensors of {name}. Put it "
                "there first, and apply the passes then"
            )
        new = isinstance(value, nn.Module) and name not in self._modules
        if new and vars(self).get("_lists", False):
            raise PassError(
                f"{name} of a {vars(self)['_kind']} would not be called: it was traced as a whole. Put it "
                "there before apply_"
            )
        if name in vars(self).get("_opened", ()) and not _unchanged(self, name, value):
            kind = vars(self)["_kind"]
            raise PassError(
                f"{name} of a {kind} cannot be set any more: the module was traced, and its graph does not "
                "read it. Set it before apply_"
            )

    def _remember(self, module: nn.Module, frozen: Frozen) -> None:
        """Be what remains of a module."""
        held = {*dir(type(self)), *vars(self)}
        vars(self).update({n: v for n, v in plain_values(module).items() if n not in held})
        if isinstance(module, nn.Linear) and self._parameters.get("weight") is not None:
            vars(self).update(zip(SIZES, self.weight.shape, strict=True))
        here = self._modules.keys() | self._parameters.keys() | self._buffers.keys()
        # What its forward asked for and did not find is frozen too.
        vars(self)["_opened"] = frozenset((attribute_names(module) | frozen.names) - here - held)
        vars(self)["_kind"] = type(module).__name__
        vars(self)["_lists"] = isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)


class Interpreted(fx.GraphModule):
    """A graph module that says so where torch.export, of which it is the model, runs its graph: it calls no
    hook then."""

    @property
    def graph(self) -> fx.Graph:
        if torch.compiler.is_exporting():
            for hook in self._forward_pre_hooks.values():
                if hasattr(hook, "before_export"):
                    hook.before_export()
        return self._graph

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        fx.GraphModule.graph.__set__(self, graph)


class _Parameters(dict[str, nn.Parameter | None]):
    """Those of what remains of a module: taken away by their names as attributes, or not at all."""

    def __delitem__(self, name: str) -> None:
        raise PassError(
            f"{name} on what is left inside of a traced module cannot be taken away, as weight_norm does: "
            "its graph reads it. Take torch.nn.utils.parametrizations.weight_norm, normalise before apply_, "
            "or leave the module out with ignore=[…]"
        )


class Inside(Remains):
    """What remains of a module inside of a region. Nothing calls it, so that no hook of its forward or
    backward would fire, and nothing that is new here would be read."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":
            raise PassError(self._never("a forward that is set on", "run"))
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in self._parameters:
            self._parameters.pop(name)
        else:
            super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As for `Remains`; a new one, as `prune` and `spectral_norm` make it, is refused."""
        taken = name.removesuffix("_orig")
        if name != taken and taken in vars(self).get("_names", ()) and not hasattr(self, taken):
            self._parameters[taken] = param  # by spectral_norm, which has taken it away before
            for other in [n for n in vars(self)["_names"] if n in self._parameters]:
                self._parameters[other] = self._parameters.pop(other)
        self._refuse_new(name)
        super().register_parameter(name, param)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As for `Remains`; a new one is refused."""
        self._refuse_new(name)
        super().register_buffer(name, tensor, persistent)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As for `Remains`; a new one is refused."""
        self._refuse_new(name)
        super().add_module(name, module)

    def _refuse_new(self, name: str) -> None:
        if name not in vars(self).get("_names", (name,)):
            raise PassError(
                f"{name} on what is left of a {vars(self)['_kind']} would not be read: a pass has made one "
                "graph of the module around it. Register, prune or normalise before apply_, or leave that "
                "one out with ignore=[…]"
            )

    def _never(self, what: str, verb: str) -> str:
        kind = vars(self).get("_kind", "module")
        return (
            f"{what} what is left of a {kind} would never {verb}: a pass has made one graph of the module "
            "around it. Register hooks on that one, a RegionModule, or leave that one out with ignore=[…]"
        )

    def _remember(self, module: nn.Module, frozen: Frozen) -> None:
        super()._remember(module, frozen)
        vars(self)["_names"] = (*self._modules, *self._parameters, *self._buffers)
        vars(self)["_parameters"] = _Parameters(self._parameters)


def _refuses(name: str) -> Any:
    def refuses(self: Inside, *_: Any, **__: Any) -> Any:
        raise PassError(self._never(f"{name} on", "fire"))

    return refuses


#: Hooks that a module runs where it is called, or where a gradient passes through it.
CALLED = (
    "register_forward_pre_hook",
    "register_forward_hook",
    "register_full_backward_pre_hook",
    "register_full_backward_hook",
    "register_backward_hook",
)

for _name in CALLED:
    setattr(Inside, _name, _refuses(_name))


def standing(region_class: type, stock: type) -> type:
    """The class of a model that has itself become a region: the region's forward, and otherwise the methods
    of the model's own class, of which it is an instance all the same.

    Args:
        region_class: with the forward.
        stock: the model's own.
    """
    own = ("__module__", "__qualname__", "__doc__")
    members: dict[str, Any] = {name: getattr(stock, name) for name in own}
    members |= {name: _refused(name) for name in _CHANGES if hasattr(stock, name)}
    # Who makes another one of this class means a stock model.
    members |= {
        "__new__": lambda _, *args, **kwargs: stock(*args, **kwargs),
        "_shared": True,
        "_stock": stock,
    }
    return type(stock)(stock.__name__, (region_class, stock), members)


#: Methods of containers that change what they hold, and so would change nothing.
_CHANGES = ("append", "extend", "insert", "pop", "__setitem__", "__delitem__", "__iadd__", "__imul__")


def _refused(name: str) -> Any:
    def refused(self: nn.Module, *_: Any, **__: Any) -> Any:
        raise PassError(
            f"{name} of a {type(self).__name__} would change nothing: it was traced as a whole. Call it "
            "before apply_"
        )

    return refused


def become_(model: nn.Module, module: Remains, stock: nn.Module, frozen: Frozen) -> None:
    """Let a model itself be the module of its region: with that one's tensors and forward, and with all else
    that the model holds and has methods for.

    Args:
        stock: what the model was, another object.
        frozen: what its graph has in it.
    """
    held = vars(module)
    known = {*INTERNAL, *held, "_compiled_call_impl"}
    kept = {n: v for n, v in [*vars(stock).items()] if n not in known and not _has_modules(v)}
    vars(model).clear()
    vars(model).update({**kept, **held})
    if isinstance(stock, nn.Sequential):  # whose modules are counted, those too of which nothing remains
        remains = {name: held["_modules"].get(name) for name in stock._modules}
        for name in [name for name, m in remains.items() if m is None]:
            remains[name] = left = Inside()
            left._remember(stock._modules[name], frozen)
        vars(model)["_modules"] = remains
    if not frozen.dynamic:  # methods may write what the forward does not read
        read = frozen.names | stock._modules.keys()
        vars(model)["_opened"] = held["_opened"] & read
    of_fx = isinstance(stock, fx.GraphModule)  # as every region is
    model.__class__ = type(module) if of_fx else standing(type(module), type(stock))


def refuse_name_clashes(stock: nn.Module, region: Remains) -> None:
    """Check that a model that is to become a region has no name that regions need.

    Args:
        region: any.

    Raises:
        PassError: names the first.
    """
    if isinstance(stock, fx.GraphModule):
        return
    needed = {*dir(region)} - {*dir(nn.Module())}
    for name in sorted(needed & {*dir(stock)}):
        raise PassError(
            f"the model [{type(stock).__name__}] has a '{name}', and so does every traced module: rename it, "
            "or put the model into another one as a part of it"
        )


def _has_modules(value: Any, depth: int = 3) -> bool:
    """Whether a value is or holds modules or parameters, which are others in a rewritten model."""
    if isinstance(value, nn.Module | nn.Parameter):
        return True
    listed = isinstance(value, dict | list | tuple | set)
    held = [*(value.values() if isinstance(value, dict) else value)] if listed else []
    return depth > 0 and any(_has_modules(one, depth - 1) for one in held)


def _unchanged(module: nn.Module, name: str, value: Any) -> bool:
    before = vars(module).get(name)
    return type(before) is type(value) and before is not None and bool(before == value)


def remember(remains: nn.Module, module: nn.Module, frozen: Frozen) -> None:
    """Let what stands in a module's place, and all in it that stands for what was opened, remember it."""
    stands = dict(remains.named_modules(remove_duplicate=False))
    for path, opened in module.named_modules(remove_duplicate=False):
        if isinstance(stands.get(path), Remains):
            stands[path]._remember(opened, frozen)  # type: ignore[operator]
