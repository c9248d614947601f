"""Changes chosen lines of the run's machinery, one at a time, and runs the tests that should notice.

    python tests/mutate.py [WORD ...]        those whose description has one of the words, or all

Works on a copy, so the checkout stays as it is. Prints one line a mutation; the status is 1 if one survived.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Mutation(NamedTuple):
    what: str
    file: str
    old: str
    new: str
    tests: str  # files, and after them perhaps -k and a word


RUN, CHECKPOINTS = "tests/tools/run/", "tests/tools/checkpoints/"
LABELS, CHANGES, ENDS = f"{RUN}test_labels.py", f"{RUN}test_changes.py", f"{RUN}test_ends.py"
FOLDERS, LOCK = f"{CHECKPOINTS}test_checkpoint_folder.py", f"{RUN}test_lock.py"
HOSTILE, RUNS = f"{CHECKPOINTS}test_hostile.py", f"{RUN}test_folder.py"
DEALT = "tests/tools/data/test_data_dealt.py"

MUTATIONS = [
    Mutation(
        "learning rate on the first group only",
        "tools/run/train.py",
        "for group in self._optimizer.param_groups:",
        "for group in self._optimizer.param_groups[:1]:",
        LABELS,
    ),
    Mutation(
        "one seed for all micro-batches", "tools/run/step.py", "micro_batch=index,", "micro_batch=0,", LABELS
    ),
    Mutation(
        "a row's last token as padding",
        "tools/data/batches.py",
        "return nothing & nothing.roll(1, dims=1).index_fill(1, torch.tensor([0]), False)",
        "return nothing",
        LABELS,
    ),
    Mutation(
        "layers reversed",
        "tools/watch/tensorboard.py",
        'named = {f"layer_{layer}": value for layer, value in values.items()}',
        'named = {f"layer_{max(values) - layer}": value for layer, value in values.items()}',
        LABELS,
    ),
    Mutation(
        "layers counted from 0",
        "tools/watch/tensorboard.py",
        'named = {f"layer_{layer}": value for layer, value in values.items()}',
        'named = {f"layer_{i}": value for i, value in enumerate(values.values())}',
        LABELS,
    ),
    Mutation(
        "grad_norm summed",
        "tools/watch/monitor.py",
        "grad_norm=sums[1] / steps",
        "grad_norm=sums[1] * steps / steps",
        LABELS,
    ),
    Mutation(
        "data position lost after LoST's scoring",
        "tools/run/train.py",
        "        self._rows.load_state_dict(beginning)\n",
        "",
        LABELS,
    ),
    Mutation(
        "evaluation on a stop",
        "tools/run/train.py",
        "if evaluates and not stopped:",
        "if evaluates:",
        ENDS,
    ),
    Mutation(
        "evaluation lost on a stop",
        "tools/run/train.py",
        "evaluation, self._evaluation_due = None, evaluates",
        "evaluation, self._evaluation_due = None, False",
        ENDS,
    ),
    Mutation(
        "alarms each window",
        "tools/watch/monitor.py",
        "new = () if self._alarmed else texts",
        "new = texts",
        LABELS,
    ),
    Mutation(
        "alarms repeated after a resume",
        "tools/watch/monitor.py",
        'bool((state or {}).get("alarmed"))',
        "False",
        LABELS,
    ),
    Mutation(
        "weights counted at any step",
        "tools/run/train.py",
        "if _due(step, recipe.log.weight_sparsity_every):",
        "if _due(step, recipe.log.every):",
        LABELS,
    ),
    Mutation(
        "the counter stands still",
        "tools/checkpoints/folder.py",
        "return 1 + max(",
        "return 0 * max(",
        FOLDERS,
    ),
    Mutation(
        "the written checkpoint is pruned",
        "tools/checkpoints/folder.py",
        "*_best(all_complete, keep_best), written}",
        "*_best(all_complete, keep_best)}",
        FOLDERS,
    ),
    Mutation(
        "foreign files are deleted",
        "tools/checkpoints/folder.py",
        'if name not in manifest["files"] and not _is_litter(name)',
        "if False",
        FOLDERS,
    ),
    Mutation(
        "unusable checkpoints are none",
        "tools/checkpoints/folder.py",
        "if reasons and not usable:",
        "if False:",
        f"{FOLDERS} {RUNS}",
    ),
    Mutation(
        "any pickle is read",
        "tools/checkpoints/reading.py",
        'raise pickle.UnpicklingError(f"{module}.{name} has no business there")',
        "return super().find_class(module, name)",
        HOSTILE,
    ),
    Mutation(
        "infinite weights are saved",
        "tools/checkpoints/checkpoint.py",
        "on_every_rank(lambda: _check_finite({**_tensors(model), **tensors}))",
        "pass",
        RUNS,
    ),
    Mutation(
        "another run's folder is taken over",
        "tools/run/folder.py",
        "if holds_run and folder.resolve().parent.parent != run_dir.resolve():",
        "if False:",
        RUNS,
    ),
    Mutation(
        "a lock on a deleted file counts",
        "tools/run/lock.py",
        "if os.fstat(descriptor).st_nlink == 0:",
        "if False:",
        LOCK,
    ),
    Mutation(
        "the schedule is recomputed on its own",
        "tools/run/folder.py",
        'steps = recipe.train.steps if schedule == "stretch" else computed_for',
        "steps = recipe.train.steps",
        CHANGES,
    ),
    Mutation(
        "the schedule is forgotten at the second resume",
        "tools/run/folder.py",
        'opened.state.get("schedule_steps", then.train.steps)',
        "then.train.steps",
        CHANGES,
    ),
    Mutation(
        "a batch that is not finite is trained on",
        "tools/run/step.py",
        "if not skipped:",
        "if True:",
        CHANGES,
    ),
    Mutation(
        "skips in a row are forgotten at a resume",
        "tools/run/train.py",
        'self._skips = operator.index(start.state.get("skips", 0))',
        "self._skips = 0",
        CHANGES,
    ),
    Mutation(
        "rows by process, not by run",
        "tools/data/dealt.py",
        "        while self._read[index] < row:  # rows of other processes",
        "        while False:",
        DEALT,
    ),
    Mutation(
        "signals wait while a run is prepared",
        "tools/run/signals.py",
        "        if request.at_once:\n",
        "        if False:\n",
        f"{RUN}test_signals.py",
    ),
    Mutation(
        "nohup is overridden",
        "tools/run/signals.py",
        "if handler is not signal.SIG_IGN]",
        "]",
        ENDS,
    ),
    Mutation(
        "a stop exits with 0",
        "tools/run/signals.py",
        "STOPPED_STATUS = 75",
        "STOPPED_STATUS = 0",
        f"{RUN}test_train.py -k signal",
    ),
]


def survives(mutation: Mutation) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkout"
        skipped = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "docs")
        shutil.copytree(ROOT, copy, symlinks=True, ignore=skipped)
        path = copy / mutation.file
        path.write_text(path.read_text().replace(mutation.old, mutation.new))
        options = ["-q", "-x", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *options, *mutation.tests.split()]
        environment = os.environ | {"PYTHONPATH": str(copy)}
        result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
        if result.returncode not in (0, 1):  # no tests ran, or pytest itself failed
            raise RuntimeError(f"{mutation.what}: {result.stdout}{result.stderr}")
        return result.returncode == 0


def main(words: list[str]) -> int:
    survivors = 0
    for mutation in MUTATIONS:
        if words and not any(word in mutation.what for word in words):
            continue
        alive = survives(mutation)
        survivors += alive
        print(f"{'SURVIVED' if alive else 'noticed '}  {mutation.what}", flush=True)
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
