"""`log.wandb` hands over to the package what it needs, goes on with its run, and is refused without it.

The package is a double here: what its real one makes of it was seen with `WANDB_MODE=offline`.
"""

import json
import sys
import types

import pytest

from act24.tools.checkpoints import folder as checkpoint_folder
from act24.tools.run.train import train
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
    module.finish = lambda: calls.append("finish")
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
    assert rest == ["events", "finish"]
    assert options["sync_tensorboard"] is True
    assert (options["project"], options["name"], options["dir"]) == ("act24", "run", str(tmp_path / "run"))
    assert (options["id"], options["resume"]) == (None, "allow")
    assert options["config"]["optimizer.lr"] == 0.01
    state = json.loads((checkpoint_folder.latest(tmp_path / "run") / "state.json").read_text())
    assert state["wandb"] == "new-id"
    calls.clear()
    train(tiny(*SHORT, "train.steps=3"), tmp_path / "run", resume="auto")
    assert (calls[0]["id"], calls[1:]) == ("new-id", ["events", "finish"])
    calls.clear()
    train(tiny(*SHORT), tmp_path / "dry", dry_run=True)
    assert calls == []


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
