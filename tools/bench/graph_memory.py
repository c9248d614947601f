"""`python -m act24.tools.bench.graph_memory [RECIPE…]`, by hand on a GPU: the memory that a training step
with CUDA graphs reserves, update by update, where a micro-batch with padding comes among others.

Each recipe, 64 rows a micro-batch and two of them an update, its passes in force from the start: three
updates without padding, four whose second micro-batch is padded, as where an epoch ends, each with one behind
it that is not. Prints JSON: of every update its seconds, the graphs there are behind it, and GiB: allocated
and reserved behind it, the most reserved in it, and what of that lies in pools of graphs.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from typing import Any

import torch

from act24.recipes.load import load_recipe
from act24.recipes.schema import Recipe
from act24.tools.bench.rows import commit, needed_gpu, versions
from act24.tools.bench.step import without_start
from act24.tools.data import Batch
from act24.tools.run.build import model_config
from act24.tools.run.optimizers import build_optimizer
from act24.tools.run.processes import Processes
from act24.tools.run.step import TrainingStep
from act24.tools.run.tuning import tune_

RECIPES = ("c4/130m-dense", "c4/130m-relu2-act24")
_ROWS, _MICRO_BATCHES = 64, 2

#: Which updates have a padded micro-batch: two of its kind are launched, the others replayed.
PADDED = (False,) * 3 + (True, False) * 4


def updates_of(recipe: Recipe, device: torch.device) -> list[dict[str, Any]]:
    """What every update of `PADDED` needs; see the module."""
    train = {"batch_size": _ROWS, "total_batch_size": _ROWS * _MICRO_BATCHES}
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})
    first = max((getattr(p, "from_step", 0) for p in recipe.passes), default=0)
    processes, built = Processes(0, 1, device), without_start(recipe, device, first)
    tune_(built.pipeline, recipe, processes)
    step = TrainingStep(built.model, recipe.train, processes, built.pipeline)
    optimizer = build_optimizer(built.model, recipe.optimizer, pipeline=built.pipeline)
    ids = torch.randint(model_config(recipe).vocab_size, (_ROWS, recipe.data.max_length))
    plain = Batch(ids, ids.roll(-1, 1))
    padded = Batch(ids, plain.labels.where(torch.arange(ids.shape[1]) < ids.shape[1] // 2, -100))
    found = []
    for number, has_padding in enumerate(PADDED):
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        began = time.perf_counter()
        step([plain, padded if has_padding else plain], optimizer, first + number)
        torch.cuda.synchronize()
        found.append({"padded": has_padding, "seconds": time.perf_counter() - began, **_memory(step)})
    return found


def _memory(step: TrainingStep) -> dict[str, Any]:
    pools = {
        segment["address"]: segment["total_size"]
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment["segment_pool_id"]) != (0, 0)
    }
    sizes = {
        "allocated_gib": torch.cuda.memory_allocated(),
        "reserved_gib": torch.cuda.memory_reserved(),
        "most_reserved_gib": torch.cuda.max_memory_reserved(),
        "in_pools_of_graphs_gib": sum(pools.values()),
    }
    graphs = 0 if step._graphs is None else len(step._graphs._graphs)
    return {name: size / 2**30 for name, size in sizes.items()} | {
        "graphs": graphs,
        "not_captured": step.not_captured,
    }


def main(*recipes: str) -> None:
    """Measure the recipes, or those of `RECIPES`."""
    device, found = needed_gpu(), {}
    for name in recipes or RECIPES:
        found[name] = updates_of(load_recipe(name), device)
        gc.collect()
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    machine = {"gpu": torch.cuda.get_device_name(), "versions": versions(), "commit": commit()}
    print(json.dumps({"rows": _ROWS, "micro_batches": _MICRO_BATCHES, "recipes": found} | machine, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
