"""The comparison of low-rank methods at a size that a CPU can train: what it shortens, runs and keeps."""

import json

import pytest

from act24.recipes.load import load_recipe, parse_recipe
from act24.tools.commands.prepare import prepare_source
from act24.tools.experiments import low_rank

TINY = """
[model]
preset = "llama-9m"
vocab_size = 300
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 1
num_attention_heads = 2

[tokenizer]
vocab_size = 300
[data]
max_length = 16

[train]
steps = 1000
batch_size = 4
total_batch_size = 8
dtype = "float32"

[optimizer]
name = "loro_adamw"
lr = 1e-2
exact_every = 100

[schedule]
name = "cosine_restart"
warmup_steps = 100
restart_every = 100
lr_adjust_steps = -100

[[passes]]
use = "low_rank"
attn_rank = 8
mlp_rank = 8
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory, smaller_modules):
    folder = tmp_path_factory.mktemp("shards") / "shards"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        prepare_source("builtin", folder, "bpe", 300, 20_000, 5_000)
    return folder


def test_every_length_shrinks_in_proportion(shards):
    recipe = low_rank.shortened(load_recipe("c4/60m-loro"), shards, 60_000_000, 2.0, seed=3)
    steps = recipe.train.steps
    assert steps == 60_000_000 // (128 * 256)
    assert (recipe.optimizer.lr, recipe.train.seed) == (0.02, 3)
    assert recipe.optimizer.exact_every == recipe.schedule.restart_every == round(500 * steps / 10_000)
    assert recipe.schedule.warmup_steps == round(1000 * steps / 10_000) == -recipe.schedule.lr_adjust_steps
    for name, *overrides in low_rank.METHODS.values():
        recipe = low_rank.shortened(load_recipe(name, overrides), shards, 10_000_000, 1.0, seed=0)
        assert recipe.lr_multiplier(recipe.train.steps - 1) > 0


@pytest.mark.slow
def test_a_comparison_goes_on_where_it_stopped(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(low_rank, "METHODS", {"LORO": ("tiny",)})
    monkeypatch.setattr(low_rank, "load_recipe", lambda name, overrides: parse_recipe(TINY, name))
    monkeypatch.setattr(low_rank, "ROWS_A_STEP", 8)
    monkeypatch.setattr(low_rank, "HELDOUT_TOKENS", 1000)
    low_rank.compare(shards, tmp_path / "out", 8 * 16 * 60, 8 * 16 * 50, seeds=1)
    kept = json.loads((tmp_path / "out.json").read_text())
    assert sorted(kept) == ["LORO, seed 0", *(f"LORO, tuning at {f}" for f in (0.5, 1.0, 2.0))]
    assert kept["LORO, seed 0"]["steps"] == 60
    best = min((f for f in (0.5, 1.0, 2.0)), key=lambda f: kept[f"LORO, tuning at {f}"]["heldout_loss"])
    assert kept["LORO, seed 0"]["lr"] == 0.01 * best
    monkeypatch.setattr(low_rank, "one_run", None)  # nothing is to be run again
    low_rank.compare(shards, tmp_path / "out", 8 * 16 * 60, 8 * 16 * 50, seeds=1)
    assert f"{kept['LORO, seed 0']['heldout_loss']:.4f}" in (tmp_path / "out.md").read_text()
