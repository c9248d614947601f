"""The optimizer and the learning rate that a recipe asks for.

A training loop sets `lr` of every group to `learning_rate(recipe, step)` and calls `optimizer.step()`. Exact
updates, refreshes, restarts and resets of moments are the optimizer's own affair, by its own count of
updates, which its state carries.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.distributed as dist
from torch import Tensor, nn

from act24.optim import AdamW, LOROAdamW, loro_parameter_groups, parameter_groups
from act24.optim.loro import exact_period, unshared
from act24.passes import Pipeline
from act24.passes.state import refuse_exact_steps
from act24.recipes import schema
from act24.tools.run.batched_eigh import batched_eigh
from act24.tools.run.processes import Processes


def build_optimizer(
    model: nn.Module,
    section: schema.Optimizer,
    *,
    pipeline: Pipeline | None = None,
    processes: Processes | None = None,
) -> AdamW:
    """The optimizer over the trainable parameters of a model.

    Args:
        pipeline: what rewrote the model; `loro_adamw` asks it which linears `low_rank` factorised.
        processes: of the run; `loro_adamw` shares its exact updates out over them.

    Raises:
        Act24Error: `loro_adamw` without a factorised linear or with 2:4 factors that its exact updates would
            tear, or options that are out of range.
    """
    shared = {
        "lr": section.lr,
        "betas": section.betas,
        "eps": section.eps,
        "state_dtype": section.state_dtype,
        "momentum_reset_steps": section.momentum_reset_steps,
    }
    if section.name != "loro_adamw":
        return AdamW(parameter_groups(model, section.weight_decay, section.decay), **shared)
    if pipeline and (section.restarts or exact_period(section.type or "loro", section.exact_every or 0)):
        refuse_exact_steps(pipeline)
    groups = loro_parameter_groups(
        model,
        pipeline.places("low_rank") if pipeline else (),
        section.weight_decay,
        section.decay,
        hidden_size=getattr(getattr(model, "config", None), "hidden_size", None),
        lr_scale=section.lr_scaler or -1.0,
    )
    return LOROAdamW(
        groups,
        **section.loro_options(),
        eigh=batched_eigh,
        share=partial(shared_out, processes) if processes and processes.world_size > 1 else unshared,
        **shared,
    )


def learning_rate(recipe: schema.Recipe, step: int, total_steps: int | None = None) -> float:
    """The learning rate of update `step`, counted from 0; see `Recipe.lr_multiplier`."""
    return recipe.optimizer.lr * recipe.lr_multiplier(step, total_steps)


def shared_out(
    processes: Processes, compute: Callable[[slice], tuple[Tensor, ...]], count: int
) -> tuple[Tensor, ...]:
    """An `act24.optim.loro.Share`: each process computes its part of a stack and hands it to all others.

    Parts are equally long, as a gather wants them; the last ones overlap where `count` is no multiple.
    """
    size = -(-count // processes.world_size)
    starts = [min(rank * size, count - size) for rank in range(processes.world_size)]
    mine = starts[processes.rank]
    results = []
    for part in compute(slice(mine, mine + size)):
        gathered = part.new_empty(processes.world_size * size, *part.shape[1:])
        dist.all_gather_into_tensor(gathered, part.contiguous())
        whole = part.new_empty(count, *part.shape[1:])
        for start, piece in zip(starts, gathered.split(size), strict=True):
            whole[start : start + size] = piece
        results.append(whole)
    return tuple(results)
