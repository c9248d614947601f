"""`log.wandb` hands over to the package what it needs, goes on with its run, and is refused without it.

The package is a double in most of them; the last has the real one, with `WANDB_MODE=offline`.
"""

import contextlib
import json
import os
import signal
import struct
import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from act24.errors import Act24Error
from act24.tools.checkpoints import folder as checkpoint_folder
from act24.tools.run.train import TrainingRun, train
from act24.tools.watch.tensorboard import SummaryWriter

SHORT = ("log.wandb=true", "train.steps=2", "schedule.warmup_steps=1", "eval.every=0", "eval.tokens=100")


@pytest.fixture
def double(monkeypatch):
    """A module `wandb` that notes its calls, and when the event file was opened."""
    calls = []
    module = types.ModuleType("wandb")
    module.Error = type("Error", (Exception,), {})

    def init(**options):
        calls.append(options)
        return types.SimpleNamespace(id=options["id"] or "new-id")

    module.init = init
    module.run = types.SimpleNamespace(mark_preempting=lambda: calls.append("preempting"))
    module.finish = lambda exit_code: calls.append(exit_code)
    opened = SummaryWriter.__init__

    def noted(self, *arguments, **options):
        calls.append("events")
        opened(self, *arguments, **options)

    monkeypatch.setattr(SummaryWriter, "__init__", noted)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    return module, calls


def test_a_run_is_begun_before_its_events_and_gone_on_with(tiny, tmp_path, double):
    _, calls = double
    train(tiny(*SHORT), tmp_path / "run")
    options, *rest = calls
    assert rest == ["events", 0]
    assert options["sync_tensorboard"] is True
    assert (options["project"], options["name"]) == ("act24", "run")
    assert (options["id"], options["resume"]) == (None, "allow")
    assert options["config"]["optimizer.lr"] == 0.01
    state = json.loads((checkpoint_folder.latest(tmp_path / "run") / "state.json").read_text())
    assert state["wandb"] == "new-id"
    calls.clear()
    train(tiny(*SHORT, "train.steps=3"), tmp_path / "run", resume="auto")
    assert (calls[0]["id"], calls[1:]) == ("new-id", ["events", 0])
    calls.clear()
    train(tiny(*SHORT), tmp_path / "dry", dry_run=True)
    assert calls == []


@pytest.mark.parametrize(("ending", "told"), [("failure", [1]), ("signal", ["preempting", 75])])
def test_a_run_that_does_not_finish_is_not_finished_there(tiny, tmp_path, double, monkeypatch, ending, told):
    """Its status is 0 for "finished"; any other is "failed", and behind `mark_preempting` "preempted"."""
    _, calls = double
    advance = TrainingRun.advance

    def ends(run):
        if ending == "failure":
            raise ValueError("of the test")
        advance(run)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(TrainingRun, "advance", ends)
    with pytest.raises(ValueError, match="of the test") if ending == "failure" else contextlib.nullcontext():
        train(tiny(*SHORT), tmp_path / "run")
    assert calls[2:] == told


def test_what_the_package_refuses_is_one_line_and_no_run(tiny_file, tmp_path, double, act24):
    module, _ = double

    def refuse(**options):
        raise module.Error("No API key configured. Use `wandb login` to log in.")

    module.init = refuse
    sets = [word for line in SHORT for word in ("--set", line)]
    status, _, lines = act24("train", tiny_file, *sets, "--run-dir", tmp_path / "run")
    assert status == 2
    assert lines[-1] == (
        "act24: log.wandb: No API key configured. Use `wandb login` to log in; "
        "WANDB_MODE=offline keeps it on this disk"
    )
    assert not (tmp_path / "run" / "recipe.toml").exists()


def test_without_the_package_it_says_what_to_install(tiny_file, tmp_path, act24, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    status, _, lines = act24("train", tiny_file, "--set", "log.wandb=true", "--run-dir", tmp_path / "run")
    assert (status, len(lines)) == (2, 1)
    assert lines[0] == (
        "act24: log.wandb = true needs the package wandb, which is not installed: pip install wandb, or set "
        "log.wandb = false"
    )
    assert not (tmp_path / "run").exists()


def test_a_package_that_lacks_another_one_is_not_called_missing(tiny_file, tmp_path, act24, monkeypatch):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text("import nothing_of_this_name")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    status, _, lines = act24("train", tiny_file, "--set", "log.wandb=true", "--run-dir", tmp_path / "run")
    assert (status, len(lines)) == (2, 1)
    assert "is installed and cannot be imported (No module named 'nothing_of_this_name')" in lines[0]


def test_a_folder_of_its_files_does_not_pass_for_the_package(tiny_file, tmp_path, act24, monkeypatch):
    """`./wandb`, which the package leaves behind, is importable where it was removed."""
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    status, _, lines = act24("train", tiny_file, "--set", "log.wandb=true", "--run-dir", tmp_path / "run")
    assert (status, lines[0].partition(",")[0]) == (2, "act24: log.wandb = true needs the package wandb")


@pytest.mark.parametrize("own", [".", "files"])
def test_its_files_cannot_lie_in_the_runs_folder(tiny, tmp_path, double, monkeypatch, own):
    """It links the event files there, and would find the links among the run's event files."""
    _, calls = double
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    if own == "files":
        monkeypatch.setenv("WANDB_DIR", own)
    with pytest.raises(Act24Error, match=r"in the run's folder.*set WANDB_DIR to a folder outside"):
        train(tiny(*SHORT), tmp_path / "run")
    assert calls == []


def records(path):
    """What a `.wandb` file holds, LevelDB's log format behind seven bytes of its own."""
    content, at, record = path.read_bytes(), 7, b""
    while len(content) - at >= 7:
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        length, kind = struct.unpack("<4xHB", content[at : at + 7])
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its end
            yield record
            record = b""


def test_the_real_package_takes_every_value_once(tiny, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    train(tiny(*SHORT, "eval.every=2"), tmp_path / "runs" / "run")
    wandb.teardown()  # its own process writes the file, and to the end only then
    (log,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    losses = {"loss/train": [], "loss/val": []}
    for content in records(log):
        items = Record.FromString(content).history.item
        named = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
        for tag in losses.keys() & named.keys():
            losses[tag].append(named[tag])
    events = EventAccumulator(str(tmp_path / "runs" / "run")).Reload()
    for tag, values in losses.items():
        assert values == pytest.approx([event.value for event in events.Scalars(tag)]), tag
    assert [len(values) for values in losses.values()] == [2, 1]
