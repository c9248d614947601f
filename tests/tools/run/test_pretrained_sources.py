"""`[model] pretrained` of a Hub name, of a folder of the old code, of a GGUF file: one update with a learning
rate of nothing leaves the weights that the source has."""

import dataclasses
import shutil

import huggingface_hub.constants
import pytest
import torch
import transformers
from safetensors.torch import load_file
from slow import slow_but

from act24 import LlamaForCausalLM
from act24.errors import Act24Error
from act24.tools.huggingface.export import export_run
from act24.tools.run.build import load
from act24.tools.run.train import train
from tests.tools.huggingface import test_old_folder as old
from tests.tools.run.test_pretrained import DENSE, branch, recipe, weights
from tests.tools.tiny import write_recipe

STILL = ("train.steps=1", "optimizer.lr=1e-30", "optimizer.weight_decay=0.0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    write_recipe(folder)
    train(recipe(folder, "train.steps=1", DENSE), folder / "warm")
    export_run(folder / "warm", folder / "exported")
    return folder


def begun_with(made, run):
    train(made, run)
    return weights(run)


def test_a_hub_name_is_read_from_the_cache_without_a_network(folder, tmp_path, monkeypatch):
    """The cache as huggingface_hub lays it out, and no network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--somebody--small"
    shutil.copytree(folder / "exported", cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    after = begun_with(branch(folder, "somebody/small", [], *STILL), tmp_path / "run")
    before = load_file(folder / "exported" / "model.safetensors")
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert load(tmp_path / "run").recipe.model.sha256
    with pytest.raises(Act24Error, match=r"somebody/other is no folder here, and the Hub .*does not give it"):
        train(branch(folder, "somebody/other", [], *STILL), tmp_path / "other")
    assert not (tmp_path / "other" / "checkpoints").exists()


@pytest.mark.parametrize("name", slow_but(("LORO",), ["dense", "LORO"]))
def test_a_folder_of_the_old_code(name, folder, tmp_path, monkeypatch):
    """With the pass that it had, parameter by parameter; dense where the factors have a product."""
    monkeypatch.setattr(old, "CONFIG", dataclasses.replace(old.CONFIG, vocab_size=300))
    source, model = old.case(name, tmp_path / "model_40")
    after = begun_with(branch(folder, source, [], *STILL), tmp_path / "run")
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "run").model(ids), model(ids), rtol=1e-4, atol=1e-5)
    assert not any(key.endswith(("_in", "_out")) for key in after)
    assert load(tmp_path / "run").step == 1  # not 41


def test_an_arcee_folder(folder, tmp_path):
    """A relu² network of transformers is the stock model with relu2_ffn; without the pass it is refused."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = transformers.ArceeForCausalLM(
        transformers.ArceeConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, eos_token_id=0)
    ).eval()
    model.save_pretrained(tmp_path / "arcee")
    shutil.copyfile(folder / "exported" / "tokenizer.json", tmp_path / "arcee" / "tokenizer.json")
    passes = [{"use": "relu2_ffn", "width": "keep"}]
    train(branch(folder, tmp_path / "arcee", passes, *STILL), tmp_path / "run")
    ours, ids = load(tmp_path / "run").model, torch.arange(24).view(2, 12)
    assert isinstance(ours, LlamaForCausalLM)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), model(ids).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(Act24Error, match=r"has no stock form.*same passes \(relu2_ffn\)"):
        train(branch(folder, tmp_path / "arcee", []), tmp_path / "other")


def test_a_gguf_file(folder, tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    export_run(folder / "warm", tmp_path / "model.gguf", "gguf")
    after = begun_with(branch(folder, tmp_path / "model.gguf", [], *STILL), tmp_path / "run")
    before = weights(folder / "warm")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    (tmp_path / "broken.gguf").write_bytes((tmp_path / "model.gguf").read_bytes()[:1000])
    with pytest.raises(Act24Error, match=r"transformers cannot open .*broken\.gguf"):
        train(branch(folder, tmp_path / "broken.gguf", [], *STILL), tmp_path / "other")
