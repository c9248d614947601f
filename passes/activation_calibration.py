"""`activation_calibration`: measure what the scale of a soft 2:4 activation should be.

    relu2(h)   ==>   relu2(h), and <site>.activation24_calibration += sums over sampled rows of h

Not a pass of recipes: the shell lowers a model through it for one forward of a few rows when a scale is due
(`act24.passes.state`), before the passes in force, which then act as ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from act24.passes.activation24 import SUMS, Activation24
from act24.passes.base import Match, OperationalPass, Plan
from act24.passes.graph.activation_sites import ActivationSite, add_site_buffer, consumers, pads_node
from act24.passes.graph.region import Region
from act24.sparse24.feed_forward.calibration import CALIBRATION, calibration_sums
from act24.sparse24.feed_forward.methods import METHODS


@dataclass(frozen=True, kw_only=True)
class ActivationCalibration(OperationalPass):
    """Measure for one `activation24`.

    Attributes:
        of: the pass whose scales are due.
    """

    name: ClassVar[str] = "activation_calibration"
    observes: ClassVar[bool] = True

    of: Activation24

    def plan(self, region: Region) -> Plan:
        planned = self.of.plan(region)
        return Plan(planned.matches, absent=planned.absent)

    def _rewrite(self, region: Region, match: Match) -> None:
        site: ActivationSite = match.nodes
        graph = region.graph
        scale_from = "activation" if METHODS[self.of.method].remeasured else self.of.scale_from
        buffer = add_site_buffer(region, match.path, SUMS, (len(CALIBRATION),), torch.float64)
        with graph.inserting_before(graph.output_node()):  # behind every weight that is read
            weights = () if scale_from == "activation" else tuple(_weights(graph, site))
            arguments = (site.hidden, pads_node(region), scale_from, self.of.calibration_samples)
            sums = graph.call_function(calibration_sums, (*arguments, site.function, *weights))
            graph.call_method("add_", (graph.get_attr(buffer), sums))


def _weights(graph: fx.Graph, site: ActivationSite) -> Iterator[fx.Node]:
    """What multiplies the activation, `[out, F]` each; of two linears in a row their product."""
    for first, *second in consumers(site):
        weight = first.args[1]
        yield graph.call_function(torch.matmul, (second[0].args[1], weight)) if second else weight  # type: ignore[misc]
