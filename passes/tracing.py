"""Find the regions of a model and trace them.

A model is not traced as a whole. Its regions are the largest modules that trace cleanly and repeat: the
decoder blocks of the stock LLaMA; in a host framework's model, whose blocks take open keyword arguments and
are hooked and recorded by class, the MLPs and single linears inside them. A module that does not repeat is
a region too when nothing below it repeats.

Clean means that the graph says all that the module does: a closed signature without defaults, no control
flow on values or on an argument being None, no hand-written backward and no grad or autocast mode of its own
(tracing would drop them), no attribute written in forward, no tensor that is neither parameter nor buffer,
and every linear visible. Modules that read `self.training` stay leaves, or tracing would freeze the mode; if
such a leaf holds linears, what surrounds it is not clean and the search goes on inside.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch import fx, nn
from torch.autograd import Function
from torch.fx._symbolic_trace import _assert_is_none
from torch.fx.node import map_arg

from act24.passes.base import PassError
from act24.passes.normal_form import is_linear, linear_arguments, normalise
from act24.passes.region import ParameterSpec, Region, RegionModule


class Unclean(Exception):
    """Why a module cannot be a region."""


def trace(model: nn.Module) -> tuple[list[Region], dict[str, str]]:
    """Find the regions of a model. The model is not touched.

    Returns:
        the regions in the order in which the model lists its modules, and the modules that were looked at
        and are none, as "fqn [class]" with the reason.

    Raises:
        PassError: the model was already rewritten.
    """
    places: dict[nn.Module, list[str]] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, RegionModule):
            raise PassError(
                f"{fqn or 'this model'} was already rewritten: give all passes in one call of apply_, which "
                "plans them together"
            )
        places.setdefault(module, []).append(fqn)
    owners = _owners(model)
    unclean: dict[nn.Module, str] = {}
    found = list(_search(model, unclean))
    # A module that is shared may be a region in one place and a part of a larger one in another, where
    # nothing must take its place.
    taken = tuple(f"{fqn}." for module, _ in found for fqn in places[module])
    regions = [
        _region(module, graph, [fqn for fqn in places[module] if not fqn.startswith(taken)], owners)
        for module, graph in found
    ]
    return regions, {f"{places[m][0]} [{type(m).__name__}]": reason for m, reason in unclean.items()}


def _search(model: nn.Module, unclean: dict[nn.Module, str]) -> Iterator[tuple[nn.Module, fx.Graph]]:
    counts = Counter(type(module) for module in model.modules())
    listed = {
        child
        for module in model.modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        for child in module
    }
    repeating = {module for module in model.modules() if counts[type(module)] > 1 or module in listed}
    seen: set[nn.Module] = set()

    def visit(module: nn.Module) -> Iterator[tuple[nn.Module, fx.Graph]]:
        if module in seen:
            return
        seen.add(module)
        if isinstance(module, RegionModule):
            raise PassError(
                "this model was already rewritten: give all passes in one call, which plans them together"
            )
        below = [child for child in module.modules() if child is not module]
        composite = [
            child for child in below if child in repeating and _linears(child) and not is_linear(child)
        ]
        if module is not model and (module in repeating or not composite):
            if not _linears(module):
                return
            try:
                yield module, _trace(module)
                return
            except Unclean as reason:
                unclean[module] = str(reason)
        for child in module.children():
            yield from visit(child)

    yield from visit(model)


def _linears(module: nn.Module) -> bool:
    return any(is_linear(child) for child in module.modules())


class _Tracer(fx.Tracer):
    """Opens everything but torch.nn's modules other than Linear, and modules that read `self.training`."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if is_linear(m):
            return False
        if _reads_training(type(m)) or type(m).__module__.startswith("torch.nn."):
            if type(m) in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
                return False
            if _linears(m):
                raise Unclean(f"{type(m).__name__} reads self.training and holds linears")
            return True
        return False

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_linear(m):
            weight, bias, transposed = linear_arguments(m)
            x = args[0] if args else kwargs["input"]
            return torch.nn.functional.linear(x, weight.t() if transposed else weight, bias)
        if "forward" in vars(m):
            raise Unclean(f"the forward of {self.path_of_module(m)} was replaced")
        return super().call_module(m, forward, args, kwargs)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        self._modes = _modes()
        return super().trace(root, concrete_args)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:
            raise Unclean("computes under a grad or autocast mode of its own")
        return super().create_node(*args, **kwargs)


def _modes() -> tuple[Any, ...]:
    autocast = ((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda"))
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


def _trace(module: nn.Module) -> fx.Graph:
    """The normal form of a module.

    Raises:
        Unclean: it has none.
    """
    if is_linear(module):
        return _trace_linear(module)
    _check_signature(module)
    before = _attributes(module)
    try:
        with _refusals():
            graph = _Tracer().trace(module)
            _check_none(module, graph)
    except Unclean:
        raise
    except Exception as error:  # whatever a forward may raise when it is given a proxy
        raise Unclean(f"{type(error).__name__}: {error}") from error
    finally:
        written = _restore(module, before)
    if written:
        raise Unclean(f"forward writes {written}")
    held = {
        name
        for named in (module.named_parameters, module.named_buffers)
        for name, _ in named("", True, False)
    }
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in held:
            raise Unclean(f"reads {node.target}, neither parameter nor buffer")
    return normalise(graph, module)


def _trace_linear(module: nn.Module) -> fx.Graph:
    """A linear alone, which has no caller to be traced from."""
    graph = fx.Graph()
    x = graph.placeholder("input")
    weight = graph.get_attr("weight")
    if linear_arguments(module)[2]:
        weight = graph.call_method("t", (weight,))
    bias = graph.get_attr("bias") if module.bias is not None else None
    graph.output(graph.call_function(torch.nn.functional.linear, (x, weight, bias)))
    return graph


def _check_signature(module: nn.Module) -> None:
    forward = type(module).forward
    if hasattr(forward, "__wrapped__") or "forward" in vars(module):
        raise Unclean("its forward is decorated")
    for parameter in list(inspect.signature(forward).parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise Unclean("its forward takes open arguments")
        if parameter.default is not parameter.empty:
            # A proxy is never None, so a branch on a missing argument would be frozen the wrong way.
            raise Unclean(f"argument '{parameter.name}' of its forward has a default")


def _check_none(module: nn.Module, graph: fx.Graph) -> None:
    """Refuse a forward that asks whether an argument is None: tracing has given it a proxy, which never is.

    Traced again with None in its place, it either fails, and so would the graph, or says the same with None.
    """

    arguments = [node for node in graph.nodes if node.op == "placeholder"]
    for argument in arguments[1:]:  # the first is what the module works on
        try:
            other = _Tracer().trace(module, {argument.target: None})
        except Exception:
            continue
        if _said(other) != _said(graph, absent=argument):
            raise Unclean(f"does something else where its argument '{argument.target}' is None")


def _said(graph: fx.Graph, absent: fx.Node | None = None) -> list[Any]:
    """A graph as data that compares, whatever its nodes are called, with None for one of its inputs."""
    nodes = [node for node in graph.nodes if node.target is not _assert_is_none]
    places = {node: place for place, node in enumerate(nodes)}
    place = lambda node: None if node is absent else places[node]  # noqa: E731
    return [
        (
            node.op,
            node.op == "placeholder" or node.target,
            map_arg(node.args, place),
            map_arg(node.kwargs, place),
        )
        for node in nodes
    ]


def _reads_training(cls: type) -> bool:
    """Whether a method of the class, own or inherited up to nn.Module, mentions `.training`."""
    functions = (
        value.__code__
        for base in cls.__mro__
        if base not in (nn.Module, object)
        for value in vars(base).values()
        if inspect.isfunction(value)
    )
    return any("training" in code.co_names for function in functions for code in _codes(function))


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


@contextmanager
def _refusals() -> Iterator[None]:
    """Within, calling an autograd.Function and reading `training` raise Unclean."""

    def refuse_function(*args: Any, **kwargs: Any) -> Any:
        raise Unclean("calls an autograd.Function, whose backward tracing would drop")

    def refuse_training(module: nn.Module) -> bool:
        raise Unclean("reads self.training")

    apply = vars(Function)["apply"]
    Function.apply = refuse_function  # type: ignore[method-assign]
    # Every module has `training` in its own __dict__; a property on the class goes before that.
    nn.Module.training = property(refuse_training)  # type: ignore[assignment]
    try:
        yield
    finally:
        Function.apply = apply  # type: ignore[method-assign]
        del nn.Module.training


def _attributes(module: nn.Module) -> dict[nn.Module, tuple[dict[str, Any], dict[str, Any]]]:
    return {child: (dict(vars(child)), dict(child._buffers)) for child in module.modules()}


def _restore(module: nn.Module, before: dict[nn.Module, tuple[dict[str, Any], dict[str, Any]]]) -> str:
    """Undo what forward wrote into the modules while it ran on proxies; the names of what it wrote."""
    written = []
    for child, (attributes, buffers) in before.items():
        for now, then in ((vars(child), attributes), (child._buffers, buffers)):
            changed = [name for name in {*now, *then} if now.get(name) is not then.get(name)]
            for name in changed:
                written.append(f"{type(child).__name__}.{name}")
                if name in then:
                    now[name] = then[name]
                else:
                    del now[name]
    return ", ".join(sorted(written))


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Every name of every parameter, by the identity of the tensor."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return owners


def _region(module: nn.Module, graph: fx.Graph, fqns: list[str], owners: dict[int, list[str]]) -> Region:
    parameters = {}
    for name, tensor in module.named_parameters(remove_duplicate=False):
        own = {f"{fqn}.{name}" for fqn in fqns}
        shared = tuple(other for other in owners[id(tensor)] if other not in own)
        parameters[name] = ParameterSpec(
            tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad, shared
        )
    classes = {path: type(child).__name__ for path, child in module.named_modules(remove_duplicate=False)}
    return Region(tuple(fqns), module, graph, parameters, classes=classes)
