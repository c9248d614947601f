"""A dry run says what the command without `--dry-run` would say, up to its first step, and writes nothing."""

import shutil

import pytest
import typer.main
from slow import slow_after
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import load_tiny, text, write_recipe

from act24.errors import Act24Error
from act24.tools.checkpoints import folder as checkpoint_folder
from act24.tools.commands.cli import app
from act24.tools.run.train import train

OVERRIDES = ("train.steps=6", "checkpoint.every=2", "eval.tokens=100")
SET = [word for override in OVERRIDES for word in ("--set", override)]
LONGER = ("--set", "train.steps=9")


@pytest.fixture(scope="module")
def a_run(tiny_file, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("dry") / "run"
    train(load_tiny(tiny_file, *OVERRIDES), run_dir)
    return run_dir


@pytest.fixture
def copied(a_run, tmp_path):
    return shutil.copytree(a_run, tmp_path / "run")


def content(folder):
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_what_every_option_does_in_a_dry_run_is_tested_here():
    options = {option.name for option in typer.main.get_command(app).commands["train"].params}
    told = {"recipe", "set_", "scale_steps"}  # make the recipe, which a dry run trains by
    assert options - told == {"run_dir", "resume", "data", "dry_run", "schedule"}


@pytest.mark.parametrize("dry", [("--dry-run",), ()], ids=["dry", "not"])
def test_a_checkpoint_that_is_not_there_is_refused(act24, tiny_file, tmp_path, dry):
    """`--dry-run` used to begin anew, whatever --resume said."""
    words = ("train", tiny_file, "--run-dir", tmp_path / "run", "--resume", tmp_path / "nonexistent", *dry)
    status, _, (line,) = act24(*words)
    assert status == 2
    assert line.endswith("/nonexistent' is neither a checkpoint nor a run with one (RUN/checkpoints/step-…)")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("resume", slow_after(1, ["auto", "a run", "a checkpoint"]))
def test_the_step_is_the_one_with_which_the_run_goes_on(tiny, copied, tmp_path, resume):
    before, longer = content(tmp_path), tiny(*OVERRIDES, "train.steps=9")
    where = {
        "auto": "auto",
        "a run": str(copied),
        "a checkpoint": str(copied / "checkpoints" / "step-000006"),
    }
    outcome = train(longer, copied, resume=where[resume], dry_run=True)
    assert (outcome.step, outcome.finished, outcome.checkpoint, outcome.evaluation) == (7, False, None, None)
    assert content(tmp_path) == before
    train(longer, copied, resume="auto")
    losses = EventAccumulator(str(copied), {"scalars": 0}).Reload().Scalars("loss/train")
    assert outcome.loss == pytest.approx({e.step: e.value for e in losses}[7], rel=1e-6)


def test_what_a_save_had_not_yet_named_is_read_where_it_is(tiny, copied, tmp_path):
    last = checkpoint_folder.latest(copied)
    last.rename(last.with_name(f"{last.name}.tmp-0123456789ab"))
    before = content(tmp_path)
    assert train(tiny(*OVERRIDES, "train.steps=9"), copied, resume="auto", dry_run=True).step == 7
    assert content(tmp_path) == before


def test_at_the_end_of_a_run_there_is_no_step(tiny, copied, tmp_path, capsys):
    before = content(tmp_path)
    assert train(tiny(*OVERRIDES), copied, resume="auto", dry_run=True).step == 6
    assert "is the end of this run: step 6 was its last" in capsys.readouterr().out
    assert content(tmp_path) == before


def test_a_recipe_of_another_run_is_refused(tiny, copied):
    with pytest.raises(Act24Error, match=r"checkpoint of another recipe: train.seed was"):
        train(tiny(*OVERRIDES, "train.seed=7"), copied, resume="auto", dry_run=True)


def test_a_folder_that_holds_a_run_is_said(tiny, copied, tmp_path, caplog):
    before = content(tmp_path)
    assert train(tiny(*OVERRIDES), copied, dry_run=True).step == 1
    assert content(tmp_path) == before
    (line,) = (record.message for record in caplog.records if "dry-run" in record.message)
    assert line.startswith(f"without --dry-run this would end here: {copied} already holds a run: go on with")


def test_a_folder_that_can_not_be_one_is_said(tiny, tmp_path, caplog):
    (tmp_path / "file").write_text("mine")
    assert train(tiny(*OVERRIDES), tmp_path / "file" / "run", dry_run=True).step == 1
    lines = [record.message for record in caplog.records]
    assert any("would end here: cannot write the folder" in line for line in lines)


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_checkpoints_that_could_not_be_written_are_said(tiny, tmp_path, caplog, resume):
    (tmp_path / "checkpoints").symlink_to("/proc/1")  # where nobody may write, root included
    assert train(tiny(*OVERRIDES), tmp_path, resume=resume, dry_run=True).step == 1
    lines = [record.message for record in caplog.records if "would end here" in record.message]
    assert [f"{tmp_path / 'checkpoints'} cannot be written: Permission denied" in line for line in lines] == [
        True
    ]


def test_data_grow_and_the_schedule_are_those_of_the_run(act24, tmp_path):
    recipe = write_recipe(tmp_path)
    words = ("train", recipe, "--run-dir", tmp_path / "run", *SET)
    assert act24(*words)[0] == 0
    (tmp_path / "train-9.txt").write_text(text(100, 99))
    before = content(tmp_path)
    words = (*words, *LONGER, "--resume", "auto", "--dry-run")
    status, _, errors = act24(*words)
    assert (status, "1 file was added" in errors[-1]) == (2, True)
    status, out, errors = act24(*words, "--data", "grow", "--schedule", "stretch")
    assert (status, errors) == (0, [])
    assert "train-9.txt): read from epoch 1 on" in out
    assert "the schedule is recomputed for 9 steps" in out
    assert "steps              7 of 9" in out
    assert content(tmp_path) == before


@pytest.mark.parametrize("dry", [("--dry-run",), ()], ids=["dry", "not"])
@pytest.mark.parametrize("option", [("--data", "grow"), ("--schedule", "stretch")], ids=" ".join)
def test_what_is_for_a_run_that_goes_on_is_refused_without_one(act24, tiny_file, tmp_path, option, dry):
    status, _, (line,) = act24("train", tiny_file, "--run-dir", tmp_path / "run", *option, *dry)
    assert status == 2
    assert line == (
        "act24: --data grow and --schedule stretch are for a run that goes on: they need --resume"
    )
    assert list(tmp_path.iterdir()) == []


def test_held_out_text_that_is_not_there_is_refused(tiny, tmp_path):
    """It is opened, though nothing is evaluated on it: what is wrong with it would end the run."""
    with pytest.raises(Act24Error, match=r"absent\.txt"):
        train(tiny(f'data.heldout_files=["{tmp_path}/absent.txt"]'), tmp_path / "run", dry_run=True)
    with pytest.raises(Act24Error, match=r"absent\.txt"):
        train(tiny(f'data.heldout_files=["{tmp_path}/absent.txt"]'), tmp_path / "run")


def test_an_evaluation_that_is_due_is_not_made(tiny, tmp_path):
    recipe = tiny(*OVERRIDES, "train.steps=1", "schedule.warmup_steps=0")
    assert train(recipe, tmp_path / "run", dry_run=True).evaluation is None
    assert list(tmp_path.iterdir()) == []
