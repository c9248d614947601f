"""What autograd keeps of a region's activations for backward, as far as a graph tells: features a token.

The inputs of linears that train, of activations and of norms, and the operands of products, each once. Widths
are those of linears, carried over what works element by element. What attention keeps is not in it, nor what
a function keeps beside its operands, so a sum is the least that is kept.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from act24.passes.graph.normal_form import is_call, is_product, is_transposed, parameter_name, weight_name
from act24.passes.graph.region import Region
from act24.relu2 import relu2
from act24.sparse24.feed_forward.operation import activation24

_ACTIVATIONS = (F.silu, F.gelu, F.relu, relu2, torch.tanh, torch.sigmoid, F.sigmoid)
_SUMS = (operator.add, torch.add)
_NORMS = (F.rms_norm, F.layer_norm)


def kept_for_backward(region: Region, nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """What autograd keeps for some nodes: nodes whose values it needs."""
    return {
        value
        for node in nodes
        for value in _operands(region, node)
        if isinstance(value, fx.Node) and value.op != "get_attr"
    }


def _operands(region: Region, node: fx.Node) -> Iterable[Any]:
    """What backward of a node needs of its arguments."""
    if is_call(node, F.linear):
        name = weight_name(node)
        trains = name not in region.parameters or region.parameters[name].requires_grad
        return node.args[:1] if trains else ()
    if node.target in (*_ACTIVATIONS, activation24) or _is_norm(region, node):
        return node.args[:1]
    numbers = not all(isinstance(value, fx.Node) for value in node.args)
    return node.args if is_product(node) and not numbers else ()


def widths(region: Region) -> dict[fx.Node, int]:
    """How many features the value of a node has, for those of which it is known."""
    found: dict[fx.Node, int] = {}
    for node in region.graph.nodes:
        name = weight_name(node) if is_call(node, F.linear) else None
        if name in region.parameters:
            sides = region.parameters[name].shape
            found[node], columns = reversed(sides) if is_transposed(node) else sides
            found[node.args[0]] = columns
        elif is_call(node, operator.getitem) and is_call(node.args[0], activation24):
            name = parameter_name(node.args[0].args[3])
            if name in region.parameters:
                found[node] = region.parameters[name].shape[0]
    before = -1
    while before < len(found):
        before = len(found)
        for node in region.graph.nodes:
            same = node.target in (*_ACTIVATIONS, *_SUMS) or _is_norm(region, node)
            if not (same or is_product(node)):
                continue
            operands = [value for value in node.args if isinstance(value, fx.Node) and value.op != "get_attr"]
            if known := [found[value] for value in operands if value in found]:
                found.setdefault(node, max(known))
            if same and node in found:  # an operand of a product may have one value for all features
                found |= {value: found[node] for value in operands if value not in found}
    return found


def _is_norm(region: Region, node: fx.Node) -> bool:
    if node.op != "call_module" or node.target in region.modules:
        return node.target in _NORMS
    return isinstance(region.module.get_submodule(str(node.target)), nn.RMSNorm | nn.LayerNorm)
