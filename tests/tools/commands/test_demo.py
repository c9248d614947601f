"""The demo's story, told by a smaller recipe."""

import hashlib
import json
import re
import shutil

import pytest
from tiny import load_tiny

from act24.errors import Act24Error
from act24.tools.commands import demo
from act24.tools.run.folder import clear_run
from act24.tools.run.lock import run_lock
from act24.tools.run.train import train


@pytest.fixture
def small(tiny, monkeypatch):
    monkeypatch.setattr(demo, "load_recipe", {"demo": tiny("train.steps=12")}.__getitem__)


@pytest.mark.usefixtures("small")
def test_the_demo_trains_evaluates_samples_and_shows_sparsity(tmp_path, capsys):
    run_dir = tmp_path / "demo"
    for _ in range(2):  # the second replaces the first
        demo.run_demo(run_dir)
        out = capsys.readouterr().out
        assert re.search(r"^steps +12 of 12", out, re.M)
        dense, sparse = (re.search(rf"^{form} +([\d.]+) ", out, re.M)[1] for form in ("dense", "2:4"))
        assert float(dense) == pytest.approx(float(sparse), abs=0.05)
        assert 'A sample:\ndef main():\n    """' in out
        assert re.search(r"^ *0 mlp +\d+\.\d% +\d+\.\d+% +\d+\.\d+%", out, re.M)
        assert re.search(r"^ *1 mlp ", out, re.M)
        assert out.endswith(f"tensorboard --logdir {run_dir}\n")


@pytest.mark.usefixtures("small")
def test_the_demo_replaces_nothing_but_runs(tmp_path):
    (tmp_path / "thesis.txt").write_text("kept")
    message = r"holds something else than a run of this act24 \(thesis.txt\); .* choose another folder with"
    with pytest.raises(Act24Error, match=message):
        demo.run_demo(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.fixture(scope="module")
def a_run(tiny_file, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("demo") / "run"
    train(load_tiny(tiny_file, "train.steps=2", "schedule.warmup_steps=0"), run_dir)
    return run_dir


FOREIGN = {
    "a file": "thesis.txt",
    "a folder": "photos/cat.jpg",
    "a file among the checkpoints": "checkpoints/best.txt",
    "a folder among the checkpoints": "checkpoints/step-000001/weights.bin",
    "a file in a checkpoint": "checkpoints/step-000002/notes.txt",
    "a file in what a save left": "checkpoints/step-000001.tmp-0123456789ab/thesis.txt",
    "a file in what was being deleted": "checkpoints/step-000002.gone-0123456789ab/thesis.txt",
    "a file like a Mac's": "checkpoints/step-000002/._notes",
    "another program's events": "events.out.tfevents.1700000000.myhost.77.0",
    "a file deep in a checkpoint": "checkpoints/step-000002/optimizer/notes.txt",
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", FOREIGN.values(), ids=FOREIGN.keys())
def test_the_demo_deletes_nothing_that_a_run_did_not_write(a_run, tmp_path, name):
    """A folder with a recipe.toml in it used to be enough."""
    run_dir = tmp_path / "run"
    shutil.copytree(a_run, run_dir)
    (run_dir / name).parent.mkdir(exist_ok=True)
    (run_dir / name).write_text("mine")
    before = sorted(run_dir.rglob("*"))
    with pytest.raises(Act24Error, match="holds something else than a run"):
        demo.run_demo(run_dir)
    assert sorted(run_dir.rglob("*")) == before


@pytest.mark.usefixtures("small")
def test_a_folder_of_recipes_is_no_run(tmp_path):
    (tmp_path / "recipe.toml").write_text("[model]")
    with pytest.raises(Act24Error, match="holds something else than a run"):
        demo.run_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]


def older(name, run_dir):
    """What makes a run one of an older act24: names of files, none of its starts, keys that went."""
    if name == "events":
        (events,) = run_dir.glob("events.*.act24")
        events.rename(events.with_suffix(""))
    elif name == "no history":
        (run_dir / "history.jsonl").unlink()
    else:
        recipe = run_dir / "recipe.toml"
        old = {"a key": "[train]\nold_key = 1\n", "a value": "[train]\nseed = 8\n", "no recipe": "]"}[name]
        recipe.write_text(recipe.read_text().replace("[train]\n", old).replace("seed = 0\n", ""))
        entry = json.loads((run_dir / "history.jsonl").read_text())
        entry["sha256"]["recipe.toml"] = hashlib.sha256(recipe.read_bytes()).hexdigest()
        (run_dir / "history.jsonl").write_text(json.dumps(entry) + "\n")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["events", "no history", "a key", "a value", "no recipe"])
def test_of_a_run_of_an_older_act24_it_is_said_what_to_do(a_run, tmp_path, name):
    """It was refused as "something else than a run", with no word on what it may be."""
    run_dir = shutil.copytree(a_run, tmp_path / "my demo")
    older(name, run_dir)
    before = sorted(run_dir.rglob("*"))
    with pytest.raises(Act24Error) as error:
        demo.run_demo(run_dir)
    assert str(error.value).endswith(
        f"if {run_dir} is of an older act24 and you do not need it, delete it (rm -r '{run_dir}'), or choose "
        "another folder with --run-dir"
    )
    assert sorted(run_dir.rglob("*")) == before


def test_a_run_is_deleted_whole(a_run, tiny, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(a_run, run_dir)
    (run_dir / "checkpoints" / "step-000002" / ".DS_Store").write_text("")
    (run_dir / "checkpoints" / "step-000001.tmp-0123456789ab").mkdir()
    recipe = tiny("train.steps=2", "schedule.warmup_steps=0")
    clear_run(run_dir, recipe)
    assert [path.name for path in run_dir.iterdir()] == [".lock"]
    clear_run(tmp_path / "nothing", recipe)


def test_a_run_in_progress_is_not_deleted(a_run, tiny, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(a_run, run_dir)
    before = sorted(run_dir.rglob("*"))
    with run_lock(run_dir), pytest.raises(Act24Error, match=r"is in use by process \d+ on .* since"):
        clear_run(run_dir, tiny("train.steps=2", "schedule.warmup_steps=0"))
    assert sorted(run_dir.rglob("*")) == before
