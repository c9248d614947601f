"""A pipeline: passes over one model, and the one call an update that a training loop owes it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from act24.errors import PassError
from act24.passes.activation24 import SCALE
from act24.passes.base import OperationalPass, Pass
from act24.passes.compared import watch_
from act24.passes.first_rows import Rows
from act24.passes.graph.activation_sites import PADS
from act24.passes.graph.check import Probe
from act24.passes.graph.region import buffers_of
from act24.passes.report import Report
from act24.passes.rewriting import Rewriting
from act24.passes.state import Reduce, Replayed, evaluation, set_pads_
from act24.passes.stock_form import as_multiplied, without_operational_state
from act24.passes.update_hooks import trunks_of
from act24.passes.updates import Updates, updates_of


def apply_(
    model: nn.Module,
    passes: Sequence[Pass],
    *,
    seed: int = 0,
    step: int = 0,
    check: bool = True,
    probe: Probe | None = None,
) -> Pipeline:
    """Rewrite a model in place.

    Args:
        model: the stock model, or any other whose regions can be traced (`act24.passes.graph.tracing`).
        passes: in order.
        seed: of the initial values of new parameters, each from a generator of (seed, its name).
        step: updates already made; decides which operational passes are in force.
        check: compare what is traced, and the rewritten model, with the modules on a small input
            (`act24.passes.graph.check` says what that costs). The report says what could not be run.
        probe: that input, as the model takes it: a tensor, positional arguments, or keyword arguments; None:
            a few random tokens or features.

    Returns:
        the pipeline: print it for the report, keep it for `lower_` when passes have step ranges.

    Raises:
        PassError: what is given is no list of passes, a pass matches nothing and is not optional, passes
            collide, a module has forward hooks, or the model was already rewritten. The model is then as it
            was.
        OptionError: the model is no module, the seed no integer, the step none or negative.

    Warns:
        PartialWarning: a pass that is not optional reaches less than its scope and targets promise; the line
            of the report that says what it leaves.
        FrozenWarning: a pass freezes what another one makes fresh, and the model is not on `meta`, to be
            filled later.
    """
    pipeline = Pipeline(model, passes, seed=seed, step=step, check=check, probe=probe)
    pipeline.commit_()
    for one in pipeline.report.partial:
        if not one.optional:
            warnings.warn(str(one), PartialWarning, stacklevel=2)
    if (untrained := pipeline.report.untrained) and not any(p.is_meta for p in model.parameters()):
        warnings.warn(untrained, FrozenWarning, stacklevel=2)
    return pipeline


def plan(
    model: nn.Module, passes: Sequence[Pass], *, check: bool = True, probe: Probe | None = None
) -> Report:
    """What `apply_` would do. Touches nothing and allocates no weights; the model may be on `meta`, where
    nothing can be checked. The check runs a double of the model: what a forward writes outside of it, into
    globals and files, it writes there too, unless check=False."""
    return Pipeline(model, passes, check=check, probe=probe).report


class PartialWarning(UserWarning):
    """A pass reaches less than its scope promises."""


class FrozenWarning(UserWarning):
    """A pass freezes what another one makes fresh: without values that are loaded into it, it is noise."""


class Pipeline(Rewriting):
    """Passes over one model, planned at construction (`act24.passes.rewriting.Rewriting`), and what training
    and evaluation of it need."""

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
        """As `Rewriting`."""
        super().__init__(model, passes, seed=seed, step=step, keep_all=keep_all, check=check, probe=probe)
        self._updates = Updates(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = super().__deepcopy__(memo)
        twin._updates = self._updates.of_copy(twin)
        if twin.modules:
            twin._watch_facts()
        return twin

    def __reduce_ex__(self, _: Any) -> NoReturn:
        raise PassError(
            "a pipeline cannot be pickled or saved, and copied by deepcopy alone, as its plan is functions: "
            "save model.state_dict() and give a stock model the same passes, or save the model alone, within "
            "pipeline.evaluation()"
        )

    def commit_(self, measured: Mapping[str, Tensor] | None = None) -> None:
        """As `Rewriting.commit_`; from then on it is watched that updates are begun."""
        if torch.is_inference_mode_enabled():
            raise PassError(
                "what passes make under torch.inference_mode() could not be renewed or trained: apply them "
                "outside of it"
            )
        stock = dict(self.model.named_parameters())
        super().commit_(measured)
        self._updates.watch_(stock)
        self._watch_facts()

    def _watch_facts(self) -> None:
        """At the model's calls, at those of the module that calls the regions, as who takes hidden states
        does, and at those of a region by itself."""
        callers = {self.model, *trunks_of(self.model, list(self.regions))}
        watch_(callers, self.facts, self._facts_of_regions)

    @property
    def updates_made(self) -> int | None:
        """How many there are, where a step was given and no update has begun since; None: state is that of
        the update that was begun last, or whatever was loaded."""
        return self._updates.made

    def state_to_stock(self, state: Mapping[str, Tensor], keep: Sequence[str] = ()) -> dict[str, Tensor]:
        """The rewritten model's state dict as a stock one, which a stock model loads with `strict`. It
        computes what this one does in evaluation mode, but for activations that are 2:4 here: weights that
        `weight24` in force makes 2:4 are as they are multiplied, if their masks are in the state, too.

        Args:
            keep: names of structural passes that are not undone, as the reader's model has them too.

        Raises:
            PassError: a pass has no such form, with its reason, or a name is missing.
        """
        served = as_multiplied(self, state, self.updates_made)
        return super().state_to_stock(without_operational_state(self, served), keep)

    def lower_(self, step: int, without: Sequence[str] = ()) -> bool:
        self._updates.settle()
        changed = super().lower_(step, without)
        self._updates.lowered_for(step)
        return changed

    def lower_to_(self, passes: Sequence[OperationalPass]) -> None:
        self._updates.settle()
        super().lower_to_(passes)

    def exchange_(self, old: OperationalPass, new: OperationalPass) -> None:
        self._updates.settle()
        super().exchange_(old, new)

    @contextmanager
    def lowered(self, passes: Sequence[OperationalPass]) -> Iterator[None]:
        """As `Rewriting.lowered`. Forwards in it are no part of an update: seeds stay, and nothing is
        asked."""
        with self._updates.held(), super().lowered(passes):
            yield

    def begin_update_(
        self,
        step: int,
        batch: Rows | None = None,
        reduce: Reduce | None = None,
        *,
        forward: Callable[..., object] | None = None,
        rank: int | None = None,
        without: Sequence[str] = (),
        loop_decays: bool = False,
        replayed: Replayed | None = None,
    ) -> str | None:
        """All that a training loop owes, once an update and before its first forward: lower the model for the
        step, renew masks and scales that are due, and set seeds.

        Collective: every process calls it with the same step. Micro-batches, masked decay and the end of the
        update need no call (`act24.passes.updates`). A training forward without it raises `Act24Error` where
        a pass in force renews anything, and behind an optimizer's step where a pass has a step to come. Masks
        and scales of an update are those of the model's own weights as it begins, also where
        `torch.func.functional_call` brings others.

        Args:
            step: updates already made.
            batch: the first rows of this process's part of the update, or all, `[rows, tokens]` each, as the
                model takes them: a tensor, a sequence of tensors, or a mapping of keyword arguments.
                Methods that measure a scale run a fixed number of these rows without gradients, under the
                autocast of the caller, so a scale does not depend on how the update is split into
                micro-batches; the others do not look at it. Buffers and generators are put back
                afterwards; what a forward counts in plain attributes, it counts then too.
            reduce: sums a tensor over the processes and returns it; None: there is one.
            forward: runs the rows; None: the model. For models that only a wrapper can run.
            rank: of this process, which draws apart from the others; None: there is one.
            without: names of operational passes to leave out.
            loop_decays: the loop calls `decay_gradients_` itself. For gradients that are scaled, captured in
                a CUDA graph, or summed over processes and not averaged: there, what autograd's hooks add to
                the first gradient of an update would be another amount.
            replayed: calls what packs and casts weights, given a key and a function over tensors at fixed
                addresses; a loop with CUDA graphs captures it and replays the capture where the key is the
                same. None: it is called at once.

        Returns:
            at the first measurement of a scale, a line that says what it is and what naive 2:4 would cost.

        Raises:
            Act24Error: a scale is due, and there is no batch; or `torch.distributed` has several processes
                and `reduce` or `rank` is missing, of which a pass makes use.
            OptionError: the step is no integer, or negative.
        """
        return self._updates.begin_(step, batch, reduce, forward, rank, without, loop_decays, replayed)

    def decay_gradients_(self) -> None:
        """Add the masked decay that is a part of the gradient (`sr_ste`), once an update, before gradients
        are clipped. Only loops that said `loop_decays` call it."""
        self._updates.decay_(None, "before_clipping")

    @contextmanager
    def evaluation(
        self,
        without: Sequence[str] = (),
        *,
        step: int | None = None,
        forward: Callable[[], object] | None = None,
        pads: Tensor | None = None,
        reduce: Reduce | None = None,
    ) -> Iterator[None]:
        """The model as it is evaluated: nothing is drawn at random, nothing is counted, masks are those of
        the weights as they are. Afterwards all state is as before, at the same addresses.

        A forward in evaluation mode (`model.eval()`) has that function without this context too; with it
        masks are made once for many forwards. To export or trace it, take a copy that is made here:
        `copy.deepcopy(model)`. Collective where parameters are sharded.

        Args:
            without: names of operational passes to leave out, to see the same weights without 2:4.
            step: updates already made: evaluate with the passes in force then, and measure scales that no
                update has set yet. None: as the pipeline is lowered; it knows of updates begun with it.
            forward: runs the model on the rows on which such scales are measured, of which `pads` are
                padding; None: those of activations stay as they are.
            reduce: as for `begin_update_`.
        """
        made = self.updates_made if step is None else step
        with self._updates.lent(), evaluation(self, without, step, made, forward, pads, reduce):
            yield

    def measure_scales_(
        self,
        step: int,
        forward: Callable[[], object],
        pads: Tensor | None = None,
        reduce: Reduce | None = None,
    ) -> None:
        """Set the scales that no update has set yet, of the passes in force once `step` updates are made, for
        a model that is saved or read before its first update with them. That update measures anew.

        Args:
            forward, pads, reduce: as for `evaluation`.
        """
        with self.evaluation(step=step, forward=forward, pads=pads, reduce=reduce):
            measured = {name: scale.clone() for name, scale in buffers_of(self.regions, SCALE).items()}
        for name, scale in buffers_of(self.regions, SCALE).items():
            scale.copy_(measured[name])

    def set_pads_(self, pads: Tensor | None) -> None:
        """Say which tokens of the next forwards are padding: boolean, the shape of the token ids; None for
        rows without padding. An `attention_mask` `[B, S]` among a forward's keyword arguments says it by
        itself."""
        set_pads_(self, pads)

    @property
    def asks_for_pads(self) -> bool:
        """Whether a region reads what `set_pads_` says."""
        return any(module._buffers.get(PADS) is not None for module in self.modules)


def pipeline_of(model: nn.Module) -> Pipeline | None:
    """The pipeline to which a training loop of the model owes its call; None if it owes none, or for a
    copy."""
    updates = updates_of(model)
    found = updates and updates.pipeline
    return found if isinstance(found, Pipeline) else None
