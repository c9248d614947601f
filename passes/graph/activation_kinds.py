"""Which activation a graph computes, however it is spelled: `transformers` alone writes GELU in half a dozen
ways, most of them a handful of products. So the nodes are run on numbers, and those are compared."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

#: What gates have, and how far a form of each may be from it: `x · sigmoid(1.702 x)` is 0.0203 from GELU.
_KINDS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "silu": (F.silu, 1e-3),
    "gelu": (F.gelu, 0.025),
}

#: Functions and methods that work on each number by itself, and draw none.
_NAMES = ("add", "sub", "mul", "multiply", "div", "true_divide", "neg", "pow", "square", "exp", "erf", "tanh")
_NAMES += ("sigmoid", "clamp", "clip")
_BY_NUMBER: set[Any] = {*_NAMES, "float", "double", "to", "type_as"}
_BY_NUMBER |= {getattr(torch, name) for name in _NAMES}
_BY_NUMBER |= {operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow}
_BY_NUMBER |= {F.gelu, F.silu, F.tanh, F.sigmoid, F.hardtanh, F.softplus}
_MODULES = (nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus)


@dataclass(frozen=True)
class ActivationKind:
    """An activation of one value.

    Attributes:
        kind: `"silu"` or `"gelu"`, in any of its forms.
        source: what it is an activation of.
        nodes: that compute it, its own among them.
    """

    kind: str
    source: fx.Node
    nodes: frozenset[fx.Node]


def activation_kind(value: object, module: nn.Module) -> ActivationKind | None:
    """Which activation gives a value, if one that gates have does.

    Args:
        module: whose graph it is.
    """
    if kind := _of_one_node(value, module):
        assert isinstance(value, fx.Node)
        return ActivationKind(kind, value.all_input_nodes[0], frozenset({value}))
    frontier, nodes, sources = [value], dict[fx.Node, None](), dict[fx.Node, None]()
    while frontier:
        node = frontier.pop()
        if not isinstance(node, fx.Node) or node in nodes:
            continue
        if _by_number(node, module):
            nodes[node] = None
            frontier += node.all_input_nodes
        else:
            sources[node] = None
    if not nodes or len(sources) != 1:
        return None
    (source,) = sources
    kind = _kind(source, nodes, module)
    return ActivationKind(kind, source, frozenset(nodes)) if kind else None


def activations(graph: fx.Graph, module: nn.Module) -> Iterator[ActivationKind]:
    """The activations in a graph, each as a whole."""
    for node in graph.nodes:
        ends = any(not _by_number(user, module) for user in node.users)
        if ends and (found := activation_kind(node, module)) is not None:
            yield found


def _of_one_node(value: object, module: nn.Module) -> str:
    """Which activation a node is that says it itself, or the empty string."""
    if not isinstance(value, fx.Node) or len(value.all_input_nodes) != 1:
        return ""
    if value.op == "call_module":
        return "gelu" if type(module.get_submodule(str(value.target))) is nn.GELU else ""
    functions: dict[Any, str] = {F.silu: "silu", F.gelu: "gelu"}
    return functions.get(value.target, "") if value.op == "call_function" else ""


def _by_number(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))) in _MODULES
    if node.target is getattr:
        return node.args[1] == "dtype"
    return node.op in ("call_function", "call_method") and node.target in _BY_NUMBER


def _kind(source: fx.Node, nodes: dict[fx.Node, None], module: nn.Module) -> str:
    x = torch.linspace(-6, 6, 49, dtype=torch.float64, device="cpu")
    values: dict[fx.Node, Any] = {source: x}
    last = source
    try:
        for node in (n for n in source.graph.nodes if n in nodes):
            args, kwargs = map_arg(node.args, values.__getitem__), map_arg(node.kwargs, values.__getitem__)
            function: Any = node.target
            if node.op == "call_module":
                function = module.get_submodule(str(node.target))
            elif node.op == "call_method":
                function = getattr(torch.Tensor, str(node.target))
            values[last := node] = function(*args, **kwargs)
        y = values[last].to(x)
        return next((k for k, (of, far) in _KINDS.items() if float((of(x) - y).abs().max()) < far), "")
    except Exception:  # an argument that this vector does not take: no activation of it then
        return ""
