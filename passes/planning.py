"""All passes planned over all regions of a model, on copies of their graphs, before anything is touched.

Planning runs the real passes in order, so that a later pass sees what an earlier one leaves. Structural ones
are planned once; operational ones for every interval of steps in which another set of them is in force.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from act24.errors import PassError
from act24.options import check_options
from act24.passes.base import Match, OperationalPass, Pass, Start, StructuralPass, check_passes
from act24.passes.graph.check import Check, Probe
from act24.passes.graph.coverage import Coverage
from act24.passes.graph.hooks import refuse_hooks, refuse_parameter_hooks, refuse_wrapped
from act24.passes.graph.normal_form import is_linear
from act24.passes.graph.region import Region
from act24.passes.graph.sites import Lowered, Site
from act24.passes.graph.stock_state import Change
from act24.passes.graph.tracing import trace
from act24.passes.graph.watched import Fact
from act24.passes.report import Report, Row, coverages, figures, no_match, row, untrained


class Planned:
    """Passes over one model, planned at construction; the model is not touched.

    Attributes:
        report: what they would do.
        step: updates already made, as of its making.
        boundaries: the steps at which the set of operational passes changes, without 0.
    """

    def __init__(
        self,
        model: nn.Module,
        passes: Sequence[Pass],
        *,
        seed: int = 0,
        step: int = 0,
        keep_all: bool = False,
        check: bool = True,
        probe: Probe | None = None,
    ) -> None:
        """Plan. Arguments as for `apply_`.

        Args:
            keep_all: let regions stand as graph modules even where no pass acts, single linears excepted.
        """
        check_options(Start(model, seed, step), "Pipeline")
        self._model = model
        given = check_passes(passes)
        self._passes = tuple(p.beside(given) for p in given)
        self._seed, self.step = seed, step
        self._classes: dict[tuple[Any, ...], type] = {}
        self._lowered: dict[tuple[OperationalPass, ...], list[Lowered]] = {}
        self._rows: list[Row] = []
        self._facts: dict[tuple[Any, ...], Fact] = {}
        self._facts_of_regions: dict[nn.Module, list[Fact]] = {}
        self._misses: list[tuple[str, str, str]] = []
        self._absent: list[tuple[str, str, str]] = []
        self._structural = [p for p in self._passes if isinstance(p, StructuralPass)]
        operational = [p for p in self._passes if isinstance(p, OperationalPass)]
        self._operational = sorted(operational, key=lambda p: p.last)
        self._active = [p for p in self._operational if p.active(step)]
        limits = {limit for p in self._operational for limit in (p.from_step, p.until_step) if limit}
        self.boundaries: tuple[int, ...] = tuple(sorted(limits))
        refuse_wrapped(model)
        if torch.get_default_device().type == "meta" and not any(p.is_meta for p in model.parameters()):
            raise PassError(
                "under torch.device('meta') new tensors have no values, and the model's have: call apply_ "
                "outside of it"
            )
        self._check = Check(model, probe) if check else None
        regions, self._unclean = trace(model, self._check)
        if self._check:
            self._check.forget_inputs()
        self._sites = [Site(r, r.copy(), kept=keep_all and not is_linear(r.module)) for r in regions]
        base = [site.base for site in self._sites]
        for p in self._structural:
            self._plan_pass(p, base)
        lowered = self._plan_operational()
        touched = [site for site in self._sites if site.touched]
        for site in touched:
            refuse_hooks(site.traced, site.opened)
            gone = site.traced.parameters.keys() - site.base.parameters.keys()
            refuse_parameter_hooks(site.traced, (*gone, *(n for c in site.base.created for n in c.names)))
        self.report = Report(
            tuple(self._rows),
            tuple(self._misses),
            **figures(model, [site.traced for site in self._sites], base, lowered),
            checked=str(self._check) if self._check else "nothing was checked: check=False",
            coverage=self._coverage(),
            unwatched=tuple({text: 0 for site in touched for text in site.traced.frozen.unwatched}),
            untrained=untrained(self._passes, self._rows),
        )

    def _coverage(self) -> tuple[Coverage, ...]:
        regions, notes = [site.traced for site in self._sites], (self._misses, self._absent)
        gone, base = self._replaced_names(), [site.base for site in self._sites]
        return coverages(self._model, regions, self._passes, self._rows, self._unclean, *notes, gone, base)

    def _replaced_names(self) -> set[str]:
        """The full names of what passes take away; in factors that stand for it others reach something."""
        return {
            site.traced.name(name)
            for site in self._sites
            for name in site.traced.parameters.keys() - site.base.parameters.keys()
            if not any(spec.factor and made.startswith(name) for made, spec in site.base.parameters.items())
        }

    def _plan_operational(self) -> list[Region]:
        """Run every interval of steps once, so that no pass can fail in the middle of a run.

        Returns:
            the regions as of the last interval in which a pass is in force, for the report's figures.
        """
        reported: set[int] = set()
        final = [site.base for site in self._sites]
        for step in (0, *self.boundaries):
            lowered = counted = [site.base.copy() for site in self._sites]
            for index, p in enumerate(self._operational):
                if p.active(step):
                    if p.last:  # it hides the operations that the figures count
                        lowered = [region.copy() for region in lowered]
                    self._plan_pass(p, lowered, report=index not in reported)
                    reported.add(index)
            self._keep(lowered)
            if any(p.active(step) and not p.observes for p in self._operational):
                final = counted
            active = [p for p in self._operational if p.active(step)]
            if any(p.fullest != p for p in active):
                most = [site.base.copy() for site in self._sites]
                for p in active:
                    self._plan_pass(p.fullest, most, report=False)
                self._keep(most)
        return final

    def _keep(self, lowered: list[Region]) -> None:
        """Note the buffers that regions of some interval have, and which modules they no longer call."""
        for site, region in zip(self._sites, lowered, strict=True):
            site.base.buffers.update(region.buffers)
            site.opened |= {*(_calls(site.base) - _calls(region))}

    def _plan_pass(self, p: Pass, regions: list[Region], report: bool = True) -> None:
        """Plan a pass over all regions, one a site, and apply it to them.

        Args:
            report: note what it does; once is enough for a pass that is in force in several intervals.
        """
        plans = [p.plan(region) for region in regions]
        most = p.fullest if isinstance(p, OperationalPass) else p
        taken = [planned.matches for planned in plans]
        if not any(taken) and not p.optional and not any(most.plan(r).matches for r in regions if most != p):
            traced, gone = [site.traced for site in self._sites], self._replaced_names()
            raise PassError(no_match(p, self._model, traced, regions, plans, self._unclean, gone))
        if missing := p.missing(regions):
            if not p.optional:
                raise PassError(f"{p.name}: {missing}")
            self._misses += [(p.name, "the model", missing)] * report
        for site, region, planned in zip(self._sites, regions, plans, strict=True):
            if isinstance(p, StructuralPass):
                self._claim(p, site, region, planned.matches)
            p.apply(region, planned)
            site.matched |= bool(planned.matches)
            if report and not p.observes:
                self._rows += [row(p, region, match) for match in planned.matches]
                self._misses += [(p.name, region.name(path), reason) for path, reason in planned.misses]
                self._absent += [(p.name, region.fqn, planned.absent)]

    def _claim(self, p: Pass, site: Site, region: Region, matches: tuple[Match, ...]) -> None:
        """One structural pass a place: the second would take apart what the first one built."""
        for match in matches:
            other = site.claims.setdefault(match.path, p)
            if other is not p:
                raise PassError(
                    f"{other.name} and {p.name} both rewrite {region.name(match.path)}: leave it out of "
                    "one of them, with ignore or scope"
                )
            if match.state is not None:
                site.changes.append(Change(site.traced, p.name, match.path, match.state))


def _calls(region: Region) -> Counter[str]:
    """How often a region calls each module in it, by local name."""
    return Counter(str(node.target) for node in region.graph.nodes if node.op == "call_module")
