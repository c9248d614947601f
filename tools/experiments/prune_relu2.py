"""Train a relu² model, prune it 2:4, and win its accuracy back with each recipe for as long, on a GPU.

    python -m act24.tools.experiments.prune_relu2 WORK REPORT.md                   about 7 minutes on an H200
    python -m act24.tools.experiments.prune_relu2 WORK REPORT.md --seconds 300     five minutes a recipe
    python -m act24.tools.experiments.prune_relu2 WORK REPORT.md --jobs 8          several at once on one GPU
    python -m act24.tools.experiments.prune_relu2 WORK REPORT.md --shards SHARDS   on text of `data prepare`

The dense model is trained on for as many updates as each recipe makes: what pruning costs is the distance to
it, and not to the model before. With activations 2:4 beside the weights, both are measured. The text is the
built-in one, so that a machine without a network will do, or token shards (those of `debian_text.py`, say):
five minutes read the built-in text some fifty times. Finished steps are kept in WORK.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from act24.errors import Act24Error
from act24.recipes.load import load_recipe
from act24.recipes.schema import Data
from act24.tools.commands.recovery import calibration_data
from act24.tools.pruning.blockwise import recover_blockwise
from act24.tools.pruning.folder import prune_model
from act24.tools.run.processes import chosen_device
from act24.tools.run.train import train

_RECIPE = """
[model]
{model}
[tokenizer]
{tokenizer}
[data]
{data}
max_length = 256
[train]
steps = {steps}
batch_size = {rows}
total_batch_size = {rows}
[optimizer]
lr = {lr}
[schedule]
warmup_steps = {warmup}
[eval]
every = 0
tokens = {heldout}
[checkpoint]
every = 0
[log]
every = 50
activation_statistics = false
{passes}
"""

#: What goes on from where, by row of the table: the passes behind relu2_ffn, and the learning rate.
BRANCHES: dict[str, tuple[str, tuple[str, ...], float]] = {
    "dense, trained on": ("dense", (), 5e-4),
    "dense, trained on with 2:4 activations": ("dense", ("activation24",), 5e-4),
    "masked dense training": ("wanda", ("sparse_mask",), 5e-4),
    "masked dense training with 2:4 activations": ("wanda", ("sparse_mask", "activation24"), 5e-4),
    "lora": ("wanda", ("lora",), 1e-3),
    "masked_lora": ("wanda", ("masked_lora",), 1e-3),
}


METHODS = ("magnitude", "wanda", "sparsegpt")

#: What makes a folder and says of it what the table has.
Step = Callable[[Path], dict[str, float]]


@dataclass(frozen=True)
class Budget:
    """What is trained and measured.

    Attributes:
        preset: of the stock model.
        steps: updates of the dense model.
        rows: of 256 tokens, an update.
        seconds: of each recipe, without compiling.
        samples: calibration rows.
        heldout: tokens of evaluation.
        jobs: steps that run at once, each in a process of its own.
        shards: token shards that are read; None for the built-in text, with a vocabulary of 4,096.
    """

    preset: str
    steps: int
    rows: int
    seconds: float
    samples: int
    heldout: int
    jobs: int
    shards: Path | None = None

    @property
    def data(self) -> tuple[str, ...]:
        """Keys of `[data]`."""
        return (
            ('source = "builtin"',)
            if self.shards is None
            else ('source = "shards"', f'shards = "{self.shards.absolute()}"')
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("work", type=Path)
    parser.add_argument("report", type=Path)
    parser.add_argument("--preset", default="llama-60m")
    parser.add_argument("--steps", type=int, default=1500, help="updates of the dense model")
    parser.add_argument("--rows", type=int, default=64, help="of 256 tokens, an update")
    parser.add_argument("--seconds", type=float, default=30, help="of each recipe, without compiling")
    parser.add_argument("--samples", type=int, default=128, help="calibration rows of 256 tokens")
    parser.add_argument("--heldout", type=int, default=400_000, help="tokens of evaluation")
    parser.add_argument("--jobs", type=int, default=1, help="methods and recipes at once, on the same device")
    parser.add_argument("--shards", type=Path, help="of `act24 data prepare`; default: the built-in text")
    given = vars(parser.parse_args())
    run(given.pop("work"), given.pop("report"), Budget(**given))


def run(work: Path, report: Path, budget: Budget) -> None:
    """All steps that are not finished, and the report after each."""
    work.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, float]] = {}
    data = calibration_data("builtin", [f"data.{key}" for key in budget.data])
    model, tokenizer = f'preset = "{budget.preset}"', 'name = "bpe"'
    if budget.shards is None:
        model, tokenizer = f"{model}\nvocab_size = 4096", "vocab_size = 4096"

    def make(steps: dict[str, Step]) -> None:
        """Run what has no result yet, and write the report after each."""
        with _workers(budget.jobs) as workers:
            running = {workers.submit(_finish, of, work, name): name for name, of in steps.items()}
            for done in as_completed(running):
                print(running[done], done.result(), flush=True)
                finished = {name: _result(work, name) for name in steps if _result(work, name).is_file()}
                found.update(
                    (n, json.loads(file.read_text(encoding="utf-8"))) for n, file in finished.items()
                )
                report.write_text(_report(found, budget), encoding="utf-8")

    base = _text(model, tokenizer, ("relu2_ffn",), budget.steps, 1e-3, budget)
    make({"dense": partial(_trained, base)})
    dense = str(_folder(work, "dense"))
    updates = max(1, int(budget.seconds * found["dense"]["updates_per_second"]))
    make({f"{m} 2:4": partial(_pruned, dense, method=m, data=data, budget=budget) for m in METHODS})
    pruned = _folder(work, "wanda 2:4")
    steps: dict[str, Step] = {
        "blockwise": partial(_blockwise, str(pruned), dense, data=data, budget=budget),
    }
    for name, (source, passes, lr) in BRANCHES.items():
        start = pruned if source == "wanda" else Path(dense)
        steps[name] = partial(_trained, _branch(start, pruned, passes, updates, lr, budget))
    make(steps)


def _folder(work: Path, name: str) -> Path:
    return work / name.replace(" ", "-").replace(":", "of")


def _result(work: Path, name: str) -> Path:
    return work / f"{name}.json"


def _finish(make: Step, work: Path, name: str) -> dict[str, float]:
    """A step's result, from a process of its own, or from where an earlier run has left it."""
    if (result := _result(work, name)).is_file():
        return json.loads(result.read_text(encoding="utf-8"))
    began = time.perf_counter()
    content = make(_folder(work, name))
    content.setdefault("seconds", time.perf_counter() - began)
    result.write_text(json.dumps(content), encoding="utf-8")
    return content


def _workers(jobs: int) -> ProcessPoolExecutor:
    """Processes that begin anew: a GPU cannot be taken into a fork."""
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))


def _text(model: str, tokenizer: str, passes: tuple[str, ...], steps: int, lr: float, budget: Budget) -> str:
    """A recipe."""
    tables = "".join(f'[[passes]]\nuse = "{name}"\n' for name in passes)
    return _RECIPE.format(
        model=model, tokenizer=tokenizer, steps=steps, rows=budget.rows, lr=lr, warmup=steps // 20,
        heldout=budget.heldout, passes=tables, data="\n".join(budget.data),
    )  # fmt: skip


def _branch(
    source: Path, folder: Path, passes: tuple[str, ...], steps: int, lr: float, budget: Budget
) -> str:
    """What goes on from the dense run, or from a pruned folder, whose MLPs keep the width they have; with
    the tokenizer of such a folder."""
    relu2 = "relu2_ffn" if source.name == "dense" else 'relu2_ffn"\nwidth = "keep'
    passes = (relu2, *passes)
    return _text(f'pretrained = "{source}"', f'name = "{folder}/tokenizer.json"', passes, steps, lr, budget)


def _trained(recipe: str, out: Path) -> dict[str, float]:
    file = out.with_suffix(".toml")
    file.write_text(recipe, encoding="utf-8")
    made = load_recipe(str(file))
    outcome = train(made, out, resume="auto")
    if outcome.evaluation is None:
        raise Act24Error(f"{out} was stopped by {outcome.stopped}: the same command goes on with it")
    tokens = made.train.total_batch_size * made.data.max_length
    speed = outcome.tokens_per_second / tokens
    return {
        "loss": outcome.evaluation.loss,
        "updates": float(made.train.steps),
        "updates_per_second": speed,
        "seconds": made.train.steps / speed if speed else float("nan"),
    }


def _pruned(source: str, out: Path, *, method: str, data: Data, budget: Budget) -> dict[str, float]:
    if not out.exists():
        options: dict[str, Any] = {
            "samples": budget.samples,
            "seqlen": 256,
            "device": str(chosen_device(None)),
        }
        prune_model(source, out, method=method, pattern="2:4", data=data, **options)
    return {"loss": _evaluated(out, budget)}


def _blockwise(pruned: str, dense: str, out: Path, *, data: Data, budget: Budget) -> dict[str, float]:
    began = time.perf_counter()
    if not out.exists():
        options: dict[str, Any] = {
            "samples": budget.samples,
            "seqlen": 256,
            "device": str(chosen_device(None)),
        }
        recover_blockwise(pruned, out, data=data, dense=dense, **options)
    seconds = time.perf_counter() - began
    return {"loss": _evaluated(out, budget), "seconds": seconds}


def _evaluated(folder: Path, budget: Budget) -> float:
    """Held-out loss as training measures it: of one update with a learning rate of nothing."""
    text = _branch(folder, folder, (), 1, 1e-30, budget)
    return _trained(text, folder.with_name(f"{folder.name}-evaluated"))["loss"]


def _report(found: dict[str, dict[str, float]], budget: Budget) -> str:
    """Held-out losses, and the distance of each to the dense model that was trained for as long."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    reached = found.get("dense, trained on", {}).get("loss")
    text = "built-in text" if budget.shards is None else "token shards"
    lines = [
        f"# A relu² {budget.preset}, pruned 2:4 and recovered",
        "",
        f"Written by `tools/experiments/prune_relu2.py` on {device}; {text}, updates of "
        f"{budget.rows} rows of 256 tokens, held-out loss in nats a token. The last column is the "
        "perplexity beside that of the dense model trained on for as many updates.",
        "",
        "| model | loss | perplexity | updates | seconds | beside dense |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        ratio = f"{math.exp(row['loss'] - reached) - 1:+.1%}" if reached else ""
        count = f"{row['updates']:,.0f}" if "updates" in row else ""
        perplexity = math.exp(row["loss"])
        lines.append(
            f"| {name} | {row['loss']:.4f} | {perplexity:.2f} | {count} | {row['seconds']:.0f} | {ratio} |"
        )
    lines += [
        "",
        "`dense` was pruned, and recoveries begin with `wanda 2:4`. Seconds of recipes leave out compiling"
        + (
            "."
            if budget.jobs == 1
            else f"; {budget.jobs} ran at once on one device, and slow each other down."
        ),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
