"""Does a change cost speed? The benchmarks of this checkout and of another one, in turn on one GPU.

    git worktree add ../before COMMIT
    python -m act24.tools.bench.beside_checkout ../before OUT.json [PART…]

Four whole steps, `bench ffn` and `bench pack` run in child processes, this side and the other one by turns;
only the parts that are named (a recipe of `STEPS`, "ffn", "pack"), if any is. OUT.json is written after each.
The ratio of a row is the rate here over the rate there, of the medians over the turns; `spread` is the
largest difference between two turns of one side, relative, below which a difference says nothing.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[2]
TURNS = 2

#: Recipe and rows of the whole steps.
STEPS = (
    ("c4/130m-relu2-act24", 256),
    ("c4/350m-relu2-act24", 128),
    ("c4/350m-loro-relu2-act24", 128),
    ("c4/1b-cola-relu2-act24", 64),
)

_STEP = """
import json, sys
from act24.recipes.load import load_recipe
from act24.tools.bench.step import time_recipe
print(json.dumps(time_recipe(load_recipe(sys.argv[1]), int(sys.argv[2]), 15)))
"""


def _child(checkout: Path, *arguments: str) -> Any:
    """The JSON that a Python process in a checkout prints last."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{checkout}: {' '.join(arguments)[:60]} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def _rows_of(command: str, checkout: Path) -> dict[str, float]:
    """Rates of a benchmark by row: GB/s, or calls a second; rows that count bytes are left out."""
    rows = _child(checkout, "-m", "act24", "bench", command, "--json")
    return {
        row["name"]: row["ours"] if row["unit"] == "GB/s" else 1e3 / row["ours"]
        for row in rows
        if row["unit"] != "bytes"
    }


def _step(recipe: str, rows: int, checkout: Path) -> dict[str, float]:
    """Steps a second of a recipe."""
    seconds, _ = _child(checkout, "-c", _STEP, recipe, str(rows))
    return {f"step {recipe}, {rows} rows": 1 / seconds}


#: What is measured, in this order; each returns rates by row for a checkout.
PARTS: dict[str, Callable[[Path], dict[str, float]]] = {
    **{recipe: functools.partial(_step, recipe, rows) for recipe, rows in STEPS},
    **{command: functools.partial(_rows_of, command) for command in ("ffn", "pack")},
}


def compare(here: list[dict[str, float]], there: list[dict[str, float]]) -> Iterator[dict[str, Any]]:
    """Rows that both sides have, from the rates of every turn."""
    for name in here[0]:
        if name not in there[0]:
            continue
        sides = [[turn[name] for turn in turns] for turns in (here, there)]
        spread = max((max(side) - min(side)) / min(side) for side in sides)
        ours, others = map(statistics.median, sides)
        yield {"name": name, "here": ours, "there": others, "ratio": ours / others, "spread": spread}


def _commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main() -> None:
    other, out, only = Path(sys.argv[1]).resolve(), Path(sys.argv[2]), sys.argv[3:]
    if unknown := set(only) - set(PARTS):
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; there is {', '.join(PARTS)}")
    import torch

    result = {
        "commits": [_commit(HERE), _commit(other)],
        "gpu": torch.cuda.get_device_name(),
        "rows": [],
    }
    for part in only or PARTS:
        here: list[dict[str, float]] = []
        there: list[dict[str, float]] = []
        for _ in range(TURNS):
            here.append(PARTS[part](HERE))
            there.append(PARTS[part](other))
        for row in compare(here, there):
            result["rows"].append(row)
            print(f"{row['ratio']:.3f}  (spread {row['spread']:.3f})  {row['name']}", flush=True)
        out.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
