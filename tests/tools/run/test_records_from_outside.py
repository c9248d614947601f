"""Optimizers and schedules that act24 does not have: registered in Python, and by an installed package."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy_records
from safetensors.torch import load_file
from tiny import write_recipe

from act24.optim import OPTIMIZERS
from act24.recipes.load import RecipeError, dump_recipe, parse_recipe
from act24.schedules import SCHEDULES
from act24.tools.checkpoints import folder as checkpoint_folder
from act24.tools.commands import doctor
from act24.tools.run.evaluate import evaluate_checkpoint
from act24.tools.run.optimizers import learning_rate
from act24.tools.run.train import train

ROOT = Path(__file__).resolve().parents[3]
TOY = [
    "optimizer={name='toy_momentum', lr=0.1, momentum=0.25}",
    "schedule={name='toy_stairs', stairs=4}",
    "train.steps=8",
    "passes.activation24.from_step=2",
]


@pytest.fixture
def registered(monkeypatch):
    for table in (OPTIMIZERS, SCHEDULES):
        monkeypatch.setattr(table, "_records", dict(table))
    toy_records.register()


def weights(run_dir):
    return load_file(checkpoint_folder.latest(run_dir) / "model.safetensors")


@pytest.mark.usefixtures("registered")
def test_a_toy_is_trained_resumed_evaluated_and_shown(tiny, tmp_path):
    recipe = tiny(*TOY, "checkpoint.every=5")
    assert [learning_rate(recipe, step) for step in range(8)] == pytest.approx(
        [0.1, 0.1, 0.075, 0.075, 0.05, 0.05, 0.025, 0.025]
    )
    assert 'name = "toy_momentum"\nlr = 0.1\nmomentum = 0.25\n' in dump_recipe(recipe)
    assert parse_recipe(dump_recipe(recipe), "again") == recipe
    whole = train(recipe, tmp_path / "whole")
    train(recipe, tmp_path / "parts")
    *_, last = checkpoint_folder.complete(tmp_path / "parts")
    shutil.rmtree(last)  # as if the run had been lost after the fifth step
    again = train(recipe, tmp_path / "parts", resume="auto")
    assert again.step == whole.step == 8
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "parts")[name]), name
    table = json.loads((checkpoint_folder.latest(tmp_path / "whole") / "optimizer.json").read_text())
    assert (table["class"], table["groups"][0]["options"]["momentum"]) == ("SGD", 0.25)
    found = evaluate_checkpoint(tmp_path / "whole", ())
    assert whole.evaluation.loss in [evaluation.loss for evaluation in found.values()]
    findings = {f.subject: f.finding for f in doctor.examine(torch.device("cpu"))}
    assert findings["optimizers of recipes"].endswith(", toy_momentum")
    assert findings["schedules of recipes"].endswith(", toy_stairs")


@pytest.mark.usefixtures("registered")
def test_its_options_are_checked_like_any_others(tiny):
    for override, message in (
        ("optimizer.momentum=1.0", r"optimizer\.momentum: has to be 0 or more and below 1, got 1\.0"),
        ("optimizer.momentun=0.5", r"optimizer\.momentun: unknown key: did you mean 'momentum'"),
        ("optimizer.exact_every=5", r'belongs to name = "loro_adamw", not to "toy_momentum"'),
        ("schedule.stairs=0", r"schedule\.stairs: has to be 1 or more, got 0"),
        ("schedule.warmup_steps=2", 'belongs to name = "cosine" or .*, not to "toy_stairs"'),
    ):
        with pytest.raises(RecipeError, match=message):
            tiny(*TOY, override)


def test_without_being_registered_it_is_unknown(tiny):
    with pytest.raises(RecipeError, match="no optimizer named 'toy_momentum'"):
        tiny(*TOY)


@pytest.fixture
def installed(tmp_path):
    """A folder of packages, as pip makes one, and how to run act24 beside it."""
    site = tmp_path / "site"
    metadata = site / "toy_act24-1.2.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-act24\nVersion: 1.2\n")
    shutil.copy(toy_records.__file__, site / "toy_act24.py")

    def run(*arguments, entry="toy_act24:register"):
        (metadata / "entry_points.txt").write_text(f"[act24.plugins]\ntoys = {entry}\n")
        path = os.pathsep.join([str(site), str(ROOT)])
        return subprocess.run(
            [sys.executable, "-m", "act24", *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_an_installed_package_is_found_by_every_command(installed, tmp_path):
    recipe = write_recipe(tmp_path)
    overrides = [word for override in TOY for word in ("--set", override)]
    trained = installed("train", recipe, *overrides, "--run-dir", tmp_path / "run")
    assert trained.returncode == 0, trained.stderr
    evaluated = installed("eval", tmp_path / "run", "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    assert "loss" in evaluated.stdout
    shown = installed("doctor")
    assert "toys of toy-act24 1.2" in shown.stdout
    assert "toy_momentum" in shown.stdout


def test_a_plugin_that_fails_says_so_in_one_line(installed, tmp_path):
    recipe = write_recipe(tmp_path)
    failed = installed("recipe", "validate", recipe, entry="toy_act24_gone:register")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.count("\n") == 1
    assert "plugin 'toys' of toy-act24 1.2" in failed.stderr
    assert "No module named 'toy_act24_gone'" in failed.stderr
    helped = installed("--help", entry="toy_act24_gone:register")
    assert helped.returncode == 0, "plugins are not loaded before a recipe is read"
    shown = installed("doctor", entry="toy_act24:nothing")
    assert shown.returncode == 0
    assert "plugin 'toys'" in shown.stdout
