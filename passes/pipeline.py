"""Plan all passes over all regions, and only then touch the model.

Planning runs the real passes on copies of the regions' graphs, in order, so that a later pass sees what an
earlier one leaves. When every pass has matched, the new modules are built, and only when all are built do
they take their places. Structural passes are applied once; operational ones are applied again whenever
their step ranges say so (`Pipeline.lower_`), over the same parameters and buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from act24.initialise import generator_for
from act24.passes.base import Match, OperationalPass, Pass, PassError, StateMap, StructuralPass
from act24.passes.graph.flops import region_flops
from act24.passes.graph.fused_columns import fuse_columns
from act24.passes.graph.hooks import refuse_hooks
from act24.passes.graph.normal_form import is_linear
from act24.passes.graph.region import Lowering, Region, RegionModule, lower_, lowering, materialise
from act24.passes.graph.tracing import trace
from act24.passes.report import Report, Row, no_match, row


def apply_(model: nn.Module, passes: Sequence[Pass], *, seed: int = 0, step: int = 0) -> Pipeline:
    """Rewrite a model in place.

    Args:
        model: the stock model, or any other whose regions can be traced (`act24.passes.graph.tracing`).
        passes: in order.
        seed: of the initial values of new parameters, each from a generator of (seed, its name).
        step: updates already made; decides which operational passes are in force.

    Returns:
        the pipeline: print it for the report, keep it for `lower_` when passes have step ranges.

    Raises:
        PassError: a pass matches nothing and is not optional, passes collide, a module has forward hooks,
            or the model was already rewritten. The model is then as it was.
    """
    pipeline = Pipeline(model, passes, seed=seed, step=step)
    pipeline.commit_()
    return pipeline


def plan(model: nn.Module, passes: Sequence[Pass]) -> Report:
    """What `apply_` would do. Touches nothing and allocates no weights; the model may be on `meta`."""
    return Pipeline(model, passes).report


@dataclass
class _Site:
    """A region on its way: as traced, after the structural passes, and the module once it stands."""

    traced: Region
    base: Region
    matches: list[Match] = field(default_factory=list)
    claims: dict[str, Pass] = field(default_factory=dict)
    touched: bool = False
    module: RegionModule | None = None


@dataclass(frozen=True)
class _Lowered:
    """A region through certain operational passes, and what each of them matched."""

    site: _Site
    lowering: Lowering
    matches: list[tuple[Match, ...]]


class Pipeline:
    """Passes over one model, planned at construction.

    Attributes:
        report: what it does.
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
    ) -> None:
        """Plan. Arguments as for `apply_`.

        Args:
            keep_all: let regions stand as graph modules even where no pass acts, single linears excepted.
        """
        self._model = model
        self._passes = tuple(passes)
        self._seed = seed
        self._classes: dict[tuple[Any, ...], type] = {}
        self._lowered: dict[tuple[OperationalPass, ...], list[_Lowered]] = {}
        self._rows: list[Row] = []
        self._misses: list[tuple[str, str, str]] = []
        operational = [p for p in self._passes if isinstance(p, OperationalPass)]
        self._operational = sorted(operational, key=lambda p: p.last)
        self._active = [p for p in self._operational if p.active(step)]
        self._check_order()
        limits = {limit for p in self._operational for limit in (p.from_step, p.until_step) if limit}
        self.boundaries: tuple[int, ...] = tuple(sorted(limits))
        regions, self._unclean = trace(model)
        self._sites = [
            _Site(region, region.copy(), touched=keep_all and not is_linear(region.module))
            for region in regions
        ]
        self._plan_structural()
        lowered = self._plan_operational()
        for site in self._sites:
            if site.touched:
                refuse_hooks(site.traced)
        self.report = self._make_report(lowered)

    def __str__(self) -> str:
        return str(self.report)

    @property
    def needs_column_scores(self) -> tuple[str, ...]:
        """The dense weights of which `commit_` wants a score for each input channel, measured by the shell:
        those that `lost` with `method = "gradient"` takes columns from."""
        return tuple(
            site.base.name(name)
            for site in self._sites
            for new in site.base.created
            if new.scored
            for name in new.sources
        )

    def commit_(self, column_scores: Mapping[str, Tensor] | None = None) -> None:
        """Build all new modules, then put each where its region was traced.

        Args:
            column_scores: `[in]` for each of `needs_column_scores`; not looked at on the meta device.

        Raises:
            PassError: that was done before, or scores are missing.
        """
        if self.modules:
            raise PassError("this pipeline was already committed")
        on_meta = any(p.is_meta for p in self._model.parameters())
        missing = [n for n in self.needs_column_scores if n not in (column_scores or {}) and not on_meta]
        if missing:
            raise PassError(
                f"{len(missing)} weights, {missing[0]} the first, need column scores, measured on the first "
                "batch: pass them to Pipeline.commit_(column_scores=...)"
            )
        built: list[tuple[_Site, RegionModule]] = [
            (site, materialise(site.base, lambda name: generator_for(self._seed, name), column_scores))
            for site in self._sites
            if site.touched
        ]
        for site, module in built:
            for fqn in site.traced.fqns:
                parent, _, leaf = fqn.rpartition(".")
                setattr(self._model.get_submodule(parent), leaf, module)
            site.module = module
            # The stock tensors that a pass replaced must not live on through the plan.
            site.traced.module = site.base.module = module
        self._lower()

    def lower_(self, step: int, without: Sequence[str] = ()) -> bool:
        """Bring the operations in line with the passes in force once `step` updates are made.

        Args:
            without: names of passes to leave out, in force or not; to see a model without 2:4, say.

        Returns:
            whether anything changed. Parameters and buffers never do.
        """
        active = [p for p in self._operational if p.active(step) and p.name not in without]
        return self._lower_to(active)

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
        buffers and steps."""
        self._passes = tuple(new if p is old else p for p in self._passes)
        self._operational = [new if p is old else p for p in self._operational]
        self._lower_to([new if p is old else p for p in self._active])

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

    def matches(self, p: OperationalPass) -> list[tuple[str, Match]]:
        """What a pass in force has rewritten, each with the name of its region."""
        index = self._active.index(p)
        lowered = self._lowered[tuple(self._active)]
        return [(done.site.traced.fqn, match) for done in lowered for match in done.matches[index]]

    def places(self, pass_name: str) -> tuple[str, ...]:
        """The fully qualified names of what a structural pass rewrites, each once."""
        return tuple(
            site.traced.name(path)
            for site in self._sites
            for path, p in site.claims.items()
            if p.name == pass_name
        )

    @property
    def modules(self) -> tuple[RegionModule, ...]:
        """The graph modules that stand in the model."""
        return tuple(self.regions.values())

    @property
    def regions(self) -> dict[str, RegionModule]:
        """The same, by the first place where each stands."""
        return {site.traced.fqn: site.module for site in self._sites if site.module is not None}

    def state_from_stock(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """A stock state dict as the rewritten model's, and the names that it cannot fill.

        Raises:
            PassError: a name that a pass starts from is missing.
        """
        result, fresh = dict(state), dict[str, None]()
        for site, _, change in self._changes():
            for fqn in site.traced.fqns:
                removes = {name: f"{fqn}.{name}" for name in change.removes}
                creates = [f"{fqn}.{name}" for name in change.creates]
                fill = change.from_stock if fresh.keys().isdisjoint(removes.values()) else None
                if fill is None:
                    for name in removes.values():
                        result.pop(name, None)
                        fresh.pop(name, None)
                    fresh.update(dict.fromkeys(creates))
                else:
                    made = fill(_take(result, removes))
                    result.update({f"{fqn}.{name}": value for name, value in made.items()})
        return result, tuple(fresh)

    def state_to_stock(self, state: Mapping[str, Tensor], keep: Sequence[str] = ()) -> dict[str, Tensor]:
        """The rewritten model's state dict as a stock one of the same function.

        Args:
            keep: names of passes that are not undone, as the reader's model has them too.

        Raises:
            PassError: a pass has no such form, with its reason, or a name is missing.
        """
        result = dict(state)
        for site, match, change in reversed(list(self._changes())):
            if site.claims[match.path].name in keep:
                continue
            if change.to_stock is None:
                raise PassError(f"{site.traced.name(match.path)} has no stock form: {change.why}")
            for fqn in site.traced.fqns:
                created = _take(result, {name: f"{fqn}.{name}" for name in change.creates})
                made = change.to_stock(created)
                result.update({f"{fqn}.{name}": value for name, value in made.items()})
        return result

    def _changes(self) -> Iterator[tuple[_Site, Match, StateMap]]:
        """The matches that change parameters, in the order in which they do."""
        for site in self._sites:
            yield from ((site, match, match.state) for match in site.matches if match.state is not None)

    def _check_order(self) -> None:
        rank = lambda p: (not isinstance(p, StructuralPass), p.observes)  # noqa: E731
        for first, second in pairwise(p for p in self._passes if not p.last):
            if rank(first) > rank(second):
                raise PassError(
                    f"{second.name} stands behind {first.name}: the order is passes that change parameters, "
                    "passes that only change operations, passes that only look"
                )

    def _plan_structural(self) -> None:
        for p in self._passes:
            if isinstance(p, StructuralPass):
                self._plan_pass(p, [site.base for site in self._sites])

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
            for site, region in zip(self._sites, lowered, strict=True):
                site.base.buffers.update(region.buffers)
            if any(p.active(step) and not p.observes for p in self._operational):
                final = counted
        return final

    def _plan_pass(self, p: Pass, regions: list[Region], report: bool = True) -> None:
        matched, absent = 0, list[tuple[str, str]]()
        for site, region in zip(self._sites, regions, strict=True):
            planned = p.plan(region)
            if isinstance(p, StructuralPass):
                self._claim(p, site, region, planned.matches)
            p.apply(region, planned)
            matched += len(planned.matches)
            site.touched |= bool(planned.matches)
            misses = [(p.name, region.name(path), reason) for path, reason in planned.misses]
            absent += [(fqn, reason) for _, fqn, reason in misses]
            if not planned.matches and not misses:
                absent.append((f"{region.fqn} [{region.class_name('')}]", planned.absent))
            if report and not p.observes:
                self._rows += [row(p, region, match) for match in planned.matches]
                self._misses += misses
        if not matched and not p.optional:
            everywhere = replace(p, targets=("*",), ignore=())
            left_out = [region.name(m.path) for region in regions for m in everywhere.plan(region).matches]
            raise PassError(no_match(p, left_out, absent, self._unclean))

    def _claim(self, p: Pass, site: _Site, region: Region, matches: tuple[Match, ...]) -> None:
        """One structural pass a place: the second would take apart what the first one built."""
        for match in matches:
            other = site.claims.setdefault(match.path, p)
            if other is not p:
                raise PassError(f"{other.name} and {p.name} both rewrite {region.name(match.path)}")
        site.matches += matches

    def _lower_to(self, active: list[OperationalPass]) -> bool:
        changed = active != self._active
        self._active = active
        if changed:
            self._lower()
        return changed

    def _lower(self) -> None:
        key = tuple(self._active)
        if key not in self._lowered:  # evaluation comes back to the same few again and again
            self._lowered[key] = [self._lower_region(site) for site in self._sites if site.module]
        for done in self._lowered[key]:
            assert done.site.module is not None
            lower_(done.site.module, done.lowering, self._classes)

    def _lower_region(self, site: _Site) -> _Lowered:
        region, matches = site.base.copy(), []
        for p in self._active:
            planned = p.plan(region)
            p.apply(region, planned)
            matches.append(planned.matches)
        fuse_columns(region)
        return _Lowered(site, lowering(region.graph, self._classes), matches)

    def _make_report(self, lowered: list[Region]) -> Report:
        tensors = {id(t): t.numel() for t in self._model.parameters()}
        before = sum(tensors.values())
        change = sum(site.base.numel() - site.traced.numel() for site in self._sites)
        traced = [site.traced for site in self._sites]
        return Report(
            rows=tuple(self._rows),
            misses=tuple(self._misses),
            parameters_before=before,
            parameters_after=before + change,
            flops_before=sum(region_flops(r) * len(r.fqns) for r in traced),
            flops_after=sum(region_flops(r) * len(r.fqns) for r in lowered),
        )


def _take(state: dict[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Take tensors out of a state dict, by the keys of `names`."""
    if missing := [fqn for fqn in names.values() if fqn not in state]:
        raise PassError(f"the state dict has no {missing[0]}")
    return {name: state.pop(fqn) for name, fqn in names.items()}
