"""What a pass is: options as data, and two functions, `plan` and `apply`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from act24.errors import PassError
from act24.options import PositiveSteps, Steps, check_options
from act24.passes.graph.normal_form import place_of
from act24.passes.graph.selectors import check_selectors, names, takes
from act24.precision import Layer

if TYPE_CHECKING:
    from act24.passes.graph.region import Region


#: Metadata of a field of a pass that recipes do not name: the shell sets it, or a user in Python.
PYTHON_ONLY = {"python_only": True}


@dataclass(frozen=True)
class StateMap:
    """How the parameters that one match replaces turn into those it creates, and back.

    Names are local to the region.

    Attributes:
        removes: parameters that the match takes away.
        creates: parameters, and persistent buffers, that it puts in their place.
        from_stock: makes the values of `creates` from those of `removes`. None: nothing of them can be used,
            and the new ones start fresh.
        to_stock: makes the values of `removes` from those of `creates`. None: no values there would compute
            the same.
        exact: after `to_stock` the model computes the same function.
        why: what is lost on the way, or why there is no way back.
    """

    removes: tuple[str, ...]
    creates: tuple[str, ...]
    from_stock: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
    to_stock: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
    exact: bool = False
    why: str = ""


@dataclass(frozen=True)
class Match:
    """One place that a pass rewrites.

    Attributes:
        path: where, local to the region (`mlp`).
        before, after: the expression there, for the report.
        nodes: what `apply` needs to find the place again. Only the pass that wrote it reads it.
        parameters_before, parameters_after: elements in the parameters that the expression reads.
        state: for passes that change parameters.
        note: one remark for the report.
        reaches: the matrices in it that the pass acts on, by local name; None: all at the path.
        spared: (local path, reason) of matrices at it that the pass leaves.
        layer: what `precision = "auto"` decides about it with; None: nothing is to be decided.
    """

    path: str
    before: str
    after: str
    nodes: Any
    parameters_before: int
    parameters_after: int
    state: StateMap | None = None
    note: str = ""
    reaches: tuple[str, ...] | None = None
    spared: tuple[tuple[str, str], ...] = ()
    layer: Layer | None = None


@dataclass(frozen=True)
class Plan:
    """What a pass would do to one region.

    Attributes:
        matches: what it rewrites.
        misses: (local path, reason) of what it recognises and leaves alone all the same.
        absent: what the region has in the pattern's place, for a region without matches and misses. Both say
            what to do.
    """

    matches: tuple[Match, ...] = ()
    misses: tuple[tuple[str, str], ...] = ()
    absent: str = ""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """The options that every pass has; a pass adds its own fields, `plan` and `_rewrite`.

    Attributes:
        targets: where the pass may act, and below (`act24.passes.graph.selectors`).
        ignore: where it may not, nor below, even if targeted.
        optional: no match is no error, nor is it one under `strict` to reach less than the scope promises.
    """

    name: ClassVar[str]
    kind: ClassVar[Literal["structural", "operational"]]
    #: Whether the pass only looks: reports leave it out.
    observes: ClassVar[bool] = False
    #: Whether the model computes the same with the pass as without it.
    keeps_function: ClassVar[bool] = False
    #: Whether the pass means to reach all matrices that it covers.
    promises: ClassVar[bool] = True
    #: Whether a target that names a linear, whatever that is for, makes the pass take it.
    takes_named: ClassVar[bool] = True
    #: Whether the pass acts on what others leave, and so stands behind them.
    remainder: ClassVar[bool] = False
    #: Whether the pass is applied behind all others, wherever it stands in the list.
    last: ClassVar[bool] = False
    #: Why a matrix is left at a place that the pass rewrites, where its matches name those that it reaches.
    spares: ClassVar[str] = ""
    #: Whether the pass is about how rows of training text are made: a model that is served goes without.
    of_rows: ClassVar[bool] = False

    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()
    optional: bool = False

    def __post_init__(self) -> None:
        """Check every field against its annotation; subclasses with rules of their own call this first.

        Raises:
            OptionError: names the pass, the field, the value, and what the field takes.
        """
        for name in ("targets", "ignore"):
            if isinstance(selectors := getattr(self, name), str):
                check_selectors(selectors, f"{self.name}: {name}")
            if isinstance(selectors, list):  # as recipes and errors spell it
                object.__setattr__(self, name, tuple(selectors))
        check_options(self, self.name)
        for name in ("targets", "ignore"):
            check_selectors(getattr(self, name), f"{self.name}: {name}")

    def beside(self, passes: tuple[Pass, ...]) -> Pass:
        """The pass with what it leaves open settled by the list in which it stands."""
        return self

    def plan(self, region: Region) -> Plan:
        """The places that the pass would rewrite. Touches nothing."""
        raise NotImplementedError

    def missing(self, regions: Sequence[Region]) -> str:
        """What the options ask for and none of the regions has, and what to do; empty if nothing."""
        return ""

    def apply(self, region: Region, plan: Plan) -> None:
        """Rewrite `region`, in place, as planned; without matches it stays as it is."""
        for match in plan.matches:
            self._rewrite(region, match)
        if plan.matches:
            region.graph.lint()

    def _rewrite(self, region: Region, match: Match) -> None:
        raise NotImplementedError

    @property
    def covers(self) -> tuple[str, ...]:
        """The roles (`act24.passes.graph.roles`) of the matrices that the pass may reach; none: the report
        does not say how many it does."""
        return ()

    def takes(self, fqn: str, classes: Mapping[str, str]) -> bool:
        """Whether `targets` and `ignore` let the pass act on a module or parameter, by full name.

        Args:
            classes: the class name of every module of the model, by full name.
        """
        return takes(self.targets, fqn, classes) and not takes(self.ignore, fqn, classes)

    def names(self, region: Region, path: str) -> bool:
        """Whether a target that is not everything names this path of the region itself; of a parameter, its
        module will do."""
        named = tuple(target for target in self.targets if target != "*")
        places = [fqn for fqn in region.names(path)]
        places += [fqn.rpartition(".")[0] for fqn in places if fqn not in region.classes]
        return any(names(named, place, region.classes) for place in places)

    def finish(self, region: Region) -> None:
        """Simplify, in place, what is left of this pass's work at the end of every lowering.

        It is called when all passes in force have rewritten the region, and may change how the graph
        computes, but not what, nor the region's parameters and buffers.
        """

    def selects(self, region: Region, path: str, whole: Sequence[str] = ()) -> bool:
        """Whether `targets` and `ignore` let the pass act at this path of the region.

        Args:
            whole: parameters, by local name, that it takes there or leaves, all of them: to name each is to
                name the path.
        """

        def given(selectors: Iterable[str], places: Sequence[str]) -> bool:
            there, *parts = (takes(selectors, place, region.classes) for place in places)
            return there or (bool(parts) and all(parts))

        names = zip(*(region.names(name) for name in (path, *map(place_of, whole))), strict=True)
        return any(given(self.targets, places) and not given(self.ignore, places) for places in names)

    def split(self, region: Region, whole: Sequence[str]) -> str:
        """Why the pass leaves parameters that it takes or leaves together: `ignore` takes one; or the empty
        string. Arguments as for `selects`."""
        ignored = (
            place
            for name in whole
            for place in region.names(place_of(name))
            if takes(self.ignore, place, region.classes)
        )
        part = next(ignored, "")
        return f"ignore takes {part}, a part of it: ignore all of it, or nothing" if part else ""


@dataclass(frozen=True, kw_only=True)
class StructuralPass(Pass):
    """A pass that changes parameters, and so holds for the whole run."""

    #: Whether nothing trains but what the pass makes.
    freezes: ClassVar[bool] = False

    kind: ClassVar[Literal["structural", "operational"]] = "structural"

    @property
    def starts_fresh(self) -> bool:
        """Whether what it makes begins at random, whatever stood there, and so has to train."""
        return False


@dataclass(frozen=True, kw_only=True)
class OperationalPass(Pass):
    """A pass that swaps operations over the same parameters, and so may come and go.

    Attributes:
        from_step: the first optimizer step, counted in updates already made, at which it is in force.
        until_step: the first at which it no longer is; None: never ends.
    """

    kind: ClassVar[Literal["structural", "operational"]] = "operational"

    from_step: Steps = 0
    until_step: PositiveSteps | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.until_step is not None and self.until_step <= self.from_step:
            raise PassError(
                f"{self.name}: until_step ({self.until_step}) is not above from_step ({self.from_step}): "
                "set a later one"
            )

    def active(self, step: int) -> bool:
        """Whether the pass is in force when `step` updates have been made."""
        return step >= self.from_step and (self.until_step is None or step < self.until_step)

    @property
    def renews(self) -> bool:
        """Whether it reads state that has to be brought up to date for every update
        (`Pipeline.begin_update_`): masks, scales, seeds."""
        return False

    @property
    def fullest(self) -> OperationalPass:
        """The pass as it takes most, of what `Rewriting.exchange_` may put in its place: whatever has a
        buffer there has it from the start."""
        return self

    def in_evaluation(self) -> OperationalPass | None:
        """The pass as evaluation has it, which neither draws nor counts; None: not at all."""
        return self


@dataclass(frozen=True)
class Start:
    """What a pipeline takes besides passes: checked, not kept."""

    model: nn.Module
    seed: int
    step: Steps


def check_passes(passes: Iterable[Pass]) -> tuple[Pass, ...]:
    """The passes of a pipeline, if they are passes and stand in an order that can be.

    Raises:
        PassError: something else than a list of passes, one that is given twice, or the wrong order.
    """
    if isinstance(passes, str | type | Pass) or not isinstance(passes, Iterable):
        raise PassError(f"passes come as a list: write [Relu2FFN(), Activation24()], not {_shown(passes)}")
    given = tuple(passes)
    for index, p in enumerate(given):
        if isinstance(p, type) and issubclass(p, Pass):
            raise PassError(f"{p.__name__} is the class of a pass: write {p.__name__}(...), with its options")
        if not isinstance(p, StructuralPass | OperationalPass):
            if isinstance(p, str):
                raise PassError(f"{_shown(p)} is text: write the pass, as Relu2FFN(), from act24.passes")
            raise PassError(f"{_shown(p)} is no pass: derive it from StructuralPass or OperationalPass")
        if p in given[:index]:
            raise PassError(f"{p.name} is given twice with the same options: leave one out")
    for first, second in pairwise(p for p in given if not p.last):
        if _rank(first) > _rank(second):
            raise PassError(
                f"{second.name} stands behind {first.name}: put first the passes that change parameters, "
                "then those that only change operations, then fp8, which takes what these leave, then "
                "those that only look"
            )
    return given


def _rank(p: Pass) -> tuple[bool, bool, bool]:
    return not isinstance(p, StructuralPass), p.observes, p.remainder


def _shown(value: object) -> str:
    text = value.__name__ if isinstance(value, type) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
