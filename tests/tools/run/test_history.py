"""What a run's history decides: where it goes on from while it has saved nothing itself."""

import json
import logging
import shutil

import pytest
from slow import slow_after, slow_but
from tiny import load_tiny

from act24.tools.checkpoints import checkpoint
from act24.tools.checkpoints import folder as checkpoint_folder
from act24.tools.run import train as train_module
from act24.tools.run.folder import describe_run, resume_point
from act24.tools.run.history import HISTORY, read_history
from act24.tools.run.lock import RunError
from act24.tools.run.train import train

OVERRIDES = ("train.steps=6", "checkpoint.every=2", "eval.tokens=100")
LONGER = (*OVERRIDES, "train.steps=8")


class Killed(BaseException):
    """Nothing after it is run."""


def killed(*_, **__):
    raise Killed


@pytest.fixture(scope="module")
def a_run(tiny_file, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("history") / "run"
    train(load_tiny(tiny_file, *OVERRIDES), run_dir)
    return run_dir


@pytest.fixture
def branch(tiny, a_run, tmp_path, monkeypatch):
    """`tmp_path/old/branch`, killed before its first save, of the run `tmp_path/old/run`."""
    (tmp_path / "old").mkdir()
    shutil.copytree(a_run, tmp_path / "old" / "run")
    with monkeypatch.context() as patch:
        patch.setattr(train_module.TrainingRun, "advance", killed)
        with pytest.raises(Killed):
            train(tiny(*LONGER), tmp_path / "old" / "branch", resume=str(tmp_path / "old" / "run"))
    return tmp_path / "old" / "branch"


@pytest.mark.parametrize("resume", slow_but(("by name",), ["auto", "by name"]))
@pytest.mark.parametrize("moved", ["the branch", "its origin", "both"])
def test_a_branch_goes_on_that_was_moved_before_its_first_save(tiny, branch, tmp_path, moved, resume):
    """It was refused for ever: its origin was known by the place alone, also to who named the new one."""
    origin, new = tmp_path / "old" / "run", tmp_path / "new"
    new.mkdir()
    if moved != "its origin":
        branch = branch.rename(new / "branch")
    if moved != "the branch":
        origin = origin.rename(new / "run")
    recipe = tiny(*LONGER)
    if (moved, resume) == ("its origin", "auto"):
        with pytest.raises(RunError, match=r"went on from .*old/run/.*is gone: .*where it is now with"):
            resume_point(branch, "auto", recipe)
        return
    start = resume_point(branch, "auto" if resume == "auto" else str(origin), recipe)
    assert start.checkpoint.folder.resolve() == checkpoint_folder.folder_of(origin, 6)
    assert (start.checkpoint.step, start.schedule_steps) == (6, 6)


@pytest.mark.parametrize("resume", slow_after(1, ["auto", "by name"]))
def test_another_checkpoint_in_the_place_of_the_origin_is_not_taken(tiny, branch, tmp_path, resume):
    """Another run of the same recipe, step and name."""
    place = tmp_path / "old" / "run"
    shutil.rmtree(place)
    if resume == "by name":
        place = tmp_path / "elsewhere"
    train(tiny(*OVERRIDES, "optimizer.lr=0.02"), place)
    with pytest.raises(RunError, match=r"that one is gone" if resume == "auto" else r"is not of it"):
        resume_point(branch, "auto" if resume == "auto" else str(place), tiny(*LONGER))


def test_a_moved_branch_comes_to_its_end(tiny, branch, tmp_path):
    moved = (tmp_path / "old").rename(tmp_path / "new") / branch.name
    outcome = train(tiny(*LONGER), moved, resume="auto")
    assert (outcome.step, outcome.finished) == (8, True)
    assert [entry["step"] for entry in read_history(moved).entries] == [6, 6]


def test_a_run_that_went_back_goes_on_from_there(tiny, a_run, tmp_path, monkeypatch):
    """Killed before it saved, `auto` used to take up the steps that it had gone back behind."""
    run_dir = shutil.copytree(a_run, tmp_path / "run")
    recipe, earlier = tiny(*OVERRIDES), checkpoint_folder.folder_of(run_dir, 4)
    with monkeypatch.context() as patch:
        patch.setattr(train_module.TrainingRun, "advance", killed)
        with pytest.raises(Killed):
            train(recipe, run_dir, resume=str(earlier))
    assert resume_point(run_dir, "auto", recipe).checkpoint.folder == earlier
    train(
        tiny(*OVERRIDES, "train.steps=5"), run_dir, resume="auto"
    )  # saves step 5, which counts from here on
    assert resume_point(run_dir, "auto", tiny(*OVERRIDES)).checkpoint.step == 5


def test_a_run_whose_last_checkpoint_was_damaged_since_goes_on_from_the_one_before(
    tiny, a_run, tmp_path, monkeypatch, caplog
):
    run_dir = shutil.copytree(a_run, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(train_module.TrainingRun, "advance", killed)
        with pytest.raises(Killed):
            train(tiny(*LONGER), run_dir, resume="auto")
    (checkpoint_folder.folder_of(run_dir, 6) / "model.safetensors").write_bytes(b"cut off")
    assert resume_point(run_dir, "auto", tiny(*LONGER)).checkpoint.step == 4
    assert "step-000006/model.safetensors is damaged" in caplog.text


def entry(**other):
    return json.dumps({"step": 0, "act24": "0.2.0", "time": "2026-11-29T07:35:38+00:00"} | other)


ODD = {
    "a number for a place": (entry(**{"from": 5}), "line 1: from: input should be a valid string, found 5"),
    "an empty place": (entry(**{"from": ""}), "line 1: from: "),
    "a step that is none": (entry(step="6"), "line 1: step: input should be a valid integer, found '6'"),
    "a step below zero": (entry(step=-1), "line 1: step: "),
    "a truth value": (entry(step=True), "line 1: step: "),
    "no number": (entry(step=float("nan")), "line 1: step: "),
    "hashes that are none": (entry(sha256=[]), "line 1: sha256: "),
    "a hash that is none": (entry(sha256={"plan.txt": 5}), "line 1: sha256.plan.txt: "),
    "changes that are none": (entry(changes={"optimizer.lr": 5}), "line 1: changes.optimizer.lr: "),
    "a key of somebody else": (entry(precious=1), "line 1: precious: "),
    "a field that is missing": ('{"step": 0}', "line 1: act24: field required"),
    "a second line": (f"{entry()}\n[1]", "line 2: "),
    "a line that is no JSON": (f"{entry()}\nmy notes", "line 2 is no JSON"),
    "deep JSON": ("[" * 10_000, "line 1: nested too deep"),
    "no text": (b"\xff\xfe", "it is no text"),
    "a folder": (None, "it is no file"),
}


@pytest.mark.parametrize("resume", ["never", "auto", "by name"])
@pytest.mark.parametrize(("content", "said"), ODD.values(), ids=ODD.keys())
def test_an_odd_history_is_refused_by_its_line(tiny, a_run, tmp_path, content, said, resume):
    """`"from": 5` used to be a traceback, and most others were taken without a word."""
    path = tmp_path / HISTORY
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content if isinstance(content, bytes) else f"{content}\n".encode())
    with pytest.raises(RunError) as error:
        resume_point(tmp_path, resume if resume != "by name" else str(a_run), tiny(*OVERRIDES))
    assert str(error.value).startswith(f"{path} is not as act24 wrote it ({said}")
    assert str(error.value).endswith("or choose another for the run with --run-dir")


def test_a_line_that_was_cut_off_is_said(tiny, tmp_path, caplog):
    describe_run(tmp_path, tiny(*OVERRIDES), "a plan", None)
    with open(tmp_path / HISTORY, "a") as file:
        file.write('{"step": 0, "ac\n')
    with caplog.at_level(logging.WARNING, logger="act24"):
        assert resume_point(tmp_path, "auto", tiny(*OVERRIDES)) is None
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}/{HISTORY}: line 2 was cut off, and is left out"
    ]


def test_a_branch_whose_origin_was_cut_off_does_not_begin_anew(tiny, a_run, tmp_path):
    """Without the line it looked like a run that had not begun."""
    (tmp_path / HISTORY).write_text('{"step": 6, "from": "/some')
    with pytest.raises(RunError, match=r"history\.jsonl is cut off where it says what the run went on from"):
        resume_point(tmp_path, "auto", tiny(*OVERRIDES))
    named = resume_point(tmp_path, str(a_run), tiny(*OVERRIDES))
    assert named.checkpoint.folder == checkpoint_folder.latest(a_run)


def test_every_entry_that_is_written_can_be_read(tiny, a_run, tmp_path):
    start = resume_point(tmp_path, str(a_run), tiny(*OVERRIDES, "optimizer.lr=0.02"))
    describe_run(tmp_path, tiny(*OVERRIDES), "a plan", start)
    (written,) = read_history(tmp_path).entries
    assert written["changes"] == {"optimizer.lr": [0.01, 0.02]}
    assert written["from_sha256"] == checkpoint.load(checkpoint_folder.latest(a_run)).manifest["sha256"]


def test_what_is_watched_and_kept_is_a_change_like_any_other(tiny, a_run, tmp_path):
    """None of these stood in the history, and a smaller checkpoint.keep deletes checkpoints."""
    watched = {
        "checkpoint.keep": [2, 1],
        "eval.every": [5, 2],
        "log.every": [1, 2],
        "description": ["", "b"],
    }
    now = tiny(*OVERRIDES, *(f"{key}={value}" for key, (_, value) in watched.items()))
    start = resume_point(tmp_path, str(a_run), now)
    describe_run(tmp_path, now, "a plan", start)
    assert read_history(tmp_path).last["changes"] == watched
    said = "checkpoint.keep was 2 and is 1: the values are the same, other checkpoints of them are kept"
    assert said in start.remarks
    assert len(start.remarks) == 4


def test_a_run_that_began_with_weights_beside_its_recipe_does_not_begin_anew_without_them(tiny, tmp_path):
    """Killed before its first save and taken up by its recipe, it used to begin at random, without a word."""
    (tmp_path / "run").mkdir()
    describe_run(tmp_path / "run", tiny(*OVERRIDES), "a plan", None, tmp_path / "model_1000")
    with pytest.raises(RunError, match=r"began with the weights of .*/model_1000, and .*--continue_from"):
        resume_point(tmp_path / "run", "auto", tiny(*OVERRIDES))
    again = resume_point(tmp_path / "run", "auto", tiny(*OVERRIDES), weights=tmp_path / "model_1000")
    assert again is None
