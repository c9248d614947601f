"""What a traced graph writes in place, and the same graph without.

Passes move, fuse, repeat and replace nodes by what their values are made of, and a value that changes later
would be another one there. So no graph of a region changes a value: a write becomes a function, whose result
is what everybody reads from then on. A write that would be seen elsewhere too, by the caller or through a
view, is refused. What stays are writes into buffers, which are the module's own; `buffer_writes` names them.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._ops import OpOverload, OpOverloadPacket

from act24.passes.graph.normal_form import is_adapter
from act24.passes.graph.proxies import AUGMENTED, OWN, Unclean

#: What is as well written without the underscore: the dtype is that of the value, as long as no other tensor
#: takes part. `eq_` is not among them: it gives numbers where `eq` gives booleans.
_SAME = """
    relu sigmoid tanh elu leaky_relu square pow sqrt rsqrt exp neg abs clamp clamp_min clamp_max
    clip mul multiply add sub subtract div divide
"""

#: Functions and methods whose result is a tensor of its own. What is not listed may return a view.
_FRESH = """
    linear matmul mm bmm addmm baddbmm conv1d conv2d conv3d add sub mul multiply div truediv
    true_divide floordiv mod pow neg subtract divide rsub square sqrt rsqrt reciprocal exp expm1 log
    log1p abs sign sin cos erf round floor ceil lerp addcmul addcdiv outer relu relu2 relu6 silu
    gelu sigmoid tanh softplus elu selu celu mish leaky_relu hardtanh hardswish hardsigmoid
    logsigmoid glu softmax log_softmax clamp clamp_min clamp_max clip maximum minimum where
    masked_fill tril triu sum mean var std norm prod cumsum amax amin max min argmax argmin topk
    sort argsort gather index_select scatter scatter_add index_add index_put cat concat concatenate
    stack clone repeat one_hot embedding bincount zeros_like ones_like empty_like full_like
    rand_like randn_like zeros ones full empty arange new_zeros new_ones new_empty new_full eq ne lt
    le gt ge layer_norm rms_norm group_norm batch_norm scaled_dot_product_attention isnan isinf
    logical_and logical_or logical_not and_ or_ xor invert
"""
_FRESH_NAMES, _SAME_NAMES = frozenset(_FRESH.split()), frozenset(_SAME.split())
_FRESH_MODULES = {
    f"torch.nn.modules.{name}"
    for name in ("normalization", "batchnorm", "activation", "conv", "linear", "sparse")
}

#: What is asked of a value and is no tensor.
_FACTS = {"shape", "dtype", "device", "ndim", "layout", "itemsize", "nbytes", "is_cuda", "is_meta"}
_FACTS |= {"requires_grad", "names"}
_COUNTS = {"size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "is_floating_point"}

#: What normalisations call it that statistics are those of the batch, and running ones are renewed.
_RENEWS = ("training", "train", "use_input_stats")

_INSTEAD = "make a new value, h = h + y and not h += y"


def without_writes(graph: fx.Graph, module: nn.Module) -> None:
    """Let a traced graph compute new values in the place of writes, in place.

    Raises:
        Unclean: it writes into something that is seen elsewhere.
    """
    shares = _Shares(graph, module)
    for node in list(graph.nodes):
        value = written(node, module)
        if value is None:
            continue
        if node.target in AUGMENTED and _is_number(value):
            node.target = AUGMENTED[node.target]
            continue
        order = {other: place for place, other in enumerate(graph.nodes)}
        seen = shares.overlapping(value, before=node, order=order)
        owned = [other for other in seen if other.op in ("placeholder", "get_attr")]
        for other in owned:
            _check_owned(other, module)
        if owned:
            continue
        for other in seen - {value}:
            if late := [user for user in other.users if order[user] > order[node]]:
                raise Unclean(
                    f"writes into {value.name} in place ({_name(node)}), which {late[0].name} sees by way of "
                    f"{other.name}: {_INSTEAD}"
                )
        readers = [user for user in value.users if order[user] > order[node]]
        result = _function(graph, node, value, module)
        for user in readers:
            user.replace_input_with(value, result)
        if result is not node:
            node.replace_all_uses_with(result)
            graph.erase_node(node)
    _check_operands(graph, shares, module)


def buffer_writes(graph: fx.Graph, module: nn.Module) -> set[fx.Node]:
    """The nodes of a graph that write into buffers, and all that are views of those buffers."""
    shares = _Shares(graph, module)
    roots = {
        root
        for node in graph.nodes
        if (value := written(node, module)) is not None
        for root in shares.roots(value)
        if root.op == "get_attr"
    }
    return {node for root in roots for node in shares.overlapping(root)}


def also_writes(node: fx.Node) -> bool:
    """Whether a function that gives a value of its own also writes into what it is given: running statistics,
    the rows of an embedding above `max_norm`, or whatever an operator's schema says."""
    if node.op != "call_function":
        return False
    schema, named = _schema(node.target), dict[str, Any]()
    try:
        parameters = {} if schema else inspect.signature(node.target).parameters  # type: ignore[arg-type]
        named = {name: p.default for name, p in parameters.items()}
    except (TypeError, ValueError):  # of torch's C++ side
        schema = _schema(getattr(torch.ops.aten, _name(node), None))
    if schema is not None:
        if any(a.alias_info and a.alias_info.is_write for a in schema.arguments):
            return True
        named = {argument.name: argument.default_value for argument in schema.arguments}
    named |= {**dict(zip(named, node.args, strict=False)), **node.kwargs}
    renews = all(named.get(flag, True) is not False for flag in _RENEWS)
    running = any(isinstance(value, fx.Node) and name.startswith("running_") for name, value in named.items())
    return (running and renews) or (named.get("max_norm") is not None and "weight" in named)


def _schema(function: Any) -> Any:
    """That of an operator of torch; None: it is none."""
    if isinstance(function, OpOverloadPacket):
        function = getattr(function, function.overloads()[0])
    return function._schema if isinstance(function, OpOverload) else None


def written(node: fx.Node, module: nn.Module) -> fx.Node | None:
    """The value that a node writes into; None: it writes into none.

    Raises:
        Unclean: it writes into several, or perhaps.
    """
    name, value = _name(node), None
    if node.op == "call_module":
        leaf = _submodule(module, node)
        writes = getattr(leaf, "inplace", False) is True
    elif node.op not in ("call_function", "call_method"):
        return None
    else:
        if any(isinstance(v, fx.Node | tuple | list) for k, v in node.kwargs.items() if k == "out"):
            raise Unclean(f"{name} writes into out=…: take what it returns instead")
        writes = node.target in AUGMENTED or (name.endswith("_") and not name.endswith("__"))
        writes = writes and name not in ("and_", "or_", "not_", "is_")  # of the module operator
        if node.op == "call_function" and (place := _inplace(node.target)) is not None:
            given = node.args[place] if len(node.args) > place else node.kwargs.get("inplace", False)
            if isinstance(given, fx.Node):
                raise Unclean(
                    f"{name} writes in place or not, as {given.name} says: decide it at construction"
                )
            writes = writes or bool(given)
    if writes:
        value = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
        if not isinstance(value, fx.Node):
            raise Unclean(f"{name} writes into several values in place: {_INSTEAD}")
    return value


def _function(graph: fx.Graph, node: fx.Node, value: fx.Node, module: nn.Module) -> fx.Node:
    """What computes the same as a write, as a value of its own."""
    alone = set(node.all_input_nodes) == {value}
    base = _name(node).rstrip("_")
    with graph.inserting_before(node):
        if node.target in AUGMENTED:
            return graph.call_function(AUGMENTED[node.target], node.args)
        if node.op == "call_module":
            function = {nn.SiLU: F.silu, nn.ReLU: F.relu}.get(type(_submodule(module, node)))
            if function is not None:
                return graph.call_function(function, (value,))
        elif node.op == "call_method" and alone and base in _SAME_NAMES:
            return graph.call_method(base, node.args, node.kwargs)
        elif node.op == "call_function" and (place := _inplace(node.target)) is not None:
            args = tuple(False if index == place else arg for index, arg in enumerate(node.args))
            kwargs = {name: arg for name, arg in node.kwargs.items() if name != "inplace"}
            args = args[:place] if len(args) == place + 1 else args
            return graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        elif node.op == "call_function" and alone and base in _SAME_NAMES and hasattr(F, base):
            return graph.call_function(getattr(F, base), node.args, node.kwargs)
        copied = graph.call_method("clone", (value,))
    node.replace_input_with(value, copied)
    return node


def _check_owned(node: fx.Node, module: nn.Module) -> None:
    """Refuse writes into what is not the graph's to write to."""
    if node.op == "placeholder":
        raise Unclean(
            f"writes into its argument '{node.target}', which is its caller's: {_INSTEAD}, or {OWN}"
        )
    if node.target in dict(module.named_parameters(remove_duplicate=False)):
        raise Unclean(f"writes into its parameter {node.target}: do that between updates, or {OWN}")


def _check_operands(graph: fx.Graph, shares: _Shares, module: nn.Module) -> None:
    """Refuse linears of a buffer that is written: passes put them elsewhere in the graph."""
    beside = buffer_writes(graph, module)
    for node in graph.nodes:
        if node.target is F.linear and (read := beside & {*node.all_input_nodes}):
            raise Unclean(f"writes into {next(iter(read)).target}, which a linear reads: {OWN}")


class _Shares:
    """Which values of a graph may lie in the memory of others."""

    def __init__(self, graph: fx.Graph, module: nn.Module) -> None:
        self._graph = graph
        self._module = module

    def of(self, node: fx.Node) -> list[fx.Node]:
        """The inputs of a node whose memory its value may share."""
        name = _name(node)
        if node.op in ("placeholder", "get_attr", "output") or _is_number(node):
            return []
        if node.op == "call_module":
            leaf = _submodule(self._module, node)
            known = leaf is not None and (type(leaf).__module__ in _FRESH_MODULES or is_adapter(leaf))
            return [] if known and not getattr(leaf, "inplace", False) else node.all_input_nodes
        if written(node, self._module) is not None:
            return node.all_input_nodes[:1]
        known = node.op == "call_method" or _package(node.target) in ("torch", "_operator", "act24")
        if (known and name in _FRESH_NAMES) or (node.target is getattr and node.args[1] in _FACTS):
            return []
        return node.all_input_nodes

    def roots(self, node: fx.Node) -> Iterator[fx.Node]:
        """Where the memory of a value comes from."""
        sources = self.of(node)
        if not sources:
            yield node
        for source in sources:
            yield from self.roots(source)

    def overlapping(
        self, value: fx.Node, before: fx.Node | None = None, order: dict[fx.Node, int] | None = None
    ) -> set[fx.Node]:
        """The values that may show a write into one, itself among them.

        Args:
            before, order: only what is there before this node; and the place of each.
        """
        found, climbing, falling = {value}, [value], [value]
        while climbing:
            child = climbing.pop()
            for parent in self.of(child):
                if parent not in found:
                    found.add(parent)
                    climbing.append(parent)
                others = (u for u in parent.users if u is not child and not _apart(child, u))
                falling += [other for other in others if parent in self.of(other)]
        seen = set[fx.Node]()
        while falling:
            node = falling.pop()
            if node in seen or (before is not None and order is not None and order[node] >= order[before]):
                continue
            seen.add(node)
            falling += [user for user in node.users if node in self.of(user)]
        return found | seen


def _apart(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes take different items of a value, as q, k, v = qkv.chunk(3) does."""
    if a.target is not operator.getitem or b.target is not operator.getitem or a.args[0] is not b.args[0]:
        return False
    i, j = a.args[1], b.args[1]
    return isinstance(i, int) and isinstance(j, int) and i != j and (i < 0) == (j < 0)


def _is_number(node: fx.Node) -> bool:
    """Whether a node is a number or a shape, which nothing can write to."""
    if node.op == "call_method":
        return node.target in _COUNTS
    if node.target is getattr:
        return node.args[1] in _FACTS
    inputs = node.all_input_nodes
    arithmetic = _package(node.target) in ("_operator", "math", "builtins")
    return node.op == "call_function" and arithmetic and bool(inputs) and all(map(_is_number, inputs))


def _submodule(module: nn.Module, node: fx.Node) -> nn.Module | None:
    try:
        return module.get_submodule(str(node.target))
    except AttributeError:  # a pass has added it
        return None


@cache
def _inplace(function: Callable[..., Any]) -> int | None:
    """Which argument of a function, by position, says whether it writes in place."""
    try:
        names = [*inspect.signature(function).parameters]
    except (TypeError, ValueError):  # of torch's C++ side
        return None
    return names.index("inplace") if "inplace" in names else None


def _package(function: Any) -> str:
    """Where a function comes from; some of torch's C++ side do not say."""
    return (getattr(function, "__module__", None) or "torch").partition(".")[0]


def _name(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    name = getattr(node.target, "__name__", "")
    return name.partition(".")[0] if isinstance(node.target, OpOverload) else name
