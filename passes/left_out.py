"""A pass that is left out and keeps its place: what it would take, no other pass takes in its stead.

Not a pass of recipes: whoever lowers a model without one of its passes (`Rewriting.in_force`) puts this one
there. Otherwise the passes behind it would take what it left, with buffers that nobody has made, and the
model would not be the same one without it but a third.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from act24.errors import PassError
from act24.passes.base import OperationalPass, Pass, Plan
from act24.passes.graph.normal_form import nodes_of, reserve
from act24.passes.graph.region import Region


@dataclass(frozen=True, kw_only=True)
class LeftOut(OperationalPass):
    """Options of `left_out`.

    Attributes:
        of: the pass that is left out.
    """

    name: ClassVar[str] = "left_out"
    keeps_function: ClassVar[bool] = True

    of: OperationalPass

    def plan(self, region: Region) -> Plan:
        return Plan()

    def apply(self, region: Region, plan: Plan) -> None:
        with_it = region.copy()
        self.of.apply(with_it, self.of.plan(with_it))
        left = {node.name for node in nodes_of(with_it.graph, F.linear)}
        for node in nodes_of(region.graph, F.linear):
            if node.name not in left:
                reserve(node)


def check_left_out(passes: Sequence[Pass], names: Sequence[str]) -> None:
    """Check that names are those of operational passes among some.

    Raises:
        PassError: a text instead of a list, the name of none of them, or of one that changes parameters.
    """
    if isinstance(names, str):
        raise PassError(f"without takes a list of names: write [{names!r}]")
    can = dict.fromkeys(p.name for p in passes if isinstance(p, OperationalPass))
    for name in names:
        if name not in can:
            listed = f"name one of {', '.join(can)}" if can else "give none, for it has no operational pass"
            structural = any(p.name == name for p in passes)
            why = "changes parameters, and so stays" if structural else "is no pass of the pipeline"
            raise PassError(f"without: {name!r} {why}: {listed}")


def left_out(passes: Sequence[OperationalPass], names: Sequence[str]) -> list[OperationalPass]:
    """Passes in force without those of some names, which leave to no other what they would have taken."""
    return [
        LeftOut(of=p) if p.name in names else p
        for p in passes
        if p.name not in names or not (p.observes or p.last)  # these take nothing
    ]
