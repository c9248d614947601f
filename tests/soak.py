"""Kills toy runs at random moments, hundreds of times, and looks at what comes out in the end.

    python tests/soak.py [--kills 200] [--seed 0] [--out docs/results/soak.json]

A run is `act24 train … --resume auto`, again and again, each time killed by SIGKILL after a random time, till
it comes to its end. Then it has to be the run that nobody killed: every file of the last checkpoint bit for
bit, each step on the same rows, each TensorBoard scalar once a step with the same value, and nothing left
over in its folder. After each kill the checkpoint that `auto` would take has to be whole. The status is 1 if
anything differs. The processes are forked from one that has loaded PyTorch; beside that they run the command.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS / "tools"), str(TESTS.parent)]

from children import CONTEXT  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402
from tiny import write_recipe  # noqa: E402

from act24.errors import Act24Error  # noqa: E402
from act24.tools.checkpoints import checkpoint  # noqa: E402
from act24.tools.checkpoints import folder as checkpoint_folder  # noqa: E402
from act24.tools.checkpoints.manifest import contents, fingerprints  # noqa: E402
from act24.tools.checkpoints.reading import TensorReader  # noqa: E402

STEPS = 24
#: Checkpoints, evaluations and ends of epochs at steps of their own.
COMMON = [
    f"train.steps={STEPS}",
    "eval.every=8",
    "eval.tokens=200",
    "log.every=2",
    "log.weight_sparsity_every=5",
    "train.total_batch_size=40",
]
RUNS = {
    "activations 2:4 from step 10 on": ["checkpoint.every=3"],
    "activations 2:4 with random draws, padded rows, shuffled text": [
        'passes=[{use="relu2_ffn"}, {use="activation24", method="mvue", backward="sparse"}]',
        'data.rows="padded"',
        "data.shuffle_buffer=3",
        "checkpoint.every=1",
    ],
    "LORO": [
        'passes=[{use="low_rank", attn_rank=8, mlp_rank=8}]',
        "optimizer.name=loro_adamw",
        "checkpoint.every=2",
    ],
}
#: Tags of what is measured in time.
_TIMED = ("perf/",)
#: What each process would import for half of its time, loaded once.
_LOADED = ("act24.tools.commands.cli", "act24.tools.run.train", "torch._dynamo", "torch.utils.tensorboard")
_LOOKED_INTO = ("optimizer/.metadata", "rank-00000.json")


def attempt(command: list[str], out: str, rows: str) -> None:
    """In a process of its own: the command, with what is trained on written down."""
    from act24.tools.commands.cli import main
    from act24.tools.run.step import TrainingStep

    file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    trained_on = os.open(rows, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    step_of = TrainingStep.__call__

    def noted(self: TrainingStep, batches: Any, optimizer: Any, step: int, *options: Any) -> Any:
        digest = hashlib.sha256(b"".join(batch.input_ids.numpy().tobytes() for batch in batches))
        os.write(trained_on, f"{step + 1} {digest.hexdigest()}\n".encode())
        return step_of(self, batches, optimizer, step, *options)

    TrainingStep.__call__ = noted  # type: ignore[method-assign]
    sys.argv = command
    main()


def start(recipe: Path, run_dir: Path, overrides: list[str]) -> Any:
    command = ["act24", "train", str(recipe), "--run-dir", str(run_dir), "--resume", "auto"]
    command += [word for override in (*COMMON, *overrides) for word in ("--set", override)]
    places = (f"{run_dir}.out", f"{run_dir}.rows")
    process = CONTEXT.Process(target=attempt, args=(command, *places))
    process.start()
    return process


def files_of(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint, but for what is another each time that a run is made: of the manifest the
    times, of the optimizer's table an id, and the states of Python's and numpy's generators, which no run
    seeds or draws from."""
    names = [name for name in contents(folder) if name not in _LOOKED_INTO]
    files: dict[str, Any] = dict(fingerprints(folder, names))
    table = TensorReader(folder / "optimizer").read_metadata()
    files["optimizer/.metadata"] = repr((table.state_dict_metadata, table.storage_data))
    of_rank = json.loads((folder / "rank-00000.json").read_text())
    for library in ("python", "numpy"):
        del of_rank["random"][library]
    files["rank-00000.json"] = of_rank
    return files


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """By tag what TensorBoard shows, of all that is no time."""
    events = EventAccumulator(str(run_dir), {"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith(_TIMED)]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def rows_of(run_dir: Path) -> dict[int, set[str]]:
    """By step, the rows that it was ever made with."""
    rows: dict[int, set[str]] = {}
    for line in Path(f"{run_dir}.rows").read_text().splitlines():
        step, digest = line.split()
        rows.setdefault(int(step), set()).add(digest)
    return rows


def facts(run_dir: Path) -> dict[str, Any]:
    """What a run has to have in common with the one that nobody killed."""
    last = checkpoint_folder.folder_of(run_dir, STEPS)
    return {
        "checkpoint": files_of(last),
        "TensorBoard": scalars(run_dir),
        "rows": rows_of(run_dir),
        "folder": sorted(path.name for path in (run_dir / "checkpoints").iterdir()),
    }


def phase(run_dir: Path) -> str:
    """Where a kill struck, as its folder shows."""
    names = [path.name for path in checkpoint_folder.all_of(run_dir)]
    if any(".tmp-" in name or ".gone-" in name for name in names):
        return "a checkpoint was half written or half deleted"
    return "between checkpoints" if names else "before the first checkpoint"


def soak(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """So many kills over as many runs as it takes."""
    CONTEXT.set_forkserver_preload(list(_LOADED))
    draw = random.Random(seed)
    recipe = write_recipe(folder)
    straight, duration = {}, {}
    for index, (name, overrides) in enumerate(RUNS.items()):
        for run_dir in (folder / f"warm-{index}", folder / f"straight-{index}"):  # the second finds caches
            began = time.monotonic()
            process = start(recipe, run_dir, overrides)
            process.join()
            duration[name] = time.monotonic() - began
            if process.exitcode:
                raise SystemExit(f"{name}: {Path(f'{run_dir}.out').read_text()}")
        straight[name] = facts(run_dir)
    struck: Counter[str] = Counter()
    differences: list[str] = []
    done, runs = 0, 0
    while done < kills:
        name, overrides = list(RUNS.items())[runs % len(RUNS)]
        run_dir = folder / f"killed-{runs}"
        runs += 1
        limit = duration[name] / 2  # most attempts are to be killed
        while True:
            saved = checkpoint_folder.folders(run_dir)[-1:]
            process = start(recipe, run_dir, overrides)
            # Once it has all its kills a run may end; a moment behind its end is no kill.
            process.join(draw.uniform(0, limit) if done < kills else None)
            if not process.is_alive():
                break
            process.kill()
            process.join()
            done += 1
            struck[phase(run_dir)] += 1
            if checkpoint_folder.folders(run_dir)[-1:] == saved:
                limit *= 1.05  # of a machine that is slower now, some kills come later
            try:
                if last := checkpoint_folder.latest(run_dir):
                    checkpoint.load(last)
            except Act24Error as error:
                differences.append(f"run {runs}, kill {done}: {error}")
        if process.exitcode:
            differences.append(f"run {runs}: {Path(f'{run_dir}.out').read_text()[-2000:]}")
            continue
        now = facts(run_dir)
        differences += [f"run {runs} ({name}): {fact}" for fact in now if now[fact] != straight[name][fact]]
        print(f"{done} kills, {runs} runs, {len(differences)} differences", flush=True)
    return {
        "kills": done,
        "runs": runs,
        "steps_a_run": STEPS,
        "recipes": list(RUNS),
        "struck": dict(sorted(struck.items())),
        "differences": differences,
        "seed": seed,
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Kills toy runs at random moments.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)  # of checkpoints that are skipped: they are what this is about
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        result = soak(options.kills, options.seed, Path(folder))
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(f"{text}\n")
    return int(bool(result["differences"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
