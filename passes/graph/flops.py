"""Floating-point operations of a graph's products with weights, per token and forward."""

from __future__ import annotations

import torch.nn.functional as F
from torch import fx

from act24.fp8.linear import linear_fp8
from act24.passes.graph.normal_form import parameter_name
from act24.passes.graph.region import Region
from act24.pruning.adapters import masked_adapter_weight
from act24.sparse24.feed_forward.operation import activation24
from act24.sparse24.weight.forms import LinearOptions24
from act24.sparse24.weight.linear24 import linear24


def region_flops(region: Region) -> int:
    """Of one forward, per token: two for each element of a weight in a dense product, one where an operand is
    2:4; with a 2:4 weight in fp8 the product is dense. What is no product with a weight is not counted."""
    return sum(_node_flops(region, node) for node in region.graph.nodes)


def _node_flops(region: Region, node: fx.Node) -> int:
    if node.target in (F.linear, linear_fp8):
        return 2 * _numel(region, node.args[1])
    if node.target is activation24:
        return 2 * _numel(region, node.args[1]) + _numel(region, node.args[3])
    if node.target is linear24:
        return (1 + in_fp8(node)) * _numel(region, node.args[1])
    return 0


def _numel(region: Region, weight: object) -> int:
    if isinstance(weight, fx.Node) and weight.target is masked_adapter_weight:
        weight = weight.args[0]  # made once a forward, whatever the tokens
    name = parameter_name(weight)
    return region.parameters[name].numel() if name in region.parameters else 0


def in_fp8(node: fx.Node) -> bool:
    """Whether a `linear24` multiplies in e4m3."""
    options = node.args[-1]
    return isinstance(options, LinearOptions24) and options.precision == "fp8"
