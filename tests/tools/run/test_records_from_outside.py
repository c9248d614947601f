"""Optimizers and schedules that act24 does not have: registered in Python, and by an installed package."""

import functools
import json
import os
import shutil
import sys

import pytest
import torch
import toy_records
from children import Command
from safetensors.torch import load_file

from act24.optim import OPTIMIZERS
from act24.recipes.load import RecipeError, dump_recipe, parse_recipe
from act24.schedules import SCHEDULES
from act24.tools.checkpoints import folder as checkpoint_folder
from act24.tools.commands import doctor
from act24.tools.run.evaluate import evaluate_checkpoint
from act24.tools.run.optimizers import learning_rate
from act24.tools.run.train import train

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


def as_installed(site, folder):
    sys.path.insert(0, str(site))
    os.chdir(folder)


@pytest.fixture
def installed(tmp_path):
    """A folder of packages, as pip makes one, and how to run act24 beside it: status, and both outputs."""
    site = tmp_path / "site"
    metadata = site / "toy_act24-1.2.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-act24\nVersion: 1.2\n")
    shutil.copy(toy_records.__file__, site / "toy_act24.py")

    def run(*arguments, entry="toy_act24:register"):
        (metadata / "entry_points.txt").write_text(f"[act24.plugins]\ntoys = {entry}\n")
        with Command(*arguments, before=functools.partial(as_installed, site, tmp_path)) as command:
            return command.end()

    return run


def test_an_installed_package_is_found_by_every_command(installed, tiny_file, tmp_path):
    overrides = [word for override in TOY for word in ("--set", override)]
    status, _, error = installed("train", tiny_file, *overrides, "--run-dir", tmp_path / "run")
    assert status == 0, error
    status, out, error = installed("eval", tmp_path / "run", "--json")
    assert status == 0, error
    assert "loss" in out
    _, out, _ = installed("doctor")
    assert "toys of toy-act24 1.2" in out
    assert "toy_momentum" in out


def test_a_plugin_that_fails_says_so_in_one_line(installed, tiny_file):
    status, out, error = installed("recipe", "validate", tiny_file, entry="toy_act24_gone:register")
    assert (status, out) == (2, "")
    assert error.count("\n") == 1
    assert "plugin 'toys' of toy-act24 1.2" in error
    assert "No module named 'toy_act24_gone'" in error
    status, _, error = installed("--help", entry="toy_act24_gone:register")
    assert status == 0, "plugins are not loaded before a recipe is read"
    status, out, _ = installed("doctor", entry="toy_act24:nothing")
    assert status == 0
    assert "plugin 'toys'" in out
