"""Which checkpoint, and whose folder: a run goes on from its own, and destroys no other."""

import json
import logging
import os
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from children import run_ranks
from safetensors.torch import load_file
from slow import slow_after
from tiny import load_tiny

from act24.errors import Act24Error
from act24.tools.checkpoints import checkpoint
from act24.tools.checkpoints import folder as checkpoint_folder
from act24.tools.checkpoints.manifest import CheckpointError, fingerprints, read_manifest, render
from act24.tools.run import build
from act24.tools.run.evaluate import evaluate_checkpoint
from act24.tools.run.folder import default_run_dir, last_checkpoint
from act24.tools.run.lock import LOCK, RunError
from act24.tools.run.train import train

OVERRIDES = ("train.steps=6", "checkpoint.every=2", "checkpoint.keep=2", "eval.tokens=100")


@pytest.fixture(scope="module")
def a_run(tiny_file, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("folder") / "run"
    train(load_tiny(tiny_file, *OVERRIDES), run_dir)
    return run_dir


@pytest.fixture
def copied(a_run, tmp_path):
    return shutil.copytree(a_run, tmp_path / "run")


def content(run_dir):
    """Every file but the lock, with its bytes."""
    return {
        path.relative_to(run_dir): path.read_bytes()
        for path in run_dir.rglob("*")
        if path.is_file() and path.name != LOCK
    }


DAMAGE = {
    "a file that is cut off": lambda folder: (folder / "state.json").write_text("{"),
    "a file that is gone": lambda folder: (folder / "model.safetensors").unlink(),
    "a manifest that is gone": lambda folder: (folder / "manifest.json").unlink(),
    "a folder in place of a file": lambda folder: (
        (folder / "state.json").unlink(),
        (folder / "state.json").mkdir(),
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_auto_does_not_start_anew_over_checkpoints_that_it_cannot_use(tiny, copied, damage):
    """It used to begin at step 0, hide what TensorBoard had, and later delete what was intact."""
    for folder in checkpoint_folder.folders(copied):
        damage(folder)
    before = content(copied)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used \(2 there\): .*step-000006"):
        train(tiny(*OVERRIDES), copied, resume="auto")
    assert content(copied) == before


def test_auto_does_not_start_anew_where_it_cannot_look(tiny, copied, monkeypatch):
    scandir = os.scandir

    def refuse(path="."):
        if os.fspath(path).endswith("checkpoints"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    before = content(copied)
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
            train(tiny(*OVERRIDES), copied, resume="auto")
    assert content(copied) == before


@pytest.mark.parametrize("name", slow_after(1, [".nfs0000000000abc", ".DS_Store", "notes.txt"]))
def test_auto_goes_on_beside_foreign_files(tiny, copied, name):
    for folder in checkpoint_folder.folders(copied):
        (folder / name).write_text("")
    longer = tiny(*OVERRIDES, "checkpoint.every=1")
    outcome = train(longer, copied, resume="auto")
    assert (outcome.step, outcome.finished) == (6, True)


@pytest.mark.parametrize("resume", ["auto", "the folder"])
def test_a_checkpoint_of_before_the_counter_is_read_and_not_gone_on_from(tiny, copied, resume):
    """The act24 of then kept neither streams of rows nor histories: KeyError was all that it said."""
    for folder in checkpoint_folder.folders(copied):
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["sequence"]
        (folder / "manifest.json").write_text(render(manifest | {"commit": "0123456789abcdef"}))
    last = checkpoint_folder.latest(copied)
    before = content(copied)
    message = (
        f"^{last} was written by an older act24.*the act24 that wrote it .commit 0123456789ab., or train"
    )
    with pytest.raises(CheckpointError, match=message):
        train(tiny(*OVERRIDES), copied, resume="auto" if resume == "auto" else str(last))
    assert content(copied) == before
    assert build.load(copied).step == int(last.name[5:])


def test_auto_starts_where_there_is_nothing_or_nothing_was_saved(tiny, tmp_path):
    run_dir = tmp_path / "run"
    assert train(tiny(*OVERRIDES), run_dir, resume="auto").step == 6
    shutil.rmtree(run_dir / "checkpoints")
    assert train(tiny(*OVERRIDES), run_dir, resume="auto").step == 6
    shutil.rmtree(run_dir / "checkpoints")
    before = content(run_dir)
    with pytest.raises(RunError, match=r"holds a run of another recipe \(train.seed was 0 and is 1\)"):
        train(tiny(*OVERRIDES, "train.seed=1"), run_dir, resume="auto")
    assert content(run_dir) == before


def test_a_checkpoint_of_another_run_does_not_take_over_a_folder(tiny, a_run, tmp_path):
    mine = tmp_path / "mine"
    train(tiny("train.steps=5", "train.seed=3"), mine)
    before = content(mine)
    with pytest.raises(RunError, match=r"mine already holds a run, and .*step-000004 is not of it"):
        train(tiny(*OVERRIDES), mine, resume=str(a_run / "checkpoints" / "step-000004"))
    assert content(mine) == before


def test_a_run_goes_back_to_a_checkpoint_of_its_own(tiny, copied, monkeypatch):
    then = load_file(checkpoint_folder.latest(copied) / "model.safetensors")
    monkeypatch.chdir(copied)
    outcome = train(tiny(*OVERRIDES), copied, resume="checkpoints/step-000004")  # however it is spelled
    assert outcome.finished
    now = load_file(checkpoint_folder.latest(copied) / "model.safetensors")
    assert all(torch.equal(then[name], now[name]) for name in then)


def test_a_run_is_taken_as_its_last_checkpoint(tiny, a_run, tmp_path):
    outcome = train(tiny(*OVERRIDES), tmp_path / "branch", resume=str(a_run))
    assert outcome.step == 6
    with pytest.raises(RunError, match="is neither a checkpoint nor a run"):
        train(tiny(*OVERRIDES), tmp_path / "new", resume=str(tmp_path / "nowhere"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", slow_after(1, ["step-lr-1e-3", "step-000010"]))
def test_a_run_is_known_by_what_is_in_it_not_by_its_name(tiny, a_run, tmp_path, name):
    """It "is not a checkpoint: it has no manifest.json"."""
    run_dir = shutil.copytree(a_run, tmp_path / name)
    last = run_dir / "checkpoints" / "step-000006"
    assert last_checkpoint(run_dir) == build.open_checkpoint(run_dir).folder == last
    assert last_checkpoint(last) == last
    assert train(tiny(*OVERRIDES), tmp_path / "branch", resume=str(run_dir)).step == 6
    (last / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=f"^{last} is not a checkpoint: it has no manifest.json"):
        build.open_checkpoint(last)
    gone = run_dir / "checkpoints" / "step-000003"
    with pytest.raises(CheckpointError, match=f"^{gone} is not a checkpoint: it does not exist. Name one"):
        build.open_checkpoint(gone)
    with pytest.raises(RunError, match="'step-by-step' is neither a checkpoint nor a run with one"):
        last_checkpoint(Path("step-by-step"))


def test_the_history_says_when_a_run_began_and_from_where_it_went_on(tiny, a_run, tmp_path):
    (began,) = map(json.loads, (a_run / "history.jsonl").read_text().splitlines())
    assert (began["step"], "from" in began) == (0, False)
    begun = a_run / "checkpoints" / "step-000004"
    train(tiny(*OVERRIDES), tmp_path / "branch", resume=str(begun))
    (went_on,) = map(json.loads, (tmp_path / "branch" / "history.jsonl").read_text().splitlines())
    assert (went_on["step"], went_on["from"]) == (4, str(begun))


def test_a_clock_that_goes_back_costs_no_checkpoint(tiny, tmp_path, monkeypatch):
    """The run on a machine whose clock is behind by more than the saving interval."""

    class Behind(checkpoint.datetime):
        hours = 0

        @classmethod
        def now(cls, tz=None):
            Behind.hours += 1
            return cls(2026, 1, 1, tzinfo=tz) - timedelta(hours=Behind.hours)

    monkeypatch.setattr(checkpoint, "datetime", Behind)
    outcome = train(tiny("train.steps=10", "checkpoint.every=2", "checkpoint.keep=2"), tmp_path)
    assert outcome.checkpoint == tmp_path / "checkpoints" / "step-000010"
    assert [path.name for path in checkpoint_folder.complete(tmp_path)] == ["step-000008", "step-000010"]
    assert checkpoint.load(outcome.checkpoint).step == 10


def test_infinite_weights_are_never_a_checkpoint(tiny, tmp_path, monkeypatch):
    """An update can overflow although loss and gradient were finite; the next step would tell, too late."""
    from act24.tools.run import train as module

    make = module.build_optimizer

    def overflowing(*arguments, **options):
        optimizer = make(*arguments, **options)

        def spoil(*_):
            if optimizer.param_groups[0]["updates"] == 4:
                optimizer.param_groups[0]["params"][-1].data[0, 0] = torch.inf

        optimizer.register_step_post_hook(spoil)
        return optimizer

    monkeypatch.setattr(module, "build_optimizer", overflowing)
    match = r"step 4 could not be saved in .*: .*weight is not finite; the last good .* is .*step-000002"
    with pytest.raises(CheckpointError, match=match):
        train(tiny("checkpoint.every=2"), tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_value_that_is_not_finite_is_found(value, dtype):
    tensors = {"a": torch.randn(7, 5).to(dtype), "b": torch.zeros(0, 3), "step": torch.tensor(3)}
    tensors["huge"] = torch.full((9,), torch.finfo(dtype).max, dtype=dtype)  # whose sum is no number
    checkpoint._check_finite(tensors)
    tensors["c"] = torch.randn(3, 1001).to(dtype)
    tensors["c"][1, 500] = value
    with pytest.raises(CheckpointError, match="c is not finite"):
        checkpoint._check_finite(tensors)


@pytest.mark.parametrize("what", slow_after(1, ["deleted", "named", "written again"]))
def test_a_reader_survives_what_a_run_does_to_the_checkpoint_under_it(copied, monkeypatch, caplog, what):
    """At each moment of reading: the newest checkpoint goes and a newer one is there; it gets its name; or
    its step is saved once more."""
    last = checkpoint_folder.latest(copied)
    then, now = {
        "deleted": (last, checkpoint_folder.folder_of(copied, 8)),
        "named": (last.with_name(f"{last.name}.tmp-0123456789ab"), last),
        "written again": (last, last),
    }[what]
    expected = evaluate_checkpoint(last)["dense"]
    saved = shutil.copytree(last, copied.with_name("saved"))

    def change():
        if changed:
            return
        changed.append(what)
        manifest = read_manifest(then)
        if then == now:
            (now / "plan.json").write_text(json.dumps(json.loads((now / "plan.json").read_text())))
            manifest["files"] = fingerprints(now, manifest["files"])
        else:
            then.rename(now)
        manifest["sequence"] += 1
        (now / "manifest.json").write_text(render(manifest))

    moments = [
        (checkpoint, "verify_files"),
        (checkpoint, "read_text"),
        (checkpoint, "read_weights"),
        (build, "parse_recipe"),
    ]
    for owner, name in moments:
        original, changed = getattr(owner, name), []
        shutil.rmtree(now, ignore_errors=True)
        shutil.rmtree(last, ignore_errors=True)
        shutil.copytree(saved, then)

        def and_then(*arguments, original=original, **options):
            change()
            return original(*arguments, **options)

        with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
            patch.setattr(owner, name, and_then)
            assert evaluate_checkpoint(copied)["dense"] == expected, name
        assert changed
        assert now.exists()


def both_train(path, run_dir, resume):
    with pytest.raises(Act24Error, match="already holds a run"):
        train(load_tiny(path, *OVERRIDES, "train.batch_size=2"), run_dir, resume=resume)


def test_all_processes_hear_of_a_folder_that_is_taken(tiny_file, a_run):
    run_ranks(2, both_train, tiny_file, a_run, "never")


def test_variants_have_folders_of_their_own():
    assert default_run_dir("c4/130m-dense") == Path("runs/c4-130m-dense")
    assert default_run_dir("my.toml", ["optimizer.lr=1e-3", "train.seed=2"]) == Path("runs/my,lr=1e-3,seed=2")
    steps = ["train.steps=99"]
    assert default_run_dir("demo", steps, scale_steps=True) == Path("runs/demo,steps=99,scaled")
    assert default_run_dir("demo", steps) == Path("runs/demo,steps=99")
    assert default_run_dir("my.toml", ['data.train_files=["a/*.txt"]']) == Path("runs/my,train_files=a_.txt")
    alike = ["eval.every=5", "log.every=5", "passes.cola.mlp_rank=5", "passes.lost.mlp_rank=5"]
    names = [f"runs/my,{end}=5" for end in ("eval.every", "log.every", "cola.mlp_rank", "lost.mlp_rank")]
    assert [str(default_run_dir("my.toml", [key])) for key in alike] == names
    long = [default_run_dir("demo", [f"data.train_files={'x' * 300}{i}"]) for i in range(2)]
    assert long[0] != long[1]
    assert all(len(path.name) < 120 for path in long)
