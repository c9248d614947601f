"""One side of `act24.tools.bench.beside_checkout`: a process of its own, with the PYTHONPATH of the checkout
that is measured.

It reads `{"part": …}` and says a line for each thing that happens: `"waits"` when it is about to time
something, after which it times it once for every `"turn"` that it reads (and says `"timed"`), until it reads
`"on"`; and at the end of a part the rates of its rows, one a turn. So nothing runs here while the other side
is timed. This file serves commits that do not have it: it imports act24 only where a part needs it.
"""

from __future__ import annotations

import fcntl
import gc
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

#: Recipe and rows of the whole steps.
STEPS = (
    ("c4/130m-relu2-act24", 256),
    ("c4/350m-relu2-act24", 128),
    ("c4/350m-loro-relu2-act24", 128),
    ("c4/1b-cola-relu2-act24", 64),
)

#: Steps before anything is timed, before each turn, and in it; milliseconds of calls in a benchmark's turn.
WARMUP, AGAIN, TIMED = 6, 1, 8
BUDGET = 60


class Turns(tuple[float, ...]):
    """A figure of each turn. Benchmarks divide by it, and into it, and print it as they would one number."""

    def __truediv__(self, by: float) -> Turns:
        return Turns(each / by for each in self)

    def __rtruediv__(self, what: float) -> Turns:
        return Turns(what / each for each in self)

    def __format__(self, spec: str) -> str:
        return format(statistics.median(self), spec)


class Talk:
    """The lines to and from `beside_checkout`."""

    def __init__(self) -> None:
        # What a benchmark prints goes to stderr.
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def say(self, what: Any) -> None:
        self._out.write(json.dumps(what) + "\n")
        self._out.flush()

    def heard(self) -> Iterator[Any]:
        return map(json.loads, iter(sys.stdin.readline, ""))

    def by_turns(self, time: Callable[[], float]) -> Turns:
        """Time something whenever it is this side's turn."""
        self.say("waits")
        found = []
        for word in self.heard():
            if word == "on":
                break
            found.append(time())
            self.say("timed")
        return Turns(found)


def _step(recipe_name: str, rows: int, talk: Talk) -> dict[str, Turns]:
    """Steps a second of a recipe, as `act24.tools.bench.step` makes them."""
    import torch

    from act24.recipes.load import load_recipe
    from act24.tools.bench import step as whole_step
    from act24.tools.data import Batch

    recipe = load_recipe(recipe_name)
    train = recipe.train.model_copy(update={"batch_size": rows, "total_batch_size": rows})
    recipe = recipe.model_copy(update={"train": train})
    # Its name in commits up to b800165.
    make = getattr(whole_step, "traced_side", None) or whole_step._traced  # type: ignore[attr-defined]
    step = make(recipe, torch.device("cuda", torch.cuda.current_device()))
    vocabulary, shape = whole_step.model_config(recipe).vocab_size, (rows, recipe.data.max_length)
    batches = [Batch(torch.randint(vocabulary, shape), torch.randint(vocabulary, shape)) for _ in range(4)]

    def run(number: int) -> list[float]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(number + 1)]
        marks[0].record()
        for index in range(number):
            step(batches[index % len(batches)])
            marks[index + 1].record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]

    run(WARMUP)
    seconds = talk.by_turns(lambda: statistics.median(run(AGAIN + TIMED)[AGAIN:]))
    return {f"step {recipe_name}, {rows} rows": 1 / seconds}


def _ffn(talk: Talk, kept: Path) -> dict[str, Turns]:
    """`bench ffn` at its first shape. Products run the algorithms that whoever came first measured."""
    from act24.tools.bench import ffn

    tuned: Callable[..., Any] = ffn.tuned

    def tuned_once(product: Any, _: object, device: Any) -> tuple[Any, Any]:
        with open(kept, "a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            known = dict(map(json.loads, file))
            name = str(tuple(product))
            if name not in known:
                found, times = tuned(product, lambda call: ffn.graph_milliseconds(call, 5), device)
                file.write(json.dumps([name, found]) + "\n")
                return found, times
        measured = sys.modules[type(product).__module__].Measured
        return measured(*known[name]), {}

    ffn.tuned = tuned_once  # type: ignore[assignment]
    return _rows(ffn, talk, ffn.bench_ffn, ffn.SHAPES[:1])


def _pack(talk: Talk) -> dict[str, Turns]:
    from act24.tools.bench import pack

    return _rows(pack, talk, pack.bench_pack)


def _rows(module: Any, talk: Talk, bench: Callable[..., Iterable[Any]], *arguments: Any) -> dict[str, Turns]:
    """Rates of a benchmark by row: GB/s, or calls a second; rows that count bytes are left out."""
    milliseconds = module.milliseconds
    module.milliseconds = lambda call, budget=BUDGET: talk.by_turns(
        lambda: milliseconds(call, min(budget, BUDGET))
    )
    return {
        row.name: row.ours if row.unit == "GB/s" else 1e3 / row.ours
        for row in bench(*arguments)
        if row.unit != "bytes"
    }


def parts(talk: Talk, kept: Path) -> dict[str, Callable[[], dict[str, Turns]]]:
    """What can be measured, by name; `kept` is a file for what both sides need to know."""
    steps: dict[str, Callable[[], dict[str, Turns]]] = {
        recipe: lambda recipe=recipe, rows=rows: _step(recipe, rows, talk)  # type: ignore[misc]
        for recipe, rows in STEPS
    }
    return {"pack": lambda: _pack(talk), **steps, "ffn": lambda: _ffn(talk, kept)}


def serve(talk: Talk, known: dict[str, Callable[[], dict[str, Turns]]]) -> None:
    """Measure what is asked for, until nobody asks."""
    for word in talk.heard():
        rates = known[word["part"]]()
        talk.say({name: list(turns) for name, turns in rates.items()})
        if torch := sys.modules.get("torch"):
            gc.collect()
            torch._dynamo.reset()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    line = Talk()
    serve(line, parts(line, Path(sys.argv[1])))
