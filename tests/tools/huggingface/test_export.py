"""Exported runs open elsewhere and compute the same."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from act24.errors import Act24Error
from act24.tools.huggingface.export import export_run
from act24.tools.run.build import load
from act24.tools.run.train import train

IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture
def trained(tiny, tmp_path):
    def run(*overrides, passes=None):
        recipe = tiny("train.steps=6", *overrides)
        if passes is not None:
            recipe = recipe.model_copy(update={"passes": passes})
        train(recipe, tmp_path / "run")
        return tmp_path / "run"

    return run


def test_factors_multiply_out_to_a_stock_checkpoint_of_equal_logits(trained, tmp_path):
    from act24.passes import LowRank

    run = trained(passes=(LowRank(attn_rank=8, mlp_rank=8),))
    assert "Hugging Face" in export_run(run, tmp_path / "out")
    ours = load(run).model.eval()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.allclose(theirs(IDS).logits, ours(IDS), atol=1e-4)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_what_has_no_stock_form_is_written_as_it_is_with_the_reason(trained, tmp_path):
    run = trained()  # relu² and 2:4
    message = export_run(run, tmp_path / "out")
    assert "different functions" in message
    assert not (tmp_path / "out" / "optimizer").exists()
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out").model(IDS), load(run).model(IDS))


def test_nothing_is_overwritten(trained, tmp_path):
    run = trained()
    (tmp_path / "out").mkdir()
    with pytest.raises(Act24Error, match="exists already"):
        export_run(run, tmp_path / "out")
