"""`activation_statistics`: count zeros after relu², and what 2:4 drops, without a host sync.

    relu2(h), relu2_24(h), relu2_linear24(...)   ==>   the same, and <site>.relu2_statistics += counts

The 2:4 operations hand out their counts anyway; for a dense relu² they are made beside it, and say what 2:4
would drop. Buffers add up until the shell reads and clears them, which it does once per logging interval.
They are no part of a checkpoint. Put this pass last.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch

from act24.passes.base import Match, OperationalPass, Plan
from act24.passes.normal_form import nodes_of
from act24.passes.region import Region
from act24.passes.relu2_sites import site_path
from act24.relu2 import STATISTICS, relu2, relu2_statistics
from act24.sparse24.activation import relu2_24, relu2_linear24

#: Last part of the name of every statistics buffer.
BUFFER = "relu2_statistics"


@dataclass(frozen=True, kw_only=True)
class ActivationStatistics(OperationalPass):
    """`activation_statistics` has no options of its own."""

    name: ClassVar[str] = "activation_statistics"
    observes: ClassVar[bool] = True

    def plan(self, region: Region) -> Plan:
        sites = [
            node for target in (relu2, relu2_24, relu2_linear24) for node in nodes_of(region.graph, target)
        ]
        matches = tuple(
            Match(path, node.name, f"{node.name}, counted", node, 0, 0)
            for node in sites
            if self.selects(region, path := site_path(node))
        )
        return Plan(matches, absent="no relu2")

    def _rewrite(self, region: Region, match: Match) -> None:
        node, graph = match.nodes, region.graph
        buffer = f"{match.path}.{BUFFER}" if match.path else BUFFER
        region.add_buffer(buffer, (len(STATISTICS),), torch.float32, persistent=False)
        with graph.inserting_after(node):
            if node.target is relu2:
                counts = graph.call_function(relu2_statistics, (node.args[0],))
            else:
                counts = graph.call_function(operator.getitem, (node, 1))
        with graph.inserting_after(counts):
            total = graph.get_attr(buffer)
        with graph.inserting_after(total):
            graph.call_method("add_", (total, counts))
