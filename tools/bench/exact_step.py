"""What LORO's exact update adds to a training step, and what its eigendecompositions take.

    python -m act24.tools.bench.exact_step [RECIPE ...] > exact.md

Default: c4/130m-loro, whose bar is an exact step of at most twice a lazy one (the public script: 3.5 to 11
times). Steps are whole ones, of `train.total_batch_size` rows, on random tokens.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections import Counter
from dataclasses import replace

import torch

from act24.low_rank.exact_step import Eigh
from act24.optim import LOROAdamW
from act24.recipes.load import load_recipe
from act24.recipes.schema import Recipe
from act24.tools.bench.rows import Row, milliseconds, needed_gpu, table
from act24.tools.data import Batch
from act24.tools.run.batched_eigh import batched_eigh, describe_eigh
from act24.tools.run.build import build
from act24.tools.run.optimizers import build_optimizer
from act24.tools.run.processes import Processes
from act24.tools.run.step import TrainingStep

_PERIOD = 4  # updates from one exact one to the next; the first period is warm-up
_PERIODS = 4
_ROWS = 128  # of a micro-batch


def bench_exact_step(reference: str) -> list[Row]:
    """An exact training step beside a lazy one, with cuSOLVER's batches and with PyTorch's loop."""
    device = needed_gpu()
    recipe = load_recipe(reference, ["log.activation_statistics=false", f"train.batch_size={_ROWS}"])
    rows = []
    for name, eigh, bar in (
        (describe_eigh(device), batched_eigh, 0.5),
        ("torch.linalg.eigh", torch.linalg.eigh, None),
    ):
        lazy, exact, stacks, guarded = _steps(recipe, eigh, device)
        note = f"lazy step; {name}; {guarded:.0f} modules refused"
        rows.append(Row(f"{reference}, exact step, {name}", exact, lazy, "ms", bar, note))
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    rows += [_decompositions(count, size, device) for (size, count) in sorted(stacks.items())]
    return rows


def _steps(recipe: Recipe, eigh: Eigh, device: torch.device) -> tuple[float, float, Counter[int], float]:
    """Median milliseconds of a lazy and an exact step, how many products of which 2 R there are, and how many
    exact updates were refused."""
    options = replace(recipe.optimizer, exact_every=_PERIOD)
    built = build(recipe, device)
    step = TrainingStep(built.model, recipe.train, Processes(0, 1, device))
    optimizer = build_optimizer(built.model, options, pipeline=built.pipeline)
    assert isinstance(optimizer, LOROAdamW)
    optimizer._eigh = eigh
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * options.lr  # where the warm-up begins
    vocabulary, length = built.model.config.vocab_size, recipe.data.max_length
    batches = [
        Batch(torch.randint(vocabulary, (_ROWS, length)), torch.randint(vocabulary, (_ROWS, length)))
        for _ in range(recipe.train.total_batch_size // _ROWS)
    ]
    count = _PERIOD * _PERIODS
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for index in range(count):
        step(batches, optimizer)
        marks[index + 1].record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    exact = times[2 * _PERIOD - 1 :: _PERIOD]
    lazy = [t for i, t in enumerate(times) if i >= _PERIOD and i % _PERIOD != _PERIOD - 1]
    places = [built.model.get_submodule(name) for name in built.pipeline.places("low_rank")]
    stacks = Counter(2 * place.get_parameter("weight_in").shape[0] for place in places)
    guarded = optimizer.diagnostics_()["guarded"].item()
    return statistics.median(lazy), statistics.median(exact), stacks, guarded


def _decompositions(count: int, size: int, device: torch.device) -> Row:
    """As many matrices of 2 R × 2 R as the model has products, at once."""
    matrices = torch.randn(count, size, size, dtype=torch.float64, device=device)
    matrices = matrices @ matrices.mT
    ours, other = (milliseconds(lambda e=e: e(matrices), 300) for e in (batched_eigh, torch.linalg.eigh))
    return Row(f"eigendecomposition of {count} × {size} × {size}, float64", ours, other, "ms", None, "torch")


def main() -> None:
    """Print a table for the recipes named on the command line."""
    for reference in sys.argv[1:] or ["c4/130m-loro"]:
        print(table(bench_exact_step(reference)), flush=True)


if __name__ == "__main__":
    main()
