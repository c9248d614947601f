"""Exported runs open elsewhere and compute the same, in every form, or say what they leave out."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest
import torch
from slow import slow_but
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

import act24
from act24.errors import Act24Error
from act24.passes import Activation24, Cola, Lost, LowRank, Pass, Relu2FFN, SparseMask, Weight24
from act24.passes.recovery import keep_zeros_, set_masks_
from act24.tools.huggingface import model_type  # noqa: F401  (registers it)
from act24.tools.huggingface.export import export_run, save_pretrained
from act24.tools.run.build import load
from act24.tools.run.evaluate import evaluate_checkpoint
from act24.tools.run.train import train

IDS = torch.arange(24).reshape(2, 12)
RANKS = {"attn_rank": 8, "mlp_rank": 8}

#: Passes by name: those of shipped recipes, and 2:4 weights under every method.
RUNS: dict[str, tuple[Pass, ...]] = {
    "dense": (),
    "relu2": (Relu2FFN(),),
    "relu": (Relu2FFN(activation="relu"),),
    "relu2-act24": (Relu2FFN(), Activation24(from_step=3)),
    "relu2-mvue": (Relu2FFN(), Activation24(method="mvue")),
    "relu2-soft": (Relu2FFN(), Activation24(method="soft_dynamic", backward="split_gemm")),
    "loro": (LowRank(**RANKS),),
    "loro-relu2": (Relu2FFN(), LowRank(**RANKS)),
    "cola-relu2-act24": (Relu2FFN(), Cola(**RANKS, bottleneck="relu2"), Activation24()),
    "lost": (Lost(**RANKS),),
    "weight24": (Weight24(),),
    "weight24-soft": (Weight24(method="soft_threshold"),),
    "weight24-sr_ste": (Weight24(method="sr_ste"),),
    "weight24-relu2": (Relu2FFN(), Weight24()),
    "weight24-not-yet": (Weight24(from_step=100),),
}
#: The first form that holds each.
FORMS = {
    "llama": ("dense", "loro", "weight24", "weight24-soft", "weight24-sr_ste", "weight24-not-yet"),
    "arcee": ("relu2", "relu2-act24", "relu2-mvue", "relu2-soft", "loro-relu2", "weight24-relu2"),
    "act24": ("relu", "cola-relu2-act24", "lost"),
}
#: What a reader of the first form computes otherwise: activations that were 2:4 in training.
DENSE_ACTIVATIONS = ("relu2-act24", "relu2-mvue", "relu2-soft")
#: One of each form, one with 2:4 activations, and 2:4 weights.
QUICK = ("relu2-act24", "loro-relu2", "cola-relu2-act24", "weight24-soft")

WEIGHTS = [name for name in RUNS if name.startswith("weight24")]


@pytest.fixture(scope="session")
def runs(tiny_file, tmp_path_factory):
    """A finished run of every entry of RUNS, made when it is first asked for."""
    import tiny as tiny_recipe

    folder, made = tmp_path_factory.mktemp("runs"), {}

    def run(name):
        if name not in made:
            recipe = tiny_recipe.load_tiny(tiny_file, "train.steps=6", "eval.every=0")
            train(recipe.model_copy(update={"passes": RUNS[name]}), folder / name)
            made[name] = folder / name
        return made[name]

    return run


def served(run, without=()) -> torch.Tensor:
    """Logits of a run as its own evaluation has them, with masks of the weights that are read."""
    built = load(run)
    with torch.no_grad(), built.pipeline.evaluation(without):
        return built.model(IDS)


def test_every_run_has_a_form():
    assert sorted(RUNS) == sorted(name for names in FORMS.values() for name in names)


@pytest.mark.parametrize("name", slow_but(QUICK, RUNS))
def test_the_first_form_is_the_trained_function_or_says_what_it_leaves_out(runs, name, tmp_path):
    message = export_run(runs(name), tmp_path / "out")
    kind = json.loads((tmp_path / "out" / "config.json").read_text())["model_type"]
    assert name in FORMS[kind]
    theirs, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values()), told
    left_out = ("activation24",) if name in DENSE_ACTIVATIONS else ()
    with torch.no_grad():
        torch.testing.assert_close(
            theirs.eval()(IDS).logits, served(runs(name), left_out), atol=2e-6, rtol=1e-5
        )
    assert ("compute dense" in message) == bool(left_out)
    assert ("Held-out loss with 2:4" in message) == bool(left_out)
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(line in card for line in message.splitlines()[1:])


@pytest.mark.parametrize("name", slow_but(QUICK, RUNS))
def test_the_form_act24_is_the_trained_function_and_comes_back_to_us(runs, name, tmp_path):
    export_run(runs(name), tmp_path / "out", "act24")
    expected = served(runs(name))
    theirs, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values()), told
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(IDS).logits, expected, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(load(tmp_path / "out").model(IDS), expected, atol=2e-6, rtol=1e-5)
    cached, plain = (
        theirs.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=c) for c in (True, False)
    )
    assert torch.equal(cached, plain)


@pytest.mark.parametrize(
    ("name", "form"),
    slow_but(
        [("weight24-soft", "act24"), ("weight24-soft", "auto"), ("weight24-relu2", "auto")],
        itertools.product(WEIGHTS, ("auto", "act24")),
    ),
)
def test_2_4_weights_leave_exactly_2_4_and_the_config_says_so(runs, name, form, tmp_path):
    export_run(runs(name), tmp_path / "out", form)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    weights = [p for n, p in model.named_parameters() if "layers" in n and p.ndim == 2]
    zeros = [int((w.unflatten(1, (-1, 4)) != 0).sum(-1).max()) for w in weights]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    in_force = name != "weight24-not-yet"
    assert set(zeros) == ({2} if in_force else {4})
    assert config.get("act24_weight_pattern") == ("2:4" if in_force else None)


def test_dense_masters_leave_only_by_name(runs, tmp_path):
    message = export_run(runs("weight24"), tmp_path / "out", dense_weights=True)
    assert "dense masters" in message
    model, masters = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), load(runs("weight24")).model
    for name, value in model.named_parameters():
        assert torch.equal(value, masters.get_parameter(name))


def test_a_form_that_does_not_hold_the_model_is_refused_with_the_one_that_does(runs, tmp_path):
    with pytest.raises(Act24Error, match=r'no form "llama".*--as arcee'):
        export_run(runs("relu2"), tmp_path / "out", "llama")
    with pytest.raises(Act24Error, match=r'no form "arcee".*--as act24'):
        export_run(runs("lost"), tmp_path / "out", "arcee")
    with pytest.raises(Act24Error, match=r"did you mean 'arcee'"):
        export_run(runs("relu2"), tmp_path / "out", "arce")
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_and_the_ends_of_generation_come_along(runs, tmp_path):
    export_run(runs("relu2"), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert tokenizer.eos_token == "<|endoftext|>"
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id
    assert tokenizer.decode(tokenizer("two of four")["input_ids"]) == "two of four"


def test_trust_remote_code_opens_the_form_act24_where_nothing_was_imported(runs, tmp_path):
    """Also once it was saved again: by who imported act24, and by who did not."""
    export_run(runs("cola-relu2-act24"), tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    code = f"""
import torch
from transformers import AutoModelForCausalLM
for source in ("out", "again", "unimported"):
    folder = {str(tmp_path)!r} + "/" + source
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    torch.save(model(torch.arange(24).reshape(2, 12)).logits, folder + ".pt")
    if source == "out":
        model.save_pretrained({str(tmp_path / "unimported")!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    expected = served(runs("cola-relu2-act24"))
    for source in ("out", "again", "unimported"):
        torch.testing.assert_close(torch.load(tmp_path / f"{source}.pt"), expected, atol=2e-6, rtol=1e-5)
        assert [file.name for file in (tmp_path / source).glob("*.py")] == ["modeling_act24.py"]


def test_a_model_of_the_type_act24_is_saved_with_its_passes(runs, tmp_path):
    export_run(runs("lost"), tmp_path / "out")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    opened.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again(IDS).logits, opened(IDS).logits)
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "again").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]  # safetensors leaves what only its owner reads


def test_what_was_exported_can_be_exported_again(runs, tmp_path):
    export_run(runs("relu2"), tmp_path / "first")
    opened = load(tmp_path / "first")
    assert opened.recipe is None
    export_run(tmp_path / "first", tmp_path / "second")
    first, second = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("first", "second")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_model_without_a_recipe_is_not_evaluated_without_a_word(runs, tmp_path):
    export_run(runs("relu2"), tmp_path / "out")
    with pytest.raises(Act24Error, match=r"holds a model and no recipe"):
        evaluate_checkpoint(tmp_path / "out")


def test_nothing_is_overwritten(runs, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(Act24Error, match="exists already"):
        export_run(runs("dense"), tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "tied"),
    [("relu2-act24", False), ("cola-relu2-act24", False), ("weight24", False), ("lost", True)],
)
def test_a_rewritten_transformers_model_leaves_by_our_writer_as_the_same_function(name, tied, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    pipeline = act24.apply_(model, RUNS[name], step=5)
    save_pretrained(pipeline, tmp_path / "out")
    again, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values()), told
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(IDS).logits, model(IDS).logits, atol=2e-6, rtol=1e-5)


def test_what_a_model_generates_with_comes_along(tmp_path):
    """By our writer, by `transformers` when that folder is saved again, and where it is exported."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, eos_token_id=[1, 3]))
    model.generation_config.update(do_sample=True, temperature=0.5, top_p=0.9, eos_token_id=[1, 3])
    save_pretrained(act24.apply_(model, RUNS["relu2"]), tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    export_run(tmp_path / "again", tmp_path / "exported")
    for name in ("out", "again", "exported"):
        found = AutoModelForCausalLM.from_pretrained(tmp_path / name).generation_config
        assert (found.temperature, found.top_p, found.eos_token_id) == (0.5, 0.9, [1, 3]), name


def test_an_opened_folder_is_trained_by_its_pipeline(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2))
    save_pretrained(act24.apply_(model, RUNS["relu2-soft"]), tmp_path / "out")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out").train()
    with pytest.raises(Act24Error, match="begin_update_"):
        opened(IDS)
    opened.pipeline.begin_update_(0, {"input_ids": IDS})
    opened(IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize("kept", [False, True])
def test_a_loop_that_lost_the_zeros_of_a_pruned_model_does_not_save_it(kept, tmp_path):
    model = act24.LlamaForCausalLM(act24.llama_config("llama-9m", vocab_size=97, num_hidden_layers=1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[..., ::2] = 0
    pipeline = act24.apply_(model, [SparseMask(masks="zeros")])
    set_masks_(pipeline, None)
    end = keep_zeros_(pipeline) if kept else lambda: None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(IDS).square().mean().backward()
    optimizer.step()
    end()
    if kept:
        save_pretrained(pipeline, tmp_path / "out")
        torch.testing.assert_close(load(tmp_path / "out").model(IDS), model(IDS))
    else:
        with pytest.raises(Act24Error, match=r"o_proj\.weight: .* pruned are not zero"):
            save_pretrained(pipeline, tmp_path / "out")


def test_a_model_that_no_folder_brings_back_is_refused_in_a_line(tmp_path):
    """Without the list of classes that `transformers` gives."""
    config = T5Config(d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2, vocab_size=97)
    pipeline = act24.apply_(T5ForConditionalGeneration(config), [Weight24()], check=False)
    with pytest.raises(Act24Error, match=r"no folder that brings this T5.*; keep its state_dict") as error:
        save_pretrained(pipeline, tmp_path / "out")
    assert len(str(error.value)) <= 300
