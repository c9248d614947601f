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

from act24.passes.activation24 import site_buffer
from act24.passes.base import Match, OperationalPass, Plan
from act24.passes.graph.activation_sites import function_of, is_activation, pads_node, site_path
from act24.passes.graph.region import Region
from act24.sparse24.feed_forward.operation import activation24, dense_statistics
from act24.sparse24.feed_forward.statistics import STATISTICS

#: Last part of the name of every statistics buffer.
BUFFER = "activation_statistics"


@dataclass(frozen=True, kw_only=True)
class ActivationStatistics(OperationalPass):
    """`activation_statistics` has no options of its own."""

    name: ClassVar[str] = "activation_statistics"
    observes: ClassVar[bool] = True

    def in_evaluation(self) -> None:
        return None

    def plan(self, region: Region) -> Plan:
        matches = tuple(
            Match(path, node.name, f"{node.name}, counted", node, 0, 0)
            for node in region.graph.nodes
            if is_activation(node) and self.selects(region, path := site_path(node))
        )
        return Plan(matches, absent="no relu² or relu")

    def _rewrite(self, region: Region, match: Match) -> None:
        node, graph = match.nodes, region.graph
        buffer = site_buffer(match.path, BUFFER)
        region.add_buffer(buffer, (len(STATISTICS),), torch.float32, persistent=False)
        with graph.inserting_before(node.next):
            if node.target is activation24:
                *arguments, options = node.args
                node.args = (*arguments, options._replace(statistics=True))
                counts = graph.call_function(operator.getitem, (node, 1))
            else:
                arguments = (node.args[0], pads_node(region), function_of(node))
                counts = graph.call_function(dense_statistics, arguments)
            graph.call_method("add_", (graph.get_attr(buffer), counts))
