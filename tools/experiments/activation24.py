"""2:4 activations beside dense training, and every part of the recipe taken away in turn.

    python -m act24.tools.experiments.activation24 run SHARDS OUT [--tokens 100000000] [--gpus 4] [--each 2]
    python -m act24.tools.experiments.activation24 report OUT

`run` trains the 130m variants below on token shards (`act24 data prepare`), all with the same tokens,
batches, learning rate and schedule, and writes OUT/<variant>-seed<k>.json as each ends;
what is there already is not run again. `report` makes OUT/results.md of them, and pictures where matplotlib
is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from act24.errors import Act24Error
from act24.recipes.load import parse_recipe
from act24.recipes.records import toml_value
from act24.recipes.schema import Recipe
from act24.tools.experiments.activation24_report import file_stem, write_report
from act24.tools.files import whole_file

WARMUP_SHARE = 0.1  # of the steps: of the learning rate, and of 2:4
DENSE_FINISH_SHARE = 1 / 6  # of transposable weights, as published


@dataclass(frozen=True)
class Variant:
    """One line of the table.

    Attributes:
        passes: tables of the recipe, as TOML values; `from_step` and `until_step` as shares of all steps.
        forgetful: with the backward that no recipe can name.
    """

    passes: tuple[dict[str, Any], ...]
    forgetful: bool = False


_RELU2 = {"use": "relu2_ffn"}


def _sparse(**options: Any) -> tuple[dict[str, Any], ...]:
    recipe = {"use": "activation24", "backward": "split_gemm", "from_step": WARMUP_SHARE}
    return (_RELU2, recipe | options)


def _weights(**options: Any) -> tuple[dict[str, Any], ...]:
    return ({"use": "weight24", "scope": "mlp", **options},)


VARIANTS: dict[str, Variant] = {
    "dense SwiGLU": Variant(()),
    "dense relu2": Variant((_RELU2,)),
    "full recipe": Variant(_sparse()),
    "no warm-up": Variant(_sparse(from_step=0)),
    "all-sparse backward": Variant(_sparse(backward="sparse")),
    "no permutation": Variant(_sparse(token_permutation="none")),
    "forward mask not reused": Variant(_sparse(), forgetful=True),
    "soft_dynamic": Variant(_sparse(method="soft_dynamic")),
    "soft_threshold_weights": Variant(_sparse(method="soft_threshold_weights")),
    "soft_threshold_weights, scale from output": Variant(
        _sparse(method="soft_threshold_weights", scale_from="output")
    ),
    "mvue": Variant(_sparse(method="mvue")),
    "fp8 in all products": Variant(_sparse(precision="fp8")),
    "fp8 everywhere, 2:4": Variant((*_sparse(), {"use": "fp8", "head": True})),
    "dense backward, masked": Variant(_sparse(backward="dense")),
    "dense backward, straight-through": Variant(_sparse(backward="dense", estimator="ste")),
    "weight24 transposable": Variant(_weights(method="transposable", until_step=1 - DENSE_FINISH_SHARE)),
    "weight24 soft_threshold": Variant(_weights(method="soft_threshold")),
    "weight24 ste": Variant(_weights(method="ste")),
    "weight24 sr_ste": Variant(_weights(method="sr_ste")),
}


def recipe_of(
    variant: Variant, shards: Path, tokens: int, rows: int, seed: int, overrides: Sequence[str] = ()
) -> Recipe:
    """The recipe of a variant: `tokens` of the shards in steps of `rows` rows."""
    steps = max(12, tokens // (rows * 256))
    lines = [
        'extends = "c4/130m-dense"',
        "[tokenizer]",
        'name = "bpe"',
        "[data]",
        'source = "shards"',
        f"shards = {toml_value(str(shards))}",
        "[train]",
        f"steps = {steps}",
        f"batch_size = {rows}",
        f"total_batch_size = {rows}",
        f"seed = {seed}",
        "[schedule]",
        f"warmup_steps = {round(WARMUP_SHARE * steps)}",
        "[eval]",
        "every = 0",
        "tokens = 2_000_000",
        "[checkpoint]",
        "every = 0",
        "keep = 1",
        "[log]",
        f"gradient_cosine_every = {max(steps // 10, 1)}",
        "weight_sparsity_every = 0",
    ]
    for options in variant.passes:
        counted = {
            key: round(value * steps) if key in ("from_step", "until_step") else value
            for key, value in options.items()
        }
        lines += ["[[passes]]", *(f"{key} = {toml_value(value)}" for key, value in counted.items())]
    recipe = parse_recipe("\n".join(lines), "the experiment", overrides)
    if not variant.forgetful:
        return recipe
    from act24.tools.experiments.forward_mask_not_reused import ForwardMaskNotReused

    forgetful = ForwardMaskNotReused(from_step=round(WARMUP_SHARE * recipe.train.steps))
    return recipe.model_copy(update={"passes": (recipe.passes[0], forgetful)})


def train_one(recipe: Recipe, forms: bool) -> dict[str, Any]:
    """Train; the figures and curves of the run, also where it diverges.

    Args:
        forms: evaluate dense and in 2:4 too.
    """
    from act24.tools.run.evaluate import evaluate_checkpoint
    from act24.tools.run.train import TrainingError, train

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        result: dict[str, Any] = {"steps": recipe.train.steps}
        try:
            outcome = train(recipe, run)
        except TrainingError as error:
            result["diverged"] = str(error)
        else:
            assert outcome.evaluation is not None
            result |= {
                "heldout_loss": outcome.evaluation.loss,
                "training_loss": outcome.loss,
                "tokens": outcome.tokens,
                "parameters": outcome.parameters,
                "tokens_per_second": outcome.tokens_per_second,
                "peak_gib": outcome.peak_memory / 2**30,
            }
            if recipe.passes and forms:
                evaluations = evaluate_checkpoint(run)
                result["forms"] = {form: evaluation.loss for form, evaluation in evaluations.items()}
        result["curves"] = dict(_curves(run))
    return result | {"seconds": time.perf_counter() - began}


def _curves(run: Path) -> Iterator[tuple[str, list[tuple[int, float]]]]:
    """What is plotted: the losses, and by layer the zeros, what is dropped, scales and cosines."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    groups = r"loss|sparsity_(relu|dropped_energy|feature_dropped_energy|scale|gradient_cosine)"
    for tag in events.Tags()["scalars"]:
        if re.match(rf"({groups}|flip_rate)/", tag) and "max_across" not in tag and "min_across" not in tag:
            yield tag, [(point.step, round(point.value, 6)) for point in events.Scalars(tag)]


def result_file(out: Path, name: str, seed: int) -> Path:
    """Where the result of a run is kept."""
    return out / f"{file_stem(name)}-seed{seed}.json"


def run_all(arguments: argparse.Namespace) -> None:
    """Work off the runs, one process each; no new one begins that would likely not end in time."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    names = arguments.only or list(VARIANTS)
    queue = [
        (name, seed)
        for seed in range(arguments.seeds)
        for name in names
        if not result_file(arguments.out, name, seed).exists()
    ]
    began, longest = time.monotonic(), 0.0
    working: dict[int, tuple[subprocess.Popen[bytes], float, str]] = {}
    while queue or working:
        for slot in range(arguments.gpus * arguments.each):
            if slot in working:
                process, since, label = working[slot]
                if process.poll() is None:
                    continue
                longest = max(longest, time.monotonic() - since)
                print(f"{label}: {'done' if process.returncode == 0 else 'FAILED'}", flush=True)
                del working[slot]
            in_time = time.monotonic() - began + longest < 60 * arguments.minutes
            if queue and in_time:
                name, seed = queue.pop(0)
                working[slot] = (
                    _start(arguments, name, seed, slot),
                    time.monotonic(),
                    f"{name}, seed {seed}",
                )
            elif queue and not working:
                print(f"{len(queue)} runs are left: call again with more time", flush=True)
                queue.clear()
        time.sleep(0.2)
    write_report(arguments.out, list(VARIANTS))


def _start(arguments: argparse.Namespace, name: str, seed: int, slot: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "act24.tools.experiments.activation24", "one"]
    command += [str(arguments.shards), str(arguments.out), name, str(seed)]
    command += ["--tokens", str(arguments.tokens), "--rows", str(arguments.rows)]
    command += ["--skip-forms"] * arguments.skip_forms
    command += [word for override in arguments.set for word in ("--set", override)]
    log = result_file(arguments.out, name, seed).with_suffix(".log").open("wb")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(index) for index in range(arguments.gpus)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": devices[slot % arguments.gpus]}
    return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def run_one(arguments: argparse.Namespace) -> None:
    """One run, in a process of its own."""
    variant = VARIANTS[arguments.name]
    recipe = recipe_of(
        variant, arguments.shards, arguments.tokens, arguments.rows, arguments.seed, arguments.set
    )
    # No recipe opens the checkpoint of a forgetful one.
    result = train_one(recipe, forms=not (variant.forgetful or arguments.skip_forms))
    target = result_file(arguments.out, arguments.name, arguments.seed)
    with whole_file(target) as partial:
        partial.write_text(json.dumps({"name": arguments.name, "seed": arguments.seed} | result) + "\n")


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="activation24", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    commands = parser.add_subparsers(required=True)
    for name, function in (("run", run_all), ("one", run_one)):
        command = commands.add_parser(name)
        command.add_argument("shards", type=Path)
        command.add_argument("out", type=Path)
        if name == "one":
            command.add_argument("name", choices=list(VARIANTS))
            command.add_argument("seed", type=int)
        command.add_argument("--tokens", type=int, default=100_000_000, help="a run")
        command.add_argument("--rows", type=int, default=256, help="a step, of 256 tokens")
        command.add_argument("--skip-forms", action="store_true", help="do not evaluate dense and in 2:4")
        command.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="for every recipe"
        )
        if name == "run":
            command.add_argument("--gpus", type=int, default=1)
            command.add_argument("--each", type=int, default=1, help="runs at a time on a GPU, taking turns")
            command.add_argument("--seeds", type=int, default=2, help="runs of each")
            command.add_argument("--minutes", type=float, default=1e9)
            command.add_argument("--only", nargs="+", choices=list(VARIANTS))
        command.set_defaults(run=function)
    report = commands.add_parser("report")
    report.add_argument("out", type=Path)
    report.set_defaults(run=lambda arguments: write_report(arguments.out, list(VARIANTS)))
    arguments = parser.parse_args(words)
    try:
        arguments.run(arguments)
    except Act24Error as error:
        sys.exit(f"activation24: {error}")


if __name__ == "__main__":
    main()
