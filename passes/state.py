"""The state of 2:4 operations, which lies in buffers: what each kind of it is made of, and how.

Masks and scales of weights, scales of activations, packed weights, seeds, padding, masked decay; and what of
all this a served model has. The buffers are named by the passes (`act24.passes.activation24`,
`act24.passes.weight24`). When each is written is not decided here: `Pipeline.begin_update_` and
`Pipeline.evaluation` do that (`act24.passes.updates`). Nothing here waits for the device, but for the one
line that `calibrate_` returns at a scale's first measurement.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from act24.errors import Act24Error
from act24.fp8.linear import cast_weight
from act24.operation import is_transformed
from act24.passes import activation24, weight24
from act24.passes.activation24 import SCALE, SUMS, Activation24
from act24.passes.activation_calibration import ActivationCalibration
from act24.passes.base import OperationalPass
from act24.passes.fp8 import PARTS, Fp8
from act24.passes.graph.activation_sites import PADS
from act24.passes.graph.linear_sites import LinearSite
from act24.passes.graph.region import RegionModule, buffers_of, joined
from act24.passes.rewriting import Rewriting
from act24.passes.weight24 import Weight24, stored_mask
from act24.sparse24.feed_forward.calibration import CALIBRATION
from act24.sparse24.pattern.soft_threshold import scale_from_sums
from act24.sparse24.weight.linear24 import flip_rate, masked_decay_
from act24.sparse24.weight.methods import DecayPlace, weight_scale
from act24.sparse24.weight.packed import packed_operands

#: What a kind of seed adds to the name that it is drawn from, so that no two are drawn alike.
_DRAWN_FROM = {activation24.SEED: ".activation", weight24.SEED: ""}

#: What is added to a seed from one micro-batch to the next: 2⁶⁴ over the golden ratio (splitmix64), as int64.
_BETWEEN_MICRO_BATCHES = 0x9E3779B97F4A7C15 - 2**64

#: Sums a tensor over all processes, in place or not, and returns it.
Reduce = Callable[[Tensor], Tensor]


def calibrate_(
    pipeline: Rewriting,
    due: Sequence[Activation24],
    forward: Callable[[], object],
    reduce: Reduce | None = None,
) -> tuple[list[str], Tensor]:
    """Measure and set the scales of the passes that are due.

    Collective: every process calls it with the same passes.

    Args:
        forward: runs the model on the rows to measure on; called without gradients.
        reduce: sums a tensor over the processes; None: there is one.

    Returns:
        the names of the sites, and the sums (`act24.sparse24.feed_forward.calibration.CALIBRATION`).
    """
    sums = buffers_of(pipeline.regions, SUMS)
    for buffer in sums.values():
        buffer.zero_()
    measuring = [ActivationCalibration(of=p) for p in due]
    # Other sites run as in evaluation, which draws nothing: seeds are those of the micro-batch before, and a
    # run that resumes has none yet.
    with torch.no_grad(), pipeline.lowered([*measuring, *as_evaluated(pipeline.active)]):
        forward()
    table = (reduce or _alone)(torch.stack(list(sums.values())))
    measured = scale_from_sums(table[:, -2:])
    scales = buffers_of(pipeline.regions, SCALE)
    for name, row, new in zip(sums, table, measured, strict=True):
        # The sums of a site stay zero if its pass is not due.
        scales[name].copy_(torch.where(row[-1] > 0, new, scales[name]))
    return list(sums), table


def _alone(tensor: Tensor) -> Tensor:
    return tensor


def calibration_text(names: Sequence[str], table: Tensor) -> str:
    """What a first measurement found, and what naive 2:4 would cost, as lines to print.

    Args:
        names: of the sites.
        table: their sums, `[sites, len(CALIBRATION)]`, floating-point.
    """
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
def renew_masks_(pipeline: Rewriting, p: Weight24, step: int) -> None:
    """Renew the masks of a `weight24` in force, if they are due, and note how much they changed; its scales
    at the first sparse update. `Pipeline.begin_update_` does it for every such pass.

    Collective where parameters are sharded: each is gathered in turn, for masks and scales are of whole
        weights.
    """
    if not p.renews_masks(step):
        return
    first = step == p.from_step
    _set_masks_(pipeline, p, scales=first, count_flips=not first)


def _set_masks_(pipeline: Rewriting, p: Weight24, *, scales: bool, count_flips: bool) -> None:
    for weight in sparse_weights(pipeline, p):
        parameter = whole(weight.parameter)
        mask = stored_mask(parameter, weight.transposed, p.method)
        if scales and p.record.soft:
            dense = parameter.T if weight.transposed else parameter
            weight.buffer(weight24.SCALE).copy_(weight_scale(dense))
        if count_flips:
            weight.buffer(weight24.FLIPS).add_(flip_rate(weight.buffer(weight24.MASK), mask))
        weight.buffer(weight24.MASK).copy_(mask)


@torch.no_grad()
def renew_to_read_(
    pipeline: Rewriting,
    step: int | None,
    forward: Callable[[], object] | None = None,
    pads: Tensor | None = None,
    reduce: Reduce | None = None,
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
    due = [
        p
        for p in pipeline.active
        if isinstance(p, Activation24) and p.soft and _is_unmeasured(pipeline, p, step)
    ]
    if not due or forward is None:
        return tuple(due)
    set_pads_(pipeline, pads)
    calibrate_(pipeline, due, forward, reduce)
    set_pads_(pipeline, None)
    return ()


def _is_new(p: OperationalPass, step: int | None) -> bool:
    """Whether no update has been made with a pass."""
    return step is not None and step <= p.from_step


def _is_unmeasured(pipeline: Rewriting, p: Activation24, step: int | None) -> bool:
    """Whether nobody has measured the scale of a pass in force. Before its first update a loop may have, for
    those who read the model then: a scale of exactly 1 is none."""
    if not _is_new(p, step):
        return False
    return step != p.from_step or all(scale == 1 for scale in torch.stack(scales_of(pipeline, p)).tolist())


def scales_of(pipeline: Rewriting, p: Activation24) -> list[Tensor]:
    """The scales of a soft pass in force, one a site."""
    scales = buffers_of(pipeline.regions, SCALE)
    return [scales[".".join(filter(None, (fqn, match.path)))] for fqn, match in pipeline.matches(p)]


@torch.no_grad()
def pack_weights_(pipeline: Rewriting, p: Weight24) -> None:
    """Pack the weights of a `weight24` in force that keeps them packed, as they and their masks are now, into
    the buffers that forward and backward read: the same memory from the first time on, as CUDA graphs want
    it. `Pipeline.begin_update_` does it for every such pass. Parameters must not be sharded."""
    if not p.keep_packed:
        return
    for weight in sparse_weights(pipeline, p):
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
def cast_weights_(pipeline: Rewriting, p: Fp8) -> None:
    """Cast the weights of an `fp8` in force that keeps them, as they are now, into the buffers that forward
    and backward read: the same memory from the first time on. `Pipeline.begin_update_` does it for every such
    pass. Parameters must not be sharded."""
    if not p.keep_cast:
        return
    for weight in sparse_weights(pipeline, p):
        dense = weight.parameter.T if weight.transposed else weight.parameter
        # In bfloat16, as forward has them: under autocast parameters are float32.
        cast = cast_weight(dense.to(torch.bfloat16), p.scaling, kernels=p.kernels)
        for kind, value in zip(PARTS, cast, strict=True):
            weight.fill_buffer_(kind, value.view(weight.buffer(kind).dtype))


def decaying_weights(pipeline: Rewriting, place: DecayPlace) -> Iterator[tuple[SparseWeight, float]]:
    """The weights of which masked decay enters the gradient at a place, before or after clipping, and its λ;
    of the passes in force."""
    for p in pipeline.active:
        if isinstance(p, Weight24) and p.masked_decay and p.record.decay_place == place:
            yield from ((weight, p.masked_decay) for weight in sparse_weights(pipeline, p))


@torch.no_grad()
def decay_gradient_(parameter: Tensor, mask: Tensor, decay: float) -> None:
    """Add masked decay, λ (1 - mask) ∘ W, to the gradient that a weight has."""
    grad = parameter.grad
    assert grad is not None
    if isinstance(parameter, DTensor):
        assert isinstance(grad, DTensor)
        # Every process has the whole mask, and takes its part of it; nothing is sent.
        mesh, placements = parameter.device_mesh, parameter.placements
        mask = distribute_tensor(mask, mesh, placements, src_data_rank=None).to_local()
        parameter, grad = parameter.to_local(), grad.to_local()
    masked_decay_(grad, parameter, mask, decay)


def whole(tensor: Tensor) -> Tensor:
    """A tensor without sharding; collective where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def refuse_exact_steps(pipeline: Rewriting) -> None:
    """To be called where LORO's optimizer takes exact steps.

    Raises:
        Act24Error: `weight24` has factors of `low_rank`, which such a step makes anew.
    """
    for p in pipeline.passes:
        if not isinstance(p, Weight24):
            continue
        with pipeline.lowered([p]):
            factors = [
                joined(fqn, match.nodes.weight)
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
        """It may be a tensor that is no parameter, for as long as torch.func.functional_call has it there."""
        path, _, leaf = self.local.rpartition(".")
        return getattr(self.module.get_submodule(path), leaf)

    def buffer(self, kind: str) -> Tensor:
        return self.module.get_buffer(self.local + kind)

    def fill_buffer_(self, kind: str, value: Tensor) -> None:
        """Copy a value into a buffer; the first one takes the place of what has no elements."""
        buffer = self.buffer(kind)
        if buffer.shape == value.shape:
            buffer.copy_(value)
        else:
            owner, leaf = self.place(kind)
            setattr(owner, leaf, value)

    def place(self, kind: str) -> tuple[nn.Module, str]:
        """The module that has a buffer, and its name there."""
        path, _, leaf = (self.local + kind).rpartition(".")
        return self.module.get_submodule(path), leaf


def sparse_weights(pipeline: Rewriting, p: Weight24 | Fp8) -> Iterator[SparseWeight]:
    """What a `weight24`, or an `fp8`, in force has taken."""
    for fqn, match in pipeline.matches(p):
        site: LinearSite = match.nodes
        name = joined(fqn, site.weight)
        yield SparseWeight(pipeline.regions[fqn], name, site.weight, site.transposed)


def set_seeds_(pipeline: Rewriting, step: int, rank: int) -> None:
    """Say what the forwards of an update draw from, before the first of them (`next_seeds_`).

    Args:
        step, rank: of the update and the process. With the pipeline's seed they draw the same, in a
            recomputation and after a resume too.
    """
    values, buffers = [], []
    for kind, suffix in _DRAWN_FROM.items():
        for name, buffer in buffers_of(pipeline.regions, kind).items():
            values.append(_hash(pipeline.seed, f"{name}{suffix}", step, rank))
            buffers.append(buffer)
    if buffers:
        torch._foreach_zero_(buffers)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(buffers, values)  # pyright: ignore[reportPrivateImportUsage]


def own_seeds(pipeline: Rewriting, own: list[Tensor]) -> list[Tensor]:
    """A copy of the seeds in memory that only this process writes to; `own` again, if it is one. Data
    parallelism sends the buffers of one process to all, unless it is told not to."""
    buffers = _seed_buffers(pipeline)
    if [seed.device for seed in own] != [buffer.device for buffer in buffers]:
        return [buffer.clone() for buffer in buffers]
    if buffers:
        torch._foreach_copy_(own, buffers)  # pyright: ignore[reportPrivateImportUsage]
    return own


def next_seeds_(pipeline: Rewriting, own: list[Tensor]) -> None:
    """Seeds of the next micro-batch, from those of this process (`own_seeds`). On the device alone, so that a
    captured forward has it too."""
    if own:
        torch._foreach_add_(own, _BETWEEN_MICRO_BATCHES)  # pyright: ignore[reportPrivateImportUsage]
        buffers = _seed_buffers(pipeline)
        if any(map(is_transformed, buffers)):  # many models at once, which draw the same
            for buffer, seed in zip(buffers, own, strict=True):
                buffer.copy_(seed)
            return
        torch._foreach_copy_(buffers, own)  # pyright: ignore[reportPrivateImportUsage]


def _seed_buffers(pipeline: Rewriting) -> list[Tensor]:
    return [buffer for kind in _DRAWN_FROM for buffer in buffers_of(pipeline.regions, kind).values()]


def set_pads_(pipeline: Rewriting, pads: Tensor | None) -> None:
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
    pipeline: Rewriting,
    without: Sequence[str],
    step: int | None,
    forward: Callable[[], object] | None,
    pads: Tensor | None,
    reduce: Reduce | None,
) -> Iterator[None]:
    """`Pipeline.evaluation`."""
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
            # Copied back in place, because CUDA graphs read these addresses.
            for buffer, value in zip(state, before, strict=True):
                buffer.copy_(value)


def as_evaluated(passes: Sequence[OperationalPass]) -> list[OperationalPass]:
    """The passes as evaluation has them."""
    return [evaluated for p in passes if (evaluated := p.in_evaluation()) is not None]


def without_counting(passes: Sequence[OperationalPass]) -> list[OperationalPass]:
    """The passes that do something."""
    return [p for p in passes if not p.observes]
