"""Which nodes are activations, and which one a graph computes, however it is spelled: `transformers` alone
writes GELU in half a dozen ways, most of them a handful of products. So the nodes are run on numbers, and
those are compared."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from act24.relu2 import relu2

#: torch's activations, by their names as functions and methods; the last are gates too, of anything.
_ACTIVATIONS = (
    "relu",
    "relu6",
    "elu",
    "selu",
    "celu",
    "gelu",
    "silu",
    "mish",
    "leaky_relu",
    "prelu",
    "rrelu",
)
_ACTIVATIONS += (
    "hardswish",
    "hardtanh",
    "hardshrink",
    "softshrink",
    "tanhshrink",
    "threshold",
    "tanh",
    "glu",
)
_GATES = ("sigmoid", "hardsigmoid", "logsigmoid", "softplus", "softsign")


def _spelled(names: tuple[str, ...]) -> set[Any]:
    """The functions and methods of some names, in place too."""
    both = {spelled for name in names for spelled in (name, f"{name}_")}
    return both | {getattr(where, n) for where in (F, torch) for n in both if hasattr(where, n)}


_ACTIVATION_TARGETS, _GATE_TARGETS = _spelled(_ACTIVATIONS) | {relu2}, _spelled(_GATES)
_ACTIVATION_MODULES = nn.modules.activation.__name__
_GATE_MODULES = (nn.Sigmoid, nn.Hardsigmoid, nn.LogSigmoid, nn.Softplus, nn.Softsign)
_NO_ACTIVATIONS = (nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin, nn.MultiheadAttention)
_NAMED = re.compile(r"[er]lu|activation|swish|mish|tanh", re.I)

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


def activates(node: fx.Node, module: nn.Module, gates: bool = True) -> bool:
    """Whether a node is an activation: torch's, or a module that stays one call and is named like one.

    Args:
        module: whose graph it is.
        gates: count sigmoids and the like, which stand at the end of what is no network too.
    """
    if node.op != "call_module":
        return node.target in _ACTIVATION_TARGETS or (gates and node.target in _GATE_TARGETS)
    called = module.get_submodule(str(node.target))
    if isinstance(called, _GATE_MODULES):
        return gates
    if any(cls.__module__ == _ACTIVATION_MODULES for cls in type(called).__mro__):
        return not isinstance(called, _NO_ACTIVATIONS)
    own = not type(called).__module__.startswith("torch.")
    return own and _NAMED.search(type(called).__name__) is not None


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
