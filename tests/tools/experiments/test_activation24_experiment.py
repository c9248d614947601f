"""The comparison of 2:4 recipes at a size that a CPU can train: its variants, its queue, its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from slow import slow_but

from act24.sparse24.pattern.feature_wise import sparsify_feature_wise, token_permutation
from act24.sparse24.pattern.selection import densest, top2_of_4
from act24.tools.commands.prepare import prepare_source
from act24.tools.experiments import activation24 as experiment
from act24.tools.experiments.forward_mask_not_reused import forgetful_ffn

TOY = [
    "model.vocab_size=300",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "data.max_length=16",
    "train.dtype=float32",
    "eval.tokens=500",
    "log.every=2",
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, smaller_modules: None) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "shards"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        prepare_source("builtin", folder, "bpe", 300, 100_000, 20_000)
    return folder


@pytest.mark.parametrize("name", slow_but(("full recipe",), experiment.VARIANTS))
def test_every_variant_trains(name: str, shards: Path) -> None:
    variant = experiment.VARIANTS[name]
    recipe = experiment.recipe_of(variant, shards, 12 * 4 * 256, rows=4, seed=1, overrides=TOY)
    assert (recipe.train.steps, recipe.train.seed, recipe.schedule.warmup_steps) == (12, 1, 1)
    result = experiment.train_one(recipe, forms=not variant.forgetful)
    assert 3 < result["heldout_loss"] < 7
    assert "loss/train" in result["curves"]
    if name.startswith("weight24"):
        assert result["curves"]["flip_rate/mean"]
    if name == "full recipe":
        assert result["forms"].keys() == {"dense", "2:4"}
        assert {tag.partition("/")[0] for tag in result["curves"]} >= {
            "sparsity_feature_dropped_energy",
            "sparsity_gradient_cosine",
        }


def test_shares_become_steps(shards: Path) -> None:
    names = ("full recipe", "no warm-up", "weight24 transposable")
    recipes = [
        experiment.recipe_of(experiment.VARIANTS[name], shards, 1200 * 256 * 256, 256, 0) for name in names
    ]
    assert [recipes[0].train.steps, recipes[0].schedule.warmup_steps] == [1200, 120]
    full, none, weights = (recipe.passes[-1] for recipe in recipes)
    assert (full.from_step, none.from_step) == (120, 0)  # type: ignore[attr-defined]
    assert weights.until_step == 1000  # type: ignore[attr-defined]


def test_the_backward_that_forgets() -> None:
    """Straight through, and selected anew from what is dense again."""
    x = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    weight_in = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    weight_out = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 6, 3, dtype=torch.float64)
    y = forgetful_ffn(x, weight_in, weight_out, 0.2)
    positive = torch.relu(x @ weight_in.T).detach()
    assert torch.allclose(y, (positive**2 * top2_of_4(positive)) @ weight_out.T)
    grad_x, grad_in, grad_out = torch.autograd.grad(y, (x, weight_in, weight_out), grad)
    hidden = 2 * positive * (grad @ weight_out)
    assert torch.allclose(grad_x, (hidden * top2_of_4(hidden.abs())) @ weight_in)
    order = token_permutation((2, 6), "batch", x.device)
    assert order is not None
    rows = lambda tensor: tensor.flatten(0, 1)[order]  # noqa: E731
    dense = densest((positive.flatten(0, 1) > 0).sum(0), 0.2)
    assert torch.allclose(grad_in, sparsify_feature_wise(rows(hidden), dense).T @ rows(x))
    assert torch.allclose(grad_out, rows(grad).T @ sparsify_feature_wise(rows(positive**2), dense))
    assert int(dense.sum()) == 2
    exact = torch.autograd.grad(F.linear(torch.relu(x @ weight_in.T) ** 2, weight_out), weight_in, grad)[0]
    assert not torch.allclose(grad_in, exact)


@pytest.mark.slow
def test_the_queue_works_off_what_is_missing(shards: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    words = ["run", str(shards), str(out), "--tokens", str(12 * 4 * 256), "--rows", "4", "--gpus", "2"]
    words += [word for override in TOY for word in ("--set", override)]
    out.mkdir()
    curves = {"loss/train": [[1, 5.0], [2, 4.0]], "sparsity_relu/mean_across_layers": [[1, 0.5], [2, 0.9]]}
    done = {"name": "dense relu2", "heldout_loss": 4.0, "tokens_per_second": 10.0, "curves": curves}
    for seed in (0, 1):
        experiment.result_file(out, "dense relu2", seed).write_text(json.dumps(done | {"seed": seed}))
    bad = {"name": "mvue", "seed": 0, "diverged": "at step 3", "curves": curves}
    experiment.result_file(out, "mvue", 0).write_text(json.dumps(bad))
    log = "relu2_ffn  ...\nstep 10/12  loss 4.5  lr 1\nstep 10: held-out loss 4.9, perplexity 134\n"
    log += "step 12/12  loss 4.2  lr 1\n"
    experiment.result_file(out, "soft_dynamic", 0).with_suffix(".log").write_text(log)
    log += "step 12: held-out loss 4.1000, perplexity 60\n"
    experiment.result_file(out, "all-sparse backward", 0).with_suffix(".log").write_text(log)
    experiment.main([*words, "--seeds", "1", "--only", "dense relu2", "no warm-up", "mvue"])
    text = (out / "results.md").read_text()
    assert "no warm-up, seed 0: done" in capsys.readouterr().out
    new = json.loads(experiment.result_file(out, "no warm-up", 0).read_text())
    assert f"| no warm-up | {new['heldout_loss']:.4f} | {new['heldout_loss'] / 4 - 1:+.2%} |" in text
    assert "| dense relu2 | 4.0000, 4.0000 | +0.00% |" in text
    assert "90.0%" in text
    assert "| mvue | diverged |" in text
    assert "| soft_dynamic | cut off at step 12 |" in text
    assert "| all-sparse backward | 4.1000 | +2.50% |" in text
    experiment.main([*words, "--minutes", "-1", "--only", "full recipe"])
    assert "2 runs are left" in capsys.readouterr().out
