"""What a training loop does for 2:4 sparsity, between the graph's forwards: the state that lies in buffers.

In order, for update `step` (updates already made), after `pipeline.lower_(step)`:

    begin_update_(pipeline, step, forward, processes)         scales and weight masks that are due
    for each micro-batch:
        begin_micro_batch_(pipeline, seed=…, step=…, …)       random seeds, padding
        forward, backward
    clip the gradients
    masked_decay_(pipeline, step, lr)                          what 2:4 weights add to gradients or weights
    optimizer.step()

and `with evaluation(pipeline):` around whatever is not training. Nothing here waits for the device, but for
the one line that `begin_update_` returns at a scale's first measurement.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from act24.passes import Activation24, OperationalPass, Pipeline
from act24.passes.activation24 import SCALE, SEED, SUMS
from act24.passes.activation_calibration import ActivationCalibration
from act24.passes.activation_sites import PADS
from act24.passes.normal_form import nodes_of, parameter_name
from act24.sparse24.activation import activation24
from act24.sparse24.calibration import CALIBRATION
from act24.sparse24.soft_threshold import scale_from_sums
from act24.tools.processes import Processes
from act24.tools.statistics import SiteStatistics

#: Share of the squared activations that 2:4 may drop before it is said. About what it drops of activations
#: of which half are zero; at 90% zeros it drops a thirtieth of this.
DROPPED_ENERGY_ALARM = 0.01


def begin_update_(
    pipeline: Pipeline, step: int, forward: Callable[[], object], processes: Processes
) -> str | None:
    """Bring scales and masks up to date, where they are due, before the first micro-batch of an update.

    Collective: every process calls it with the same step.

    Args:
        step: updates already made.
        forward: runs the model on some rows of this process's first micro-batch, `calibration_samples` of
            them or more; called without gradients if a scale is due.

    Returns:
        at the first measurement of a scale, a line that says what it is and what naive 2:4 would cost.
    """
    due = [p for p in pipeline.active if isinstance(p, Activation24) and p.calibrates(step)]
    if not due:
        return None
    names, table = _calibrate_(pipeline, due, forward, processes)
    first = any(step == p.from_step for p in due)
    return _calibration_text(names, table) if first else None


def _calibrate_(
    pipeline: Pipeline, due: Sequence[Activation24], forward: Callable[[], object], processes: Processes
) -> tuple[list[str], Tensor]:
    """Measure and set the scales of the passes that are due; the names of their sites, and the sums."""
    sums = site_buffers(pipeline, SUMS)
    for buffer in sums.values():
        buffer.zero_()
    measuring = [ActivationCalibration(of=p) for p in due]
    with torch.no_grad(), pipeline.lowered([*measuring, *_without_counting(pipeline.active)]):
        forward()
    table = processes.sum_(torch.stack(list(sums.values())))
    measured = scale_from_sums(table[:, -2:])
    scales = site_buffers(pipeline, SCALE)
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
    seeds = site_buffers(pipeline, SEED)
    if seeds:
        values = [_hash(seed, name, step, micro_batch, rank) for name in seeds]
        buffers = list(seeds.values())
        torch._foreach_zero_(buffers)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(buffers, values)  # pyright: ignore[reportPrivateImportUsage]
    set_pads_(pipeline, pads)


def set_pads_(pipeline: Pipeline, pads: Tensor | None) -> None:
    """Put the padding of the next forward into the regions that ask for it."""
    for module in pipeline.modules:
        if PADS in module._buffers:
            empty = torch.zeros((), dtype=torch.bool, device=module._buffers[PADS].device)  # type: ignore[union-attr]
            module._buffers[PADS] = empty if pads is None else pads


def _hash(*parts: object) -> int:
    """63 bits."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@contextmanager
def evaluation(pipeline: Pipeline, without: Sequence[str] = ()) -> Iterator[None]:
    """The model as it is evaluated: nothing is drawn at random, nothing is counted, no state moves.

    Args:
        without: names of passes to leave out, to see the same weights without 2:4.
    """
    passes = [p.in_evaluation() for p in pipeline.active if p.name not in without]
    set_pads_(pipeline, None)
    with pipeline.lowered([p for p in passes if p is not None]):
        yield


def gradient_cosines(pipeline: Pipeline, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """How far 2:4 bends the weight gradients: the cosine to the exact ones of the same forward.

    The input gradients are exact in every backward, so each cosine shows what happens at its own weight.

    Args:
        loss: the loss of one micro-batch; called twice. Statistics do not count it.

    Returns:
        by the weight's name, a scalar on the device; empty where every backward is dense.
    """
    passes = _without_counting(pipeline.active)
    exact = [replace(p, backward="dense") if isinstance(p, Activation24) else p for p in passes]
    if exact == passes:
        return {}
    weights = {
        f"{fqn}.{name}": module.get_parameter(name)
        for fqn, module in pipeline.regions.items()
        for node in nodes_of(module.graph, activation24)
        for position in (1, 3)
        if (name := parameter_name(node.args[position]))
    }
    gradients = []
    for chosen in (passes, exact):
        with pipeline.lowered(chosen):
            gradients.append(torch.autograd.grad(loss(), list(weights.values())))
    cosines = [
        torch.nn.functional.cosine_similarity(sparse.float().flatten(), dense.float().flatten(), dim=0)
        for sparse, dense in zip(*gradients, strict=True)
    ]
    return dict(zip(weights, cosines, strict=True))


def alarms(sites: Sequence[SiteStatistics]) -> list[str]:
    """What a person should know: activations of which 2:4 drops more than `DROPPED_ENERGY_ALARM`."""
    texts = []
    for name, what in (
        ("dropped_energy", "of the squared activations"),
        ("feature_dropped_energy", "of the squared activations from weight gradients, along the tokens"),
    ):
        loud = [s for s in sites if (getattr(s, name) or 0) > DROPPED_ENERGY_ALARM]
        if loud:
            worst = max(loud, key=lambda s: getattr(s, name))
            others = f", and more than {DROPPED_ENERGY_ALARM:.0%} at {len(loud) - 1} others" * (len(loud) > 1)
            place = f"layer {worst.layer}, {worst.site}" if worst.layer is not None else worst.site
            texts.append(f"2:4 drops {getattr(worst, name):.1%} {what} at {place}{others}")
    return texts


def site_buffers(pipeline: Pipeline, kind: str) -> dict[str, Tensor]:
    """The buffers of one kind, by the fully qualified name of their site."""
    return {
        f"{fqn}.{name}".removesuffix(f".{kind}"): buffer
        for fqn, module in pipeline.regions.items()
        for name, buffer in module.named_buffers()
        if name.rpartition(".")[2] == kind
    }


def _without_counting(passes: Sequence[OperationalPass]) -> list[OperationalPass]:
    return [p for p in passes if not p.observes]
