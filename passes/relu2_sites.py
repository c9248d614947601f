"""Where relu² stands in a graph, dense or already 2:4, and under which name.

A site is named by the innermost module above the linears around it: `mlp` for a feed-forward network,
`self_attn.q_proj` for the bottleneck inside a factorised projection. The name is the same before and after
`activation24`, so that state kept under it outlives a change of pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import fx

from act24.passes.normal_form import (
    common_path,
    is_call,
    is_transposed,
    nodes_of,
    parameter_name,
    weight_name,
)
from act24.passes.region import Region
from act24.relu2 import relu2
from act24.sparse24.activation import relu2_linear24


@dataclass(frozen=True)
class Relu2Site:
    """A dense relu².

    Attributes:
        path: its name, local to the region.
        node: the relu2 node.
        before: the linear that alone feeds it, or None.
        after: the linear that alone reads it, or None.
        width: number of features, None where no linear tells.
        parameters: elements in the weights and biases of `before` and `after`.
    """

    path: str
    node: fx.Node
    before: fx.Node | None
    after: fx.Node | None
    width: int | None
    parameters: int

    @property
    def fusible(self) -> bool:
        """Whether linear → relu² → linear can become one operation."""
        return self.before is not None and self.after is not None


def relu2_sites(region: Region) -> Iterator[Relu2Site]:
    """The dense relu² sites of a region, in graph order."""
    for node in nodes_of(region.graph, relu2):
        source, users = node.args[0], list(node.users)
        before = source if is_call(source, F.linear) and len(source.users) == 1 else None
        after = users[0] if len(users) == 1 and is_call(users[0], F.linear) else None
        if after is not None and after.args[0] is not node:
            after = None
        width = None
        if before is not None:
            width = _features(region, before, 0)
        if width is None and after is not None:
            width = _features(region, after, 1)
        names = [parameter_name(arg) for n in (before, after) if n is not None for arg in n.args[1:]]
        parameters = sum(region.parameters[name].numel() for name in names if name in region.parameters)
        yield Relu2Site(site_path(node), node, before, after, width, parameters)


def site_path(node: fx.Node) -> str:
    """The name of the site of a relu2, relu2_24 or relu2_linear24 node."""
    names = _weights(node) or [*_reach(node, up=True), *_reach(node, up=False)]
    return common_path(*names)


def _weights(node: fx.Node) -> list[str]:
    """The weights that a linear, or the fused operation, reads."""
    positions = {F.linear: (1,), relu2_linear24: (1, 3)}.get(node.target, ())  # type: ignore[arg-type]
    return [name for position in positions if (name := parameter_name(node.args[position]))]


def _reach(node: fx.Node, up: bool) -> Iterator[str]:
    """The weights of the nearest linears on one side."""
    for neighbour in node.all_input_nodes if up else node.users:
        if neighbour.op == "placeholder":
            continue
        if weights := _weights(neighbour):
            yield from weights
        else:
            yield from _reach(neighbour, up)


def _features(region: Region, linear: fx.Node, dimension: int) -> int | None:
    name = weight_name(linear)
    if name not in region.parameters:
        return None
    shape = region.parameters[name].shape
    return shape[1 - dimension] if is_transposed(linear) else shape[dimension]
