"""Floating-point operations of a graph's products with weights, per token and forward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from act24.fp8.linear import linear_fp8
from act24.passes.graph.normal_form import source_name
from act24.passes.graph.region import Region
from act24.passes.graph.roles import linears_in
from act24.pruning.adapters import masked_adapter_weight
from act24.sparse24.feed_forward.operation import activation24
from act24.sparse24.weight.forms import LinearOptions24
from act24.sparse24.weight.linear24 import linear24


def region_flops(region: Region) -> int:
    """Of one forward, per token: two for each element of a weight in a dense product, one where an operand is
    2:4; with a 2:4 weight in fp8 the product is dense. A weight that forward makes of parameters counts by
    its shape, and making it, once for all tokens, does not. What is no product with a weight does not."""
    return sum(_node_flops(region, node) for node in region.graph.nodes)


def uncounted(region: Region) -> set[str]:
    """The local names of parameters of which linears make their weight in a way that shows no shape."""
    linears = linears_in(region.graph, region.module)
    return {name for node, names in linears.items() if not _node_flops(region, node) for name in names}


def _node_flops(region: Region, node: fx.Node) -> int:
    if node.target in (F.linear, linear_fp8):
        return 2 * _numel(region, node.args[1])
    if node.target is activation24:
        return 2 * _numel(region, node.args[1]) + _numel(region, node.args[3])
    if node.target is linear24:
        return (1 + in_fp8(node)) * _numel(region, node.args[1])
    if node.op == "call_module" and node.target not in region.modules:
        called = region.module.get_submodule(str(node.target))
        return 2 * called.in_features * called.out_features if isinstance(called, nn.Linear) else 0
    return 0


def _numel(region: Region, weight: object) -> int:
    if isinstance(weight, fx.Node) and weight.target is masked_adapter_weight:
        weight = weight.args[0]  # made once a forward, whatever the tokens
    name = source_name(weight)
    if name in region.parameters:
        return region.parameters[name].numel()
    try:
        return _on_meta(region, weight, {}).numel()
    except Exception:  # it is of inputs, or of what has no shape without values
        return 0


def _on_meta(region: Region, value: Any, known: dict[fx.Node, Any]) -> Any:
    """What a node comes to, of parameters that are only shapes."""
    if not isinstance(value, fx.Node):
        return value
    if value not in known:
        known[value] = _run_on_meta(region, value, known)
    return known[value]


def _run_on_meta(region: Region, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    name = str(node.target)
    if node.op == "get_attr":
        if name not in region.parameters:
            return region.module.get_buffer(name).to("meta")
        spec = region.parameters[name]
        return torch.empty(spec.shape, dtype=spec.dtype, device="meta")
    args: Any = map_arg(node.args, lambda n: _on_meta(region, n, known))
    kwargs: Any = map_arg(node.kwargs, lambda n: _on_meta(region, n, known))
    function: Any = {"call_function": node.target, "call_method": getattr(Tensor, name, None)}[node.op]
    return function(*args, **kwargs)


def in_fp8(node: fx.Node) -> bool:
    """Whether a `linear24` multiplies in e4m3."""
    options = node.args[-1]
    return isinstance(options, LinearOptions24) and options.precision == "fp8"
