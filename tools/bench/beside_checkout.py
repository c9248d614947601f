"""Does a change cost speed? The benchmarks of this checkout and of another one, in turn on one GPU.

    git worktree add ../before COMMIT
    python -m act24.tools.bench.beside_checkout ../before OUT.json [PART…]

`bench pack`, four whole steps and `bench ffn` at its first shape, or only the parts that are named (a recipe
of `turns.STEPS`, "pack", "ffn"). One process a side builds and compiles what it times while the other does,
and then they are timed by turns, call by call, with nothing else on the GPU. OUT.json is written after each
part.
The ratio of a row is the rate here over the rate there, of the medians over the turns; `spread` is the
largest difference between two turns of one side, relative, below which a difference says nothing.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from act24.tools.bench.turns import STEPS

HERE = Path(__file__).resolve().parents[2]
TURNS = 3

PARTS = ("pack", *(recipe for recipe, _ in STEPS), "ffn")


class Side:
    """A process that measures a checkout (`act24.tools.bench.turns`)."""

    def __init__(self, checkout: Path, *command: str) -> None:
        self.checkout = checkout
        path = os.pathsep.join(filter(None, (str(checkout), os.environ.get("PYTHONPATH"))))
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        # Of its own: Inductor finds a graph again by the names of its operators, and what it wrote for one
        # commit calls those of another with arguments that they do not take.
        self._compiled = tempfile.TemporaryDirectory()
        self._process = subprocess.Popen(
            # -P: the folder of the script, in this checkout, is nowhere to import from.
            [sys.executable, "-P", *command],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": self._compiled.name},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def say(self, word: Any) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(word) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._ended()

    def hear(self) -> Any:
        assert self._process.stdout
        return json.loads(self._process.stdout.readline() or self._ended())

    def _ended(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        raise SystemExit(f"{self.checkout} came to no end:\n{self._errors.read()[-2000:]}")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()
        self._compiled.cleanup()


def measured(sides: Sequence[Side], part: str) -> list[dict[str, list[float]]]:
    """The rates of a part by row, one for each turn, of every side. Whenever all sides that are not through
    wait to time something, they do so one after the other, `TURNS` times."""
    for side in sides:
        side.say({"part": part})
    results: dict[Side, dict[str, list[float]]] = {}
    while still := [side for side in sides if side not in results]:
        said = [(side, side.hear()) for side in still]
        results |= {side: word for side, word in said if word != "waits"}
        waiting = [side for side in still if side not in results]
        for _ in range(TURNS):
            for side in waiting:
                side.say("turn")
                side.hear()
        for side in waiting:
            side.say("on")
    return [results[side] for side in sides]


def compare(
    here: Mapping[str, Sequence[float]], there: Mapping[str, Sequence[float]]
) -> Iterator[dict[str, Any]]:
    """Rows that both sides have, from the rates of every turn."""
    for name in here:
        if name not in there:
            continue
        sides = here[name], there[name]
        spread = max((max(side) - min(side)) / min(side) for side in sides)
        ours, others = map(statistics.median, sides)
        yield {"name": name, "here": ours, "there": others, "ratio": ours / others, "spread": spread}


def _commit(checkout: Path) -> str:
    """The commit that a checkout is of; a folder inside of another repository is not of that one's."""
    command = ["git", "-C", str(checkout), "rev-parse", "--show-toplevel", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    top, _, commit = done.stdout.strip().partition("\n")
    return commit if commit and Path(top) == checkout else "unknown"


def main() -> None:
    other, out, only = Path(sys.argv[1]).resolve(), Path(sys.argv[2]), sys.argv[3:]
    if unknown := set(only) - set(PARTS):
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; there is {', '.join(PARTS)}")
    if not (other / "act24" / "__init__.py").is_file():
        raise SystemExit(
            f"{other} is no checkout of act24: `git worktree add {sys.argv[1]} COMMIT` makes one"
        )
    import torch

    result: dict[str, Any] = {
        "commits": [_commit(HERE), _commit(other)],
        "gpu": torch.cuda.get_device_name(),
        "rows": [],
        "on one side only": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        script = str(Path(__file__).with_name("turns.py"))
        sides = [Side(checkout, script, f"{folder}/tuned") for checkout in (HERE, other)]
        try:
            for part in only or PARTS:
                begun = time.monotonic()
                here, there = measured(sides, part)
                for row in compare(here, there):
                    result["rows"].append(row)
                    print(f"{row['ratio']:.3f}  (spread {row['spread']:.3f})  {row['name']}", flush=True)
                alone = sorted(here.keys() ^ there.keys())
                result["on one side only"] += alone
                took = f"{time.monotonic() - begun:.0f} s"
                print(
                    f"{part} took {took}" + f"; on one side only: {'; '.join(alone)}" * bool(alone),
                    flush=True,
                )
                out.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
        finally:
            for side in sides:
                side.close()


if __name__ == "__main__":
    main()
