"""Whole training steps with 2:4 activations beside the same model without, and beside dense SwiGLU.

    python -m act24.tools.experiments.activation24_speed OUT [--turns 2] [--only WORD ...]

Every model is built, warmed up, timed and freed in turn, all in one process, and again in the next turn.
OUT.json holds the medians of each turn as they come in, and OUT.md the comparisons. The width of 7b is timed
with 4 layers, which leave room for their optimizer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from act24.passes import Activation24
from act24.recipes.load import load_recipe
from act24.recipes.schema import Recipe
from act24.sparse24.feed_forward.options import Precision
from act24.tools.bench.rows import Row, needed_gpu, table, versions
from act24.tools.bench.step import time_recipe

_STEPS = 15


@dataclass(frozen=True)
class Size:
    """A preset's recipes, rows a step, and what is overridden."""

    family: str
    rows: int
    overrides: tuple[str, ...] = ()


_WIDE = ("model.preset=llama-7b", "model.num_hidden_layers=4", "data.max_length=2048")
_PURE = ("train.dtype=bfloat16", "optimizer.state_dtype=parameter")
SIZES = {
    "60m": Size("60m", 256),
    "130m": Size("130m", 256),
    "350m": Size("350m", 128),
    "1b": Size("1b", 64),
    "7b width": Size("1b", 8, _WIDE),
    # The bars of these two were set with everything in bfloat16, moments too.
    "1b in bfloat16": Size("1b", 64, _PURE),
    "7b width in bfloat16": Size("1b", 8, (*_WIDE, *_PURE)),
}


class Model(NamedTuple):
    """What is timed: a shipped recipe at a size, with a backward of activation24, or without that pass."""

    size: str
    recipe: str
    backward: str | None = None
    precision: Precision = "bfloat16"

    @property
    def title(self) -> str:
        """For a table."""
        sparse = {
            None: "",
            "dense": ", 2:4, exact backward",
            "split_gemm": ", 2:4",
            "sparse": ", 2:4, all sparse",
        }
        fp8 = ", fp8" if self.precision == "fp8" else ""
        return f"{self.size} {self.recipe.removesuffix('-act24')}{sparse[self.backward]}{fp8}"

    def load(self) -> Recipe:
        """The recipe, without the counting of statistics, which is the same on all sides."""
        size = SIZES[self.size]
        recipe = load_recipe(
            f"c4/{size.family}-{self.recipe}", ["log.activation_statistics=false", *size.overrides]
        )
        passes = []
        for p in recipe.passes:
            if not isinstance(p, Activation24):
                passes.append(p)
            elif self.backward:
                passes.append(Activation24(backward=self.backward, precision=self.precision))
        return recipe.model_copy(update={"passes": tuple(passes)})


class Comparison(NamedTuple):
    """Two models, and what the ratios of their rates and of their memory have to reach."""

    ours: Model
    other: Model
    rate: float | None = None
    memory: float | None = None


def _with_and_without(size: str, recipe: str, backwards: Sequence[str]) -> list[Comparison]:
    return [Comparison(Model(size, recipe, b), Model(size, recipe), rate=0.98) for b in backwards]


_WIDE_BF16, _1B_BF16 = "7b width in bfloat16", "1b in bfloat16"
COMPARISONS = [
    Comparison(Model(_WIDE_BF16, "relu2-act24", "split_gemm"), Model(_WIDE_BF16, "dense"), rate=1.12),
    Comparison(Model(_WIDE_BF16, "relu2-act24", "split_gemm", "fp8"), Model(_WIDE_BF16, "dense"), rate=1.12),
    Comparison(
        Model(_1B_BF16, "cola-relu2-act24", "split_gemm"), Model(_1B_BF16, "dense"), rate=1.95, memory=0.80
    ),
    Comparison(Model("7b width", "relu2-act24", "split_gemm"), Model("7b width", "dense"), rate=1.12),
    Comparison(Model("7b width", "relu2-act24", "split_gemm", "fp8"), Model("7b width", "dense"), rate=1.12),
    Comparison(Model("1b", "cola-relu2-act24", "split_gemm"), Model("1b", "dense"), rate=1.95, memory=0.80),
    *_with_and_without(_WIDE_BF16, "relu2-act24", ("split_gemm",)),
    *_with_and_without("60m", "relu2-act24", ("dense",)),
    *_with_and_without("130m", "relu2-act24", ("split_gemm", "dense")),
    *_with_and_without("350m", "relu2-act24", ("split_gemm", "dense")),
    *_with_and_without("1b", "relu2-act24", ("split_gemm",)),
    *_with_and_without("7b width", "relu2-act24", ("split_gemm",)),
    *_with_and_without("1b", "cola-relu2-act24", ("split_gemm",)),
    *(
        comparison
        for method in ("loro", "cola", "lost")
        for size in ("60m", "130m", "350m", "1b")
        for comparison in _with_and_without(size, f"{method}-relu2-act24", ("dense",))
    ),
]


def run(out: Path, turns: int, only: Sequence[str], minutes: float) -> None:
    """Time what is not in OUT.json yet, and write the table of what is there."""
    needed_gpu()
    path = out.with_suffix(".json")
    found: dict[str, list[dict[str, float]]] = {}
    if path.exists():
        found = json.loads(path.read_text())["models"]
    began = time.monotonic()
    chosen = [c for c in COMPARISONS if not only or any(word in c.ours.title for word in only)]
    for turn in range(turns):
        for model in dict.fromkeys(side for c in chosen for side in (c.other, c.ours)):
            taken = found.setdefault(model.title, [])
            if len(taken) > turn or time.monotonic() - began > 60 * minutes:
                continue
            recipe = model.load()
            seconds, peak = time_recipe(recipe, SIZES[model.size].rows, _STEPS)
            tokens = SIZES[model.size].rows * recipe.data.max_length
            taken.append(
                {"milliseconds": 1e3 * seconds, "tokens_per_second": tokens / seconds, "peak_gib": peak}
            )
            print(f"{model.title}: {taken[-1]}", flush=True)
            path.write_text(json.dumps({"models": found, "versions": versions()}, indent=1) + "\n")
    text = table(_rows(found)) + "\n"
    out.with_suffix(".md").write_text(text)
    print(text)


def _rows(found: dict[str, list[dict[str, float]]]) -> list[Row]:
    def median(model: Model, key: str) -> float:
        return statistics.median(turn[key] for turn in found[model.title])

    rows = []
    for ours, other, rate, memory in COMPARISONS:
        if not (found.get(ours.title) and found.get(other.title)):
            continue
        name = f"step, {ours.title} / {other.title}"
        for key, unit, bar in (("milliseconds", "ms", rate), ("peak_gib", "bytes", memory)):
            sides = [median(model, key) * (2**30 if unit == "bytes" else 1) for model in (ours, other)]
            rows.append(Row(name, *sides, unit, bar))
    return rows


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="activation24_speed", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="in the name of our side")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no model after so many")
    arguments = parser.parse_args()
    run(arguments.out, arguments.turns, arguments.only, arguments.minutes)


if __name__ == "__main__":
    main()
