"""Plan all passes over all regions, and only then touch the model.

When every pass has matched (`act24.passes.planning`), the new modules are built, and only when all are built
do they take their places. Structural passes are applied once; operational ones are applied again whenever
their step ranges say so (`Rewriting.lower_`), over the same parameters and buffers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any, Self

from torch import Tensor, nn

from act24.errors import PassError
from act24.initialise import generator_for
from act24.options import check_values
from act24.passes.base import Match, OperationalPass, Pass, Start
from act24.passes.graph.frozen import opened_values
from act24.passes.graph.hooks import recompile_
from act24.passes.graph.lowering import lower_, lowering
from act24.passes.graph.measurements import Measurement, check_measured
from act24.passes.graph.placing import put, twin
from act24.passes.graph.region import RegionModule, materialise, reset_buffers_
from act24.passes.graph.sites import Lowered, Site
from act24.passes.graph.stock_state import Change, freeze_beside_, from_stock, to_stock
from act24.passes.graph.watched import Fact
from act24.passes.left_out import check_left_out, left_out
from act24.passes.not_saved import refuse_to_resize_, refuse_to_save_
from act24.passes.planning import Planned


class Rewriting(Planned):
    """Passes over one model, planned at construction, and applied by `commit_`."""

    def __str__(self) -> str:
        return str(self.report)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The same passes over a copy of the model: of the one that is copied along, if one is."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(vars(self))
        twin._model = copy.deepcopy(self._model, memo)
        twin._check, twin._lowered, twin._facts_of_regions = None, {}, {}  # made again when they are needed
        twin._sites = [site.twin(memo) for site in self._sites]
        if twin.modules:
            twin._lower()
            twin._facts = twin._watched()
        return twin

    @property
    def measurements(self) -> dict[str, Measurement]:
        """What `commit_` has to be told of the model as it is before: by name what is wanted, and of which
        parameter. Passes ask for it; who owns the data measures it."""
        return {name: wanted for site in self._sites for name, wanted in site.base.measurements.items()}

    def commit_(self, measured: Mapping[str, Tensor] | None = None) -> None:
        """Build all new modules, then put each where its region was traced.

        Args:
            measured: a tensor for each of `measurements`, of the shape given there. On the meta device
                nothing is measured, since nothing has values.

        Raises:
            PassError: that was done before, or a measurement is missing or of another shape.
        """
        if self.modules:
            raise PassError("this pipeline was already committed: make another one for another model")
        measured = measured or {}
        if not any(p.is_meta for p in self._model.parameters()):
            check_measured(self.measurements, measured)
        for site in self._sites:
            if site.touched and site.traced.module is self._model:
                # The model itself becomes the new module; what it was has to be somewhere.
                site.traced.module = site.base.module = twin(self._model)
        built: list[tuple[Site, RegionModule]] = [
            (site, materialise(site.base, lambda name: generator_for(self._seed, name), measured))
            for site in self._sites
            if site.touched
        ]
        for site, module in built:
            put(self._model, site.traced, module)
            site.module = module if site.traced.fqn else self._model  # type: ignore[assignment]
        self._lower()
        try:
            self._check_rewritten(built)
        except PassError:
            for site, _ in built:
                site.module = None
                put(self._model, site.traced, site.traced.module)
            raise
        for site, _ in built:
            assert site.module is not None
            recompile_(site.traced.module, site.module)
            # Or the plan would keep the stock tensors alive that a pass replaced.
            site.traced.module = site.base.module = site.module
        alone = {p.name for p in self._structural if p.freezes}
        freeze_beside_(self._model, [change for change in self.changes if change.pass_name in alone])
        matched = {row.pass_name for row in self.report.rows}
        changed = [p for p in self._passes if p.name in matched and not p.keeps_function]
        refuse_to_save_(self._model, changed)
        refuse_to_resize_(self._model)
        self._check = None
        self._facts = self._watched()

    def _watched(self) -> dict[tuple[Any, ...], Fact]:
        """What the graphs no longer read, by place: of what lies outside of the modules, and of those that a
        pass in force at some step has opened."""
        self._facts_of_regions.clear()
        watched = dict[tuple[Any, ...], Fact]()
        for site in self._sites:
            if site.module is not None:
                opened = [opened_values(site.module, path, site.base.name(path)) for path in site.opened]
                own = {f.key: f for f in chain(site.traced.frozen.facts, *opened)}
                watched |= own
                self._facts_of_regions[site.module] = [*own.values()]
        return watched

    @property
    def facts(self) -> tuple[Fact, ...]:
        """What is compared with what it was: plain values that tracing has read outside of the modules, or a
        pass in those that it has opened; each once."""
        return tuple(self._facts.values())

    def _check_rewritten(self, built: Sequence[tuple[Site, RegionModule]]) -> None:
        """Run the model on what the stock one ran on, if it did.

        Raises:
            PassError: what passes made is not read, what they replaced is, or a region is run past.
        """
        if self._check is None:
            return
        made, replaced = dict[str, dict[str, Tensor]](), dict[str, Tensor]()
        regions = {s.traced.fqn or "the model": s.module for s in self._sites if s.matched and s.module}
        for site, module in built:
            old = dict(site.traced.module.named_parameters(remove_duplicate=False))
            new = dict(module.named_parameters(remove_duplicate=False))
            gone = {name: old[name] for name in old if new.get(name) is not old[name]}
            replaced |= {site.base.name(name): tensor for name, tensor in gone.items()}
            for creation in site.base.created:
                if any(name in gone and self._check.was_read(gone[name]) for name in creation.sources):
                    here = {site.base.name(n): new[n] for n in creation.names if n in site.base.parameters}
                    made.setdefault(site.traced.fqn or "the model", {}).update(here)
        same = not self._active and not any(site.claims for site in self._sites)
        stock = {module: site.traced.module for site, module in built}
        self._check.rewritten(self._model, regions, made, replaced, stock, same)
        self.report = replace(self.report, checked=str(self._check))

    def lower_(self, step: int, without: Sequence[str] = ()) -> bool:
        """Bring the operations in line with the passes in force once `step` updates are made.

        Args:
            without: names of passes to leave out, in force or not; to see a model without 2:4, say.

        Returns:
            whether anything changed. Parameters and buffers never do.

        Raises:
            PassError: `without` names what is no operational pass of this pipeline.
        """
        return self._lower_to(self.in_force(step, without))

    def in_force(self, step: int, without: Sequence[str] = ()) -> list[OperationalPass]:
        """The operational passes in force once `step` updates are made, those named in `without` left out
        (`left_out`).

        Raises:
            OptionError: the step is no integer, or negative.
            PassError: `without` names what is no operational pass of this pipeline.
        """
        check_values(Start, "updates already made", step=step)
        check_left_out(self._passes, without)
        return left_out([p for p in self._operational if p.active(step)], without)

    def lower_to_(self, passes: Sequence[OperationalPass]) -> None:
        """The model through other operational passes from now on, as `lowered` has it for a while."""
        self._lower_to(list(passes))

    @contextmanager
    def lowered(self, passes: Sequence[OperationalPass]) -> Iterator[None]:
        """The model through other operational passes, over the same parameters and buffers, for as long as
        the context lasts. They may need no buffer that the pipeline's own passes do not have."""
        before = self._active
        self._lower_to(list(passes))
        try:
            yield
        finally:
            self._lower_to(before)

    def exchange_(self, old: OperationalPass, new: OperationalPass) -> None:
        """Put a pass in the place of another that differs only in how it computes: it has the same matches,
        or some of those of its `fullest`, and the same buffers and steps. Also where the other's form
        of evaluation is in force."""
        self._passes = tuple(new if p is old else p for p in self._passes)
        self._operational = [new if p is old else p for p in self._operational]
        forms = {id(old): new}
        if (served := old.in_evaluation()) is not None and (instead := new.in_evaluation()) is not None:
            forms |= {id(p): instead for p in self._active if p is not old and p == served}
        self._lower_to([forms.get(id(p), p) for p in self._active])

    @property
    def seed(self) -> int:
        """Of new parameters and of what is drawn in training."""
        return self._seed

    @property
    def model(self) -> nn.Module:
        """The model that the passes rewrote."""
        return self._model

    @property
    def passes(self) -> tuple[Pass, ...]:
        """All passes, in order."""
        return self._passes

    @property
    def active(self) -> tuple[OperationalPass, ...]:
        """The operational passes in force."""
        return tuple(self._active)

    def matches(
        self, p: OperationalPass, among: Sequence[OperationalPass] | None = None
    ) -> list[tuple[str, Match]]:
        """What a pass has rewritten, each with the name of its region.

        Args:
            among: the passes in force, of which it is one; None: those that are.
        """
        passes = tuple(self._active if among is None else among)
        index = passes.index(p)
        return [
            (one.site.traced.fqn, match) for one in self._lowerings(passes) for match in one.matches[index]
        ]

    def places(self, pass_name: str) -> tuple[str, ...]:
        """The fully qualified names of what a structural pass rewrites, each once."""
        return tuple(
            site.traced.name(path)
            for site in self._sites
            for path, p in site.claims.items()
            if p.name == pass_name
        )

    def reset_buffers_(self) -> None:
        """Give all buffers that passes added their first values, for a model whose parameters were made up
        after `to_empty`, as a benchmark does."""
        for site in self._sites:
            if site.module is not None:
                reset_buffers_(site.module, site.base.buffers)

    @property
    def modules(self) -> tuple[RegionModule, ...]:
        """The graph modules that stand in the model."""
        return tuple(self.regions.values())

    @property
    def regions(self) -> dict[str, RegionModule]:
        """The same, by the first place where each stands."""
        return {site.traced.fqn: site.module for site in self._sites if site.module is not None}

    def state_from_stock(
        self, state: Mapping[str, Tensor], keep: Sequence[str] = ()
    ) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """A stock state dict as the rewritten model's, and the names that it cannot fill.

        Args:
            keep: names of passes whose parameters the state has already.

        Raises:
            PassError: a name that a pass starts from is missing.
        """
        return from_stock([change for change in self.changes if change.pass_name not in keep], state)

    def state_to_stock(self, state: Mapping[str, Tensor], keep: Sequence[str] = ()) -> dict[str, Tensor]:
        """The rewritten model's state dict as a stock one of the same function.

        Args:
            keep: names of passes that are not undone, as the reader's model has them too.

        Raises:
            PassError: a pass has no such form, with its reason, or a name is missing.
        """
        return to_stock([change for change in self.changes if change.pass_name not in keep], state)

    @property
    def changes(self) -> list[Change]:
        """What passes do to parameters, in their order."""
        return [change for site in self._sites for change in site.changes]

    def _lower_to(self, active: list[OperationalPass]) -> bool:
        for fact in self._facts.values():
            fact.check()
        changed = active != self._active
        self._active = active
        if changed:
            self._lower()
        return changed

    def _lower(self) -> None:
        for done in self._lowerings(tuple(self._active)):
            assert done.site.module is not None
            lower_(done.site.module, done.lowering, self._classes)

    def _lowerings(self, passes: tuple[OperationalPass, ...]) -> list[Lowered]:
        if passes not in self._lowered:  # evaluation comes back to the same few again and again
            sites = [site for site in self._sites if site.module]
            self._lowered[passes] = [self._lower_region(site, passes) for site in sites]
        return self._lowered[passes]

    def _lower_region(self, site: Site, passes: tuple[OperationalPass, ...]) -> Lowered:
        region, matches = site.base.copy(), []
        for p in passes:
            planned = p.plan(region)
            p.apply(region, planned)
            matches.append(planned.matches)
        for p in (*self._structural, *passes):
            p.finish(region)
        return Lowered(site, lowering(region.graph, self._classes), matches)
