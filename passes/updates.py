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
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from act24.errors import Act24Error
from act24.operation import in_functorch
from act24.passes.activation24 import SCALE, Activation24
from act24.passes.base import OperationalPass, Pass
from act24.passes.changed_weights import Replaced, Unchanged
from act24.passes.first_rows import Rows, call_with, first_rows, measured_at
from act24.passes.forwards import Forward, Forwards, Kind
from act24.passes.graph.activation_sites import PADS
from act24.passes.graph.region import buffers_of
from act24.passes.read_weights import ReadWeights
from act24.passes.rewriting import Rewriting
from act24.passes.seeds import Seeds
from act24.passes.state import (
    Reduce,
    Replayed,
    SparseWeight,
    as_evaluated,
    calibrate_,
    calibration_text,
    decay_gradient_,
    decaying_weights,
    new_places,
    renew_masks_,
    renew_weights_to_read_,
    set_pads_,
)
from act24.passes.update_hooks import (
    COPIED,
    forget_orphans_,
    parameters_of,
    refuse_to_export,
    takes_attention_mask,
    watch_forwards_,
    watch_optimizers_,
    watcher_of,
)
from act24.passes.weight24 import MASK, Weight24
from act24.sparse24.weight.methods import DecayPlace


class Updates:
    """Where the updates of one pipeline stand."""

    def __init__(self, pipeline: Rewriting) -> None:
        self.pipeline = pipeline
        self.renews = False  # any pass ever
        self.owed = False  # a call an update: a pass renews, or has a step to come
        self._begun = False
        self._stepped = False  # an optimizer, since the model was lowered for a step
        self._lowered_for = pipeline.step
        self._held = False
        self.serves = False  # what was read is lowered and renewed to be served, and trained no further
        #: Updates already made, where somebody has said so and none was begun since.
        self.made = pipeline.step or None
        self._last = -1  # the last update that was begun
        self._read = ReadWeights(pipeline)
        self._seeds = Seeds(pipeline)
        self._unchanged: Unchanged | None = None  # the weights, since the update began
        self._replaced = Replaced(pipeline.model, {})
        self._forwards = Forwards()
        self._masked = False  # the padding is that of an attention mask
        self._decaying: dict[int, tuple[SparseWeight, float]] = {}  # in whose gradient decay is, by id
        self._decayed: set[int] = set()  # parameters, by id, whose gradient of this update has its decay
        self._hooked: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()

    def watch_(self, stock: Mapping[str, Tensor]) -> None:
        """Hook the model and the optimizers, if any pass ever needs it; once. A model that is told of padding
        by its caller is hooked for the passes that leave padding out, too.

        Args:
            stock: the parameters that the model had, by name.
        """
        model, regions = self.pipeline.model, list(self.pipeline.regions)
        self.renews = any(isinstance(p, OperationalPass) and p.renews for p in self.pipeline.passes)
        self.owed = self.renews or self._waiting() is not None
        self._replaced = Replaced(model, stock)
        pads = any(module._buffers.get(PADS) is not None for module in self.pipeline.modules)
        if self.owed or (pads and takes_attention_mask(model, regions)):
            watch_forwards_(model, regions, self)
        if self.owed or self._replaced:
            watch_optimizers_(self)

    def of_copy(self, pipeline: Rewriting) -> Updates:
        """Who watches a copy of the pipeline, where its updates stand as they do here."""
        twin = Updates(pipeline)
        twin._begun, twin._last, twin.made = self._begun, self._last, self.made
        twin._lowered_for, twin._stepped = self._lowered_for, self._stepped
        if pipeline.modules:
            forget_orphans_(pipeline.model, {*pipeline.modules})
            twin.watch_({})
        return twin

    def before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._replaced.refuse_optimizer(self.pipeline.model, optimizer)
        if not self.owed or not self._updated_by(optimizer):
            return None
        named = {**dict(zip(("self", "closure"), args, strict=False)), **kwargs}
        if (closure := named.pop("closure", None)) is not None:  # that makes the gradients
            return args[:1], {**kwargs, "closure": self._decaying_closure(closure, optimizer)}
        self._decay_at_step(optimizer)
        return None

    def after_step(self, optimizer: Optimizer) -> None:
        if self.owed and self._updated_by(optimizer):
            self._begun, self._stepped = False, True
            self._read.forget_cache()  # fused ones leave no trace in versions

    def _decay_at_step(self, optimizer: Optimizer) -> None:
        self.decay_(parameters_of(optimizer), "before_clipping", "after_clipping")

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
        theirs = parameters_of(optimizer)
        return any(id(p) in theirs for p in self.pipeline.model.parameters())

    def decay_(self, parameters: Container[int] | None, *places: DecayPlace) -> None:
        """Add the masked decay of this update to the gradients that do not have it yet.

        Args:
            parameters: by `id`, those it is added to; None: all.
        """
        self.settle()
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
        replayed: Replayed | None,
    ) -> str | None:
        self.settle()
        self.serves = False
        pipeline = self.pipeline
        _refuse_to_guess(pipeline, reduce, rank)
        pipeline.lower_(step, without)
        for p in pipeline.active:
            if isinstance(p, Weight24):
                renew_masks_(pipeline, p, step)
        renew_weights_to_read_(pipeline, replayed)
        note = None
        due = [one for one in measured_at(pipeline, step) if one.of in pipeline.active]
        if due:
            if batch is None:
                raise Act24Error(
                    f"activation24 measures the scale of {due[0].of.method} at step {step}, and has no rows "
                    "to measure it on: hand in the first ones of the update, begin_update_(step, batch=…)"
                )
            scales = buffers_of(pipeline.regions, SCALE)
            for one in due:  # whatever was measured for readers before: a run goes on as if not
                for name in new_places(pipeline, one.of, step):
                    scales[name].fill_(1)
            rows, run = first_rows(batch, due), forward or pipeline.model
            measured = calibrate_(pipeline, due, lambda: call_with(run, rows), reduce)
            first = any(step == one.of.from_step for one in due)
            note = calibration_text(*measured) if first else None
        self._seeds.begin_(step, rank or 0)
        self._read.forget_cache()
        self._decayed.clear()
        self._decaying = {} if loop_decays else self._watch_gradients()
        looks = self._waiting() is not None or any(self._trains(p) for p in pipeline.passes)
        self._unchanged = Unchanged(pipeline.modules) if looks else None
        self._begun, self._last, self.made = True, step, None
        return note

    def lowered_for(self, step: int) -> None:
        """Somebody has lowered the model for a step. Scales of an update that this pipeline has begun are
        set."""
        self.made = step if step > self._last else None
        self._lowered_for, self._stepped = step, False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Forwards are none of an update's micro-batches, and are as the caller has lowered the model."""
        self.settle()
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    @contextmanager
    def _as_served(self, cache: Any) -> Iterator[None]:
        """`Pipeline.evaluation` for one forward."""
        served = Rewriting.lowered(self.pipeline, as_evaluated(self.pipeline.active))
        with served, self._read.in_place(self.made, cache):
            yield

    def before_forward(self, module: nn.Module, kwargs: Mapping[str, Any]) -> None:
        with self._forwards.lock:
            this, outer = self._forwards.begin(module)
            if outer is None:
                self._read_attention_mask(kwargs.get("attention_mask"))
            if self._held or _in_backward():
                return
            kind = "served" if not module.training else "trains" if torch.is_grad_enabled() else "runs"
            if kind == "served":
                self._serve(this, kwargs.get("past_key_values"))
            elif outer is None:
                self._refuse_threads(kind)
                if kind == "trains":
                    self._begin_micro_batch()
                this.kind = kind  # not before: of what was refused there is no backward

    def _serve(self, this: Forward, cache: Any) -> None:
        """The first of several forwards in evaluation mode, within each other or in threads, exchanges what
        they read, and the last one puts it back."""
        if any(isinstance(p, Weight24) for p in self.pipeline.active):
            refuse_to_export()
        self._refuse_threads("served")
        self._forwards.serve(self._as_served(cache))
        this.kind = "served"

    def _refuse_threads(self, kind: Kind) -> None:
        """Threads share the model's state, which one of them would change under the others."""
        elsewhere = self._forwards.elsewhere()
        mixed = elsewhere and (kind == "served") != ("served" in elsewhere)
        if mixed or ("trains" in elsewhere and self._seeds):
            raise Act24Error(
                "two threads run this model at once, one of them in training mode: masks and seeds are the "
                "model's, not a thread's. Let them wait for each other, or give each a copy, "
                "copy.deepcopy((model, pipeline))"
            )

    def _begin_micro_batch(self) -> None:
        """A forward that is trained on, in no other."""
        renewing, waiting = [p for p in self.pipeline.passes if self._trains(p)], self._waiting()
        if renewing or waiting is not None:
            refuse_to_export()
        if renewing and not self._begun:
            raise Act24Error(
                f"{renewing[0].name} trains on masks, scales or seeds of an update that nobody began: "
                "call pipeline.begin_update_(step, batch=…) before the first forward of every update"
            )
        if waiting is not None and self._stepped:
            raise Act24Error(
                f"{waiting.name} comes and goes at steps, and nobody has said that step "
                f"{self._lowered_for} is over: call pipeline.begin_update_(step, batch=…) before the "
                "first forward of every update"
            )
        if waiting is not None and self._last == self._lowered_for:
            renewing.append(waiting)
        if renewing:
            self._refuse_other_weights(renewing[0])
        self._refuse_scaled_gradients()
        self._seeds.next_()

    def _refuse_other_weights(self, p: Pass) -> None:
        """An update that no optimizer made ends none here."""
        if in_functorch():  # whose weights are arguments, of memory that cannot be looked at
            return
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        if self._unchanged is not None and self._unchanged.violated():
            raise Act24Error(
                f"weights have changed since update {self._last} began, by no step of an optimizer, and "
                f"{p.name} would go on as that update has it: call pipeline.begin_update_(step, "
                "batch=…) before the first forward of every update, also where weights are written by hand"
            )

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

    def _waiting(self) -> OperationalPass | None:
        """The first pass of which a step is still to come, where the model is trained on."""
        return next(
            (
                p
                for p in self.pipeline.passes
                if isinstance(p, OperationalPass) and not self.serves
                if max(p.from_step, p.until_step or 0) > self._lowered_for
            ),
            None,
        )

    def _trains(self, p: Pass) -> bool:
        """Whether a pass is in force that renews state, also where its form of evaluation stands in for
        it."""
        active = self.pipeline.active
        return isinstance(p, OperationalPass) and p.renews and (p in active or p.in_evaluation() in active)

    def after_forward(self, module: nn.Module, output: object) -> None:
        with self._forwards.lock:
            this = self._forwards.end(module)
            if this is not None and this.kind == "trains":
                self._seeds.forwarded(output)

    def settle(self) -> None:
        """What a forward in evaluation mode exchanged is put back. Also where the next thing begins, and
        before state is read: PyTorch calls no hooks behind a forward that Ctrl-C ended.

        Raises:
            Act24Error: such a forward has not ended.
        """
        with self._forwards.lock:
            self._forwards.settle()

    def _read_attention_mask(self, mask: object) -> None:
        """Padding as `transformers` marks it, `[B, S]` with zeros."""
        if isinstance(mask, Tensor) and mask.ndim == 2:
            set_pads_(self.pipeline, mask == 0)
            self._masked = True
        elif self._masked:
            set_pads_(self.pipeline, None)
            self._masked = False

    def as_served(self) -> AbstractContextManager[None] | None:
        """As `Watcher.as_served`, at the addresses of the update's state, which CUDA graphs read."""
        self.settle()
        active = [*self.pipeline.active]
        renewed = any(isinstance(p, Weight24) for p in active)
        if self._held or self.serves or (as_evaluated(active) == active and not renewed):
            return None
        return self.pipeline.evaluation()  # type: ignore[attr-defined]

    def copied(self) -> str | None:
        """What a copy of the model, which has no pipeline, has to be told."""
        self.settle()
        if self._masked:  # nobody would take it out of the copy
            self._read_attention_mask(None)
        if not self.renews and self._waiting() is None:
            return None
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


def updates_of(model: nn.Module) -> Updates | None:
    """Who watches a model; None where no call an update is owed, and for a copy."""
    found = watcher_of(model)
    return found if isinstance(found, Updates) and found.owed else None


def _in_backward() -> bool:
    """Whether a backward is at work, which computes a forward again."""
    return torch._C._current_graph_task_id() != -1
