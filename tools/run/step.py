"""One optimizer step: micro-batches in, loss and gradient norm out, both left on the device."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from act24.llama import LlamaForCausalLM
from act24.loss import CHUNK_TOKENS, cross_entropy_sum
from act24.passes import OperationalPass, Pipeline
from act24.passes.document_attention import set_starts_
from act24.passes.first_rows import first_measured_at, measured_at, rows_to_run
from act24.passes.fp8 import head_arguments
from act24.passes.graph.roles import head_of
from act24.passes.recovery import clear_pruned_gradients_, impose_zeros_
from act24.passes.seeds import set_seeds_
from act24.passes.state import without_counting
from act24.recipes.schema import Train
from act24.tools.data import Batch
from act24.tools.run.graphs import FixedInputs, GraphedCalls, why_not_captured
from act24.tools.run.language import block_list, head_weight, hidden_states
from act24.tools.run.processes import Processes, whole
from act24.tools.watch.sparsity_watch import gradient_cosines

#: Of DDP: statistics belong to their process, and the rest is equal anyway. torch 2.13 has another name for
#: it, and sends buffers around once, at the beginning, where they are equal too.
_BUFFERS_STAY: dict[str, Any] = {
    name: False
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
}
if len(_BUFFERS_STAY) > 1:
    del _BUFFERS_STAY["broadcast_buffers"]  # deprecated


class SummedLoss(nn.Module):
    """Token ids and labels to the summed loss: the one module whose forward training and evaluation call, so
    that data parallelism wraps the head and the loss too."""

    def __init__(self, model: LlamaForCausalLM, compiled: bool = False) -> None:
        super().__init__()
        self.model = model
        # Compiled, the softmax over a chunk's logits is two passes over them instead of six.
        self._loss = torch.compile(cross_entropy_sum, dynamic=False) if compiled else cross_entropy_sum

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """input_ids, labels `[B, S]`; the summed loss, a float32 scalar, and the number of its tokens."""
        hidden = hidden_states(self.model, input_ids)
        in_e4m3 = head_arguments(head_of(self.model), hidden)
        return self._loss(hidden, head_weight(self.model), labels, CHUNK_TOKENS, *in_e4m3)


@dataclass(frozen=True)
class StepResult:
    """What a step leaves on the device.

    Attributes:
        loss: mean over all predicted tokens of the step, over all processes.
        grad_norm: global, before clipping.
        tokens: number of predicted tokens.
        note: something to tell the user, at rare steps.
        skipped: loss or gradient were not finite, and no update was made of them.
    """

    loss: Tensor
    grad_norm: Tensor
    tokens: Tensor
    note: str | None = None
    skipped: bool = False


class TrainingStep:
    """A model made ready to train on the processes at hand: compiled by region, checkpointed, replicated or
    sharded, captured where that can be. Calling it makes one optimizer step and never waits for the device.

    Attributes:
        summed_loss: the model with its loss.
        not_captured: why micro-batches are launched operator by operator; empty where graphs are replayed.
    """

    def __init__(
        self, model: LlamaForCausalLM, train: Train, processes: Processes, pipeline: Pipeline | None = None
    ) -> None:
        """Wrap `model` in place; build the optimizer afterwards, its parameters may be other objects now.

        Args:
            pipeline: what rewrote the model; its passes may keep state that moves with every update.

        Raises:
            Act24Error: `train.cuda_graphs = "on"`, and there can be none.
        """
        self._processes = processes
        self._pipeline = pipeline
        self._accumulated = accumulation(train, processes.world_size)
        self._clip = train.grad_clip
        self._skips = train.on_nonfinite == "skip"
        self._autocast = train.dtype == "bfloat16_autocast"
        self.not_captured = why_not_captured(
            train, processes.device, processes.world_size, pipeline is not None
        )
        self._inputs = FixedInputs(processes.device)
        self._graphs = (
            None if self.not_captured else GraphedCalls(processes.device, train.cuda_graphs == "on")
        )
        self._in_force: Sequence[OperationalPass] | None = None
        self._last: Sequence[Batch] = ()
        compiled = uses_compile(train, processes.device)
        if train.activation_checkpointing:
            _checkpoint_blocks_(model)
        if compiled:
            for layer in block_list(model):
                layer.compile(fullgraph=isinstance(model, LlamaForCausalLM))
        self.summed_loss = SummedLoss(model, compiled)
        self._loss: nn.Module = self.summed_loss
        # Captured, the bare model is: its gradients are added up over the processes once they are all there.
        self._adds_up = processes.world_size > 1 and self._graphs is not None
        if self._adds_up:
            processes.broadcast_(model.state_dict().values())
        elif processes.world_size > 1 and train.parallel == "ddp":
            self._loss = DistributedDataParallel(
                self.summed_loss,
                device_ids=[processes.device.index] if processes.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                **_BUFFERS_STAY,
            )
        elif processes.world_size > 1:
            _shard_(self.summed_loss)
        self._parameters = [p for p in model.parameters() if p.requires_grad]

    def __call__(
        self, batches: Sequence[Batch], optimizer: Optimizer, step: int = 0, without: Sequence[str] = ()
    ) -> StepResult:
        """Forward and backward over the micro-batches of one step, clip, update, clear the gradients.

        Args:
            step: updates already made.
            without: names of passes to leave out.

        Raises:
            Act24Error: a step cannot be captured, and has to be.
        """
        with self._on_stream():
            note = self._begin_update(batches, step, without)
            return self._step(batches, optimizer, note)

    def _begin_update(self, batches: Sequence[Batch], step: int, without: Sequence[str]) -> str | None:
        if self._pipeline is None:
            return None
        rows = None
        if due := measured_at(self._pipeline, step):
            rows = _first_rows(batches, rows_to_run(due, batches[0].input_ids.shape[1]))
            self._pipeline.set_pads_(self._pads(rows))
        with self._precision():
            return self._pipeline.begin_update_(
                step,
                rows and self._rows(rows),
                self._processes.sum_,
                forward=self.summed_loss,  # which alone gathers what is sharded; replicas do not talk
                rank=self._processes.rank,
                without=without,
                loop_decays=True,  # a captured backward calls no hooks, and its gradients are summed
                replayed=self._graphs,
            )

    def _step(self, batches: Sequence[Batch], optimizer: Optimizer, note: str | None) -> StepResult:
        assert len(batches) == self._accumulated
        self._last = batches
        counted = torch.stack([(batch.labels >= 0).sum() for batch in batches]).sum()
        tokens = self._processes.sum_(self._inputs.fill("counted", counted).clone())
        # Parallel wrappers average gradients over the processes; the loss is to be a mean over all tokens.
        shares = 1 if self._adds_up else self._processes.world_size
        scale = self._inputs.fill("scale", shares / tokens.clamp(min=1))
        total = torch.zeros((), device=self._processes.device)
        placed = self._follow_pipeline()
        for index, batch in enumerate(batches):
            if self._pipeline is not None:
                self._pipeline.set_pads_(self._pads(batch))
            with self._synchronised(last=index == len(batches) - 1):
                total += self._forward_backward(batch, scale)
            if placed and index == 0:
                self._drop_unused_gradients()
        if self._adds_up:
            self._processes.sum_all_([p.grad for p in self._parameters if p.grad is not None])
        if self._pipeline is not None:
            self._pipeline.decay_gradients_()
            clear_pruned_gradients_(self._pipeline)
        grad_norm = nn.utils.clip_grad_norm_(self._parameters, self._clip or float("inf"))
        loss, grad_norm = self._processes.sum_(total) / shares, whole(grad_norm)
        # Whoever asks to skip waits for the device here. Both values are the same on all processes.
        skipped = self._skips and not bool(torch.isfinite(loss + grad_norm))
        if not skipped:
            optimizer.step()
            if self._pipeline is not None:
                impose_zeros_(self._pipeline)
        # Graphs add to the gradients that were there when they were captured.
        optimizer.zero_grad(set_to_none=self._graphs is None)
        if self._graphs is not None and self._graphs.problem != self.not_captured:
            self.not_captured = self._graphs.problem
            note = f"{note}\n{self.capture_text}" if note else self.capture_text
        return StepResult(loss, grad_norm, tokens, note, skipped)

    @property
    def capture_text(self) -> str:
        """A line that says why nothing is captured; empty where it is, and where there is no GPU."""
        if not self.not_captured or (self._graphs is None and self._processes.device.type != "cuda"):
            return ""
        return f"no CUDA graphs, steps are launched operator by operator: {self.not_captured}"

    def measure_first_scales_(self, step: int) -> None:
        """Set the scales that the update to come measures first, on rows of the last one, for who reads the
        model in between: a checkpoint would have 1 for them.

        Args:
            step: updates already made.
        """
        if self._pipeline is None or not self._last:
            return
        due = first_measured_at(self._pipeline, step)
        if not due:
            return
        rows = _first_rows(self._last, rows_to_run(due, self._last[0].input_ids.shape[1]))
        with self._on_stream(), self._precision():
            self._pipeline.measure_scales_(
                step, lambda: self._forward(rows, self.summed_loss), self._pads(rows), self._processes.sum_
            )

    def evaluation_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed loss of held-out rows and the number of their tokens, as `SummedLoss` has them, without
        gradients. Captured as training is. Replicas do not talk."""
        ids, labels = self._rows(batch)

        def forward() -> tuple[Tensor, Tensor]:
            with self._precision():
                return self.summed_loss(ids, labels)

        with self._on_stream(), torch.no_grad():
            if self._graphs is None:
                return forward()
            loss, count = self._graphs(("evaluation", *self._key(batch)), forward)
            return loss.clone(), count.clone()

    def gradient_cosines(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Of 2:4 weight gradients to exact ones, by weight, on the device (`sparsity_watch`), on the first
        micro-batch of the update to come. Replicas do not talk: a forward through their wrapper would wait
        for a backward of its own."""
        if self._pipeline is None:
            return {}
        with self._on_stream():
            # The draws of this look are its own; the update that follows sets its seeds anew.
            self._pipeline.lower_(step)
            set_seeds_(self._pipeline, step, self._processes.rank)
            self._pipeline.set_pads_(self._pads(batch))
            return gradient_cosines(self._pipeline, lambda: self._forward(batch, self.summed_loss))

    def _on_stream(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._graphs is None else self._graphs.on_stream()

    def _follow_pipeline(self) -> bool:
        """At a boundary of passes drop the graphs of what was in force, and gradients with them; counting may
        come and go without that. Whether it was one, and gradients of zeros wait to be added to.

        They are not left to the first backward to make: it takes them out of the memory of its activations,
        piece by piece, and all those blocks would stay reserved beside those of the graph (130m at 64 rows:
        15.9 GiB, of which 8.5 were ever allocated).
        """
        in_force = without_counting(self._pipeline.active) if self._pipeline is not None else ()
        boundary, self._in_force = in_force != self._in_force, in_force
        if self._graphs is None or not boundary:
            return False
        self._graphs.drop()
        for parameter in self._parameters:
            parameter.grad = None
        if self._processes.device.type == "cuda":
            torch.cuda.empty_cache()
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)
        return True

    def _drop_unused_gradients(self) -> None:
        """What nothing has added to is of a parameter that nothing reads: it has no gradient, and is not
        updated."""
        for parameter in self._parameters:
            if parameter.grad is not None and parameter.grad._version == 0:
                parameter.grad = None

    def _key(self, batch: Batch) -> tuple[Hashable, ...]:
        """What the kernels of a micro-batch depend on, and its values do not."""
        if self._pipeline is None:
            return batch.input_ids.shape, False, ()
        padded = batch.pads is not None and self._pipeline.asks_for_pads
        return batch.input_ids.shape, padded, self._pipeline.active

    def _rows(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Ids and labels on the device; where their documents begin comes into the model."""
        if self._pipeline is not None:
            starts = batch.starts
            set_starts_(self._pipeline, None if starts is None else self._inputs.fill("starts", starts))
        return self._inputs.fill("input_ids", batch.input_ids), self._inputs.fill("labels", batch.labels)

    def _forward(self, batch: Batch, loss: nn.Module | None = None) -> Tensor:
        """The summed loss of a micro-batch."""
        with self._precision():
            return (loss or self._loss)(*self._rows(batch))[0]

    def _forward_backward(self, batch: Batch, scale: Tensor) -> Tensor:
        """Add up the gradients of a micro-batch, and return its loss, until the next one."""
        ids, labels = self._rows(batch)

        def accumulate() -> tuple[Tensor]:
            with self._precision():
                loss = self._loss(ids, labels)[0] * scale
            loss.backward()
            return (loss.detach(),)

        (loss,) = accumulate() if self._graphs is None else self._graphs(self._key(batch), accumulate)
        return loss

    def _pads(self, batch: Batch) -> Tensor | None:
        return None if batch.pads is None else self._inputs.fill("pads", batch.pads)

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        # No cache of casts: on one side of a capture it would hand out the other side's memory.
        return torch.autocast(
            self._processes.device.type, torch.bfloat16, enabled=self._autocast, cache_enabled=False
        )

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[object]:
        """Gradients travel with the last micro-batch only."""
        if isinstance(self._loss, DistributedDataParallel) and not last:
            return self._loss.no_sync()
        if hasattr(self._loss, "set_requires_gradient_sync"):
            self._loss.set_requires_gradient_sync(last)  # type: ignore[operator]
        return contextlib.nullcontext()


def _first_rows(batches: Sequence[Batch], count: int) -> Batch:
    """The first rows of an update, however it is split into micro-batches."""

    def first(name: str) -> Any:
        parts = [getattr(batch, name) for batch in batches]
        return None if parts[0] is None else torch.cat(parts)[:count]

    return Batch(first("input_ids"), first("labels"), first("starts"))


def accumulation(train: Train, world_size: int) -> int:
    """Micro-batches a step and process.

    Raises:
        Act24Error: the rows of a step cannot be shared out evenly.
    """
    from act24.errors import Act24Error

    rows = train.batch_size * world_size
    if train.total_batch_size % rows:
        raise Act24Error(
            f"train.total_batch_size ({train.total_batch_size}) must be a multiple of train.batch_size × "
            f"processes ({train.batch_size} × {world_size} = {rows})"
        )
    return train.total_batch_size // rows


def uses_compile(train: Train, device: torch.device) -> bool:
    """`train.compile`, with auto resolved."""
    return train.compile == "on" or (train.compile == "auto" and device.type == "cuda")


def _checkpoint_blocks_(model: LlamaForCausalLM) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    layers = block_list(model)
    for index, layer in enumerate(layers):
        # Passes draw from seeds in buffers, which needs no state of a generator; dropout does not.
        drops = any(isinstance(module, nn.Dropout) and module.p for module in layer.modules())
        layers[index] = checkpoint_wrapper(layer, preserve_rng_state=drops)


def _shard_(loss: SummedLoss) -> None:
    from torch.distributed.fsdp import fully_shard

    for layer in block_list(loss.model):
        fully_shard(layer)
    fully_shard(loss)  # the rest: embedding, last norm and head, gathered for the whole forward
