"""`activation_statistics`: count zeros after relu² or relu, and what 2:4 drops, without a host sync.

    relu2(h), activation24(...)   ==>   the same, and <site>.activation_statistics += counts
    linear_fp8(x, W, ...)         ==>   the same, and <weight>_e4m3_counts += counts, in backward
                                        <weight>_e4m3_gradient_counts; in fp8 linear24 and activation24 too,
                                        where they are of the network's x and the gradient of its y

The 2:4 operation counts when asked to; for a dense activation the counts are made beside it, and say what 2:4
would drop. Of linears in e4m3 it is what becomes zero of their inputs, in a sample, and of the gradients of
their outputs, in all entries, as the kernels that cast these see them anyway. Buffers add up until the shell
reads and clears them, which it does once per logging interval. They are no part of a checkpoint, and
evaluation runs without them. Put this pass last.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from act24.errors import Act24Error
from act24.fp8.linear import linear_fp8, underflow_counts
from act24.operation import in_functorch, operation
from act24.passes.base import Match, OperationalPass, Plan
from act24.passes.graph.activation_sites import (
    add_site_buffer,
    function_of,
    is_activation,
    name_sites,
    obstacle,
    pads_node,
    site_path,
)
from act24.passes.graph.flops import in_fp8
from act24.passes.graph.normal_form import parameter_name
from act24.passes.graph.region import Region
from act24.sparse24.feed_forward.operation import activation24
from act24.sparse24.feed_forward.packed_fp8 import PACKED_FP8
from act24.sparse24.feed_forward.statistics import STATISTICS, dense_statistics
from act24.sparse24.weight.linear24 import linear24

#: The kind of every statistics buffer, and the last part of its name; and of counts of linears in e4m3.
BUFFER, UNDERFLOW = "activation_statistics", "_e4m3_counts"
GRADIENT_UNDERFLOW = "_e4m3_gradient_counts"


#: The place of the scaling among the arguments of `linear_fp8`.
_SCALING = 7


@dataclass(frozen=True, kw_only=True)
class ActivationStatistics(OperationalPass):
    """`activation_statistics` has no options of its own."""

    name: ClassVar[str] = "activation_statistics"
    observes: ClassVar[bool] = True

    def in_evaluation(self) -> None:
        return None

    def plan(self, region: Region) -> Plan:
        name_sites(region)
        matches = tuple(
            Match(path, node.name, f"{node.name}, counted", (node, False), 0, 0)
            for node in region.graph.nodes
            if is_activation(node) and self.selects(region, path := site_path(node))
            if node.target is activation24 or not obstacle(region, node)
        )
        linears = tuple(
            Match(str(name), node.name, f"{node.name}, counted", (node, True), 0, 0)
            for node in region.graph.nodes
            if _reads_e4m3(node)
            if self.selects(region, str(name := parameter_name(node.args[1])).rpartition(".")[0])
        )
        return Plan((*matches, *linears), absent="no relu² or relu: leave the pass out")

    def _rewrite(self, region: Region, match: Match) -> None:
        (node, of_input), graph = match.nodes, region.graph
        if of_input:
            for kind in (UNDERFLOW, GRADIENT_UNDERFLOW):
                region.add_buffer(match.path + kind, (2,), torch.float32, False, kind=kind, of=match.path)
            with graph.inserting_before(node):
                gradients = graph.get_attr(match.path + GRADIENT_UNDERFLOW)
                node.kwargs = {**node.kwargs, "counter": gradients}
            with graph.inserting_before(node.next):
                scaling = node.args[_SCALING] if node.target is linear_fp8 else "rowwise"
                counts = graph.call_function(underflow_counts, (node.args[0], scaling))
                graph.call_function(add_counts_, (graph.get_attr(match.path + UNDERFLOW), counts))
            return
        buffer = add_site_buffer(region, match.path, BUFFER, (len(STATISTICS),), torch.float32)
        with graph.inserting_before(node.next):
            if node.target is activation24:
                *arguments, options = node.args
                node.args = (*arguments, options._replace(statistics=True))
                counts = graph.call_function(operator.getitem, (node, 1))
            else:
                arguments = (node.args[0], pads_node(region), function_of(node))
                counts = graph.call_function(dense_statistics, arguments)
            graph.call_function(add_counts_, (graph.get_attr(buffer), counts))


@operation
def add_counts_(buffer: Tensor, counts: Tensor) -> Tensor:
    """buffer += counts, in place; both of one shape.

    Raises:
        Act24Error: a transformation of torch.func surrounds it, which may not write to what is outside.
    """
    if in_functorch():
        raise Act24Error(
            "activation_statistics cannot count inside of torch.func: leave it out there, "
            "pipeline.lower_(step, without=['activation_statistics'])"
        )
    return buffer.add_(counts)


def _reads_e4m3(node: fx.Node) -> bool:
    """Whether it is a linear whose input is cast to e4m3, or begins with one."""
    if node.target is activation24:
        return None not in (node.args[1], node.args[3]) and PACKED_FP8.knows(node.args[-1])  # type: ignore[arg-type]
    return node.target is linear_fp8 or (node.target is linear24 and in_fp8(node))
