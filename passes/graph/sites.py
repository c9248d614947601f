"""A region on its way through the passes of a pipeline."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

from act24.passes.base import Match, Pass
from act24.passes.graph.lowering import Lowering
from act24.passes.graph.region import Region, RegionModule
from act24.passes.graph.stock_state import Change


@dataclass
class Site:
    """A region as traced, after the structural passes, and the module once it stands.

    Attributes:
        matched: a pass acts on it.
        kept: it is to stand as a graph module even if none does.
        opened: modules in it, by local name, that a pass in force at some step computes as functions: they
            stay where they are, and are not called.
    """

    traced: Region
    base: Region
    changes: list[Change] = field(default_factory=list)
    claims: dict[str, Pass] = field(default_factory=dict)
    matched: bool = False
    kept: bool = False
    module: RegionModule | None = None
    opened: set[str] = field(default_factory=set)

    @property
    def touched(self) -> bool:
        """Whether it will stand as a graph module."""
        return self.matched or self.kept

    def twin(self, memo: dict[int, Any]) -> Site:
        """A site of a copy of the model."""
        traced, base = self.traced.copy(), self.base.copy()
        traced.module, base.module = copy.deepcopy((traced.module, base.module), memo)
        traced.frozen = traced.frozen.of_copy(memo)
        return replace(self, traced=traced, base=base, module=copy.deepcopy(self.module, memo))


@dataclass(frozen=True)
class Lowered:
    """A region through certain operational passes, and what each of them matched."""

    site: Site
    lowering: Lowering
    matches: list[tuple[Match, ...]]
