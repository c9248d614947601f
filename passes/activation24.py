"""`activation24`: relu² activations become 2:4 along the features.

    linear_out(relu2(linear_in(x)))   ==>   relu2_linear24(x, W_in, b_in, W_out, b_out)
    relu2(h), any other surroundings  ==>   relu2_24(h)

wherever the pattern came from: the feed-forward network of `relu2_ffn`, or a low-rank bottleneck. Where
what precedes relu2 is not one linear the operation starts at the pre-activation, and where relu2 has
several consumers all of them see the same 2:4 activation.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

from act24.passes.base import Match, OperationalPass, Plan
from act24.passes.normal_form import replace_node
from act24.passes.region import Region
from act24.passes.relu2_sites import Relu2Site, relu2_sites
from act24.sparse24.activation import Backward, Method, relu2_24, relu2_linear24


@dataclass(frozen=True, kw_only=True)
class Activation24(OperationalPass):
    """Options of `activation24`; their meaning is that of `act24.sparse24.activation`."""

    name: ClassVar[str] = "activation24"

    method: Method = "naive"
    backward: Backward = "dense"

    def plan(self, region: Region) -> Plan:
        matches, misses = [], []
        for site in relu2_sites(region):
            if not self.selects(region, site.path):
                continue
            if site.width is not None and site.width % 4:
                misses.append((site.path, f"F is {site.width}, not a multiple of 4"))
                continue
            matches.append(
                Match(
                    path=site.path,
                    before="linear · relu2 · linear" if site.fusible else "relu2",
                    after="relu2_linear24" if site.fusible else "relu2_24",
                    nodes=site,
                    parameters_before=site.parameters,
                    parameters_after=site.parameters,
                )
            )
        return Plan(tuple(matches), tuple(misses), absent="no relu2 (pass relu2_ffn makes one of SwiGLU)")

    def _rewrite(self, region: Region, match: Match) -> None:
        site: Relu2Site = match.nodes
        graph = region.graph
        end = site.after if site.fusible else site.node
        with graph.inserting_before(end):
            if site.fusible:
                arguments = (*site.before.args, *site.after.args[1:], self.method, self.backward)
                fused = graph.call_function(relu2_linear24, arguments)
            else:
                fused = graph.call_function(relu2_24, (site.node.args[0], self.method))
            output = graph.call_function(operator.getitem, (fused, 0))
        replace_node(graph, end, output)
