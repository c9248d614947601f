"""300 steps of 60m with kernels and 2:4 products, and with the plain-PyTorch reference: the same curve?

    python -m act24.tools.experiments.kernels_against_emulation run SHARDS OUT [VARIANT]
    python -m act24.tools.experiments.kernels_against_emulation report OUT

Same seed, same batches, 2:4 from the first step, the 2:4 products chosen at a width where they would not pay,
and for a measure of what rounding alone does the reference not compiled, which rounds in other places. `run`
writes OUT/<variant>.json; `report` the differences and, with matplotlib, a picture.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch

from act24.passes.relu2_ffn import parity_width
from act24.recipes.load import load_recipe
from act24.recipes.records import toml_value
from act24.sparse24.format.products import Measured, feed_forward_products
from act24.tools.run.build import model_config
from act24.tools.run.tuning import cache_path, machine, write_table

_STEPS, _ROWS = 300, 128
VARIANTS = {
    "kernels": (),
    "reference": ("passes.activation24.kernels=false",),
    "reference, not compiled": ("passes.activation24.kernels=false", 'train.compile="off"'),
    "kernels, exact backward": ("passes.activation24.backward=dense",),
    "reference, exact backward, not compiled": (
        "passes.activation24.backward=dense",
        "passes.activation24.kernels=false",
        "train.compile=off",
    ),
    "reference, exact backward": ("passes.activation24.backward=dense", "passes.activation24.kernels=false"),
}


def train_one(name: str, shards: Path, out: Path) -> None:
    """Train a variant, and write its losses."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from act24.tools.run.train import train

    recipe = load_recipe(
        "c4/60m-relu2-act24",
        [
            "data.source=shards",
            f"data.shards={toml_value(str(shards))}",
            "tokenizer.name=bpe",
            f"train.steps={_STEPS}",
            f"train.batch_size={_ROWS}",
            f"train.total_batch_size={_ROWS}",
            "schedule.warmup_steps=30",
            "passes.activation24.from_step=0",
            "passes.activation24.backward=split_gemm",
            "eval.every=0",
            "eval.tokens=1_000_000",
            "checkpoint.every=0",
            "log.every=1",
            *VARIANTS[name],
        ],
    )
    with tempfile.TemporaryDirectory() as folder:
        # As if a tuner had found the 2:4 products faster, so that they run.
        os.environ["XDG_CACHE_HOME"] = folder
        config = model_config(recipe)
        width, features = config.hidden_size, parity_width(config.intermediate_size)
        products = feed_forward_products(_ROWS * recipe.data.max_length, width, features, width, False)
        if torch.cuda.is_available():
            table = tuple((product, Measured(0, 0.0, 1.0)) for product in products.values())
            write_table(cache_path(), machine(torch.device("cuda", 0)), table)
        outcome = train(recipe, Path(folder) / "run")
        events = EventAccumulator(str(Path(folder) / "run"), size_guidance={"scalars": 0}).Reload()
        losses = [point.value for point in events.Scalars("loss/train")]
    assert outcome.evaluation is not None
    out.mkdir(parents=True, exist_ok=True)
    result = {"losses": losses, "heldout_loss": outcome.evaluation.loss}
    (out / f"{name.replace(', ', '-').replace(' ', '-')}.json").write_text(json.dumps(result) + "\n")


def report(out: Path) -> None:
    """The differences between the curves, as a table, and a picture."""
    found = {
        name: json.loads(path.read_text())
        for name in VARIANTS
        if (path := out / f"{name.replace(', ', '-').replace(' ', '-')}.json").exists()
    }
    lines = [
        "| | held-out loss | training loss, mean of the last 20 | mean difference | largest |",
        "|---|---|---|---|---|",
    ]
    for name, result in found.items():
        base = found.get("reference, exact backward" if "exact" in name else "reference", result)["losses"]
        apart = [abs(a - b) for a, b in zip(result["losses"], base, strict=True)]
        lines.append(
            f"| {name} | {result['heldout_loss']:.4f} | {sum(result['losses'][-20:]) / 20:.4f} | "
            f"{sum(apart) / len(apart):.5f} | {max(apart):.5f} |"
        )
    (out / "results.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    base = found["reference"]["losses"] if "reference" in found else ()
    for name, result in found.items():
        if "exact" in name or not base:
            continue
        left.plot(result["losses"], label=name, linewidth=0.8)
        if name != "reference":
            right.plot(
                [a - b for a, b in zip(result["losses"], base, strict=True)], label=name, linewidth=0.8
            )
    left.set(xlabel="step", ylabel="training loss")
    right.set(xlabel="step", ylabel="difference to the reference")
    left.legend()
    right.legend()
    figure.savefig(out / "kernels-against-emulation.png", dpi=120)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="kernels_against_emulation", description=__doc__)
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("run")
    training.add_argument("shards", type=Path)
    training.add_argument("out", type=Path)
    training.add_argument("variant", nargs="?", choices=list(VARIANTS), help="all by default")
    training.set_defaults(
        run=lambda a: [train_one(name, a.shards, a.out) for name in ([a.variant] if a.variant else VARIANTS)]
    )
    reporting = commands.add_parser("report")
    reporting.add_argument("out", type=Path)
    reporting.set_defaults(run=lambda a: report(a.out))
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
