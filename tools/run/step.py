"""One optimizer step: micro-batches in, loss and gradient norm out, both left on the device."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from act24.llama import LlamaForCausalLM
from act24.loss import cross_entropy_sum
from act24.passes import Pipeline
from act24.passes.state import begin_micro_batch_, begin_update_, decay_dropped_weights_
from act24.recipes.schema import Train
from act24.tools.data import Batch
from act24.tools.run.processes import Processes, whole
from act24.tools.watch.sparsity_watch import gradient_cosines


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
        return self._loss(self.model.model(input_ids), self.model.head_weight, labels)


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
    sharded. Calling it makes one optimizer step and never waits for the device.

    Attributes:
        summed_loss: the model with its loss, for evaluation: replicas need not talk there.
    """

    def __init__(
        self, model: LlamaForCausalLM, train: Train, processes: Processes, pipeline: Pipeline | None = None
    ) -> None:
        """Wrap `model` in place; build the optimizer afterwards, its parameters may be other objects now.

        Args:
            pipeline: what rewrote the model; its passes may keep state that moves with every update.
        """
        self._processes = processes
        self._pipeline = pipeline
        self._seed = train.seed
        self._accumulated = accumulation(train, processes.world_size)
        self._clip = train.grad_clip
        self._skips = train.on_nonfinite == "skip"
        self._autocast = train.dtype == "bfloat16_autocast"
        compiled = uses_compile(train, processes.device)
        if train.activation_checkpointing:
            _checkpoint_blocks_(model)
        if compiled:
            for layer in model.model.layers:
                layer.compile(fullgraph=True)
        self.summed_loss = SummedLoss(model, compiled)
        self._loss: nn.Module = self.summed_loss
        if processes.world_size > 1 and train.parallel == "ddp":
            self._loss = DistributedDataParallel(
                self.summed_loss,
                device_ids=[processes.device.index] if processes.device.type == "cuda" else None,
                broadcast_buffers=False,  # statistics belong to their process; the rest is equal anyway
                gradient_as_bucket_view=True,
            )
        elif processes.world_size > 1:
            _shard_(self.summed_loss)
        self._parameters = [p for p in model.parameters() if p.requires_grad]

    def __call__(self, batches: Sequence[Batch], optimizer: Optimizer, step: int = 0) -> StepResult:
        """Forward and backward over the micro-batches of one step, clip, update, clear the gradients.

        Args:
            step: updates already made.
        """
        assert len(batches) == self._accumulated
        device, world_size = self._processes.device, self._processes.world_size
        counted = torch.stack([(batch.labels >= 0).sum() for batch in batches]).sum()
        tokens = self._processes.sum_(_to(counted, device).clone())
        # Parallel wrappers average gradients over the processes; the loss is to be a mean over all tokens.
        scale = world_size / tokens.clamp(min=1)
        total = torch.zeros((), device=device)
        note = None
        if self._pipeline is not None:
            first = batches[0]
            note = begin_update_(
                self._pipeline, step, lambda: self._forward(first), self._pads(first), self._processes.sum_
            )
        for index, batch in enumerate(batches):
            self._begin_micro_batch(batch, step, index)
            last = index == len(batches) - 1
            with self._synchronised(last):
                loss = self._forward(batch) * scale
                loss.backward()
            total += loss.detach()
        grad_norm = nn.utils.clip_grad_norm_(self._parameters, self._clip or float("inf"))
        loss, grad_norm = self._processes.sum_(total) / world_size, whole(grad_norm)
        # Whoever asks to skip waits for the device here. Both values are the same on all processes.
        skipped = self._skips and not bool(torch.isfinite(loss + grad_norm))
        if not skipped:
            if self._pipeline is not None:
                decay_dropped_weights_(self._pipeline, optimizer.param_groups[0]["lr"])
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, grad_norm, tokens, note, skipped)

    def gradient_cosines(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Of 2:4 weight gradients to exact ones, by weight, on the device (`sparsity_watch`), on the first
        micro-batch of the update to come. Replicas do not talk: a forward through their wrapper would wait
        for a backward of its own."""
        if self._pipeline is None:
            return {}
        self._begin_micro_batch(batch, step, 0)
        return gradient_cosines(self._pipeline, lambda: self._forward(batch, self.summed_loss))

    def _forward(self, batch: Batch, loss: nn.Module | None = None) -> Tensor:
        """The summed loss of a micro-batch."""
        device = self._processes.device
        with self._precision():
            return (loss or self._loss)(_to(batch.input_ids, device), _to(batch.labels, device))[0]

    def _begin_micro_batch(self, batch: Batch, step: int, index: int) -> None:
        if self._pipeline is not None:
            begin_micro_batch_(
                self._pipeline,
                seed=self._seed,
                step=step,
                micro_batch=index,
                rank=self._processes.rank,
                pads=self._pads(batch),
            )

    def _pads(self, batch: Batch) -> Tensor | None:
        return None if batch.pads is None else _to(batch.pads, self._processes.device)

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(self._processes.device.type, torch.bfloat16, enabled=self._autocast)

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[object]:
        """Gradients travel with the last micro-batch only."""
        if isinstance(self._loss, DistributedDataParallel) and not last:
            return self._loss.no_sync()
        if hasattr(self._loss, "set_requires_gradient_sync"):
            self._loss.set_requires_gradient_sync(last)  # type: ignore[operator]
        return contextlib.nullcontext()


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


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)  # an unpinned copy would wait for the device


def _checkpoint_blocks_(model: LlamaForCausalLM) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    layers = model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)


def _shard_(loss: SummedLoss) -> None:
    from torch.distributed.fsdp import fully_shard

    for layer in loss.model.model.layers:
        fully_shard(layer)
    fully_shard(loss)  # the rest: embedding, last norm and head, gathered for the whole forward
