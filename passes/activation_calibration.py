"""`activation_calibration`: measure what the scale of a soft 2:4 activation should be.

    activation24(...)   ==>   the same, and <site>.activation24_calibration += sums over sampled rows of h

Not a pass of recipes: the shell lowers a model through it for one forward of a few rows when a scale is due
(`act24.passes.state`), behind the passes in force, which so take what they take without it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import fx

from act24.passes.activation24 import SUMS, TAKEN_BY, Activation24
from act24.passes.base import Match, OperationalPass, Plan
from act24.passes.graph.activation_sites import add_site_buffer, pads_node, site_path
from act24.passes.graph.normal_form import nodes_of
from act24.passes.graph.region import Region
from act24.sparse24.feed_forward.calibration import CALIBRATION, calibration_sums
from act24.sparse24.feed_forward.methods import METHODS
from act24.sparse24.feed_forward.operation import activation24
from act24.sparse24.weight.linear24 import linear24

#: What multiplies its first argument by its second, a weight, before it does anything else.
_LINEARS = (F.linear, linear24, activation24)


@dataclass(frozen=True, kw_only=True)
class ActivationCalibration(OperationalPass):
    """Measure for one `activation24`.

    Attributes:
        of: the pass whose scales are due.
        places: the sites to measure at, by full name; None: all.
    """

    name: ClassVar[str] = "activation_calibration"
    observes: ClassVar[bool] = True

    of: Activation24
    places: frozenset[str] | None = None

    def plan(self, region: Region) -> Plan:
        its = (self.of, self.of.in_evaluation())
        matches = tuple(
            Match(site_path(node), node.name, f"{node.name}, measured", node, 0, 0)
            for node in nodes_of(region.graph, activation24)
            if node.meta[TAKEN_BY] in its
            if self.places is None or region.name(site_path(node)) in self.places
        )
        return Plan(matches, absent="no 2:4 activation: put activation24 before it")

    def _rewrite(self, region: Region, match: Match) -> None:
        node, graph = match.nodes, region.graph
        hidden, weight_in, bias_in, *_, options = node.args
        scale_from = "activation" if METHODS[self.of.method].remeasured else self.of.scale_from
        buffer = add_site_buffer(region, match.path, SUMS, (len(CALIBRATION),), torch.float64)
        with graph.inserting_before(graph.output_node()):  # behind every weight that is read
            if weight_in is not None:
                hidden = graph.call_function(F.linear, (hidden, weight_in, bias_in))
            weights = () if scale_from == "activation" else tuple(_weights(graph, node))
            arguments = (hidden, pads_node(region), scale_from, self.of.calibration_samples)
            sums = graph.call_function(calibration_sums, (*arguments, options.function, *weights))
            graph.call_method("add_", (graph.get_attr(buffer), sums))


def _weights(graph: fx.Graph, node: fx.Node) -> Iterator[fx.Node]:
    """What multiplies the 2:4 activation, `[out, F]` each; of two linears in a row their product."""
    output = next(user for user in node.users if user.target is operator.getitem and user.args[1] == 0)
    if node.args[3] is not None:
        readers = [(node.args[3], output)]
    else:
        readers = [(user.args[1], user) for user in output.users if _multiplies(user, output)]
    for weight, product in readers:
        (*rest,) = product.users
        alone = len(rest) == 1 and product.target is not activation24 and _multiplies(rest[0], product)
        yield graph.call_function(torch.matmul, (rest[0].args[1], weight)) if alone else weight  # type: ignore[misc]


def _multiplies(user: fx.Node, node: fx.Node) -> bool:
    """Whether a user of a node multiplies it with a weight."""
    return user.target in _LINEARS and user.args[0] is node and user.args[1] is not None
