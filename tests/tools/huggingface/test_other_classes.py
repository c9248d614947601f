"""Models of `transformers`' own classes leave as what was trained, or say what they leave out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import act24
from act24.errors import Act24Error
from act24.passes import Activation24, Cola, LowRank, Pass, Weight24
from act24.tools.huggingface import model_type  # noqa: F401  (registers it)
from act24.tools.huggingface.export import export_run, save_pretrained
from act24.tools.run.build import load
from act24.tools.run.opening import open_any
from act24.tools.run.train import train
from tests.tools.run.test_pretrained import branch, recipe
from tests.tools.tiny import TINY_SIZES, write_recipe

IDS = torch.arange(24).reshape(2, 12)
SIZES = {
    **TINY_SIZES,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "eos_token_id": 0,
    "bos_token_id": None,
}


def of_class(kind: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def dense(run: Any) -> torch.Tensor:
    with torch.no_grad(), run.pipeline.evaluation(("activation24",)):
        return run.model(IDS).logits


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a Nemotron, whose networks are relu² as they come: with 2:4 activations, and 2:4 weights in
    attention."""
    folder = tmp_path_factory.mktemp("nemotron")
    write_recipe(folder)
    of_class("Nemotron").save_pretrained(folder / "source")
    train(recipe(folder, "train.steps=1", "eval.every=0", "passes=[]"), folder / "warm")
    tokenizer = load(folder / "warm").tokenizer
    assert tokenizer is not None
    (folder / "source" / "tokenizer.json").write_text(tokenizer.to_json())
    passes = [{"use": "activation24"}, {"use": "weight24", "scope": "attn"}]
    train(branch(folder, folder / "source", passes, "train.steps=2", "eval.every=0"), folder / "run")
    return folder / "run"


def test_a_run_says_that_readers_compute_its_activations_dense(run: Path, tmp_path: Path) -> None:
    """It left as a class that computes another function, and not a word."""
    message, built = export_run(run, tmp_path / "out"), load(run)
    card = (tmp_path / "out" / "README.md").read_text()
    for told in (message, card):
        assert (
            "2:4 activations, which its readers compute dense, and no form of this class keeps them" in told
        )
        assert "Held-out loss with 2:4" in told
        assert "8 of its weights are 2:4: of every 4 along the inputs 2 stay" in told
    assert json.loads((tmp_path / "out" / "config.json").read_text())["act24_weight_pattern"] == "2:4"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, dense(built), atol=2e-6, rtol=1e-5)
        assert not torch.allclose(theirs(IDS).logits, built.model(IDS).logits, atol=1e-3)
    weight = theirs.model.layers[0].self_attn.q_proj.weight
    assert int((weight.unflatten(1, (-1, 4)) != 0).sum(-1).max()) == 2
    message = export_run(run, tmp_path / "masters", dense_weights=True)
    assert "dense masters" in message
    masters = AutoModelForCausalLM.from_pretrained(tmp_path / "masters").state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(masters[name], built.model.state_dict()[name])


@pytest.mark.slow
def test_a_run_is_measured_as_it_was_trained_and_elsewhere_dense_is_said(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`act24 eval --protocol` measured the activations dense."""
    built = load(run)
    with torch.no_grad():
        trained, plain = open_any(run, as_trained=True).model, open_any(run).model
        torch.testing.assert_close(trained(IDS).logits, built.model(IDS).logits, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(plain(IDS).logits, dense(built), atol=2e-6, rtol=1e-5)
    (warning,) = [r.getMessage() for r in caplog.records if "2:4 activations" in r.getMessage()]
    assert warning.endswith("was trained with 2:4 activations, which are computed dense here")


@pytest.mark.parametrize(
    ("kind", "passes"),
    [
        ("Arcee", [Activation24()]),
        ("Arcee", [Cola(scope="mlp", mlp_rank=8), Weight24(scope="attn")]),
        ("Qwen2", [Weight24()]),
        ("Qwen2", [LowRank(attn_rank=8, mlp_rank=8)]),
    ],
)
def test_a_rewritten_model_leaves_by_our_writer(kind: str, passes: list[Pass], tmp_path: Path) -> None:
    model = of_class(kind)
    pipeline = act24.apply_(model, passes, step=5)
    with pytest.raises(Act24Error, match=r"act24\.save_pretrained"):
        model.save_pretrained(tmp_path / "theirs")
    save_pretrained(pipeline, tmp_path / "out")
    again, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values()), told
    assert type(again).__name__ == ("Act24ForCausalLM" if kind == "Arcee" else "Qwen2ForCausalLM")
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(IDS).logits, model(IDS).logits, atol=2e-6, rtol=1e-5)
    pattern = json.loads((tmp_path / "out" / "config.json").read_text()).get("act24_weight_pattern")
    assert pattern == ("2:4" if any(isinstance(p, Weight24) for p in passes) else None)
    if kind == "Arcee" and (reopened := again.pipeline) is not None:  # there is a call to owe
        save_pretrained(reopened, tmp_path / "third")
        with torch.no_grad():
            third = AutoModelForCausalLM.from_pretrained(tmp_path / "third").eval()
            torch.testing.assert_close(third(IDS).logits, model(IDS).logits, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "passes", "why"),
    [
        ("Qwen2", [Cola(attn_rank=8, mlp_rank=8)], "between the factors stands silu"),
        ("Nemotron", [Activation24()], "compute 2:4 activations dense"),
    ],
)
def test_what_no_folder_brings_back_is_refused(
    kind: str, passes: list[Pass], why: str, tmp_path: Path
) -> None:
    pipeline = act24.apply_(of_class(kind), passes)
    with pytest.raises(Act24Error, match=rf"brings this {kind}ForCausalLM back.*{why}.*state_dict"):
        save_pretrained(pipeline, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_module_of_nobody_s_class_is_refused(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
    pipeline = act24.apply_(model, [Weight24(targets=("*",))])
    with pytest.raises(Act24Error, match=r"brings this \w+ back.*keep its state_dict"):
        save_pretrained(pipeline, tmp_path / "out")
