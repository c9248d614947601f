"""The normal form of a region's graph, and how to read it.

Every linear is a node `linear(x, weight, bias)` whose weight is a `get_attr` node under the parameter's own
name, or the transpose or a cast of one. SiLU is `silu(x)`, ReLU `relu(x)`, relu squared in any spelling
`relu2(x)`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from act24.relu2 import relu2

_MULTIPLY = (operator.mul, torch.mul, torch.multiply, "mul", "multiply")
_MATMUL = (operator.matmul, torch.matmul, "matmul", "__matmul__")
#: Methods that give the same numbers in another dtype.
_CASTS = ("to", "type", "type_as", "float", "double", "half", "bfloat16")
#: The dtypes in which a weight stays what it is; a cast to others quantises it.
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SQUARE = (torch.square, "square")
_POWER = (operator.pow, torch.pow, "pow")
_RELU = (F.relu, torch.relu, "relu")

#: Where a linear's metadata says that no pass may take it.
_RESERVED = "reserved"


def is_linear(module: nn.Module) -> bool:
    """Whether the module computes x Wᵀ + b and nothing else: nn.Linear, or transformers' Conv1D."""
    plain = type(module).forward is nn.Linear.forward or _is_conv1d(module)
    stored = module._parameters.get("weight") is not None  # a parametrised weight is computed
    return plain and stored and "forward" not in vars(module)  # as frameworks that offload replace it


def is_known_linear(module: nn.Module) -> bool:
    """Whether the module's class is torch's or transformers' own, of which no doubt is possible. Others that
    `is_linear` names may compute their weight, or do more than a Conv1D of that name."""
    known = ("torch.nn.modules.linear", "transformers.pytorch_utils")
    return is_linear(module) and type(module).__module__ in known


def is_identity(module: nn.Module) -> bool:
    """Whether the module gives what it is given, in training too, as long as nobody sets its p."""
    return type(module) is nn.Identity or (type(module) is nn.Dropout and module.p == 0)


def is_adapter(module: nn.Module) -> bool:
    """Whether the module is a layer of PEFT's: a linear with what was added to it, which PEFT switches and
    merges as long as the module stands."""
    return any(
        cls.__name__ == "BaseTunerLayer" and cls.__module__.startswith("peft.")
        for cls in type(module).__mro__
    )


def linear_arguments(module: nn.Module) -> tuple[Tensor, Tensor | None, bool]:
    """The weight, the bias, and whether the weight is stored `[in, out]`."""
    return module.weight, module.bias, _is_conv1d(module)  # type: ignore[return-value]


def _is_conv1d(module: nn.Module) -> bool:
    # GPT-2's linear, known by name: transformers is no dependency.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def normalise(graph: fx.Graph, module: nn.Module) -> None:
    """Bring a traced graph without writes (`act24.passes.graph.writes`) into normal form, in place.

    Args:
        module: what was traced; linears are opened by the tracer, activations here.
    """
    for node in list(graph.nodes):
        node.type = None  # annotations, which may be strings that pickle cannot look up
        if node.op == "call_module":
            _open_activation(graph, node, module.get_submodule(node.target))
    for node in list(graph.nodes):
        if _calls(node, _MATMUL):
            _open_product(graph, node, module)
    for node in list(graph.nodes):
        if is_call(node, F.linear):
            _positional(node, ("input", "weight", "bias"), (None, None, None))
        elif is_call(node, F.silu):
            node.args, node.kwargs = (_argument(node, 0, "input"),), {}
        elif (hidden := _squared_relu(node)) is not None:
            with graph.inserting_before(node):
                replacement = graph.call_function(relu2, (hidden,))
            replace_node(graph, node, replacement)
        elif _calls(node, _RELU) and node.target is not F.relu:
            with graph.inserting_before(node):
                replacement = graph.call_function(F.relu, (_argument(node, 0, "input"),))
            replace_node(graph, node, replacement)
    graph.lint()


def _open_activation(graph: fx.Graph, node: fx.Node, module: nn.Module) -> None:
    if type(module) is nn.Identity:
        replace_node(graph, node, node.all_input_nodes[0])
        return
    function = {nn.SiLU: F.silu, nn.ReLU: F.relu}.get(type(module))
    if function is None:
        return
    with graph.inserting_before(node):
        replacement = graph.call_function(function, (_argument(node, 0, "input"),))
    replace_node(graph, node, replacement)


def _open_product(graph: fx.Graph, node: fx.Node, module: nn.Module) -> None:
    """x @ Wᵀ and x @ W of a matrix W as a linear."""
    x, weight = (*node.args, None, None)[:2]
    if node.kwargs or not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or x.op == "get_attr":
        return
    source, turned, casts = weight, False, list[fx.Node]()
    while isinstance(source, fx.Node) and (_turns(source) or is_cast(source)):
        turned ^= _turns(source)
        casts += [source] if is_cast(source) else []
        source = source.args[0]  # type: ignore[assignment]
    if not isinstance(source, fx.Node) or source.op != "get_attr" or _ndim(module, str(source.target)) != 2:
        return
    with graph.inserting_before(node):
        stored = source
        for cast in reversed(casts):
            stored = graph.call_method(str(cast.target), (stored, *cast.args[1:]), cast.kwargs)
        stored = stored if turned else graph.call_method("t", (stored,))
        replacement = graph.call_function(F.linear, (x, stored, None))
    replace_node(graph, node, replacement)


def _turns(node: fx.Node) -> bool:
    """Whether a node is the transpose of a matrix."""
    if node.target is getattr:
        return node.args[1] in ("T", "mT")
    return node.target in ("t", torch.t) and len(node.args) == 1


def _ndim(module: nn.Module, name: str) -> int:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return parameters[name].ndim if name in parameters else 0


def _squared_relu(node: fx.Node) -> fx.Node | None:
    """The pre-activation h of relu(h)², if the node is one."""
    base, *rest = node.args or (None,)
    product = _calls(node, _MULTIPLY) and rest == [base]
    power = _calls(node, _POWER) and rest == [2]
    if not (product or power or _calls(node, _SQUARE)):
        return None
    if _calls(base, _RELU) and len(base.users) == 1:
        return _argument(base, 0, "input")
    return None


def _calls(node: Any, spellings: tuple[Any, ...]) -> TypeGuard[fx.Node]:
    """Whether something is a node that calls one of these functions or methods."""
    return (
        isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and node.target in spellings
    )


def is_product(node: Any) -> TypeGuard[fx.Node]:
    """Whether something is the elementwise product of two values, in any spelling."""
    return _calls(node, _MULTIPLY) and len(node.args) == 2


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs[name]


def _positional(node: fx.Node, names: tuple[str, ...], defaults: tuple[Any, ...]) -> None:
    given = dict(zip(names, defaults, strict=True)) | dict(zip(names, node.args, strict=False)) | node.kwargs
    node.args, node.kwargs = tuple(given[name] for name in names), {}


def replace_node(graph: fx.Graph, node: fx.Node, replacement: fx.Node) -> None:
    """Let every user of `node` use `replacement`, and remove `node` and what only it needed."""
    node.replace_all_uses_with(replacement)
    erase(graph, node)


def erase(graph: fx.Graph, node: fx.Node) -> None:
    """Remove a node without users, and then its inputs as far as they have none left; not placeholders."""
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for source in inputs:
        if not source._erased and not source.users and source.op != "placeholder":
            erase(graph, source)


def nodes_of(graph: fx.Graph, target: Callable[..., Any]) -> Iterator[fx.Node]:
    """The nodes that call a function, in order."""
    return (node for node in list(graph.nodes) if node.op == "call_function" and node.target is target)


def reserve(linear: fx.Node) -> None:
    """Keep a linear from the passes that take linears (`act24.passes.left_out`)."""
    linear.meta[_RESERVED] = True


def is_reserved(linear: fx.Node) -> bool:
    """Whether no pass may take a linear."""
    return _RESERVED in linear.meta


def is_call(node: Any, target: Callable[..., Any]) -> TypeGuard[fx.Node]:
    """Whether something is a node that calls a function."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is target


def parameter_name(argument: Any) -> str | None:
    """The local name of the parameter that an argument of a call is, or is the transpose of, or None."""
    if isinstance(argument, fx.Node) and argument.op == "call_method" and argument.target == "t":
        argument = argument.args[0]
    return str(argument.target) if isinstance(argument, fx.Node) and argument.op == "get_attr" else None


def is_cast(node: Any) -> TypeGuard[fx.Node]:
    """Whether something is a node that gives the numbers of its first argument in another dtype."""
    if not isinstance(node, fx.Node) or node.op != "call_method" or node.target not in _CASTS:
        return False
    given = (*node.args[1:], *node.kwargs.values())
    named = node.target == "type" and any(isinstance(one, str) for one in given)
    return not named and all(one in _DTYPES for one in given if isinstance(one, torch.dtype))


def _is_turned(node: Any) -> TypeGuard[fx.Node]:
    """Whether something is a node by which the normal form transposes."""
    return isinstance(node, fx.Node) and node.op == "call_method" and node.target == "t"


def readers_of(node: fx.Node) -> list[fx.Node]:
    """The users of a value that read its numbers, and not only its dtype or device."""
    return [u for u in node.users if not asks_kind(u) and (not is_cast(u) or u.args[0] is node)]


def source_name(argument: Any) -> str | None:
    """The local name of the parameter that an argument is, or is a cast or the transpose of, or None."""
    while is_cast(argument) or _is_turned(argument):
        argument = argument.args[0]
    return parameter_name(argument)


def weight_source(linear: fx.Node) -> str | None:
    """The parameter that a linear's weight is, or is a cast of."""
    return source_name(linear.args[1])


def casts_weight(linear: fx.Node) -> bool:
    """Whether a linear's weight is a cast of a parameter."""
    return weight_name(linear) is None and weight_source(linear) is not None


def cast_alike(graph: fx.Graph, linear: fx.Node, weight: fx.Node) -> fx.Node:
    """A parameter in the dtype that a linear's own weight is cast to, at the graph's point of insertion."""
    casts, argument = list[fx.Node](), linear.args[1]
    while is_cast(argument) or _is_turned(argument):
        casts += [argument] if is_cast(argument) else []
        argument = argument.args[0]
    for cast in reversed(casts):
        weight = graph.call_method(str(cast.target), (weight, *cast.args[1:]), cast.kwargs)
    return weight


def asks_kind(node: fx.Node) -> bool:
    """Whether a node asks a value for its dtype or device, and for no numbers."""
    return node.target is getattr and node.args[1] in ("dtype", "device")


def readers(graph: fx.Graph, name: str) -> int:
    """How many nodes read a parameter's values. A module that is called twice reads its weight twice."""
    own = (node for node in graph.nodes if node.op == "get_attr" and node.target == name)
    return sum(not asks_kind(user) for node in own for user in node.users)


def weight_name(linear: fx.Node) -> str | None:
    """The parameter that is a linear's weight."""
    return parameter_name(linear.args[1])


def place_of(name: str) -> str:
    """Where a parameter stands: its module; one that is not called `weight` has a place of its own."""
    return "" if name == "weight" else name.removesuffix(".weight")


def bias_name(linear: fx.Node) -> str | None:
    """The parameter that is a linear's bias."""
    return parameter_name(linear.args[2])


def is_transposed(linear: fx.Node) -> bool:
    """Whether the parameter holds the transpose of the weight."""
    weight, turned = linear.args[1], False
    while is_cast(weight) or _is_turned(weight):
        turned ^= _is_turned(weight)
        weight = weight.args[0]
    return turned


def common_path(*names: str) -> str:
    """The innermost module path above all parameters named: `mlp.up_proj.weight`, `mlp.down_proj.weight`
    give `mlp`; a single name gives its module."""
    paths = [name.split(".")[:-1] for name in names]
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
