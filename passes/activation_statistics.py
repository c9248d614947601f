"""`activation_statistics`: count zeros after relu² or relu, and what 2:4 drops, without a host sync.

    relu2(h), activation24(...)   ==>   the same, and <site>.activation_statistics += counts

The 2:4 operation counts when asked to; for a dense activation the counts are made beside it, and say what 2:4
would drop. Buffers add up until the shell reads and clears them, which it does once per logging interval.
They are no part of a checkpoint, and evaluation runs without them. Put this pass last.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch

from act24.passes.base import Match, OperationalPass, Plan
from act24.passes.graph.activation_sites import (
    add_site_buffer,
    function_of,
    is_activation,
    name_sites,
    pads_node,
    site_path,
)
from act24.passes.graph.region import Region
from act24.sparse24.feed_forward.operation import activation24
from act24.sparse24.feed_forward.statistics import STATISTICS, dense_statistics

#: The kind of every statistics buffer, and the last part of its name.
BUFFER = "activation_statistics"


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
            Match(path, node.name, f"{node.name}, counted", node, 0, 0)
            for node in region.graph.nodes
            if is_activation(node) and self.selects(region, path := site_path(node))
        )
        return Plan(matches, absent="no relu² or relu")

    def _rewrite(self, region: Region, match: Match) -> None:
        node, graph = match.nodes, region.graph
        buffer = add_site_buffer(region, match.path, BUFFER, (len(STATISTICS),), torch.float32)
        with graph.inserting_before(node.next):
            if node.target is activation24:
                *arguments, options = node.args
                node.args = (*arguments, options._replace(statistics=True))
                counts = graph.call_function(operator.getitem, (node, 1))
            else:
                arguments = (node.args[0], pads_node(region), function_of(node))
                counts = graph.call_function(dense_statistics, arguments)
            graph.call_method("add_", (graph.get_attr(buffer), counts))
