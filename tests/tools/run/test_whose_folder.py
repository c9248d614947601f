"""What somebody else wrote into a run's folder stays; a folder that is another one now is left alone."""

import contextlib
import errno
import os
import re
import shutil
from pathlib import Path

import pytest
from slow import slow_after
from tiny import load_tiny

from act24.recipes.load import dump_recipe, load_recipe
from act24.tools.checkpoints import checkpoint
from act24.tools.checkpoints import folder as checkpoint_folder
from act24.tools.checkpoints.manifest import CheckpointError
from act24.tools.commands import demo
from act24.tools.run import train as train_module
from act24.tools.run.folder import clear_run, describe_run, resume_point
from act24.tools.run.lock import LOCK, RunError, run_lock
from act24.tools.run.train import train

OVERRIDES = ("train.steps=6", "checkpoint.every=2", "checkpoint.keep=2", "eval.tokens=100")


@pytest.fixture(scope="module")
def a_run(tiny_file, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whose") / "run"
    train(load_tiny(tiny_file, *OVERRIDES), run_dir)
    return run_dir


@pytest.fixture
def copied(a_run, tmp_path):
    return shutil.copytree(a_run, tmp_path / "run")


def content(run_dir):
    """Every file with its bytes."""
    return {path.relative_to(run_dir): path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


class Killed(BaseException):
    """Nothing after it is run."""


def killed(*_, **__):
    raise Killed


FOREIGN = {
    "plan.txt": "my plan\n",
    "history.jsonl": '{"precious": 1}\n',
    "recipe.toml": "# my comment\n",
    ".lock": "my diary\n",
    "stopped": "SIGTERM: why I did not\n",
}


@pytest.mark.parametrize("resume", ["never", "auto", "a run"])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_run_writes_over_nothing_that_is_not_its_own(tiny, a_run, tmp_path, name, resume):
    run_dir = tmp_path / "mine"
    run_dir.mkdir()
    (run_dir / name).write_text(FOREIGN[name])
    with pytest.raises(RunError, match=rf"mine/{re.escape(name)} is not .*move it .*--run-dir"):
        train(tiny(*OVERRIDES), run_dir, resume=str(a_run) if resume == "a run" else resume)
    assert (run_dir / name).read_text() == FOREIGN[name]
    assert {path.name for path in run_dir.iterdir()} <= {name, LOCK}


@pytest.mark.parametrize("name", ["plan.txt", "history.jsonl", "recipe.toml", ".lock"])
def test_a_run_writes_through_no_link(tiny, copied, tmp_path, name):
    there = (copied / name).rename(tmp_path / "precious")
    (copied / name).symlink_to(there)
    before = there.read_bytes()
    with pytest.raises(RunError, match=re.escape(name)):
        train(tiny(*OVERRIDES, "train.steps=7"), copied, resume="auto")
    assert there.read_bytes() == before


@pytest.mark.parametrize("name", FOREIGN)
def test_a_pipe_in_the_place_of_a_runs_file_is_no_file_to_wait_for(tiny, copied, name):
    (copied / name).unlink(missing_ok=True)
    os.mkfifo(copied / name)
    with pytest.raises(RunError, match=rf"run/{re.escape(name)} is not .*move it "):
        train(tiny(*OVERRIDES, "train.steps=7"), copied, resume="auto")
    assert (copied / name).is_fifo()


def test_a_recipe_that_was_edited_in_the_runs_folder_is_not_lost(tiny, copied):
    recipe = copied / "recipe.toml"
    recipe.write_text("# why: see page 3\n" + recipe.read_text())
    before = recipe.read_bytes()
    with pytest.raises(RunError, match=r"recipe.toml is not as act24 wrote it"):
        train(tiny(*OVERRIDES, "train.steps=7"), copied, resume="auto")
    assert recipe.read_bytes() == before


def test_a_resolved_recipe_in_the_folder_is_what_would_be_written(tiny, tmp_path):
    (tmp_path / "recipe.toml").write_text(dump_recipe(tiny(*OVERRIDES)))
    assert train(tiny(*OVERRIDES), tmp_path).finished


def test_a_run_goes_on_after_its_recipe_changed_and_its_history_was_cut_off(tiny, copied):
    assert train(tiny(*OVERRIDES, "train.steps=7"), copied, resume="auto").step == 7
    with open(copied / "history.jsonl", "a") as file:
        file.write('{"step": 7, "fr')  # the disk was full
    for steps in (8, 9):
        assert train(tiny(*OVERRIDES, f"train.steps={steps}"), copied, resume="auto").step == steps


class Disk:
    """Ends the process, or is full, at its n-th touch. A process that is dead touches nothing more."""

    def __init__(self, monkeypatch, last, full):
        self.left, self.full = last, full
        replace, unlink = os.replace, Path.unlink

        def write(path, content):
            with open(path, "wb") as file:
                for part in (content[: len(content) // 2], content[len(content) // 2 :]):
                    self.touch()
                    file.write(part)
            self.touch()

        monkeypatch.setattr(Path, "write_bytes", write)
        monkeypatch.setattr(Path, "unlink", lambda *a, **b: (self.touch(frees=True), unlink(*a, **b))[1])
        monkeypatch.setattr(os, "replace", lambda *a: (self.touch(), replace(*a), self.touch())[1])

    def touch(self, frees=False):
        self.left -= 1
        if self.full and self.left == 0 and not frees:
            raise OSError(errno.ENOSPC, "No space left on device")
        if not self.full and self.left <= 0:
            raise Killed


@pytest.mark.parametrize("full", [False, True], ids=["a kill", "a full disk"])
@pytest.mark.parametrize("begun", [0, 2], ids=["at the first start", "at a later one"])
def test_a_description_that_is_cut_off_anywhere_blocks_no_run(tiny, tmp_path, monkeypatch, begun, full):
    """recipe.toml was written over in place: what was cut off was "not as act24 wrote it" for ever."""
    recipes = [tiny(*OVERRIDES, f"train.steps={steps}") for steps in (7, 8, 9)]
    texts = {dump_recipe(recipe) for recipe in recipes}
    for last in range(1, 100):
        run_dir = tmp_path / str(last)
        run_dir.mkdir()
        for recipe in recipes[:begun]:
            describe_run(run_dir, recipe, "a plan", None)
        with monkeypatch.context() as patch:
            disk = Disk(patch, last, full)
            with contextlib.suppress(Killed, RunError):
                describe_run(run_dir, recipes[2], "another plan", None)
        for recipe in reversed(recipes):  # the same command once more, and that of before
            assert resume_point(run_dir, "auto", recipe) is None
            assert not (run_dir / "recipe.toml").exists() or (run_dir / "recipe.toml").read_text() in texts
            describe_run(run_dir, recipe, "a third plan", None)
        if disk.left > 0:
            break
    assert last >= 15  # three files, five touches each


@pytest.mark.parametrize("name", ["recipe.toml", "plan.txt", "history.jsonl"])
def test_what_an_older_act24_left_half_written_blocks_no_run(tiny, tmp_path, name):
    describe_run(tmp_path, tiny(*OVERRIDES), "a plan", None)
    if name == "history.jsonl":
        with open(tmp_path / name, "a") as file:
            file.write('{"st')
    else:
        (tmp_path / name).write_text("")
    assert resume_point(tmp_path, "auto", tiny(*OVERRIDES, "train.steps=7")) is None


def test_a_lock_whose_text_a_full_disk_cut_off_is_still_ours(tmp_path):
    (tmp_path / LOCK).write_text("proc")
    with run_lock(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith("process ")


def test_the_demo_deletes_no_folder_of_the_names_of_a_run(tiny, tmp_path):
    for name in ("plan.txt", "history.jsonl", "events.out.tfevents.1.mine"):
        (tmp_path / name).write_text('{"user": "asked"}\n')
    before = content(tmp_path)
    with pytest.raises(RunError):
        demo.run_demo(tmp_path)
    (tmp_path / "events.out.tfevents.1.mine").unlink()
    with pytest.raises(RunError, match=r"history.jsonl is not as act24 wrote it"):
        demo.run_demo(tmp_path)
    assert content(tmp_path).items() <= before.items()


def test_the_demo_deletes_no_run_of_another_recipe(copied):
    before = content(copied)
    with pytest.raises(RunError, match=r"holds a run of another recipe \(.* was .* and is"):
        clear_run(copied, load_recipe("demo"))
    assert content(copied) == before


def test_a_run_that_was_killed_before_its_first_save_goes_on_from_its_origin(
    tiny, a_run, tmp_path, monkeypatch
):
    """The same command used to be refused, and `auto` began at step 0 without a word."""
    branch, longer = tmp_path / "branch", tiny(*OVERRIDES, "train.steps=8")
    with monkeypatch.context() as patch:
        patch.setattr(train_module.TrainingRun, "advance", killed)
        with pytest.raises(Killed):
            train(longer, branch, resume=str(a_run))
    again = shutil.copytree(branch, tmp_path / "again")
    for run_dir, resume in ((branch, str(a_run)), (again, "auto")):
        outcome = train(longer, run_dir, resume=resume)
        assert outcome.step == 8
        assert outcome.tokens > checkpoint.load(checkpoint_folder.latest(a_run)).state["tokens"]
        assert '"step": 6' in (run_dir / "history.jsonl").read_text().splitlines()[-1]


def test_an_origin_that_is_gone_is_a_refusal(tiny, copied, tmp_path, monkeypatch):
    longer = tiny(*OVERRIDES, "train.steps=8")
    with monkeypatch.context() as patch:
        patch.setattr(train_module.TrainingRun, "advance", killed)
        with pytest.raises(Killed):
            train(longer, tmp_path / "branch", resume=str(copied))
    before = content(tmp_path / "branch")
    shutil.rmtree(copied)
    with pytest.raises(RunError, match=r"went on from .*step-000006, has no checkpoint of its own, and that"):
        train(longer, tmp_path / "branch", resume="auto")
    assert content(tmp_path / "branch").keys() == before.keys()


def test_checkpoints_that_could_not_be_written_are_refused_before_the_first_step(tiny, tmp_path):
    """It was the first save that found it out, and the steps up to there were lost."""
    (tmp_path / "checkpoints").symlink_to("/sys/kernel")  # where nobody makes a folder, root included
    with pytest.raises(CheckpointError, match=r"/checkpoints cannot be written: .*; make it writable, or"):
        train(tiny(*OVERRIDES), tmp_path, resume="auto")
    assert {path.name for path in tmp_path.iterdir()} == {LOCK, "checkpoints"}


def test_checkpoints_on_another_disk_are_the_runs_own(tiny, copied, tmp_path):
    there = (copied / "checkpoints").rename(tmp_path / "scratch")
    (copied / "checkpoints").symlink_to(there)
    assert train(tiny(*OVERRIDES, "train.steps=7"), copied, resume=str(copied)).step == 7
    assert train(tiny(*OVERRIDES, "train.steps=8"), copied, resume="auto").step == 8
    there.rename(tmp_path / "away")
    for resume in ("auto", str(copied)):
        with pytest.raises(checkpoint.CheckpointError, match=r"checkpoints is a link to .*nothing is there"):
            train(tiny(*OVERRIDES, "train.steps=9"), copied, resume=resume)
    with pytest.raises(RunError, match="already holds a run"):
        train(tiny(*OVERRIDES, "train.steps=9"), copied)


@pytest.mark.parametrize("what", ["old", "tmp"], ids=["taken away", "not yet named"])
def test_a_checkpoint_that_a_save_had_not_yet_named_is_gone_on_from(tiny, copied, what):
    """A kill before the rename of a first save was a start at step 0, and `prune` deleted what was there."""
    last = checkpoint_folder.latest(copied)
    for folder in checkpoint_folder.folders(copied):
        if folder != last:
            shutil.rmtree(folder)
    last.rename(last.with_name(f"{last.name}.{what}-0123456789ab"))
    assert train(tiny(*OVERRIDES, "train.steps=7"), copied, resume="auto").step == 7
    assert [path.name for path in checkpoint_folder.all_of(copied)] == ["step-000006", "step-000007"]


@pytest.mark.parametrize(
    ("where", "name", "how"),
    slow_after(
        2,
        [
            pytest.param(train_module.TrainingRun, "advance", "deleted", id="deleted between two saves"),
            pytest.param(train_module.TrainingRun, "advance", "anew", id="replaced between two saves"),
            pytest.param(checkpoint, "fingerprints", "anew", id="replaced as files are written"),
            pytest.param(checkpoint_folder, "next_sequence", "taken", id="taken before they are published"),
        ],
    ),
)
def test_a_run_whose_folder_is_another_one_now_stops(tiny, tmp_path, monkeypatch, where, name, how):
    """It used to save into the other's checkpoints, or to end in a traceback."""
    run_dir, original = tmp_path / "run", getattr(where, name)
    other = tiny(*OVERRIDES, "train.steps=5", "train.seed=5")
    began, found = [], []

    def taken(*arguments):
        if not began and (checkpoints := checkpoint_folder.complete(run_dir)):
            began.append(how)
            if how == "taken":  # .lock was swept away, and another run has one now
                (run_dir / LOCK).unlink()
                (run_dir / LOCK).write_text("process 1\n")
            else:
                shutil.rmtree(run_dir)
            if how == "anew":
                train(other, run_dir)
            found.append(checkpoints if how == "taken" else content(tmp_path))
        return original(*arguments)

    monkeypatch.setattr(where, name, taken)
    with pytest.raises(
        RunError, match=r"run was deleted, moved or taken by another run .* writes nothing more"
    ):
        train(tiny(*OVERRIDES), run_dir)
    assert found == [checkpoint_folder.all_of(run_dir) if how == "taken" else content(tmp_path)]
    assert run_dir.exists() == (how != "deleted")


def test_a_lock_that_was_swept_away_alone_does_no_harm(tmp_path):
    with run_lock(tmp_path) as lock:
        (tmp_path / LOCK).unlink()
        lock.check()
        with run_lock(tmp_path), pytest.raises(RunError, match="taken by another run"):
            lock.check()
