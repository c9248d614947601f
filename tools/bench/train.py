"""`act24 bench train`: the training loop as a user runs it, recipes side by side in one run.

What is timed is `TrainingRun`, the loop of `act24 train`: batches from token shards, accumulation to the
recipe's own total batch, statistics, logging to TensorBoard, each window ended by a read from the device.
Left out are what a run does seldom: evaluation, checkpoints, and the start values of the weights, which are
drawn at random. Passes are in force from the first step.

Sides are built, warmed up for a window, timed and freed in turn, as often as there are turns; a rate is the
median over the turns. The text is Python's standard library, tokenised once for all sides, and as often over
as a turn is long: an epoch ends once in days elsewhere, and CUDA graphs are captured again then.
"""

from __future__ import annotations

import gc
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from act24.errors import Act24Error
from act24.passes import OperationalPass
from act24.recipes.schema import Data, Recipe, Tokenizer
from act24.tools.bench.loop_timing import LoopTiming
from act24.tools.bench.step import without_start
from act24.tools.data import documents, open_tokenizer, prepare_shards
from act24.tools.run.build import SPARSE_PASSES, model_config
from act24.tools.run.processes import Processes, open_processes
from act24.tools.run.progress import run_progress
from act24.tools.run.signals import StopRequest
from act24.tools.run.step import accumulation
from act24.tools.run.train import TrainingRun

#: A token of the text has no more characters than this, on average.
_CHARACTERS = 8


def bench_train(
    recipes: Mapping[str, Recipe],
    rows: Sequence[int],
    steps: int = 20,
    turns: int = 2,
    transformers: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time the training loop of recipes, at every number of rows a micro-batch.

    Args:
        recipes: by name. Each keeps its rows a step, rounded to whole micro-batches.
        rows: rows a micro-batch.
        steps: timed steps a turn.
        transformers: one more side, the LLaMA of `transformers` of the first recipe's size.
        say: is told each timing.

    Returns:
        JSON values: the sides in order, machine, versions and commit.

    Raises:
        Act24Error: no GPU, or recipes of different sequence lengths.
    """
    if not torch.cuda.is_available():
        raise Act24Error("bench train times a GPU, and there is none here")
    if len({recipe.data.max_length for recipe in recipes.values()}) > 1:
        raise Act24Error("bench train compares recipes of one data.max_length")
    found: list[LoopTiming] = []
    with tempfile.TemporaryDirectory() as folder, open_processes() as processes:
        if processes.world_size > 1:
            raise Act24Error("bench train is for one process")
        vocabulary = min(model_config(recipe).vocab_size for recipe in recipes.values())
        longest = max(_tokens(recipe, number, steps) for recipe in recipes.values() for number in rows)
        shards = _shards(Path(folder), vocabulary, longest)
        for number in rows:
            sides: dict[str, Callable[[], LoopTiming]] = {
                name: lambda n=name, r=recipe, b=number: _time_recipe(n, r, b, steps, shards, processes)
                for name, recipe in recipes.items()
            }
            if transformers:
                from act24.tools.bench.transformers_loop import time_transformers

                first = prepared(next(iter(recipes.values())), number, steps, shards)
                sides["transformers"] = lambda r=first: time_transformers(r, steps, processes)
            taken: dict[str, list[LoopTiming]] = {name: [] for name in sides}
            for _ in range(turns):
                for name, time_side in sides.items():
                    taken[name].append(time_side())
                    _free()
                    say(f"{name}, {number} rows: {taken[name][-1].rate:,.0f} tokens/s")
            found += [_together(timings) for timings in taken.values()]
    first_of = {timing.rows: timing.rate for timing in reversed(found)}
    return {
        "sides": [
            asdict(timing) | {"rate": timing.rate, "ratio": timing.rate / first_of[timing.rows]}
            for timing in found
        ],
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": commit(),
        "steps": steps,
        "turns": turns,
    }


def row_numbers(text: str, option: str = "--rows") -> list[int]:
    """`"32,64"` as numbers of rows, or what else an option counts.

    Raises:
        Act24Error: it is something else.
    """
    numbers = [int(number) if number.isdecimal() else 0 for number in text.split(",")]
    if min(numbers) < 1:
        raise Act24Error(f"{option} takes whole numbers of at least 1, separated by commas, not {text!r}")
    return numbers


def with_dense_sides(recipes: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """Each recipe behind the same one without its 2:4 passes, to which ratios then are where it is alone."""
    sides = {}
    for name, recipe in recipes.items():
        dense = tuple(p for p in recipe.passes if p.name not in SPARSE_PASSES)
        if dense != recipe.passes:
            sides[f"{name} without 2:4"] = recipe.model_copy(update={"passes": dense})
        sides[name] = recipe
    return sides


def prepared(recipe: Recipe, rows: int, steps: int, shards: Path) -> Recipe:
    """A recipe with so many rows a micro-batch, on the shards, its passes in force from the start."""
    every = min(recipe.log.every, max(1, steps // 2))
    total = max(1, round(recipe.train.total_batch_size / rows)) * rows
    return recipe.model_copy(
        update={
            "tokenizer": Tokenizer(),  # that of the shards
            "data": recipe.data.model_copy(update={"source": "shards", "shards": str(shards)}),
            "train": recipe.train.model_copy(
                update={
                    "batch_size": rows,
                    "total_batch_size": total,
                    "steps": max(recipe.train.steps, 10 * steps),
                }
            ),
            "log": recipe.log.model_copy(update={"every": every}),
            "eval": recipe.eval.model_copy(update={"every": 0, "tokens": 1}),
            "checkpoint": recipe.checkpoint.model_copy(update={"every": 0}),
            "passes": tuple(
                replace(p, from_step=0, until_step=None) if isinstance(p, OperationalPass) else p
                for p in recipe.passes
            ),
        }
    )


def _time_recipe(
    name: str, recipe: Recipe, rows: int, steps: int, shards: Path, processes: Processes
) -> LoopTiming:
    recipe = prepared(recipe, rows, steps, shards)
    every, count = recipe.log.every, accumulation(recipe.train, 1)
    with tempfile.TemporaryDirectory() as folder, run_progress(0, steps, False) as progress:
        never = StopRequest()
        run_dir = Path(folder) / "run"
        run_dir.mkdir()
        run = TrainingRun(recipe, run_dir, processes, None, make=without_start)
        try:
            begin = time.perf_counter()
            for _ in range(every):
                run.advance()
                run.after_step(progress, never, stopped=False, ends=False)
            begin = time.perf_counter() - begin
            tokens, seconds = run.monitor.tokens, run.monitor.seconds
            for _ in range(_timed(recipe, steps)):
                run.advance()
                run.after_step(progress, never, stopped=False, ends=False)
            rate = (run.monitor.tokens - tokens) / (run.monitor.seconds - seconds)
            return LoopTiming(
                name,
                rows,
                count,
                recipe.train.total_batch_size * recipe.data.max_length,
                (rate,),
                begin - tokens / rate,
                torch.cuda.max_memory_allocated() / 2**30,
                torch.cuda.max_memory_reserved() / 2**30,
                not run.training_step.not_captured,
                recipe.log.activation_statistics,
            )
        finally:
            run.close(None, failed=False)


def _together(timings: Sequence[LoopTiming]) -> LoopTiming:
    """The turns of one side as one timing; what it costs to begin is that of the first turn."""
    rates = tuple(timing.tokens_per_second[0] for timing in timings)
    return replace(timings[0], tokens_per_second=rates)


def _tokens(recipe: Recipe, rows: int, steps: int) -> int:
    """More than a turn of a recipe reads."""
    recipe = prepared(recipe, rows, steps, Path())
    updates = recipe.log.every + _timed(recipe, steps)
    return (updates + 1) * recipe.train.total_batch_size * (recipe.data.max_length + 1)


def _timed(recipe: Recipe, steps: int) -> int:
    """Steps that are timed: whole windows, so that what is measured ends with the read from the device that
    ends a window."""
    return -(-steps // recipe.log.every) * recipe.log.every


def _shards(folder: Path, vocab_size: int, tokens: int) -> Path:
    """Shards of at least so many tokens."""
    tokenizer = open_tokenizer(Data(source="builtin"), Tokenizer(vocab_size=vocab_size))
    text = [path.read_text(encoding="utf-8", errors="replace") for path in documents.builtin_files()]
    for number in range(-(-tokens * _CHARACTERS // sum(map(len, text)))):
        with open(folder / f"{number}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": document}) + "\n" for document in text)
    data = Data(source="files", train_files=(str(folder / "*.jsonl"),))
    prepare_shards(data, tokenizer, folder / "shards", max_tokens=tokens, max_heldout_tokens=2000)
    return folder / "shards"


def _free() -> None:
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def commit() -> str:
    """The commit of this checkout, marked where files differ from it; "unknown" where it is none."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
