"""What a training loop does for 2:4 sparsity, between the graph's forwards: the state that lies in buffers.

In order, for update `step` (updates already made), after `pipeline.lower_(step)`:

    begin_update_(pipeline, step, forward)                     scales and weight masks that are due
    for each micro-batch:
        begin_micro_batch_(pipeline, seed=…, step=…, …)       random seeds, padding
        forward, backward
    decay_dropped_weights_(pipeline, clipped=False)            masked decay that is a part of the gradient
    clip the gradients
    decay_dropped_weights_(pipeline, clipped=True)             masked decay that is not
    optimizer.step()

and `with evaluation(pipeline):` around whatever is not training: there, masks are of the weights as they are.
The buffers are named by the passes (`act24.passes.activation24`, `act24.passes.weight24`). Nothing here waits
for the device, but for the one line that `begin_update_` returns at a scale's first measurement.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from act24.errors import Act24Error
from act24.fp8.linear import cast_weight
from act24.passes import Activation24, Fp8, OperationalPass, Pipeline, Weight24, activation24, fp8, weight24
from act24.passes.activation24 import SCALE, SUMS
from act24.passes.activation_calibration import ActivationCalibration
from act24.passes.graph.activation_sites import PADS
from act24.passes.graph.linear_sites import LinearSite
from act24.passes.graph.region import RegionModule, buffers_of
from act24.passes.weight24 import stored_mask
from act24.sparse24.feed_forward.calibration import CALIBRATION
from act24.sparse24.pattern.soft_threshold import scale_from_sums
from act24.sparse24.weight.linear24 import flip_rate, masked_decay_
from act24.sparse24.weight.methods import weight_scale
from act24.sparse24.weight.packed import packed_operands

#: What a kind of seed adds to the name that it is drawn from, so that no two are drawn alike.
_DRAWN_FROM = {activation24.SEED: ".activation", weight24.SEED: ""}

#: Sums a tensor over all processes, in place or not, and returns it.
Reduce = Callable[[Tensor], Tensor]


def _alone(summed: Tensor) -> Tensor:
    return summed


def begin_update_(
    pipeline: Pipeline,
    step: int,
    forward: Callable[[], object],
    pads: Tensor | None = None,
    reduce: Reduce = _alone,
) -> str | None:
    """Bring scales and masks up to date, where they are due, before the first micro-batch of an update.

    Collective: every process calls it with the same step.

    Args:
        step: updates already made.
        forward: runs the model on some rows of this process's first micro-batch, `calibration_samples` of
            them or more; called without gradients if a scale is due.
        pads: which tokens of those rows are padding, as for `begin_micro_batch_`.
        reduce: sums a tensor over the processes; nothing here knows of any.

    Returns:
        at the first measurement of a scale, a line that says what it is and what naive 2:4 would cost.
    """
    for p in pipeline.active:
        if isinstance(p, Weight24):
            renew_masks_(pipeline, p, step)
            pack_weights_(pipeline, p)
        elif isinstance(p, Fp8):
            cast_weights_(pipeline, p)
    due = [p for p in pipeline.active if isinstance(p, Activation24) and p.calibrates(step)]
    if not due:
        return None
    set_pads_(pipeline, pads)
    names, table = _calibrate_(pipeline, due, forward, reduce)
    first = any(step == p.from_step for p in due)
    return _calibration_text(names, table) if first else None


def _calibrate_(
    pipeline: Pipeline, due: Sequence[Activation24], forward: Callable[[], object], reduce: Reduce
) -> tuple[list[str], Tensor]:
    """Measure and set the scales of the passes that are due; the names of their sites, and the sums."""
    sums = buffers_of(pipeline.regions, SUMS)
    for buffer in sums.values():
        buffer.zero_()
    measuring = [ActivationCalibration(of=p) for p in due]
    # As in evaluation: the seeds are still those of another micro-batch, and of none where a run resumes.
    with torch.no_grad(), pipeline.lowered([*measuring, *as_evaluated(pipeline.active)]):
        forward()
    table = reduce(torch.stack(list(sums.values())))
    measured = scale_from_sums(table[:, -2:])
    scales = buffers_of(pipeline.regions, SCALE)
    for name, row, new in zip(sums, table, measured, strict=True):
        # A site of a pass that is not due has summed up nothing.
        scales[name].copy_(torch.where(row[-1] > 0, new, scales[name]))
    return list(sums), table


def _calibration_text(names: Sequence[str], table: Tensor) -> str:
    rows = [
        (name, dict(zip(CALIBRATION, row, strict=True)))
        for name, row in zip(names, table.tolist(), strict=True)
    ]
    lines = []
    for name, row in rows:
        if row["energy"] == 0:
            continue
        scale = float(scale_from_sums(torch.tensor([row["scale_product"], row["scale_square"]])))
        best = float(scale_from_sums(torch.tensor([row["product"], row["square"]])))
        error = (row["energy"] - 2 * scale * row["product"] + scale**2 * row["square"]) / row["energy"]
        naive = row["naive_error"] / row["energy"]
        lines.append((name, scale, best, max(error, 0.0) ** 0.5, naive**0.5))
    if not lines:
        return "2:4 activations are all zero: scales stay as they are"
    name, scale, best, error, naive = max(lines, key=lambda line: line[3])
    scales = [line[1] for line in lines]
    return (
        f"2:4 scale β: {min(scales):.4f} to {max(scales):.4f} over {len(lines)} activations. Worst, {name}: "
        f"β = {scale:.4f} (least error at {best:.4f}), relative error {error:.4f}; naive 2:4: {naive:.4f}"
    )


@torch.no_grad()
def renew_masks_(pipeline: Pipeline, p: Weight24, step: int) -> None:
    """Renew the masks of a `weight24` in force, if they are due, and note how much they changed; its scales
    at the first sparse update. `begin_update_` does it for every such pass.

    Collective where parameters are sharded: each is gathered in turn, for masks and scales are of whole
        weights.
    """
    if not p.renews_masks(step):
        return
    first = step == p.from_step
    _set_masks_(pipeline, p, scales=first, count_flips=not first)


def _set_masks_(pipeline: Pipeline, p: Weight24, *, scales: bool, count_flips: bool) -> None:
    for weight in weights_of(pipeline, p):
        parameter = _whole(weight.parameter)
        mask = stored_mask(parameter, weight.transposed, p.method)
        if scales and p.record.soft:
            dense = parameter.T if weight.transposed else parameter
            weight.buffer(weight24.SCALE).copy_(weight_scale(dense))
        if count_flips:
            weight.buffer(weight24.FLIPS).add_(flip_rate(weight.buffer(weight24.MASK), mask))
        weight.buffer(weight24.MASK).copy_(mask)


@torch.no_grad()
def renew_to_read_(
    pipeline: Pipeline,
    step: int | None,
    forward: Callable[[], object] | None = None,
    pads: Tensor | None = None,
    reduce: Reduce = _alone,
) -> tuple[Activation24, ...]:
    """Set masks to those of the weights as they are, and scales that no update has set yet, of the passes in
    force. Training does it when an update begins, so that at and before a pass's first one its buffers hold
    what came of the initial weights.

    Collective where parameters are sharded.

    Args:
        step: updates already made; None: scales are set.
        forward: runs the model on some rows; None: there are none.
        pads, reduce: as for `begin_update_`.

    Returns:
        the passes whose scale is missing for want of rows.
    """
    for p in pipeline.active:
        if isinstance(p, Weight24):
            _set_masks_(pipeline, p, scales=_is_new(p, step), count_flips=False)
    due = [p for p in pipeline.active if isinstance(p, Activation24) and p.soft and _is_new(p, step)]
    if not due or forward is None:
        return tuple(due)
    set_pads_(pipeline, pads)
    _calibrate_(pipeline, due, forward, reduce)
    set_pads_(pipeline, None)
    return ()


def _is_new(p: OperationalPass, step: int | None) -> bool:
    """Whether no update has been made with a pass."""
    return step is not None and step <= p.from_step


@torch.no_grad()
def pack_weights_(pipeline: Pipeline, p: Weight24) -> None:
    """Pack the weights of a `weight24` in force that keeps them packed, as they and their masks are now, into
    the
    buffers that forward and backward read: the same memory from the first time on, as CUDA graphs want it.
    `begin_update_` does it for every such pass. Parameters must not be sharded."""
    if not p.keep_packed:
        return
    for weight in weights_of(pipeline, p):
        turned = (lambda t: t.T) if weight.transposed else (lambda t: t)
        dense = turned(weight.parameter)
        if not p.packs(*dense.shape):
            continue
        mask = None if p.record.soft else turned(weight.buffer(weight24.MASK))
        scale = weight.buffer(weight24.SCALE) if p.record.soft else None
        packed, transposed = packed_operands(dense, mask, scale, p.record.both_ways)
        weight.fill_buffer_(weight24.PACKED, packed)
        if transposed is not None:
            weight.fill_buffer_(weight24.TRANSPOSED, transposed)


@torch.no_grad()
def cast_weights_(pipeline: Pipeline, p: Fp8) -> None:
    """Cast the weights of an `fp8` in force that keeps them, as they are now, into the buffers that forward
    and backward read: the same memory from the first time on. `begin_update_` does it for every such pass.
    Parameters must not be sharded."""
    if not p.keep_cast:
        return
    for weight in weights_of(pipeline, p):
        dense = weight.parameter.T if weight.transposed else weight.parameter
        # In bfloat16, as forward has them: under autocast parameters are float32.
        cast = cast_weight(dense.to(torch.bfloat16), p.scaling, kernels=p.kernels)
        for kind, value in zip(fp8.PARTS, cast, strict=True):
            weight.fill_buffer_(kind, value)


@torch.no_grad()
def decay_dropped_weights_(pipeline: Pipeline, *, clipped: bool) -> None:
    """Masked decay of the gradients of an update, to be called twice: before clipping for methods whose decay
    is a part of the gradient (SR-STE), and between clipping and the optimizer step for those where it is not.

    Args:
        clipped: whether the gradients are clipped by now. A loop that does not clip makes both calls one
            after the other.
    """
    place = "after_clipping" if clipped else "before_clipping"
    for p in pipeline.active:
        if isinstance(p, Weight24) and p.masked_decay and p.record.decay_place == place:
            for weight in weights_of(pipeline, p):
                if weight.parameter.grad is not None:
                    mask = weight.buffer(weight24.MASK)
                    _decay_gradient_(weight.parameter, weight.parameter.grad, mask, p.masked_decay)


def _decay_gradient_(parameter: Tensor, grad: Tensor, mask: Tensor, decay: float) -> None:
    if isinstance(parameter, DTensor):
        assert isinstance(grad, DTensor)
        # Every process has the whole mask, and takes its part of it; nothing is sent.
        mesh, placements = parameter.device_mesh, parameter.placements
        mask = distribute_tensor(mask, mesh, placements, src_data_rank=None).to_local()
        parameter, grad = parameter.to_local(), grad.to_local()
    masked_decay_(grad, parameter, mask, decay)


def _whole(tensor: Tensor) -> Tensor:
    """A tensor without sharding; collective where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def refuse_exact_steps(pipeline: Pipeline) -> None:
    """To be called where LORO's optimizer takes exact steps.

    Raises:
        Act24Error: `weight24` has factors of `low_rank`, which such a step makes anew.
    """
    for p in pipeline.passes:
        if not isinstance(p, Weight24):
            continue
        with pipeline.lowered([p]):
            factors = [
                f"{fqn}.{match.nodes.weight}"
                for fqn, match in pipeline.matches(p)
                if match.nodes.factor is not None
            ]
        if factors:
            raise Act24Error(
                f"weight24 makes {factors[0]} 2:4, and LORO's exact step mixes the columns of the factors: "
                "with each, half of the mask flips and the effective weight jumps, though the product stays. "
                'Use type "eucl" for the optimizer, or leave the factors out of weight24'
            )


@dataclass(frozen=True)
class SparseWeight:
    """A weight under `weight24` or `fp8`, the region where it stands, and its names."""

    module: RegionModule
    name: str
    local: str
    transposed: bool

    @property
    def parameter(self) -> Tensor:
        return self.module.get_parameter(self.local)

    def buffer(self, kind: str) -> Tensor:
        return self.module.get_buffer(self.local + kind)

    def fill_buffer_(self, kind: str, value: Tensor) -> None:
        """Copy a value into a buffer; the first one takes the place of what has no elements."""
        buffer = self.buffer(kind)
        if buffer.shape == value.shape:
            buffer.copy_(value)
        else:
            path, _, leaf = (self.local + kind).rpartition(".")
            setattr(self.module.get_submodule(path), leaf, value)


def weights_of(pipeline: Pipeline, p: Weight24 | Fp8) -> Iterator[SparseWeight]:
    """What a `weight24` or `fp8` in force has taken."""
    for fqn, match in pipeline.matches(p):
        site: LinearSite = match.nodes
        name = f"{fqn}.{site.weight}"
        yield SparseWeight(pipeline.regions[fqn], name, site.weight, site.transposed)


def begin_micro_batch_(
    pipeline: Pipeline,
    *,
    seed: int,
    step: int,
    micro_batch: int,
    rank: int = 0,
    pads: Tensor | None = None,
) -> None:
    """Say what the next forward draws from, and which of its tokens are padding.

    Args:
        seed, step, micro_batch, rank: of the run, the update, the micro-batch in it, the process. The same
            four draw the same, in a recomputation and after a resume too.
        pads: boolean, the shape of the token ids; None for rows without padding.
    """
    if any(p.draws for p in pipeline.active if isinstance(p, Activation24 | Weight24)):
        values, buffers = [], []
        for kind, suffix in _DRAWN_FROM.items():
            for name, buffer in buffers_of(pipeline.regions, kind).items():
                values.append(_hash(seed, f"{name}{suffix}", step, micro_batch, rank))
                buffers.append(buffer)
        torch._foreach_zero_(buffers)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(buffers, values)  # pyright: ignore[reportPrivateImportUsage]
    set_pads_(pipeline, pads)


def set_pads_(pipeline: Pipeline, pads: Tensor | None) -> None:
    """Put the padding of the next forward into the regions that ask for it; None takes it out."""
    for module in pipeline.modules:
        old = module._buffers.get(PADS)
        if old is not None and (pads is not None or old.ndim):
            module._buffers[PADS] = torch.zeros_like(old[(0,) * old.ndim]) if pads is None else pads


def _hash(*parts: object) -> int:
    """63 bits."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@contextmanager
def evaluation(
    pipeline: Pipeline,
    without: Sequence[str] = (),
    *,
    step: int | None = None,
    forward: Callable[[], object] | None = None,
    pads: Tensor | None = None,
    reduce: Reduce = _alone,
) -> Iterator[None]:
    """The model as it is evaluated: nothing is drawn at random, nothing is counted, masks are those of the
    weights as they are. Afterwards all state is as before, at the same addresses.

    Collective where parameters are sharded.

    Args:
        without: names of passes to leave out, to see the same weights without 2:4.
        step: updates already made: evaluate with the passes in force then, and measure scales that no update
            has set yet. None: as the pipeline is lowered and its scales are.
        forward, pads, reduce: what scales are measured on, as for `begin_update_`; without `forward` those of
            activations stay as they are.
    """
    set_pads_(pipeline, None)
    active = pipeline.active if step is None else pipeline.in_force(step)
    kinds = (weight24.MASK, weight24.SCALE, SCALE, SUMS)
    state = [buffer for kind in kinds for buffer in buffers_of(pipeline.regions, kind).values()]
    before = [buffer.clone() for buffer in state]
    with pipeline.lowered(as_evaluated([p for p in active if p.name not in without])):
        try:
            renew_to_read_(pipeline, step, forward, pads, reduce)
            yield
        finally:
            # In place, and not by exchange: CUDA graphs read these addresses.
            for buffer, value in zip(state, before, strict=True):
                buffer.copy_(value)


def as_evaluated(passes: Sequence[OperationalPass]) -> list[OperationalPass]:
    """The passes as evaluation has them."""
    return [evaluated for p in passes if (evaluated := p.in_evaluation()) is not None]


def without_counting(passes: Sequence[OperationalPass]) -> list[OperationalPass]:
    """The passes that do something."""
    return [p for p in passes if not p.observes]
