"""A checkpoint's files, altered behind valid hashes: opened, and gone on from."""

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import fuzzing
from damage import altered, damaged
from hypothesis import given
from hypothesis import strategies as st

from act24.recipes.load import load_recipe
from act24.tools.checkpoints.manifest import fingerprints, render
from act24.tools.run.build import load
from act24.tools.run.train import train

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))
import tiny


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    return load_recipe(str(tiny.write_recipe(folder)), ["train.steps=5", "model.num_hidden_layers=1"])


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, recipe):
    folder = tmp_path_factory.mktemp("run") / "run"
    with contextlib.redirect_stdout(io.StringIO()):
        train(recipe, folder)
    return folder


def reseal(folder: Path) -> None:
    """A manifest that fits the files as they are."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = fingerprints(folder, manifest["files"])
    (folder / "manifest.json").write_text(render(manifest))


@fuzzing
@given(st.data())
def test_checkpoints_behind_valid_hashes(tried, run_dir, recipe, tmp_path_factory, data):
    run = tmp_path_factory.mktemp("fuzzed") / "run"
    shutil.copytree(run_dir, run)
    (folder,) = (run / "checkpoints").iterdir()
    name = data.draw(st.sampled_from(sorted(json.loads((folder / "manifest.json").read_text())["files"])))
    path = folder / name
    if name.endswith(".json") and data.draw(st.integers(0, 2)):
        path.write_text(json.dumps(data.draw(altered(json.loads(path.read_text())))))
    else:
        path.write_bytes(data.draw(damaged(path.read_bytes())))
    reseal(folder)
    silent = contextlib.redirect_stdout(io.StringIO())

    def evaluate():
        with silent, torch.no_grad():
            load(run).model(torch.zeros(1, 4, dtype=torch.long))

    def resume():
        with silent:
            train(recipe, run, resume="auto")

    tried(evaluate)
    tried(resume)


@fuzzing
@given(st.data())
def test_checkpoints_as_they_are(tried, run_dir, tmp_path_factory, data):
    run = tmp_path_factory.mktemp("fuzzed") / "run"
    shutil.copytree(run_dir, run)
    (folder,) = (run / "checkpoints").iterdir()
    files = ["manifest.json", *json.loads((folder / "manifest.json").read_text())["files"]]
    path = folder / data.draw(st.sampled_from(sorted(files)))
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    tried(lambda: load(run))
