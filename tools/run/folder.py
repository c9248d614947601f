"""A run's folder: where it is, whether it may be written, and what it goes on from.

RUN/
    recipe.toml         the resolved recipe
    plan.txt            what the passes did
    history.jsonl       when it began, was taken up again, from where and with what changes
    .lock               held by the process that trains (`lock.py`)
    stopped             below torchrun: a signal ended the last start, with a checkpoint (`note_stop`)
    checkpoints/        `tools/checkpoints/checkpoint.py`
    events.out.tfevents…
"""

from __future__ import annotations

import hashlib
import json
import logging
import operator
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from act24.errors import Act24Error
from act24.recipes.keys import short
from act24.recipes.load import dump_recipe, parse_recipe
from act24.recipes.schema import Recipe
from act24.tools.checkpoints import checkpoint
from act24.tools.checkpoints import folder as checkpoint_folder
from act24.tools.checkpoints.checkpoint import version
from act24.tools.checkpoints.manifest import CheckpointError, manifest_or_none
from act24.tools.checkpoints.reading import contents_of, read_text
from act24.tools.checkpoints.together import on_the_first
from act24.tools.files import is_plain, whole_file
from act24.tools.run.changes import Change, ScheduleChoice, are_scaled, changes, effects, schedule_line
from act24.tools.run.history import (
    HISTORY,
    History,
    Origin,
    in_the_way,
    origin_entry,
    origin_of,
    read_history,
)
from act24.tools.run.lock import LOCK, Lock, RunError, run_lock

_LONGEST_NAME = 100  # of a folder, in characters
RECIPE, PLAN = "recipe.toml", "plan.txt"
#: Where a stop is noted whose status `torchrun` hides: it makes 1 of whatever its processes exit with.
STOPPED = "stopped"
_NOTED = re.compile(r"SIG[A-Z]+: saved step [0-9]+\n")
_OURS = re.compile(
    r"recipe\.toml|plan\.txt|history\.jsonl|stopped|\.lock|checkpoints|events\.out\.tfevents\.\d+\..+\.\d+\.\d+\.act24"
)

_UNDO = "; undo that, or begin another run in another folder with --run-dir"

logger = logging.getLogger("act24")


@dataclass(frozen=True)
class Start:
    """Where a run goes on.

    Attributes:
        checkpoint: verified.
        schedule_steps: what its learning rate is computed for from here on.
        changes: what is different from here on.
        remarks: the same for people, with what it does, one line each.
        is_last: it is the checkpoint of the run's own folder that was written last.
    """

    checkpoint: checkpoint.Checkpoint
    schedule_steps: int
    changes: tuple[Change, ...]
    remarks: tuple[str, ...]
    is_last: bool


def default_run_dir(reference: str, overrides: Sequence[str] = (), scale_steps: bool = False) -> Path:
    """`runs/<recipe>` below the working directory, and of a variant, of which `scale_steps` makes one too,
    `runs/<recipe>,lr=0.001`: two settings of one recipe do not share a folder."""
    name = reference.removesuffix(".toml").strip("./").replace("/", "-")
    for key, _, value in (override.partition("=") for override in overrides):
        plain = re.sub(r"[^\w.+-]+", "_", value).strip("_")
        name += f",{short(key.strip())}={plain}"
    name += ",scaled" * scale_steps
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return Path("runs") / name


def resume_point(
    run_dir: Path,
    resume: str,
    recipe: Recipe,
    schedule: ScheduleChoice = "hold",
    world_size: int = 1,
    weights: Path | None = None,
    dry_run: bool = False,
) -> Start | None:
    """The verified checkpoint to go on from, with what changes there, or None for a fresh start.

    Args:
        resume: `never`, `auto` (the last checkpoint of the run, if there is a run), a checkpoint's folder, or
            another run's, of which the last checkpoint is taken.
        schedule: `hold` leaves the learning rate as it was for the steps that the run had, and behind them at
            its last value; `stretch` computes it anew for the steps of the recipe.
        world_size: processes now.
        weights: with which a fresh start begins, where its recipe does not name them.
        dry_run: nothing is renamed, and a folder that a fresh start could not have is a warning.

    Raises:
        RunError: the folder already holds a run and `resume` is `never` or a checkpoint of another run; or
            the checkpoint is of another recipe, or behind its end; or files of the user are where a run
            writes its own.
        CheckpointError: the checkpoint is damaged or of an older act24, or there are some and none can be
            used; or none could be saved beside them.
    """
    folder = on_the_first(lambda: _chosen(run_dir, resume, recipe, weights, dry_run))
    if folder is None:
        return None
    opened = checkpoint.load(folder)
    if "sequence" not in opened.manifest:  # nor what a run of now needs to go on: streams of rows, histories
        raise CheckpointError(
            f"{folder} was written by an older act24, and this one cannot go on from there: use the act24 "
            f"that wrote it{_of_commit(opened.manifest)}, or train anew in another --run-dir; "
            "eval, sample and export read it as it is"
        )
    with contents_of(folder / RECIPE):
        then = parse_recipe(opened.recipe_text, f"{folder}/recipe.toml")
    different, others = changes(then, recipe)
    if others:
        own = folder.parent.parent / RECIPE
        raise RunError(
            f"{folder} is a checkpoint of another recipe: {'; '.join(map(str, others[:4]))}"
            + _way_on(then, recipe, others, own if own.exists() else folder / RECIPE, run_dir, resume, _UNDO)
        )
    if recipe.train.steps < opened.step:
        raise RunError(
            f"train.steps is {recipe.train.steps}, and {folder} is behind that already: set it to "
            f"{opened.step} or more, or go back to an earlier checkpoint with --resume"
        )
    before = opened.manifest["world_size"]
    if before != world_size:
        different.append(Change("processes", before, world_size))
    with contents_of(folder / "state.json"):
        computed_for = operator.index(opened.state.get("schedule_steps", then.train.steps))
    steps = recipe.train.steps if schedule == "stretch" else computed_for
    remarks = effects(different)
    if then.train.steps != recipe.train.steps or steps != computed_for:
        remarks.append(schedule_line(recipe, opened.step, computed_for, steps, then.train.steps))
    is_last = on_the_first(lambda: _is_last(run_dir, opened))
    return Start(opened, steps, tuple(different), tuple(remarks), is_last)


def _is_last(run_dir: Path, opened: checkpoint.Checkpoint) -> bool:
    own = Path(os.path.abspath(opened.folder)).parent.resolve() == (run_dir / "checkpoints").resolve()
    return own and checkpoint_folder.next_sequence(run_dir) == opened.manifest["sequence"] + 1


def begun(run_dir: Path, start: Start | None) -> Recipe | None:
    """The recipe that a run began with: of the checkpoint from which it goes on, or where it ended before its
    first, of its folder; None where nothing is there."""
    described = (start.checkpoint.folder if start else run_dir) / RECIPE
    text = start.checkpoint.recipe_text if start else described.exists() and read_text(described)
    return parse_recipe(text, str(described)) if text else None


def _way_on(
    then: Recipe,
    now: Recipe,
    others: list[Change],
    own: Path,
    run_dir: Path,
    resume: str,
    otherwise: str = "",
) -> str:
    """What to do where only counts of steps differ: the command goes on with the run's `own` recipe."""
    if not are_scaled(then, now, others):
        return otherwise
    command = ["act24", "train", str(own), "--set", f"train.steps={now.train.steps}"]
    command += ["--run-dir", str(run_dir), "--resume", resume]
    said = "; --scale-steps scales these: go on with the run's own recipe, and without it"
    return f"{said}: {shlex.join(command)}"


def _of_commit(manifest: dict[str, Any]) -> str:
    return f" (commit {manifest['commit'][:12]})" if isinstance(manifest.get("commit"), str) else ""


def _chosen(run_dir: Path, resume: str, recipe: Recipe, weights: Path | None, dry_run: bool) -> Path | None:
    if dry_run:
        try:
            _refuse_unwritable(run_dir)
            checkpoint_folder.check_writable(run_dir, dry_run)
            if resume == "never":
                return _chosen(run_dir, resume, recipe, weights, dry_run=False)
        except (RunError, CheckpointError) as error:
            logger.warning("without --dry-run this would end here: %s", error)
            if resume == "never":
                return None
    history = read_history(run_dir)
    _refuse_others_files(run_dir, history, dump_recipe(recipe))
    holds_run = bool(history.entries) or os.path.lexists(run_dir / "checkpoints")
    if resume == "never":
        if holds_run:
            raise RunError(
                f"{run_dir} already holds a run: go on with --resume auto, or choose another with --run-dir"
            )
        return None
    if not dry_run:
        with _writing(run_dir):
            (run_dir / STOPPED).unlink(missing_ok=True)
        checkpoint_folder.check_writable(run_dir)
        checkpoint_folder.put_back(run_dir)
    origin = origin_of(run_dir, history)
    if resume == "auto":
        return _last_of_run(run_dir, recipe, weights, history, origin)
    return _named(run_dir, resume, holds_run, origin)


def _last_of_run(
    run_dir: Path, recipe: Recipe, weights: Path | None, history: History, origin: Origin | None
) -> Path | None:
    """What `--resume auto` goes on from; None for a run that has saved nothing yet."""
    folder = checkpoint_folder.latest(run_dir)
    if origin and not (folder and origin.is_behind(folder)):  # it has saved nothing since
        folder = origin.found(whole=True) or folder or origin.found()
        if folder is None:
            raise RunError(
                f"{run_dir} went on from {origin.recorded}, has no checkpoint of its own, and that one "
                "is gone: bring it back, say where it is now with --resume, or choose another folder "
                "with --run-dir"
            )
    if folder is None and history.cut_off:
        raise RunError(
            f"{run_dir / HISTORY} is cut off where it says what the run went on from, and there is no "
            "checkpoint: name that with --resume, or choose another folder with --run-dir"
        )
    if folder is None and weights is None and (began := history.last.get("weights")):
        raise RunError(
            f"{run_dir} began with the weights of {began}, and has saved nothing since: go on with the "
            "command that began it (--continue_from), or choose another folder with --run-dir"
        )
    if folder is None and (then := begun(run_dir, None)):  # it ended before its first checkpoint
        _, others = changes(then, recipe)
        if others:
            raise RunError(
                f"{run_dir} holds a run of another recipe ({'; '.join(map(str, others[:4]))}): choose "
                "another folder with --run-dir"
                + _way_on(then, recipe, others, run_dir / RECIPE, run_dir, "auto")
            )
    return folder


def _named(run_dir: Path, resume: str, holds_run: bool, origin: Origin | None) -> Path:
    """The checkpoint that `--resume` names."""
    folder = last_checkpoint(Path(resume))
    parent = Path(os.path.abspath(folder)).parent.resolve()
    if holds_run and parent != (run_dir / "checkpoints").resolve():
        branches = origin is not None and origin.is_beside(folder)
        if not branches or checkpoint_folder.latest(run_dir):
            raise RunError(
                f"{run_dir} already holds a run, and {folder} is not of it: go on with --resume auto, or "
                "choose another folder with --run-dir"
            )
    return folder


def _refuse_unwritable(run_dir: Path) -> None:
    """Raises RunError where a run's folder could not be made or written, as `run_lock` does."""
    there = next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise RunError(
            f"cannot write the folder {run_dir}: {there} is no folder that can be written; "
            "choose another with --run-dir"
        )


def _refuse_others_files(run_dir: Path, history: History, recipe: str) -> None:
    """Raises RunError for a recipe.toml or plan.txt that no run wrote here, or somebody has edited since; or
    where something else is called as what `note_stop` leaves."""
    mark = run_dir / STOPPED
    if os.path.lexists(mark) and not (is_plain(mark) and _NOTED.fullmatch(read_text(mark))):
        raise RunError(in_the_way(mark))
    if history.entries and "sha256" not in history.last:  # of an older act24, which kept no hashes
        return
    for name, equal in ((RECIPE, recipe), (PLAN, "")):
        path = run_dir / name
        if not os.path.lexists(path):
            continue
        if not is_plain(path):
            raise RunError(in_the_way(path))
        with contents_of(path):
            content = path.read_bytes()
        written = [entry.get("sha256", {}).get(name) for entry in history.entries]
        # Empty is what an older act24 left that was killed there; nothing of anybody is lost with it.
        if content and hashlib.sha256(content).hexdigest() not in written and content != equal.encode():
            raise RunError(in_the_way(path))


def last_checkpoint(path: Path, nor: str = "") -> Path:
    """`path`, if it is a checkpoint, or the last checkpoint of the run there.

    Args:
        nor: what else was looked for there, for whoever is told that it is nothing of all this.

    Raises:
        Act24Error: it is neither, or no checkpoint of the run can be used.
    """
    if (path / checkpoint_folder.MANIFEST).is_file() or checkpoint_folder.is_named_like_one(path):
        return path
    latest = checkpoint_folder.latest(path)
    if latest is None:
        raise RunError(f"'{path}' is neither a checkpoint nor a run with one (RUN/checkpoints/step-…){nor}")
    return latest


def way_back(run_dir: Path, last: Path | None, updated: int) -> str:
    """What to do about weights whose loss is finite no more: they are those of step `updated`, the same in
    each checkpoint since. `last`: the checkpoint that the run saved last, or went on from."""
    saved = [*checkpoint_folder.complete(run_dir), *([last] if last else [])]
    steps = {path: (manifest_or_none(path) or {}).get("step", updated) for path in saved}
    older = [path for path in saved if steps[path] < updated]
    if older:
        way = f"go back to {max(older, key=steps.__getitem__)} with --resume and a smaller optimizer.lr"
    else:
        way = (
            "no checkpoint of this run is older than these weights: begin anew in another --run-dir with a "
            "smaller optimizer.lr, more schedule.warmup_steps or a train.grad_clip"
        )
    return f"{way}, or where it is the text that is bad, raise train.max_skips"


def clear_run(run_dir: Path, recipe: Recipe) -> None:
    """Delete the run of a recipe in a folder, if that is all there is in it.

    Raises:
        RunError: it holds anything that no run wrote, or a run of another recipe, and is as it was; or a run
            is in progress there.
    """
    if not run_dir.exists():
        return
    _check_replaceable(run_dir, recipe)  # before a lock is put into what may be no run
    with run_lock(run_dir):
        _check_replaceable(run_dir, recipe)
        for folder in checkpoint_folder.all_of(run_dir):
            shutil.rmtree(folder)
        names = [entry.name for entry in os.scandir(run_dir) if entry.name != LOCK]
        for name in sorted(names, key=lambda name: name == HISTORY):  # last: without it no run is deleted
            path = run_dir / name
            path.rmdir() if path.is_dir() else path.unlink()


def _check_replaceable(run_dir: Path, recipe: Recipe) -> None:
    """Raises RunError that says why a folder is not deleted, and what to do."""
    try:
        _refuse_foreign(run_dir, recipe)
    except Act24Error as error:  # also what an older act24 wrote into a recipe
        raise RunError(
            f"{error}; only a run that this act24 made of the same recipe is replaced: if {run_dir} is of an "
            f"older act24 and you do not need it, delete it (rm -r {shlex.quote(str(run_dir))}), or choose "
            "another folder with --run-dir"
        ) from None


def _refuse_foreign(run_dir: Path, recipe: Recipe) -> None:
    try:
        entries = sorted(os.scandir(run_dir), key=lambda entry: entry.name)
        foreign = [e.name for e in entries if not _OURS.fullmatch(e.name) or e.is_symlink()]
        inside = checkpoint_folder.all_of(run_dir)
        foreign += [f"checkpoints/{f.name}" for f in inside if checkpoint_folder.why_not_ours(f)]
    except OSError as error:
        raise RunError(f"{run_dir} cannot be read: {error.strerror}") from None
    if entries and HISTORY not in (entry.name for entry in entries):
        foreign.append(f"it has no {HISTORY}")
    if foreign:
        raise RunError(f"{run_dir} holds something else than a run of this act24 ({foreign[0]})")
    _refuse_others_files(run_dir, read_history(run_dir), dump_recipe(recipe))
    if then := begun(run_dir, None):
        _, others = changes(then, recipe)
        if others:
            raise RunError(f"{run_dir} holds a run of another recipe ({others[0]})")


def note_stop(lock: Lock | None, signal: str, step: int) -> None:
    """Below `torchrun`, leave a file in a run's folder that says that a signal ended it, all processes
    together and with a checkpoint: a loop that starts it again tells so from a failure. The next start
    deletes it.

    Not before the first step: where one process fails, `torchrun` stops the others by the same signal.
    """
    if lock and "TORCHELASTIC_RUN_ID" in os.environ:
        with _writing(lock.run_dir), whole_file(lock.run_dir / STOPPED) as partial:
            partial.write_text(f"{signal}: saved step {step}\n")


@contextmanager
def _writing(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write the folder {run_dir}: {error}") from None


def describe_run(
    run_dir: Path,
    recipe: Recipe,
    plan: str,
    start: Start | None,
    weights: Path | None = None,
    grown: tuple[int, int] | None = None,
) -> None:
    """Write into a run's folder what it is a run of, and that it begins, or from where it goes on and with
    what changes. Wherever that is cut off, the run can be gone on with.

    Args:
        weights: as for `resume_point`.
        grown: `TokenRows.grown`.

    Raises:
        RunError: the folder cannot be written.
    """
    entry: dict[str, Any] = {"step": 0}
    if start:
        entry = origin_entry(run_dir, start.checkpoint)
        entry["changes"] = {change.key: [change.old, change.new] for change in start.changes}
        entry["changes"] |= {"files": list(grown)} if grown else {}
        entry["schedule_steps"] = start.schedule_steps
    elif weights:
        entry["weights"] = os.path.abspath(weights)
    entry |= {"act24": version(), "time": datetime.now(UTC).isoformat(timespec="seconds")}
    files = {RECIPE: dump_recipe(recipe).encode(), PLAN: f"{plan}\n".encode()}
    entry["sha256"] = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    history = run_dir / HISTORY
    with _writing(run_dir):
        past = history.read_bytes() if history.exists() else b""
        past += b"\n" if past and not past.endswith(b"\n") else b""
        # The history first: it says that the others, old and new, are of a run.
        files = {HISTORY: past + f"{json.dumps(entry)}\n".encode(), **files}
        for name, content in files.items():
            with whole_file(run_dir / name) as partial:
                partial.write_bytes(content)
