"""config.json, tokenizer_config.json and generation_config.json: with `transformers` and without it, of one
end of a text and of several, and of shapes that `transformers` has its own mind about."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from act24.errors import Act24Error
from act24.initialise import build_llama
from act24.llama import LlamaConfig
from act24.tools.huggingface import model_type  # noqa: F401  (registers it)
from act24.tools.huggingface.any_model import write_any
from act24.tools.huggingface.export import export_run
from act24.tools.huggingface.folder import save_pretrained, write_pretrained
from act24.tools.huggingface.tokenizer_files import write_tokenizer
from act24.tools.run.build import load
from act24.tools.run.opening import open_any
from act24.tools.run.train import train
from tests.tools.run.test_pretrained import branch, recipe
from tests.tools.tiny import TINY_SIZES, write_recipe

IDS = torch.arange(24).reshape(2, 12)
#: By form, the overrides of a run that leaves in it.
PASSES = {"llama": "[]", "arcee": '[{use="relu2_ffn"}]', "act24": '[{use="cola", attn_rank=8, mlp_rank=8}]'}
SMALL = ("config.json", "tokenizer_config.json", "generation_config.json")


def forms(fast: str) -> list[Any]:
    return [pytest.param(form, marks=() if form == fast else pytest.mark.slow) for form in PASSES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    write_recipe(folder)
    return folder


def run_of(folder: Path, name: str, *overrides: str) -> Path:
    run = folder / name
    if not run.exists():
        train(recipe(folder, "train.steps=1", "eval.every=0", *overrides), run)
    return run


@pytest.mark.parametrize("form", forms("act24"))
def test_with_transformers_the_files_say_the_same_and_what_transformers_adds(
    folder: Path, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(folder, form, f"passes={PASSES[form]}")
    export_run(run, tmp_path / "with")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        export_run(run, tmp_path / "without")
    added = {}
    for name in SMALL:
        ours, both = (json.loads((tmp_path / n / name).read_text()) for n in ("without", "with"))
        assert {key: both[key] for key in ours} == ours
        added[name] = both.keys() - ours.keys()
    assert all("transformers_version" in added[name] for name in ("config.json", "generation_config.json"))
    read = [AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("with", "without")]
    assert read[0] | {"transformers_version": None, "_name_or_path": ""} == read[1] | {
        "transformers_version": None,
        "_name_or_path": "",
    }
    opened = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("with", "without")]
    assert torch.equal(*(model.eval()(IDS).logits for model in opened))
    text = [AutoTokenizer.from_pretrained(tmp_path / name) for name in ("with", "without")]
    assert text[0]("two of four") == text[1]("two of four")
    assert text[0].special_tokens_map == text[1].special_tokens_map


@pytest.mark.parametrize("form", forms("act24"))
def test_a_batch_of_prompts_goes_on_as_each_of_them_alone(folder: Path, form: str, tmp_path: Path) -> None:
    """Filled at the right, which is the default of `transformers`, the shorter ones go on behind padding."""
    export_run(run_of(folder, form, f"passes={PASSES[form]}"), out := tmp_path / "out")
    assert json.loads((out / "tokenizer_config.json").read_text())["padding_side"] == "left"
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    prompts = ["two of four tokens graph pass", "low", "the rank"]

    def on(texts: list[str]) -> list[list[int]]:
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        rows = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False
        )
        return rows[:, ids.shape[1] :].tolist()

    assert on(prompts) == [on([prompt])[0] for prompt in prompts]


@pytest.mark.parametrize("form", forms("arcee"))
def test_heads_that_do_not_divide_the_width_leave_as_what_transformers_opens(
    folder: Path, form: str, tmp_path: Path
) -> None:
    """`transformers` 5 refuses such a LLaMA and such an Arcee, which were written."""
    shape = ("model.hidden_size=40", "model.num_attention_heads=3", "model.head_dim=16")
    run = tmp_path / "run"
    train(recipe(folder, "train.steps=1", "eval.every=0", f"passes={PASSES[form]}", *shape), run)
    export_run(run, tmp_path / "out")
    write_any(open_any(run), tmp_path / "again")
    with torch.no_grad():
        expected = load(run).model(IDS)
        for name in ("out", "again"):
            theirs = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()(IDS).logits
            torch.testing.assert_close(theirs, expected, atol=2e-6, rtol=1e-5)
    with pytest.raises(Act24Error, match=r'no form "llama": transformers wants a hidden_size.*--as act24'):
        export_run(run, tmp_path / "llama", "llama")


@pytest.mark.slow
def test_networks_of_different_widths_leave_as_act24(folder: Path, tmp_path: Path) -> None:
    passes = (
        '[{use="relu2_ffn", targets=["*.layers.0.mlp"], width="keep"}, '
        '{use="relu2_ffn", targets=["*.layers.1.mlp"]}]'
    )
    train(recipe(folder, "train.steps=1", "eval.every=0", f"passes={passes}"), tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(IDS).logits, load(tmp_path / "run").model(IDS), atol=2e-6, rtol=1e-5
        )
    with pytest.raises(Act24Error, match=r"Arcee has one width of networks, and these have \[48, 128\]"):
        export_run(tmp_path / "run", tmp_path / "arcee", "arcee")


def test_of_a_whole_file_and_shards_that_is_read_which_transformers_reads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever saves both ways into one folder leaves the index; and by our writer nothing is left."""
    config = transformers.LlamaConfig(**TINY_SIZES)
    sharded, whole = (transformers.LlamaForCausalLM(config) for _ in range(2))
    sharded.save_pretrained(tmp_path / "both", max_shard_size="20KB")
    whole.save_pretrained(tmp_path / "one")
    shutil.copyfile(tmp_path / "one" / "model.safetensors", tmp_path / "both" / "model.safetensors")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "both").eval()
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "both").model(IDS), read(IDS).logits, atol=2e-6, rtol=1e-5)
    assert "the first is read, as transformers does" in caplog.text
    ours = load(tmp_path / "one").model
    for shard in (20_000, 10**9, 20_000):
        write_pretrained(tmp_path / "ours", ours.config, "llama", ours.state_dict(), shard=shard)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
        assert all(torch.equal(again[name], value) for name, value in ours.state_dict().items())
        names = {path.name for path in (tmp_path / "ours").iterdir()}
        assert ("model.safetensors" in names) == ("model.safetensors.index.json" not in names)


def test_what_transformers_would_not_open_is_not_written(tmp_path: Path) -> None:
    config = LlamaConfig(97, 40, 48, 1, 3, head_dim=16)
    with pytest.raises(Act24Error, match=r"transformers 5.* would not open this model.*multiple"):
        save_pretrained(build_llama(config, 0), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["Llama", pytest.param("Qwen2", marks=pytest.mark.slow)])
def test_a_model_of_several_ends_keeps_them(folder: Path, kind: str, tmp_path: Path) -> None:
    """And what it samples with. As the stock model, and as `transformers`' own class."""
    torch.manual_seed(0)
    tokens = {"bos_token_id": 7, "eos_token_id": [0, 9], "pad_token_id": 1}
    config = getattr(transformers, f"{kind}Config")(**TINY_SIZES, **tokens)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path / "source")
    first = load(run_of(folder, "llama", f"passes={PASSES['llama']}"))
    assert first.tokenizer is not None
    end = first.tokenizer.eos_id
    (tmp_path / "source" / "tokenizer.json").write_text(first.tokenizer.to_json())
    sampling = {"do_sample": True, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1}
    began = {**sampling, "eos_token_id": [0, 9], "bos_token_id": 7, "pad_token_id": 3}
    (tmp_path / "source" / "generation_config.json").write_text(json.dumps(began))
    train(branch(folder, tmp_path / "source", [], "train.steps=1", "eval.every=0"), tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    write_any(open_any(tmp_path / "run"), tmp_path / "again")
    assert end == 0
    sampled = {**sampling, "pad_token_id": 3, "eos_token_id": [0, 9]}
    for name in ("out", "again"):
        found = GenerationConfig.from_pretrained(tmp_path / name)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert found.eos_token_id == model.config.eos_token_id == [0, 9], name
        assert found.bos_token_id == 7
        assert {key: getattr(found, key) for key in sampled} == sampled, name
        assert model.config.pad_token_id == 1
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 7)


def test_generation_settings_of_another_tokenizer_are_left_out(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load(run_of(folder, "llama", f"passes={PASSES['llama']}")).tokenizer
    assert tokenizer is not None
    began = {"eos_token_id": [5, 9], "pad_token_id": 9, "bad_words_ids": [[4]]}
    write_tokenizer(tmp_path, tokenizer, LlamaConfig(300, 32, 48, 1, 4), 64, began)
    assert "they end a text at [5, 9], its tokenizer at 0" in caplog.text
    found = GenerationConfig.from_pretrained(tmp_path)
    assert (found.eos_token_id, found.pad_token_id, found.bad_words_ids) == (0, tokenizer.pad_id, None)
