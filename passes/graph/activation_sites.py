"""Where relu² or relu stands in a graph, dense or already 2:4, and under which name.

A site is named by the innermost module above the linears around it: `mlp` for a feed-forward network,
`self_attn.q_proj` for the bottleneck inside a factorised projection. Where several sites have that name, each
is named by the linear in front of it (`mlp.first_up`, `mlp.second_up`) or behind it; and where a module is
called several times, which gives sites with the same linears, by the number of the call too
(`mlp.call_1`, `mlp.call_2`). Names are given once, to the dense graph, and stay with the node that takes an
activation's place, so that state kept under them outlives a change of pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from act24.errors import PassError
from act24.fp8.linear import linear_fp8
from act24.passes.graph.flow import PRODUCTS, mixing_products, of_inputs
from act24.passes.graph.last_dimension import keeps_last, meets_features
from act24.passes.graph.normal_form import (
    casts_weight,
    common_path,
    is_adapter,
    is_call,
    is_identity,
    is_transposed,
    parameter_name,
    readers_of,
    source_name,
    weight_source,
)
from act24.passes.graph.region import Region
from act24.relu2 import relu2
from act24.sparse24.feed_forward.operation import activation24
from act24.sparse24.pattern.token_wise import Function
from act24.sparse24.weight.linear24 import linear24

#: A buffer at the root of a region: True where a token is padding, one value a token. A scalar, which is how
#: it starts, says that there is none; the shell puts another tensor in its place for each micro-batch.
PADS = "pad_rows"

#: Where a node's metadata has the name of its site.
_SITE = "activation_site"

#: Why the relu in attention without softmax is no site.
OF_ATTENTION = "its relu is of what attention multiplies, and no network's: leave it"

#: Why the relu of a router is left alone, and of what biases attention's scores.
OF_ROUTER = "its relu is a router's: name it in targets to take it"
OF_BIAS = "its relu is of a bias of attention's scores: name it in targets to take it"

_FUNCTIONS: dict[object, Function] = {relu2: "relu2", F.relu: "relu"}


@dataclass(frozen=True)
class ActivationSite:
    """A dense relu² or relu.

    Attributes:
        path: its name, local to the region.
        node: the activation.
        function: which of the two.
        before: the linear that feeds nothing else, or None.
        after: the linear that alone reads it, or None. An nn.Dropout with p = 0 may lie between.
        width: number of features, None where no linear tells.
        width_in, width_out: what `before` reads and `after` writes, None where it is missing.
        parameters: elements in the weights and biases of `before` and `after`.
    """

    path: str
    node: fx.Node
    function: Function
    before: fx.Node | None
    after: fx.Node | None
    width: int | None
    width_in: int | None
    width_out: int | None
    parameters: int

    @property
    def hidden(self) -> fx.Node:
        """The pre-activation."""
        return self.node.args[0]  # type: ignore[return-value]


def activation_sites(region: Region) -> Iterator[ActivationSite]:
    """The dense sites of a region, in graph order.

    A linear between two activations, as in a feed-forward network whose projections have bottlenecks,
    belongs to the first, whose product with it can be 2:4.
    """
    taken: set[fx.Node] = set()
    name_sites(region)
    for node in list(region.graph.nodes):
        if node.op != "call_function" or node.target not in _FUNCTIONS:
            continue
        if obstacle(region, node):
            continue
        source, last = node.args[0], node
        while drops_nothing(region, source) and len(source.users) == 1:
            source = source.all_input_nodes[0]
        while len(last.users) == 1 and drops_nothing(region, user := next(iter(last.users))):
            last = user
        users = readers_of(last)
        before = source if _is_plain(source) and len(source.users) == 1 else None
        after = users[0] if len(users) == 1 and _is_plain(users[0]) else None
        if after is not None and after.args[0] is not last:
            after = None
        width = _features(region, source, 0) if is_call(source, F.linear) else _adapted(region, source)
        if width is None and after is not None:
            width = _features(region, after, 1)
        if before in taken:
            before = None
        taken |= {linear for linear in (before, after) if linear is not None}
        names = [parameter_name(arg) for n in (before, after) if n is not None for arg in n.args[1:]]
        parameters = sum(region.parameters[name].numel() for name in names if name in region.parameters)
        function = _FUNCTIONS[node.target]
        width_in = None if before is None else _features(region, before, 1)
        width_out = None if after is None else _features(region, after, 0)
        yield ActivationSite(
            site_path(node), node, function, before, after, width, width_in, width_out, parameters
        )


def _is_plain(node: fx.Node) -> bool:
    """Whether a node is a linear that the operation can take: it reads weights as they are."""
    return is_call(node, F.linear) and not casts_weight(node)


def drops_nothing(region: Region, node: Any) -> bool:
    """Whether something is a node that calls a module which gives what it is given."""
    called = isinstance(node, fx.Node) and node.op == "call_module" and node.target not in region.modules
    return called and is_identity(region.module.get_submodule(str(node.target)))


def is_activation(node: fx.Node) -> bool:
    """Whether a node is an activation, dense or 2:4."""
    return node.op == "call_function" and (node.target in _FUNCTIONS or node.target is activation24)


def function_of(node: fx.Node) -> Function:
    """Which function a dense activation is."""
    return _FUNCTIONS[node.target]


def site_path(node: fx.Node) -> str:
    """The name of the site of an activation, dense or 2:4, that `name_sites` has seen."""
    return node.meta[_SITE]


def add_site_buffer(
    region: Region,
    path: str,
    kind: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    persistent: bool = False,
    initial: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
) -> str:
    """Let a site have a buffer (`Region.add_buffer`); its name, local to the region."""
    name = f"{path}.{kind}" if path else kind
    region.add_buffer(name, shape, dtype, persistent, initial, kind=kind, of=path)
    return name


def keep_site(old: fx.Node, new: fx.Node) -> None:
    """Let the node that takes an activation's place have the name of its site."""
    new.meta[_SITE] = old.meta[_SITE]


def name_sites(region: Region) -> None:
    """Give every activation of a region a name of its own, which it then keeps.

    Raises:
        PassError: two of them would have one name.
    """
    nodes = [node for node in region.graph.nodes if is_activation(node)]
    if all(_SITE in node.meta for node in nodes):
        return
    around = {node: _around(node) for node in nodes}
    names = {node: common_path(*up, *down) for node, (up, down) in around.items()}
    names = _told_apart(names, lambda node: common_path(*around[node][0][:1]))
    names = _told_apart(names, lambda node: common_path(*around[node][1][:1]))
    for same in _of_one_name(names):
        for number, node in enumerate(same, 1):
            call = f"call_{number}"
            names[node] = f"{names[node]}.{call}" if names[node] else call
    names = {node: node.meta.get(_SITE, name) for node, name in names.items()}
    for same in _of_one_name(names):
        raise PassError(
            f"{region.name(names[same[0]])} would be the name of {len(same)} activations, whose scales, "
            "seeds and statistics could not be told apart: give the linears around them modules of their own"
        )
    for node, name in names.items():
        node.meta[_SITE] = name


def _told_apart(names: dict[fx.Node, str], other: Callable[[fx.Node], str]) -> dict[fx.Node, str]:
    """The names, with another one for nodes that share theirs, where that tells them apart."""
    names = dict(names)
    for same in _of_one_name(names):
        others = [other(node) for node in same]
        if len(set(others)) > 1 and all(others):
            names.update(zip(same, others, strict=True))
    return names


def _of_one_name(names: dict[fx.Node, str]) -> list[list[fx.Node]]:
    """The groups of nodes that share a name, in graph order."""
    groups: dict[str, list[fx.Node]] = {}
    for node, name in names.items():
        groups.setdefault(name, []).append(node)
    return [group for group in groups.values() if len(group) > 1]


def _around(node: fx.Node) -> tuple[list[str], list[str]]:
    """The weights of the nearest linears in front of an activation and behind it."""
    weights = node.args[1:5:2] if node.target is activation24 else (None, None)
    up, down = ([name] if (name := parameter_name(weight)) else None for weight in weights)
    return up or _reach(node, up=True), down or _reach(node, up=False)


def pads_node(region: Region) -> fx.Node:
    """The region's padding buffer as a node at the current point of insertion."""
    region.add_buffer(PADS, (), torch.bool, persistent=False)
    return region.graph.get_attr(PADS)


def obstacle(region: Region, node: fx.Node) -> str:
    """Why an activation is no site, or the empty string: its last dimension has to be a linear's features.
    So no convolution and no product of attention's comes first on either side, and on one a linear."""
    mixing, made, reached = mixing_products(region.graph), of_inputs(region.graph), False
    widths = {width for n in region.graph.nodes for width in _widths(region, n)}
    for up in (True, False):
        frontier, seen = [(node, True)], {(node, True)}
        while frontier:
            current, straight = frontier.pop()
            for other in current.all_input_nodes if up else readers_of(current):
                step = (other, straight and keeps_last(other, region.module, widths))
                if step in seen or other.op in ("placeholder", "get_attr", "output"):
                    continue
                if _is_convolution(region, other):
                    return "its relu stands between convolutions, whose features lie elsewhere: leave it"
                if other in mixing:
                    return OF_ATTENTION
                seen.add(step)
                turned = other.target in PRODUCTS and made.issuperset(other.all_input_nodes)
                if not turned and _reads_weight(region, other):
                    reached |= straight and meets_features(other, None if up else current, made)
                else:
                    frontier.append(step)
    return "" if reached else "its relu stands at no linear whose features it has: leave it"


def _reads_weight(region: Region, node: fx.Node) -> bool:
    """Whether a node multiplies with a weight, or is a module that does."""
    if node.op == "call_module":
        called = region.module.get_submodule(str(node.target))
        return is_adapter(called) or isinstance(called, nn.Linear)
    return node.target in (F.linear, linear_fp8) or node.target in PRODUCTS or bool(read_weights(node))


def _is_convolution(region: Region, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(region.module.get_submodule(str(node.target)), nn.modules.conv._ConvNd)
    return node.target in (F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d)


def read_weights(node: fx.Node) -> list[str]:
    """The weights that a linear, or the fused operation, reads."""
    positions = {F.linear: (1,), linear24: (1,), activation24: (1, 3)}.get(node.target, ())  # type: ignore[arg-type]
    return [name for position in positions if (name := source_name(node.args[position]))]


def _reach(node: fx.Node, up: bool) -> list[str]:
    """The weights of the nearest linears on one side."""
    found, seen, frontier = [], {node}, [node]
    while frontier:
        node = frontier.pop()
        for neighbour in node.all_input_nodes if up else node.users:
            if neighbour in seen or neighbour.op in ("placeholder", "get_attr"):
                continue
            seen.add(neighbour)
            if weights := read_weights(neighbour):
                found.append(weights[-1 if up else 0])
            else:
                frontier.append(neighbour)
    return found


def by_name_only(region: Region, site: ActivationSite) -> tuple[list[str], str]:
    """The weights of the nearest linears in front of an activation, by local name, and why it is left unless
    it is named, if all are routers' or of biases."""
    weights = _around(site.node)[0]
    roles = {str(region.roles.get(name)) for name in weights}
    why = OF_ROUTER if roles == {"router"} else OF_BIAS if roles == {"bias"} else ""
    return (weights, why) if why else ([], "")


def adapters_beside(region: Region, site: ActivationSite) -> list[str]:
    """The layers of PEFT's that feed an activation or read it, by local name."""
    around = [node for node in (site.hidden, *site.node.users) if _adapted(region, node) is not None]
    return [str(node.target) for node in around]


def _adapted(region: Region, node: fx.Node) -> int | None:
    """The features that a layer of PEFT's gives, if a node calls one."""
    if node.op != "call_module":
        return None
    module: Any = region.module.get_submodule(str(node.target))
    return module.out_features if is_adapter(module) else None


def _widths(region: Region, node: fx.Node) -> list[int]:
    sides = [_features(region, node, side) for side in (0, 1)] if is_call(node, F.linear) else []
    return [side for side in sides if side is not None]


def _features(region: Region, linear: fx.Node, dimension: int) -> int | None:
    name = weight_source(linear)
    if name not in region.parameters:
        return None
    shape = region.parameters[name].shape
    return shape[1 - dimension] if is_transposed(linear) else shape[dimension]
