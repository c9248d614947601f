"""One call an update: what a training loop owes a rewritten model (`Pipeline.begin_update_`), and what
watches that it is made.

The loop says when an update begins. Everything else comes by itself: micro-batches are told apart by a hook
on the module that calls the regions, outside of them, so that a region that is recomputed in backward draws
what it drew; an update ends when an optimizer makes its step with parameters of the model; and a forward in
evaluation mode is one of the function that is served (`Pipeline.evaluation`).

Masked decay enters where the method's publication has it (`act24.sparse24.weight.methods.DecayPlace`). What
is a part of the gradient, as in SR-STE, is added when autograd gives a weight its first gradient of an
update, so that it is clipped, averaged over processes and logged as the gradient is; what comes after
clipping, and what no hook of autograd saw, at the optimizer's step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
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
from act24.operation import is_transformed
from act24.passes.activation24 import Activation24
from act24.passes.base import OperationalPass, Pass
from act24.passes.fp8 import Fp8
from act24.passes.rewriting import Rewriting
from act24.passes.state import (
    Reduce,
    SparseWeight,
    as_evaluated,
    calibrate_,
    calibration_text,
    cast_weights_,
    decay_gradient_,
    decaying_weights,
    next_seeds_,
    own_seeds,
    pack_weights_,
    renew_masks_,
    scales_of,
    set_pads_,
    set_seeds_,
    sparse_weights,
    stored_mask,
    whole,
)
from act24.passes.update_hooks import COPIED, forget_orphans_, watch_forwards_, watcher_of
from act24.passes.weight24 import MASK, Weight24
from act24.sparse24.weight.methods import DecayPlace

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
        self._served: list[tuple[SparseWeight, Tensor]] = []  # masks of weights, as a forward in evaluation
        self._served_state: list[Any] = []  # mode read them last, and what tells those weights from others
        self._cache: weakref.ref[Any] | None = None  # keys and values of that forward
        self._entered: ExitStack | None = None  # by a forward in evaluation mode
        self._running: nn.Module | None = None  # whose forward this is, of modules within each other
        self._masked = False  # the padding is that of an attention mask
        self._decaying: dict[int, tuple[SparseWeight, float]] = {}  # in whose gradient decay is, by id
        self._seeds: list[Tensor] = []
        self._decayed: set[int] = set()  # parameters, by id, whose gradient of this update has its decay
        self._hooked: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()

    def watch_(self) -> None:
        """Hook the model and the optimizers, if any pass ever needs it; once."""
        passes = [p for p in self.pipeline.passes if isinstance(p, OperationalPass)]
        if not any(p.renews for p in passes):
            return
        watch_forwards_(self.pipeline.model, list(self.pipeline.regions), self)
        self._watch_optimizers()

    def of_copy(self, pipeline: Rewriting) -> Updates:
        """Who watches a copy of the pipeline, where its updates stand as they do here."""
        twin = Updates(pipeline)
        twin._begun = self._begun
        if pipeline.modules:
            forget_orphans_(pipeline.model)
            twin.watch_()
        return twin

    def _watch_optimizers(self) -> None:
        """Of whichever kind, wrapped or made anew: there is nothing to attach, and nothing to forget."""
        this = weakref.ref(self)

        def before(
            optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            if (updates := this()) is None or not updates._updated_by(optimizer):
                return None
            named = {**dict(zip(("self", "closure"), args, strict=False)), **kwargs}
            if (closure := named.pop("closure", None)) is not None:  # that makes the gradients
                return args[:1], {**kwargs, "closure": updates._decaying_closure(closure, optimizer)}
            updates._decay_at_step(optimizer)
            return None

        def after(optimizer: Optimizer, *_: Any) -> None:
            if (updates := this()) is not None and updates._updated_by(optimizer):
                updates._begun, updates._cache = False, None  # fused ones leave no trace in versions

        for hook in (register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)):
            weakref.finalize(self, hook.remove)

    def _decay_at_step(self, optimizer: Optimizer) -> None:
        self.decay_(_parameters(optimizer), "before_clipping", "after_clipping")

    def _decaying_closure(self, closure: Callable[[], object], optimizer: Optimizer) -> Callable[[], object]:
        """A closure of `optimizer.step` behind which gradients have their decay, each time it is called."""
        again = False

        def decaying() -> object:
            nonlocal again
            if again:  # as L-BFGS does: these gradients are new
                self._decayed.clear()
            again = True
            result = closure()
            self._decay_at_step(optimizer)
            return result

        return decaying

    def _updated_by(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer makes a step of this model: the hooks see those of every model there is."""
        theirs = _parameters(optimizer)
        return any(id(p) in theirs for p in self.pipeline.model.parameters())

    def decay_(self, parameters: Container[int] | None, *places: DecayPlace) -> None:
        """Add the masked decay of this update to the gradients that do not have it yet.

        Args:
            parameters: by `id`, those it is added to; None: all.
        """
        for place in places:
            for weight, decay in decaying_weights(self.pipeline, place):
                if parameters is None or id(weight.parameter) in parameters:
                    self._decay_once(weight.parameter, weight.buffer(MASK), decay)

    def _decay_once(self, parameter: Tensor, mask: Tensor, decay: float) -> None:
        if parameter.grad is not None and id(parameter) not in self._decayed:
            self._decayed.add(id(parameter))
            decay_gradient_(parameter, mask, decay)

    def _watch_gradients(self) -> dict[int, tuple[SparseWeight, float]]:
        """Decay that is a part of the gradient enters with the first one that autograd adds up: of which
        weights, by the `id` of the parameter that has the hook."""
        decaying = {
            id(weight.parameter): (weight, decay)
            for weight, decay in decaying_weights(self.pipeline, "before_clipping")
        }
        this = weakref.ref(self)

        def added(parameter: Tensor) -> None:
            updates = this()
            if updates is not None and updates._begun and (found := updates._decaying.get(id(parameter))):
                weight, decay = found
                updates._decay_once(parameter, weight.buffer(MASK), decay)

        for key, (weight, _) in decaying.items():
            parameter = weight.parameter  # a wrapper may have made it anew since
            if self._hooked.get(key) is not parameter:
                self._hooked[key] = parameter
                parameter.register_post_accumulate_grad_hook(added)
        return decaying

    def begin_(
        self,
        step: int,
        batch: Rows | None,
        reduce: Reduce | None,
        forward: Callable[..., object] | None,
        rank: int | None,
        without: Sequence[str],
        loop_decays: bool,
    ) -> str | None:
        self._leave()
        pipeline = self.pipeline
        _refuse_to_guess(pipeline, reduce, rank)
        pipeline.lower_(step, without)
        for p in pipeline.active:
            if isinstance(p, Weight24):
                renew_masks_(pipeline, p, step)
                pack_weights_(pipeline, p)
            elif isinstance(p, Fp8):
                cast_weights_(pipeline, p)
        note = None
        due = [p for p in measured_at(pipeline, step) if p in pipeline.active]
        if due:
            if batch is None:
                raise Act24Error(
                    f"activation24 measures the scale of {due[0].method} at step {step}, and has no rows to "
                    "measure it on: hand in the first ones of the update, begin_update_(step, batch=…)"
                )
            for p in due:
                if step == p.from_step:  # whatever was measured for readers before: a run goes on as if not
                    for scale in scales_of(pipeline, p):
                        scale.fill_(1)
            rows, run = first_rows(batch, due), forward or pipeline.model
            measured = calibrate_(pipeline, due, lambda: _call(run, rows), reduce)
            first = any(step == p.from_step for p in due)
            note = calibration_text(*measured) if first else None
        set_seeds_(pipeline, step, rank or 0)
        self._seeds = own_seeds(pipeline, self._seeds)
        self._cache = None
        self._decayed.clear()
        self._decaying = {} if loop_decays else self._watch_gradients()
        self._begun = True
        return note

    @contextmanager
    def held(self) -> Iterator[None]:
        """Forwards are none of an update's micro-batches, and are as the caller has lowered the model."""
        self._leave()
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    @contextmanager
    def _as_served(self, goes_on: bool) -> Iterator[None]:
        """`Pipeline.evaluation` for one forward: masks are made anew only if a weight was written to
        since."""
        with self.pipeline.lowered(as_evaluated(self.pipeline.active)), self._masks_of_weights(goes_on):
            yield

    @contextmanager
    def _masks_of_weights(self, goes_on: bool) -> Iterator[None]:
        """Masks of the weights as they are, in buffers of their own in the place of the update's."""
        exchanged: list[tuple[nn.Module, str, Tensor]] = []
        try:
            for weight, fresh in self._masks(goes_on):
                owner, leaf = weight.place(MASK)
                exchanged.append((owner, leaf, owner._buffers[leaf]))  # type: ignore[arg-type]
                owner._buffers[leaf] = fresh
            yield
        finally:
            for owner, leaf, buffer in reversed(exchanged):
                owner._buffers[leaf] = buffer

    @torch.inference_mode(False)  # what is made here is read elsewhere too
    @torch.no_grad()
    def _masks(self, goes_on: bool) -> list[tuple[SparseWeight, Tensor]]:
        """Made anew where a weight is not what it was. Its norm says so too: whoever writes to `.data`, as
        averages of weights do, leaves no trace in its version. Norms make the host wait for the device, so
        that a forward that goes on from a cache is spared them: its beginning has looked."""
        weights = [
            (weight, p.method)
            for p in self.pipeline.active
            if isinstance(p, Weight24) and not p.record.soft
            for weight in sparse_weights(self.pipeline, p)
        ]
        if not weights:
            return []
        parameters = [weight.parameter for weight, _ in weights]
        if any(map(is_transformed, parameters)):  # of torch.func, for as long as this forward lasts
            return [(w, stored_mask(w.parameter, w.transposed, method)) for w, method in weights]
        # A shard's version and norm say nothing of the others.
        sharded = any(isinstance(p, DTensor) for p in parameters)
        state: list[Any] = [(id(p), None if p.is_inference() else p._version) for p in parameters]
        if goes_on and not sharded and state == self._served_state[: len(state)]:
            return self._served
        state += [] if sharded else _norms(parameters)
        if sharded or state != self._served_state:
            self._served_state = state
            self._served = [
                (weight, stored_mask(whole(weight.parameter), weight.transposed, method))
                for weight, method in weights
            ]
        return self._served

    def before_forward(self, module: nn.Module, kwargs: Mapping[str, Any]) -> None:
        if self._running is not None and self._running is not module:
            return
        self._read_attention_mask(kwargs.get("attention_mask"))
        if self._held or torch._C._current_graph_task_id() != -1:  # a recomputation in backward
            return
        self._leave()
        if not module.training:
            entered = ExitStack()
            entered.enter_context(self._as_served(self._goes_on(kwargs.get("past_key_values"))))
            self._entered = entered
        elif torch.is_grad_enabled():
            renewing = [p for p in self.pipeline.passes if self._trains(p)]
            if renewing and not self._begun:
                raise Act24Error(
                    f"{renewing[0].name} trains on masks, scales or seeds of an update that nobody began: "
                    "call pipeline.begin_update_(step, batch=…) before the first forward of every update"
                )
            self._refuse_scaled_gradients()
            next_seeds_(self.pipeline, self._seeds)
        self._running = module  # last: to enter the context above is to leave whatever ran before

    def _goes_on(self, cache: Any) -> bool:
        """Whether a forward continues one whose keys and values are in the cache, as `generate` of
        `transformers` does for every token but the first."""
        if not hasattr(cache, "get_seq_length"):
            self._cache = None
            return False
        known = self._cache is not None and self._cache() is cache
        self._cache = weakref.ref(cache)
        length = cache.get_seq_length() if known else 0
        return isinstance(length, int) and length > 0  # a tensor is on the device: to read it is to wait too

    def _refuse_scaled_gradients(self) -> None:
        """Decay cannot enter gradients at their beginning that a GradScaler has scaled."""
        kind = next(iter(self.pipeline.model.parameters())).device.type
        scaled = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        if scaled and self._decaying:
            raise Act24Error(
                "sr_ste's masked decay is a part of the gradient, and gradients of float16 are scaled: train "
                "in bfloat16, or begin_update_(…, loop_decays=True) and call pipeline.decay_gradients_() "
                "behind scaler.unscale_(optimizer)"
            )

    def _trains(self, p: Pass) -> bool:
        """Whether a pass is in force that renews state, also where its form of evaluation stands in for
        it."""
        active = self.pipeline.active
        return isinstance(p, OperationalPass) and p.renews and (p in active or p.in_evaluation() in active)

    def after_forward(self, module: nn.Module) -> None:
        if module is self._running:
            self._leave()

    def _leave(self) -> None:
        """Also where the next thing begins: PyTorch calls no hooks behind a forward that Ctrl-C ended."""
        self._running = None
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
        return "" if self._held else COPIED


def _refuse_to_guess(pipeline: Rewriting, reduce: Reduce | None, rank: int | None) -> None:
    """Among several processes, what they have to do together is handed in: each of them alone would measure
    a scale of its own, and all would draw the same."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not several or torch.distributed.get_world_size() == 1:
        return
    wanted = []
    if reduce is None and any(isinstance(p, Activation24) and p.record.scaled for p in pipeline.passes):
        wanted.append("reduce=, which sums a tensor over the processes that train on the same weights")
    if rank is None and any(isinstance(p, Activation24 | Weight24) and p.draws for p in pipeline.passes):
        wanted.append("rank=, by which they draw apart")
    if wanted:
        raise Act24Error(
            f"begin_update_: there are {torch.distributed.get_world_size()} processes; hand in "
            + " and ".join(wanted)
        )


def first_rows(batch: Rows, due: Sequence[Activation24]) -> Rows:
    """The rows of a batch that are enough to measure on; the same ones, however many follow."""
    tensors = (
        batch.values() if isinstance(batch, Mapping) else (batch,) if isinstance(batch, Tensor) else batch
    )
    first = next((t for t in tensors if isinstance(t, Tensor) and t.ndim), None)
    if first is None:
        raise Act24Error(
            "begin_update_: give batch as a tensor, a sequence of them, or a mapping as of keyword arguments"
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
    found = watcher_of(model)
    return found if isinstance(found, Updates) else None


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


def _norms(tensors: list[Tensor]) -> list[float]:
    return torch.stack(torch._foreach_norm(tensors)).tolist()  # pyright: ignore[reportPrivateImportUsage]


def _parameters(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
