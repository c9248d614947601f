"""One call an update: what a training loop owes a rewritten model (`Pipeline.begin_update_`), and what
watches that it is made.

The loop says when an update begins. Everything else comes by itself: micro-batches are told apart by a hook
on the module that calls the regions, outside of them, so that a region that is recomputed in backward draws
what it drew; masked decay enters, and an update ends, when an optimizer makes its step with parameters of the
model; and a forward in evaluation mode is one of the function that is served (`Pipeline.evaluation`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from act24.errors import Act24Error
from act24.passes.activation24 import Activation24
from act24.passes.base import OperationalPass, Pass
from act24.passes.graph.region import RegionModule
from act24.passes.rewriting import Rewriting
from act24.passes.state import (
    Reduce,
    SparseWeight,
    as_evaluated,
    calibrate_,
    calibration_text,
    decay_dropped_weights_,
    next_seeds_,
    pack_weights_,
    renew_masks_,
    set_pads_,
    set_seeds_,
    sparse_weights,
    stored_mask,
    whole,
)
from act24.passes.weight24 import MASK, Weight24

#: What a loop hands in to measure on: the arguments of a forward.
Rows = Tensor | Sequence[Tensor] | Mapping[str, Any]

#: Token rows that run for each one that is measured: neighbours in a text say much the same.
_RUN_FOR_ONE = 16


class Updates:
    """Where the updates of one pipeline stand."""

    def __init__(self, pipeline: Rewriting) -> None:
        self.pipeline = pipeline
        self._begun = False
        self._held = False
        self._served: dict[str, tuple[Tensor, int, Tensor]] = {}  # parameter, its version, its mask
        self._entered: ExitStack | None = None  # by a forward in evaluation mode
        self._masked = False  # the padding is that of an attention mask

    def watch_(self) -> None:
        """Hook the model and the optimizers, if any pass ever needs it; once."""
        passes = [p for p in self.pipeline.passes if isinstance(p, OperationalPass)]
        if not any(p.renews for p in passes):
            return
        _Before.hide()
        trunk = _trunk(self.pipeline.model, list(self.pipeline.regions))
        trunk.register_forward_pre_hook(_Before(self), with_kwargs=True)
        trunk.register_forward_hook(_After(self), always_call=True)
        self._watch_optimizers()

    def of_copy(self, pipeline: Rewriting) -> Updates:
        """Who watches a copy of the pipeline, where its updates stand as they do here."""
        twin = Updates(pipeline)
        twin._begun = self._begun
        if pipeline.modules:
            for module in pipeline.model.modules():
                for hooks in (module._forward_pre_hooks, module._forward_hooks):
                    for key in [key for key, hook in hooks.items() if isinstance(hook, _Orphan | _Nothing)]:
                        del hooks[key]
            twin.watch_()
        return twin

    def _watch_optimizers(self) -> None:
        """Of whichever kind, wrapped or made anew: there is nothing to attach, and nothing to forget."""
        this = weakref.ref(self)

        def before(optimizer: Optimizer, *_: Any) -> None:
            if (updates := this()) is not None and updates._updated_by(optimizer):
                decay_dropped_weights_(updates.pipeline, _parameters(optimizer))

        def after(optimizer: Optimizer, *_: Any) -> None:
            if (updates := this()) is not None and updates._updated_by(optimizer):
                updates._begun = False

        for hook in (register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)):
            weakref.finalize(self, hook.remove)

    def _updated_by(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer makes a step of this model: the hooks see those of every model there is."""
        theirs = _parameters(optimizer)
        return any(id(p) in theirs for p in self.pipeline.model.parameters())

    def begin_(
        self,
        step: int,
        batch: Rows | None,
        reduce: Reduce | None,
        forward: Callable[..., object] | None,
        rank: int,
        without: Sequence[str],
    ) -> str | None:
        pipeline = self.pipeline
        pipeline.lower_(step, without)
        for p in pipeline.active:
            if isinstance(p, Weight24):
                renew_masks_(pipeline, p, step)
                pack_weights_(pipeline, p)
        note = None
        due = [p for p in measured_at(pipeline, step) if p in pipeline.active]
        if due:
            if batch is None:
                raise Act24Error(
                    f"activation24 measures the scale of {due[0].method} at step {step}, and has no rows to "
                    "measure it on: hand in the first ones of the update, begin_update_(step, batch=…)"
                )
            rows, run = first_rows(batch, due), forward or pipeline.model
            measured = calibrate_(pipeline, due, lambda: _call(run, rows), reduce)
            first = any(step == p.from_step for p in due)
            note = calibration_text(*measured) if first else None
        set_seeds_(pipeline, step, rank)
        self._begun = True
        return note

    @contextmanager
    def held(self) -> Iterator[None]:
        """Forwards are none of an update's micro-batches, and are as the caller has lowered the model."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    @contextmanager
    def _as_served(self) -> Iterator[None]:
        """`Pipeline.evaluation` for one forward: masks are made anew only if a weight was written to
        since."""
        with self.pipeline.lowered(as_evaluated(self.pipeline.active)), self._masks_of_weights():
            yield

    @contextmanager
    def _masks_of_weights(self) -> Iterator[None]:
        """Masks of the weights as they are, in buffers of their own in the place of the update's."""
        exchanged: list[tuple[nn.Module, str, Tensor]] = []
        try:
            for p in self.pipeline.active:
                if not isinstance(p, Weight24) or p.record.soft:
                    continue
                for weight in sparse_weights(self.pipeline, p):
                    fresh = self._mask_of(weight, p.method)
                    owner, leaf = weight.place(MASK)
                    exchanged.append((owner, leaf, owner._buffers[leaf]))  # type: ignore[arg-type]
                    owner._buffers[leaf] = fresh
            yield
        finally:
            for owner, leaf, buffer in reversed(exchanged):
                owner._buffers[leaf] = buffer

    @torch.inference_mode(False)  # what is made here is read elsewhere too
    @torch.no_grad()
    def _mask_of(self, weight: SparseWeight, method: str) -> Tensor:
        parameter = weight.parameter
        of, version, mask = self._served.get(weight.name, (None, -1, None))
        sharded = isinstance(parameter, DTensor)  # whose version says nothing of its shards
        if sharded or of is not parameter or version != parameter._version or mask is None:
            mask = stored_mask(whole(parameter), weight.transposed, method)
            self._served[weight.name] = (parameter, parameter._version, mask)
        return mask

    def before_forward(self, module: nn.Module, kwargs: Mapping[str, Any]) -> None:
        self._read_attention_mask(kwargs.get("attention_mask"))
        if self._held or torch._C._current_graph_task_id() != -1:  # a recomputation in backward
            return
        if not module.training:
            self._entered = ExitStack()
            self._entered.enter_context(self._as_served())
        elif torch.is_grad_enabled():
            renewing = [p for p in self.pipeline.passes if self._trains(p)]
            if renewing and not self._begun:
                raise Act24Error(
                    f"{renewing[0].name} trains on masks, scales or seeds of an update that nobody began: "
                    "call pipeline.begin_update_(step, batch=…) before the first forward of every update"
                )
            next_seeds_(self.pipeline)

    def _trains(self, p: Pass) -> bool:
        """Whether a pass is in force that renews state, also where its form of evaluation stands in for
        it."""
        active = self.pipeline.active
        return isinstance(p, OperationalPass) and p.renews and (p in active or p.in_evaluation() in active)

    def after_forward(self) -> None:
        if self._entered is not None:
            self._entered.close()
            self._entered = None

    def _read_attention_mask(self, mask: object) -> None:
        """Padding as `transformers` marks it, `[B, S]` with zeros."""
        if isinstance(mask, Tensor) and mask.ndim == 2:
            set_pads_(self.pipeline, mask == 0)
            self._masked = True
        elif self._masked:
            set_pads_(self.pipeline, None)
            self._masked = False

    def copied(self) -> str:
        """What a copy of the model, which has no pipeline, has to be told."""
        return "" if self._held else _COPIED


_COPIED = (
    "this model is a copy that was made in training, without the pipeline that knows its masks and seeds: "
    "copy it inside `with pipeline.evaluation():`, or apply the same passes to a stock model and "
    "load_state_dict()"
)
_UNTRAINED = (
    "this model is a copy without the pipeline that renews its masks, scales and seeds: to train it, apply "
    "the same passes to a stock model and load_state_dict()"
)


class _Hook:
    """A hook of a model; copies of it, which have no pipeline, have another in its place."""

    def __init__(self, updates: Updates) -> None:
        self.updates = updates


class _Before(_Hook):
    def __deepcopy__(self, memo: dict[int, Any]) -> _Orphan:
        return _Orphan(self.updates.copied())

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return _Orphan, (self.updates.copied(),)

    @classmethod
    def hide(cls) -> None:
        """From torch.compile, for whoever compiles the whole model. Not at import, which would not be
        fast."""
        if not hasattr(cls, "_hidden"):
            cls._hidden = True
            for kind in (_Before, _After):
                kind.__call__ = torch.compiler.disable(kind.__call__)  # type: ignore[method-assign]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.updates.before_forward(module, kwargs)


class _After(_Hook):
    def __deepcopy__(self, memo: dict[int, Any]) -> _Nothing:
        return _Nothing()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Nothing, ()

    def __call__(self, *_: Any) -> None:
        self.updates.after_forward()


class _Nothing:
    def __call__(self, *_: Any) -> None:
        pass


class _Orphan:
    """Refuses what a copy of a model cannot do."""

    def __init__(self, why: str) -> None:
        self._why = why

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if module.training and torch.is_grad_enabled():
            raise Act24Error(_UNTRAINED)
        if self._why and not module.training:
            raise Act24Error(self._why)


def first_rows(batch: Rows, due: Sequence[Activation24]) -> Rows:
    """The rows of a batch that are enough to measure on; the same ones, however many follow."""
    tensors = (
        batch.values() if isinstance(batch, Mapping) else (batch,) if isinstance(batch, Tensor) else batch
    )
    first = next((t for t in tensors if isinstance(t, Tensor) and t.ndim), None)
    if first is None:
        raise Act24Error(
            "begin_update_: batch is a tensor, a sequence of them, or a mapping as of keyword arguments"
        )
    rows = rows_to_run(due, first.shape[1] if first.ndim > 1 else 1)

    def cut(value: Any) -> Any:
        fits = isinstance(value, Tensor) and value.ndim and value.shape[0] == first.shape[0]
        return value[:rows] if fits else value

    if isinstance(batch, Tensor):
        return cut(batch)
    if isinstance(batch, Mapping):
        return {name: cut(value) for name, value in batch.items()}
    return tuple(map(cut, batch))


def updates_of(model: nn.Module) -> Updates | None:
    """Who watches a model; None where nothing is to be renewed, and for a copy."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return next((hook.updates for hook in hooks if isinstance(hook, _Before)), None)


def measured_at(pipeline: Rewriting, step: int) -> list[Activation24]:
    """The passes whose scales are due once `step` updates are made."""
    passes = (p for p in pipeline.passes if isinstance(p, Activation24) and p.active(step))
    return [p for p in passes if p.calibrates(step)]


def rows_to_run(due: Sequence[Activation24], length: int) -> int:
    """Rows of so many tokens that are run when scales are due."""
    samples = max(p.calibration_samples for p in due)
    return -(-_RUN_FOR_ONE * samples // length)


def _call(forward: Callable[..., object], rows: Rows) -> object:
    if isinstance(rows, Mapping):
        return forward(**rows)
    return forward(rows) if isinstance(rows, Tensor) else forward(*rows)


def _parameters(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _trunk(model: nn.Module, regions: Sequence[str]) -> nn.Module:
    """The innermost module that calls all regions and is none of a list of blocks."""
    paths = [fqn.split(".")[:-1] for fqn in regions]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    while common:
        module = model.get_submodule(".".join(common))
        parent = model.get_submodule(".".join(common[:-1]))
        if not _only_holds(module) and not _only_holds(parent) and not isinstance(module, RegionModule):
            return module
        common.pop()
    return model


def _only_holds(module: nn.Module) -> bool:
    """Whether a module is a list or a dictionary of others."""
    return type(module).forward is nn.Module.forward
