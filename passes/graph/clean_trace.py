"""Trace one module into normal form, or say why its graph would not be the whole truth.

Clean means that the graph says all that the module does: a closed signature without defaults, no control
flow on values or on an argument being None, no hand-written backward and no grad or autocast mode of its own
(tracing would drop them), no attribute written in forward, no tensor that is neither parameter nor buffer,
and every linear visible. Modules that read `self.training` stay leaves, or tracing would freeze the mode; if
such a leaf holds linears, what surrounds it is not clean.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.autograd import Function
from torch.fx._symbolic_trace import _assert_is_none
from torch.fx.node import map_arg

from act24.passes.graph.normal_form import is_call, is_linear, linear_arguments, normalise


class Unclean(Exception):
    """Why a module cannot be a region."""


def clean_trace(module: nn.Module) -> fx.Graph:
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
        written = _restore(before)
    if written:
        raise Unclean(f"forward writes {written}")
    held = {*dict(module.named_parameters(remove_duplicate=False))}
    held |= {*dict(module.named_buffers(remove_duplicate=False))}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in held:
            raise Unclean(f"reads {node.target}, neither parameter nor buffer")
    normalise(graph, module)
    if not any(is_call(node, F.linear) for node in graph.nodes):
        raise Unclean("holds no linear")
    return graph


def matrices(module: nn.Module) -> int:
    """How many matrices a module holds that a linear may read, its own or called by function; none of
    torch's own modules but Linear, and no embeddings."""
    return sum(
        parameter is not None and parameter.ndim == 2
        for child in module.modules()
        if not is_closed(child) and not isinstance(child, nn.Embedding)
        for parameter in child._parameters.values()
    )


def is_closed(module: nn.Module) -> bool:
    """Whether a module is torch's own and neither linear nor container: norms are best left whole, and
    attention reads its children's weights past their forward."""
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return type(module).__module__.startswith("torch.nn.") and not (
        type(module) in containers or is_linear(module)
    )


class _Tracer(fx.Tracer):
    """Opens everything but torch's own modules other than Linear, and modules that read `self.training`."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if is_linear(m):
            return False
        if _reads_training(type(m)) or is_closed(m):
            if matrices(m) or any(is_linear(child) for child in m.modules()):
                raise Unclean(f"holds linears in {self.path_of_module(m)}, which cannot be opened")
            return True
        return False

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_linear(m):
            weight, bias, transposed = linear_arguments(m)
            x = args[0] if args else kwargs["input"]
            return F.linear(x, weight.t() if transposed else weight, bias)
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


def _trace_linear(module: nn.Module) -> fx.Graph:
    """A linear alone, which has no caller to be traced from."""
    graph = fx.Graph()
    x = graph.placeholder("input")
    weight = graph.get_attr("weight")
    if linear_arguments(module)[2]:
        weight = graph.call_method("t", (weight,))
    bias = graph.get_attr("bias") if module.bias is not None else None
    graph.output(graph.call_function(F.linear, (x, weight, bias)))
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
        except Unclean:
            raise
        except Exception:  # None is no value that it takes
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


def _attributes(module: nn.Module) -> dict[nn.Module, dict[str, tuple[Any, Any]]]:
    """The attributes of every module within, and the contents of those that are lists or dicts."""
    return {
        child: {name: (value, _content(value)) for name, value in vars(child).items()}
        for child in module.modules()
    }


def _content(value: Any) -> Any:
    return value.copy() if type(value) in (list, dict) else None


def _same(value: Any, content: Any) -> bool:
    if isinstance(value, dict):
        return value.keys() == content.keys() and all(value[key] is content[key] for key in content)
    return len(value) == len(content) and all(map(operator.is_, value, content))


def _restore(before: dict[nn.Module, dict[str, tuple[Any, Any]]]) -> str:
    """Undo what forward wrote into the modules while it ran on proxies; the names of what it wrote."""
    written = []
    for child, attributes in before.items():
        now = vars(child)
        for name in now.keys() - attributes.keys():
            written.append(f"{type(child).__name__}.{name}")
            del now[name]
        for name, (value, content) in attributes.items():
            if name in now and now[name] is value and (content is None or _same(value, content)):
                continue
            written.append(f"{type(child).__name__}.{name}")
            now[name] = value
            if content is not None:
                value.clear()
                value.update(content) if isinstance(value, dict) else value.extend(content)
    return ", ".join(sorted(written))
