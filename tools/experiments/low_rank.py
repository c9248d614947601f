"""Low-rank methods beside each other: loss at equal tokens, and speed beside hand-written modules.

    python -m act24.tools.experiments.low_rank train SHARDS OUT [--tokens 60000000] [--tuning-tokens 10000000]
    python -m act24.tools.experiments.low_rank speed OUT [--sizes 130m 350m 1b]

`train` takes the 60m recipes of the methods, their schedules shortened in proportion, to token shards written
by `act24 data prepare`. Each method gets the same tuning: short runs at half, once and twice the learning
rate of its recipe, and one long run at the best of the three. `speed` times training steps. Both write
OUT.json after every run, skip what it holds already, and write OUT.md beside it; with `--only` and
`--methods` several GPUs share the work, one process each with its CUDA_VISIBLE_DEVICES, and a last call
without them writes the whole table.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from act24.passes import Cola, Relu2FFN
from act24.recipes.load import load_recipe
from act24.recipes.schema import Data, Recipe, Tokenizer
from act24.tools.bench.step import bench_step
from act24.tools.run.train import train

#: Recipes, each with what is set in it.
METHODS: dict[str, tuple[str, ...]] = {
    "dense": ("c4/60m-dense",),
    "dense, wsd": ("c4/60m-dense", "schedule.name=wsd", "schedule.min_lr_ratio=0.0"),
    "dense, muon": ("c4/60m-dense", "optimizer.name=muon"),
    "dense, muon and wsd": ("c4/60m-muon",),
    "LORO": ("c4/60m-loro",),
    "LORO without exact updates": ("c4/60m-loro-eucl",),
    "low-rank, restarts": ("c4/60m-low-rank-restarts",),
    "CoLA": ("c4/60m-cola",),
    "LoST": ("c4/60m-lost",),
}
FACTORS = (0.5, 1.0, 2.0)  # on the recipe's learning rate
ROWS_A_STEP = 128  # a quarter of the published batch, so that few tokens still make many updates
HELDOUT_TOKENS = 1_000_000
SPEED_ROWS = {"130m": 256, "350m": 128, "1b": 64}  # of 256 tokens
SPEED_STEPS = 15
SPEED_METHODS = ("dense", "loro", "cola", "lost")


def shortened(recipe: Recipe, shards: Path, tokens: int, factor: float, seed: int) -> Recipe:
    """A 60m recipe for so many tokens of the shards: every length in steps shrinks in proportion."""
    steps = max(50, tokens // (ROWS_A_STEP * recipe.data.max_length))
    share = steps / recipe.train.steps

    def scaled(options: object, *names: str) -> dict[str, int]:
        counts = {name: getattr(options, name, 0) for name in names}
        return {
            name: round(count * share) or (1 if count > 0 else -1) for name, count in counts.items() if count
        }

    optimizer, schedule = recipe.optimizer, recipe.schedule
    return recipe.model_copy(
        update={
            "data": Data(source="shards", shards=str(shards), max_length=recipe.data.max_length),
            "tokenizer": Tokenizer(name="bpe"),
            "train": recipe.train.model_copy(
                update={
                    "steps": steps,
                    "batch_size": ROWS_A_STEP,
                    "total_batch_size": ROWS_A_STEP,
                    "seed": seed,
                }
            ),
            "optimizer": replace(
                optimizer,
                lr=optimizer.lr * factor,
                **scaled(optimizer, "exact_every", "refresh_every", "restarts"),
            ),
            "schedule": replace(
                schedule, **scaled(schedule, "warmup_steps", "restart_every", "lr_adjust_steps")
            ),
            "eval": recipe.eval.model_copy(update={"every": 0, "tokens": HELDOUT_TOKENS}),
            "checkpoint": recipe.checkpoint.model_copy(update={"every": 0}),
        }
    )


class Results:
    """Named results in a JSON file, written whenever one comes in; several processes may share it."""

    def __init__(self, out: Path) -> None:
        self._path = out.with_suffix(".json")

    def read(self) -> dict[str, Any]:
        """All that is there."""
        return json.loads(self._path.read_text()) if self._path.exists() else {}

    def of(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result under this name, made if it is not there."""
        found = self.read().get(name)
        if found is None:
            found = make()
            with open(self._path.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._path.write_text(json.dumps(self.read() | {name: found}, indent=1) + "\n")
        return found


def one_run(recipe: Recipe) -> dict[str, Any]:
    """Train, and keep the figures only."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        outcome = train(recipe, Path(folder) / "run")
    assert outcome.evaluation is not None
    return {
        "heldout_loss": outcome.evaluation.loss,
        "training_loss": outcome.loss,
        "lr": recipe.optimizer.lr,
        "tokens": outcome.tokens,
        "steps": outcome.step,
        "parameters": outcome.parameters,
        "peak_gib": outcome.peak_memory / 2**30,
        "tokens_per_second": outcome.tokens_per_second,
    }


def compare(
    shards: Path, out: Path, tokens: int, tuning_tokens: int, seeds: int, only: Sequence[str] = ()
) -> None:
    """Tune and train methods, and write their table."""
    results = Results(out)
    lines = [
        "| method | held-out loss | parameters | peak GiB | tokens/s | learning rate |",
        "|---|---|---|---|---|---|",
    ]
    for name in only or METHODS:
        reference, *overrides = METHODS[name]
        recipe = load_recipe(reference, [*overrides, "log.activation_statistics=false"])
        tuned = {}
        for factor in FACTORS:
            short = shortened(recipe, shards, tuning_tokens, factor, seed=0)
            tuned[factor] = results.of(f"{name}, tuning at {factor}", lambda r=short: one_run(r))
        best = min(tuned, key=lambda factor: tuned[factor]["heldout_loss"])
        runs = [
            results.of(f"{name}, seed {seed}", lambda r=run: one_run(r))
            for seed in range(seeds)
            for run in [shortened(recipe, shards, tokens, best, seed)]
        ]
        loss = ", ".join(f"{run['heldout_loss']:.4f}" for run in runs)
        run = runs[0]
        lines.append(
            f"| {name} | {loss} | {run['parameters'] / 1e6:.2f}M | {run['peak_gib']:.2f} | "
            f"{run['tokens_per_second']:,.0f} | {run['lr']:g} |"
        )
    _write(out, lines)


def speed(out: Path, sizes: Sequence[str], methods: Sequence[str] = SPEED_METHODS, turns: int = 2) -> None:
    """Time the methods, with SwiGLU and with relu², beside hand-written modules."""
    results = Results(out)
    lines = [
        "| | act24, tokens/s | hand-written | rate | peak GiB | hand-written |",
        "|---|---|---|---|---|---|",
    ]
    for size in sizes:
        for method in methods:
            for network in ("SwiGLU", "relu2"):
                recipe = load_recipe(f"c4/{size}-{method}", ["log.activation_statistics=false"])
                if network == "relu2":
                    recipe = recipe.model_copy(update={"passes": _with_relu2(recipe)})
                name = f"{size} {method}, {network}"
                found = results.of(
                    name, lambda r=recipe, s=size: bench_step(r, SPEED_ROWS[s], SPEED_STEPS, turns)
                )
                ours, other = found["sides"]
                lines.append(
                    f"| {name} | {ours['tokens_per_second']:,.0f} | {other['tokens_per_second']:,.0f} | "
                    f"{found['rate_ratio']:.3f} | {ours['peak_gib']:.2f} | {other['peak_gib']:.2f} |"
                )
    _write(out, lines)


def _with_relu2(recipe: Recipe) -> tuple[Any, ...]:
    """The recipe's passes behind relu2_ffn, which leaves CoLA no SiLU to drop."""
    kept = (
        Cola(attn_rank=p.attn_rank, mlp_rank=p.mlp_rank) if isinstance(p, Cola) else p for p in recipe.passes
    )
    return (Relu2FFN(), *kept)


def _write(out: Path, lines: list[str]) -> None:
    text = "\n".join(lines) + "\n"
    out.with_suffix(".md").write_text(text)
    print(text)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="low_rank", description=__doc__)
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train")
    training.add_argument("shards", type=Path)
    training.add_argument("out", type=Path)
    training.add_argument("--tokens", type=int, default=60_000_000)
    training.add_argument("--tuning-tokens", type=int, default=10_000_000)
    training.add_argument("--seeds", type=int, default=1)
    training.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS))
    training.set_defaults(run=lambda a: compare(a.shards, a.out, a.tokens, a.tuning_tokens, a.seeds, a.only))
    timing = commands.add_parser("speed")
    timing.add_argument("out", type=Path)
    timing.add_argument("--sizes", nargs="+", choices=list(SPEED_ROWS), default=list(SPEED_ROWS))
    timing.add_argument("--methods", nargs="+", choices=SPEED_METHODS, default=list(SPEED_METHODS))
    timing.add_argument("--turns", type=int, default=2, help="of each side")
    timing.set_defaults(run=lambda a: speed(a.out, a.sizes, a.methods, a.turns))
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
