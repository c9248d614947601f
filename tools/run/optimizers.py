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
from torch.optim import Optimizer

from act24.optim import OptimizerOptions, Surroundings
from act24.optim.base import unshared
from act24.passes import Pipeline
from act24.passes.state import refuse_exact_steps
from act24.recipes import schema
from act24.tools.run.batched_eigh import batched_eigh
from act24.tools.run.processes import Processes


def build_optimizer(
    model: nn.Module,
    options: OptimizerOptions,
    *,
    pipeline: Pipeline | None = None,
    processes: Processes | None = None,
) -> Optimizer:
    """The optimizer over the trainable parameters of a model.

    Args:
        pipeline: what rewrote the model; an optimizer may ask which modules a pass took.
        processes: of the run; an optimizer may share its work out over them.

    Raises:
        Act24Error: exact steps would tear 2:4 factors, or what the optimizer itself says.
    """
    if pipeline and options.exact_steps():
        refuse_exact_steps(pipeline)
    surroundings = Surroundings(
        places=pipeline.places if pipeline else lambda name: (),
        eigh=batched_eigh,
        share=partial(shared_out, processes) if processes and processes.world_size > 1 else unshared,
    )
    return options.build(model, surroundings)


def learning_rate(recipe: schema.Recipe, step: int, total_steps: int | None = None) -> float:
    """The learning rate of update `step`, counted from 0; see `Recipe.lr_multiplier`."""
    return recipe.optimizer.lr * recipe.lr_multiplier(step, total_steps)


def shared_out(
    processes: Processes, compute: Callable[[slice], tuple[Tensor, ...]], count: int
) -> tuple[Tensor, ...]:
    """An `act24.optim.base.Share`: each process computes its part of a stack and hands it to all others.

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
