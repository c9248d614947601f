"""Gated networks: down(act(gate(x)) * up(x)), however the two halves and the activation are spelled.

What lies between the linears is run on numbers (as in `act24.passes.graph.activation_kinds`), of several
numbers of dimensions, since `h.chunk(2, dim=2)` halves the features of some alone; whether they are halved
shows in the result, which has to have as many as `down` reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from act24.passes.graph.flow import asks_size
from act24.passes.graph.normal_form import (
    is_call,
    is_product,
    is_transposed,
    readers_of,
    source_name,
    weight_source,
)
from act24.passes.graph.region import Region

#: What gates a network, and how far a form of it may be: `x · sigmoid(1.702 x)` is 0.0203 from GELU.
_GATES: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "silu": (F.silu, 1e-3),
    "gelu": (F.gelu, 0.025),
    "sigmoid": (torch.sigmoid, 1e-3),
    "relu": (F.relu, 1e-3),
    "relu2": (lambda x: F.relu(x).square(), 1e-3),
    "tanh": (torch.tanh, 1e-3),
    "hardswish": (F.hardswish, 1e-3),
    "mish": (F.mish, 1e-3),
}
#: What needs no numbers to be known.
_USUAL: dict[Any, str] = {F.silu: "silu", nn.SiLU: "silu", F.gelu: "gelu", nn.GELU: "gelu"}
#: Rounding of the few steps that may be in bfloat16.
_ROUNDING = 0.02

#: Sizes in front of the features.
_TOKENS = ((2, 3), (3,), (2, 2, 3), ())

_DRAWS = re.compile(r"rand|drop|normal_|bernoulli|rrelu|multinomial|gumbel|poisson|exponential_|empty")
_MODULES = nn.modules.activation.__name__


@dataclass(frozen=True)
class Gated:
    """The linears of a gated network, and the product between them.

    Attributes:
        product: what `down` reads, but for dropout and a cast behind it.
        gate, up: two linears, or twice the one that computes both.
        kind: the activation of the gate.
        between: the nodes between these linears and the product, which goes away with them.
        up_first: of the rows of the one that computes both, the first half gives what is gated.
    """

    product: fx.Node
    gate: fx.Node
    up: fx.Node
    down: fx.Node
    kind: str
    between: frozenset[fx.Node]
    up_first: bool = False

    @property
    def fused(self) -> bool:
        return self.gate is self.up

    def width(self, region: Region) -> int:
        """F."""
        return region.parameters[weight_source(self.up) or ""].shape[0] // (2 if self.fused else 1)


def gated_networks(region: Region) -> Iterator[Gated]:
    """The gated networks of a region, in graph order."""
    for node in region.graph.nodes:
        if is_call(node, F.linear) and (found := _gated(region, node)):
            yield found


def end_of(region: Region, product: fx.Node) -> fx.Node:
    """The last of what stands between a product and its linear and does the same to any activation: dropout,
    and a cast to the dtype of the weight."""
    end = product
    while len(readers_of(end)) == 1 and _passes_on(region, user := readers_of(end)[0], end):
        end = user
    return end


def _passes_on(region: Region, node: fx.Node, given: fx.Node) -> bool:
    if node.op == "call_module":
        return type(region.module.get_submodule(str(node.target))) is nn.Dropout
    return node.op == "call_method" and node.target == "to" and node.args[0] is given


def _gated(region: Region, down: fx.Node) -> Gated | None:
    product: Any = down.args[0]
    while isinstance(product, fx.Node) and product.args and len(readers_of(product)) == 1:
        given: Any = product.args[0]
        if not isinstance(given, fx.Node) or not _passes_on(region, product, given):
            break
        product = given
    if not isinstance(product, fx.Node) or len(readers_of(product)) != 1:
        return None
    between = _between(region, product)
    if between is None:
        return None
    nodes, called, asked = between
    linears = (
        called[:1] if len({_what(node) for node in called}) == 1 else called
    )  # the same one, called twice
    rows = [_sizes(region, node)[0] for node in linears]
    if len(linears) == 1:
        rows = [None if rows[0] is None or rows[0] % 2 else rows[0] // 2]
    widths = {size for size in (*rows, _sizes(region, down)[1]) if size is not None}
    if len(widths) != 1 or (len(linears) == 1 and rows == [None]):
        return None
    (width,), first = widths, linears[0]
    if plain := _as_usual(region, product, linears, nodes):
        gate, up, kind = plain
        return Gated(product, gate, up, down, kind, frozenset({*nodes, product}))
    for tokens in _TOKENS:
        values = _numbers(tokens, width, len(linears))
        bound = {node: values[min(place, len(values) - 1)] for place, node in enumerate(called)}
        features = _sizes(region, first)[1] or width
        bound |= {node: torch.zeros(*tokens, features, device="cpu") for node in asked}
        result = _run(region, nodes, bound, product)
        if result is None or result.shape != (*tokens, width):
            continue
        halves = values if len(values) == 2 else values[0].chunk(2, -1)
        for which, (gate, up) in enumerate((halves, halves[::-1])):
            if kind := _kind(result, gate, up):
                pair = linears if len(linears) == 2 else [first, first]
                gated, other = pair[::-1] if which else pair
                again = (node for node in called if node not in linears)
                inside = frozenset({*nodes, *again, product})
                return Gated(product, gated, other, down, kind, inside, up_first=which == 1)
    return None


def _as_usual(
    region: Region, product: fx.Node, linears: list[fx.Node], nodes: list[fx.Node]
) -> tuple[fx.Node, fx.Node, str] | None:
    """`(gate, up, kind)` where it is spelled as everyone does, act(gate) * up, for which no number is needed:
    to plan a model of any width allocates nothing."""
    if len(nodes) != 2 or len(linears) != 2 or not is_product(product):
        return None
    (activation,) = (node for node in nodes if node is not product)
    gate = activation.args[0] if activation.args else None
    others = [node for node in linears if node is not gate]
    factors: Any = product.args
    if gate not in linears or {*factors} != {activation, *others}:
        return None
    called: Any = activation.target
    if activation.op == "call_module":
        called = type(region.module.get_submodule(str(called)))
    kind = _USUAL.get(called) if activation.op != "call_method" else None
    return (gate, others[0], kind) if isinstance(gate, fx.Node) and kind else None


def _what(linear: fx.Node) -> tuple[Any, ...]:
    """What a linear computes."""
    return (linear.args[0], weight_source(linear) or linear, source_name(linear.args[2]))


def _between(region: Region, product: fx.Node) -> tuple[list[fx.Node], list[fx.Node], list[fx.Node]] | None:
    """What a product is computed by, in graph order, the one or two linears that give all of its numbers, and
    the values that are asked for their size alone; None where there is something else."""
    nodes, linears, asked = set[fx.Node](), set[fx.Node](), set[fx.Node]()
    frontier = [product]
    while frontier:
        node = frontier.pop()
        if node in nodes or node in linears:
            continue
        if is_call(node, F.linear):
            linears.add(node)
        elif not _runs(region, node):
            return None
        else:
            nodes.add(node)
            given = node.all_input_nodes
            if asks_size(node) and not is_call(given[0], F.linear) and given[0] not in nodes:
                asked.add(given[0])
            else:
                frontier += given
    if len(linears) not in (1, 2):
        return None
    ordered = [[n for n in region.graph.nodes if n in some] for some in (nodes, linears, asked - nodes)]
    return ordered[0], ordered[1], ordered[2]


def _runs(region: Region, node: fx.Node) -> bool:
    """Whether a node can be run by itself: it draws nothing, and reads no parameter."""
    if node.op == "call_module":
        called = region.module.get_submodule(str(node.target))
        return type(called).__module__ == _MODULES and not any(True for _ in called.parameters())
    if node.op not in ("call_function", "call_method"):
        return False
    name = str(getattr(node.target, "__name__", node.target))
    known = str(getattr(node.target, "__module__", None)).partition(".")[0]
    ours = node.op == "call_method" or known in ("torch", "_operator", "builtins", "math", "None")
    return ours and _DRAWS.search(name) is None


def _sizes(region: Region, linear: fx.Node) -> tuple[int | None, int | None]:
    """`(out, in)`, each None where no plain parameter says it."""
    name = weight_source(linear)
    if name not in region.parameters:
        return None, None
    rows, columns = region.parameters[name].shape
    return (columns, rows) if is_transposed(linear) else (rows, columns)


def _numbers(tokens: tuple[int, ...], width: int, count: int) -> list[Tensor]:
    """What the linears give: of both halves every number is another, and none of them is small."""
    size = width * torch.Size(tokens).numel()
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.rand(4, size, dtype=torch.float64, device="cpu", generator=generator)
    signs = torch.where(
        drawn[2:] < 0.4, -1.0, 1.0
    )  # more of one than of the other: their mean is not 0 either
    gate, up = (one.view(*tokens, width) for one in signs * (0.1 + 6 * drawn[:2]))
    return [gate, up] if count == 2 else [torch.cat([gate, up], -1)]


def _run(
    region: Region, nodes: list[fx.Node], bound: dict[fx.Node, Tensor], product: fx.Node
) -> Tensor | None:
    values: dict[fx.Node, Any] = dict(bound)
    try:
        for node in nodes:
            args, kwargs = map_arg(node.args, values.__getitem__), map_arg(node.kwargs, values.__getitem__)
            function: Any = node.target
            if node.op == "call_module":
                function = region.module.get_submodule(str(node.target))
            elif node.op == "call_method":
                function = getattr(torch.Tensor, str(node.target))
            values[node] = function(*args, **kwargs)
        result = values[product]
        return result if isinstance(result, Tensor) and result.is_floating_point() else None
    except Exception:  # a number of dimensions, or values, that these nodes are not made for
        return None


def _kind(result: Tensor, gate: Tensor, up: Tensor) -> str:
    """What gates `up`, by what became of both, or the empty string."""
    factor = result.double() / up
    for kind, (function, far) in _GATES.items():
        expected = function(gate)
        if bool(((factor - expected).abs() < far + _ROUNDING * expected.abs()).all()):
            return kind
    return ""
