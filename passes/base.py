"""What a pass is: options as data, and two functions, `plan` and `apply`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from act24.errors import Act24Error
from act24.passes.graph.selectors import selected

if TYPE_CHECKING:
    from act24.passes.graph.region import Region


#: Metadata of a field of a pass that recipes do not name: the shell sets it, or a user in Python.
PYTHON_ONLY = {"python_only": True}


class PassError(Act24Error):
    """A pass that cannot be applied to this model, and why."""


@dataclass(frozen=True)
class StateMap:
    """How the parameters that one match replaces turn into those it creates, and back.

    Names are local to the region.

    Attributes:
        removes: names of a stock state dict that end here.
        creates: names that begin here.
        from_stock: removed values to created values; None: they cannot be carried over, and the created
            ones start fresh.
        to_stock: created values to removed values; None: there is no such form.
        exact: the function of the model is the same after `to_stock`.
        why: what is lost, or why there is no way back.
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
        nodes: what `apply` needs to find it again; only the pass that wrote it looks inside.
        parameters_before, parameters_after: elements in the parameters that the expression reads.
        state: for passes that change parameters.
        note: one remark for the report.
    """

    path: str
    before: str
    after: str
    nodes: Any
    parameters_before: int
    parameters_after: int
    state: StateMap | None = None
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """What a pass would do to one region.

    Attributes:
        matches: what it rewrites.
        misses: (local path, reason) of what it recognises and still leaves alone.
        absent: what the region has instead of the pattern, where there is neither.
    """

    matches: tuple[Match, ...] = ()
    misses: tuple[tuple[str, str], ...] = ()
    absent: str = ""


@dataclass(frozen=True)
class PassResult:
    """A region after a pass, and whether anything in it changed."""

    region: Region
    changed: bool


@dataclass(frozen=True, kw_only=True)
class Pass:
    """The options that every pass has; a pass adds its own fields, `plan` and `_rewrite`.

    Attributes:
        targets: where the pass may act (`act24.passes.graph.selectors`).
        ignore: where it may not, even if targeted.
        optional: no match is no error.
    """

    name: ClassVar[str]
    kind: ClassVar[Literal["structural", "operational"]]
    #: Whether the pass only looks: reports leave it out.
    observes: ClassVar[bool] = False
    #: Whether the pass takes what all others leave, wherever it stands in the list.
    last: ClassVar[bool] = False

    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()
    optional: bool = False

    def plan(self, region: Region) -> Plan:
        """The places that the pass would rewrite. Touches nothing."""
        raise NotImplementedError

    def apply(self, region: Region, plan: Plan) -> PassResult:
        """Rewrite `region`, in place, as planned; without matches it stays as it is."""
        for match in plan.matches:
            self._rewrite(region, match)
        if plan.matches:
            region.graph.lint()
        return PassResult(region, changed=bool(plan.matches))

    def _rewrite(self, region: Region, match: Match) -> None:
        raise NotImplementedError

    def selects(self, region: Region, path: str) -> bool:
        """Whether `targets` and `ignore` let the pass act at this path of the region."""
        return any(
            selected(self.targets, self.ignore, fqn, region.class_name(path)) for fqn in region.names(path)
        )


@dataclass(frozen=True, kw_only=True)
class StructuralPass(Pass):
    """A pass that changes parameters, and so holds for the whole run."""

    kind: ClassVar[Literal["structural", "operational"]] = "structural"


@dataclass(frozen=True, kw_only=True)
class OperationalPass(Pass):
    """A pass that swaps operations over the same parameters, and so may come and go.

    Attributes:
        from_step: the first optimizer step, counted in updates already made, at which it is in force.
        until_step: the first at which it no longer is; None: never ends.
    """

    kind: ClassVar[Literal["structural", "operational"]] = "operational"

    from_step: int = 0
    until_step: int | None = None

    def __post_init__(self) -> None:
        if self.from_step < 0:
            raise PassError(f"{self.name}: from_step must be 0 or more, got {self.from_step}")
        if self.until_step is not None and self.until_step <= self.from_step:
            raise PassError(
                f"{self.name}: until_step ({self.until_step}) must be above from_step ({self.from_step})"
            )

    def active(self, step: int) -> bool:
        """Whether the pass is in force when `step` updates have been made."""
        return step >= self.from_step and (self.until_step is None or step < self.until_step)

    def in_evaluation(self) -> OperationalPass | None:
        """The pass as evaluation has it, which neither draws nor counts; None: not at all."""
        return self
