"""The demo's story, told by a smaller recipe."""

import re

import pytest

from act24.errors import Act24Error
from act24.tools.commands import demo


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
    with pytest.raises(Act24Error, match="holds something else than a run; choose another with --run-dir"):
        demo.run_demo(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "kept"
