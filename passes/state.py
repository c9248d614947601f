"""The state of 2:4 operations, which lies in buffers: what each kind of it is made of, and how.

Masks and scales of weights, scales of activations, packed weights, seeds, padding, masked decay; and what of
all this a served model has. The buffers are named by the passes (`act24.passes.activation24`,
`act24.passes.weight24`). When each is written is not decided here: `Pipeline.begin_update_` and
`Pipeline.evaluation` do that (`act24.passes.updates`). Nothing here waits for the device, but for the one
line that `calibrate_` returns at a scale's first measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from act24.errors import Act24Error
from act24.fp8.linear import cast_weight, uses_kernels
from act24.passes import weight24
from act24.passes.activation24 import SCALE, SUMS, Activation24
from act24.passes.activation_calibration import ActivationCalibration
from act24.passes.base import OperationalPass
from act24.passes.fp8 import PARTS, Fp8
from act24.passes.graph.activation_sites import PADS
from act24.passes.graph.linear_sites import LinearSite
from act24.passes.graph.normal_form import nodes_of, parameter_name
from act24.passes.graph.region import RegionModule, buffers_of, joined
from act24.passes.graph.restored import restored
from act24.passes.left_out import check_left_out, left_out
from act24.passes.rewriting import Rewriting
from act24.passes.weight24 import Weight24, stored_mask
from act24.sparse24.feed_forward.calibration import CALIBRATION
from act24.sparse24.feed_forward.operation import activation24 as activation24_operation
from act24.sparse24.feed_forward.packed_fp8 import cast_weights
from act24.sparse24.pattern.soft_threshold import scale_from_sums
from act24.sparse24.weight.linear24 import flip_rate, masked_decay_
from act24.sparse24.weight.methods import DecayPlace, weight_scale
from act24.sparse24.weight.packed import packed_operands
from act24.words import counted

#: Sums a tensor over all processes, in place or not, and returns it.
Reduce = Callable[[Tensor], Tensor]

#: Calls a function that reads and writes tensors at fixed addresses and waits for nothing; or replays what an
#: earlier call with an equal key has launched.
Replayed = Callable[[Hashable, Callable[[], tuple[Tensor, ...]]], object]


@dataclass(frozen=True)
class Due:
    """Scales to measure.

    Attributes:
        of: the pass whose they are.
        places: at these of its sites, by full name; None: at all.
    """

    of: Activation24
    places: frozenset[str] | None = None


def calibrate_(
    pipeline: Rewriting,
    due: Sequence[Due],
    forward: Callable[[], object],
    reduce: Reduce | None = None,
) -> tuple[list[str], Tensor]:
    """Measure and set the scales that are due.

    Collective: every process calls it with the same ones.

    Args:
        forward: runs the model on the rows to measure on; called without gradients.
        reduce: sums a tensor over the processes; None: there is one.

    Returns:
        the names of the sites, and the sums (`act24.sparse24.feed_forward.calibration.CALIBRATION`).
    """
    sums = buffers_of(pipeline.regions, SUMS)
    for buffer in sums.values():
        buffer.zero_()
    measuring = [ActivationCalibration(of=one.of, places=one.places) for one in due]
    # Other sites run as in evaluation, which draws nothing: a run that resumes has no seeds yet.
    lowered = pipeline.lowered([*as_evaluated(pipeline.active), *measuring])
    with torch.no_grad(), lowered, restored(pipeline.model, pipeline.regions):
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
        f"2:4 scale β: {min(scales):.4f} to {max(scales):.4f} over {counted(len(lines), 'activation')}. "
        f"Worst, {name}: β = {scale:.4f} (least error at {best:.4f}), relative error {error:.4f}; naive 2:4: "
        f"{naive:.4f}"
    )


def new_places(
    pipeline: Rewriting,
    p: OperationalPass,
    step: int | None,
    among: Sequence[OperationalPass] | None = None,
) -> set[str]:
    """What a pass in force has at a step for the first time: at its first one everything, later what another
    pass has left to it. No update has set the scales there, nor masks.

    Args:
        step: updates already made; None: it is not known, and all is set.
        among: the passes in force, of which it is one; None: those that are.

    Returns:
        full names: of weights, or of the sites of activations.
    """
    if step is None or (step > p.from_step and step not in pipeline.boundaries):
        return set()
    now = _places(pipeline, p, pipeline.active if among is None else among)
    before = pipeline.in_force(step - 1) if step > p.from_step else []
    for passes in (before, as_evaluated(before)):
        if p in passes:
            return now - _places(pipeline, p, passes)
    return now


def _places(pipeline: Rewriting, p: OperationalPass, among: Sequence[OperationalPass]) -> set[str]:
    return {
        joined(fqn, match.path if isinstance(p, Activation24) else match.nodes.weight)
        for fqn, match in pipeline.matches(p, among)
    }


@torch.no_grad()
def renew_masks_(pipeline: Rewriting, p: Weight24, step: int) -> None:
    """Renew the masks of a `weight24` in force, if they are due, and note how much they changed; its scales
    at the first sparse update. `Pipeline.begin_update_` does it for every such pass.

    Collective where parameters are sharded: each is gathered in turn, for masks and scales are of whole
        weights.
    """
    new, due = new_places(pipeline, p, step), p.renews_masks(step)
    for weight in sparse_weights(pipeline, p):
        if due or weight.name in new:
            _set_mask_(weight, p, scale=weight.name in new, count_flips=weight.name not in new)


def _set_mask_(weight: SparseWeight, p: Weight24, *, scale: bool, count_flips: bool) -> None:
    parameter = whole(weight.parameter)
    mask = stored_mask(parameter, weight.transposed, p.method)
    if scale and p.record.soft:
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
) -> list[Due]:
    """Set masks to those of the weights as they are, and scales that no update has set yet, of the passes in
    force. Training does it when an update begins, so that at and before a pass's first one its buffers hold
    what came of the initial weights.

    Collective where parameters are sharded.

    Args:
        step: updates already made; None: scales are set.
        forward: runs the model on some rows; None: there are none, and scales of activations stay.
        pads, reduce: as for `begin_update_`.

    Returns:
        the scales that are missing for want of rows.
    """
    for p in pipeline.active:
        if isinstance(p, Weight24):
            new = new_places(pipeline, p, step)
            for weight in sparse_weights(pipeline, p):
                _set_mask_(weight, p, scale=weight.name in new, count_flips=False)
    due = _unmeasured(pipeline, step)
    if not due or forward is None:
        return due
    set_pads_(pipeline, pads)
    calibrate_(pipeline, due, forward, reduce)
    set_pads_(pipeline, None)
    return []


def _unmeasured(pipeline: Rewriting, step: int | None) -> list[Due]:
    """The scales of activations that nobody has measured, of the passes in force. Before an update has, a
    loop may have done it, for those who read the model then: a scale of exactly 1 is none."""
    found = []
    for p in pipeline.active:
        if isinstance(p, Activation24) and p.soft and (places := new_places(pipeline, p, step)):
            scales = buffers_of(pipeline.regions, SCALE)
            if step != p.from_step or torch.stack([scales[name] for name in places]).eq(1).all():
                found.append(Due(p, frozenset(places)))
    return found


def renew_weights_to_read_(pipeline: Rewriting, replayed: Replayed | None = None) -> None:
    """Make the weights that forward and backward read in another form, packed 2:4 or in e4m3, of the passes
    in force that keep them so; `Pipeline.begin_update_` does. Parameters must not be sharded.

    Args:
        replayed: launched one by one this takes longer than its kernels do.
    """

    def renew() -> tuple[Tensor, ...]:
        for one in _weights_to_read(pipeline):
            one()
        return ()

    if next(_weights_to_read(pipeline), None) is None:
        return
    renew() if replayed is None else replayed(("weights to read", pipeline.active), renew)


def _weights_to_read(pipeline: Rewriting) -> Iterator[Callable[[], None]]:
    """What makes each of them, as a weight and its mask are when it is called, in the same memory from its
    second call on, as CUDA graphs want it."""
    for p in pipeline.active:
        if isinstance(p, Weight24) and p.keep_packed:
            for weight in sparse_weights(pipeline, p):
                if p.packs(*_turned(weight, weight.parameter).shape):
                    yield partial(_pack_, p, weight)
        elif isinstance(p, Fp8) and p.keep_cast:
            yield from (partial(_cast_linear_, p, weight) for weight in sparse_weights(pipeline, p))
        elif isinstance(p, Activation24) and p.keep_cast:
            for fqn in dict.fromkeys(fqn for fqn, _ in pipeline.matches(p)):
                module = pipeline.regions[fqn]
                for node in nodes_of(module.graph, activation24_operation):
                    if node.kwargs.get("casts"):
                        names = [str(parameter_name(node.args[place])) for place in (1, 3)]
                        weights = [SparseWeight(module, joined(fqn, n), n, transposed=False) for n in names]
                        yield partial(_cast_network_, p, weights)


def _turned(weight: SparseWeight, tensor: Tensor) -> Tensor:
    """As a linear has its weight, `[out, in]`."""
    return tensor.T if weight.transposed else tensor


@torch.no_grad()
def _pack_(p: Weight24, weight: SparseWeight) -> None:
    mask = None if p.record.soft else _turned(weight, weight.buffer(weight24.MASK))
    scale = weight.buffer(weight24.SCALE) if p.record.soft else None
    dense = _turned(weight, weight.parameter)
    packed, transposed = packed_operands(dense, mask, scale, p.record.both_ways)
    weight.fill_buffer_(weight24.PACKED, packed)
    if transposed is not None:
        weight.fill_buffer_(weight24.TRANSPOSED, transposed)


@torch.no_grad()
def _cast_linear_(p: Fp8, weight: SparseWeight) -> None:
    dense = _turned(weight, weight.parameter)
    # In bfloat16, as forward has them: under autocast parameters are float32.
    kernels = uses_kernels(dense.device, p.kernels)
    _fill_cast_(weight, cast_weight(dense.to(torch.bfloat16), p.scaling, kernels=kernels))


@torch.no_grad()
def _cast_network_(p: Activation24, weights: Sequence[SparseWeight]) -> None:
    weight_in, weight_out = (weight.parameter.to(torch.bfloat16) for weight in weights)
    casts = cast_weights(weight_in, weight_out, kernels=uses_kernels(weight_in.device, p.kernels))
    for weight, start in zip(weights, (0, len(PARTS)), strict=True):
        _fill_cast_(weight, casts[start : start + len(PARTS)])


def _fill_cast_(weight: SparseWeight, cast: Sequence[Tensor]) -> None:
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
        factors = [
            joined(fqn, match.nodes.weight)
            for step in (0, *pipeline.boundaries)
            if p.active(step)
            for fqn, match in pipeline.matches(p, pipeline.in_force(step))
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


def set_pads_(pipeline: Rewriting, pads: Tensor | None) -> None:
    """Put the padding of the next forward into the regions that ask for it; None takes it out."""
    for module in pipeline.modules:
        old = module._buffers.get(PADS)
        if old is not None and (pads is not None or old.ndim):
            module._buffers[PADS] = torch.zeros_like(old[(0,) * old.ndim]) if pads is None else pads


@contextmanager
def evaluation(
    pipeline: Rewriting,
    without: Sequence[str],
    step: int | None,
    made: int | None,
    forward: Callable[[], object] | None,
    pads: Tensor | None,
    reduce: Reduce | None,
) -> Iterator[None]:
    """`Pipeline.evaluation`; `made` is how many updates are, where that is known."""
    check_left_out(pipeline.passes, without)
    set_pads_(pipeline, None)
    active = pipeline.active if step is None else pipeline.in_force(step)
    kinds = (weight24.MASK, weight24.SCALE, SCALE, SUMS)
    state = [buffer for kind in kinds for buffer in buffers_of(pipeline.regions, kind).values()]
    before = [buffer.clone() for buffer in state]
    with pipeline.lowered(left_out(as_evaluated(active), without)):
        try:
            renew_to_read_(pipeline, made, forward, pads, reduce)
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
