"""Runs that start from weights: of a run, a folder, another class; and those that keep zeros."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from slow import slow_after, slow_but

from act24.errors import Act24Error
from act24.recipes.load import load_recipe
from act24.recipes.schema import Recipe
from act24.tools.huggingface.export import export_run
from act24.tools.pruning.folder import prune_model
from act24.tools.pruning.masks import read_masks
from act24.tools.run import train as train_module
from act24.tools.run.build import load
from act24.tools.run.pretrained import plan
from act24.tools.run.train import train
from tests.tools.tiny import TINY_SIZES, write_recipe

DENSE = "passes=[]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    write_recipe(folder)
    return folder


@pytest.fixture(scope="module")
def warm(folder):
    """A dense run of 6 steps."""
    run = folder / "warm"
    train(recipe(folder, "train.steps=6", DENSE), run)
    return run


@pytest.fixture(scope="module")
def pruned(folder, warm):
    """The same, pruned 2:4."""
    from act24.tools.commands.recovery import calibration_data

    data = calibration_data(str(folder / "train-*.txt"), ())
    prune_model(str(warm), folder / "pruned", data=data, samples=8, seqlen=16)
    return folder / "pruned"


def recipe(folder, *overrides: str) -> Recipe:
    return load_recipe(str(folder / "tiny.toml"), ("schedule.warmup_steps=0", *overrides))


def branch(folder, source, passes, *overrides, **model) -> Recipe:
    """The tiny recipe, started from a model."""
    text = (folder / "tiny.toml").read_text()
    rest = text.partition("[tokenizer]")[2].replace("warmup_steps = 4", "warmup_steps = 0")
    body = rest.partition("[[passes]]")[0]
    file = folder / "branch.toml"
    tables = "".join(
        "[[passes]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in p.items()) for p in passes
    )
    tokenizer = (
        f'[tokenizer]\nname = "{source}/tokenizer.json"\n'
        if Path(source, "tokenizer.json").exists()
        else "[tokenizer]"
    )
    body = body.replace("\nvocab_size = 300\n", "\n", 1) if "name" in tokenizer else body
    file.write_text(f'[model]\npretrained = "{source}"\n{tokenizer}{body}{tables}')
    return load_recipe(str(file), overrides)


def weights(run):
    return load(run).model.state_dict()


def test_a_branch_begins_where_the_warm_up_ended(folder, warm, tmp_path):
    """One update with a learning rate of nothing: the weights are those of the warm-up."""
    still = ("train.steps=1", "optimizer.lr=1e-30", "optimizer.weight_decay=0.0")
    train(branch(folder, warm, [], *still), tmp_path / "run")
    before, after = weights(warm), weights(tmp_path / "run")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    saved = load(tmp_path / "run")
    assert saved.recipe.model.sha256
    assert saved.step == 1  # its own count, not 7


@pytest.mark.parametrize(
    "passes",
    slow_after(
        2,
        [
            [{"use": "weight24", "method": "ste"}],
            [{"use": "low_rank", "attn_rank": 32, "mlp_rank": 32}],
            [{"use": "relu2_ffn"}, {"use": "activation24"}],
            [{"use": "cola", "attn_rank": 8, "mlp_rank": 8}],
            [{"use": "lora"}],
        ],
    ),
    ids=lambda passes: passes[-1]["use"],
)
def test_branches_with_other_methods(folder, warm, tmp_path, passes, caplog):
    """From one warm-up, each with another method: what the method does not replace is the warm-up's."""
    still = ("train.steps=1", "optimizer.lr=1e-30", "optimizer.weight_decay=0.0")
    train(branch(folder, warm, passes, *still), tmp_path / "run")
    before, after = weights(warm), weights(tmp_path / "run")
    shared = before.keys() & after.keys()
    assert "model.embed_tokens.weight" in shared
    replaced = {"relu2_ffn": "mlp"}.get(passes[0]["use"], "nothing")
    assert all(torch.equal(before[name], after[name]) for name in shared if replaced not in name)
    fresh = "start fresh" in caplog.text
    assert fresh is (passes[0]["use"] in ("relu2_ffn", "cola", "lora"))
    if passes[0]["use"] == "low_rank":  # of full rank: the product is the weight
        name = "model.layers.0.self_attn.q_proj.weight"
        product = after[f"{name}_out"] @ after[f"{name}_in"]
        torch.testing.assert_close(product, before[name], rtol=1e-4, atol=1e-5)


def test_a_relu2_run_branches_into_24_with_its_own_parameters(folder, tmp_path):
    train(recipe(folder, "train.steps=3"), tmp_path / "relu2")
    passes = [{"use": "relu2_ffn"}, {"use": "weight24", "method": "ste"}]
    still = ("train.steps=1", "optimizer.lr=1e-30", "optimizer.weight_decay=0.0")
    train(branch(folder, tmp_path / "relu2", passes, *still), tmp_path / "run")
    before, after = weights(tmp_path / "relu2"), weights(tmp_path / "run")
    named = [name for name in before if "24_" not in name]
    assert all(torch.equal(before[name], after[name]) for name in named)
    with pytest.raises(Act24Error, match=r"has no stock form.*same passes \(relu2_ffn\)"):
        train(branch(folder, tmp_path / "relu2", []), tmp_path / "other")
    adapters = [passes[0], {"use": "lora"}]
    assert "never trains" not in str(plan(branch(folder, tmp_path / "relu2", adapters)))
    train(branch(folder, tmp_path / "relu2", adapters, *still), tmp_path / "adapted")
    after = weights(tmp_path / "adapted")
    assert all(torch.equal(before[name], after[name]) for name in named)


def test_adapters_on_weights_that_start_fresh_are_refused(folder, warm, tmp_path):
    made = branch(folder, warm, [{"use": "relu2_ffn"}, {"use": "lora"}])
    alone = recipe(folder, 'passes=[{use="lora"}]')
    match = "model.pretrained: .*warm has no values for .*mlp.up_proj.weight.* train without lora first"
    for refused, why in ((made, match), (alone, "this model starts fresh: name a trained one")):
        for begin in (plan, lambda refused: train(refused, tmp_path / "run")):
            with pytest.raises(Act24Error, match=why):
                begin(refused)


def test_the_run_goes_on_when_what_it_began_with_is_gone(folder, warm, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(warm, source)
    made = branch(folder, source, [], "train.steps=4", "checkpoint.every=2")
    train(made, tmp_path / "whole")
    run = tmp_path / "run"
    train(made, run)
    shutil.rmtree(run / "checkpoints" / "step-000004")
    shutil.rmtree(source)
    train(made, run, resume="auto")
    one, other = weights(tmp_path / "whole"), weights(run)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("saved", [True, False], ids=["saved", "killed before its first save"])
def test_a_run_goes_on_when_what_it_began_with_was_moved(folder, warm, tmp_path, monkeypatch, saved):
    """By its new name it was "a run of another recipe"; and by its old name other weights were taken, without
    a word, by a run that had not saved."""

    class Killed(BaseException):
        pass

    def killed(self):
        raise Killed

    source, run = shutil.copytree(warm, tmp_path / "source"), tmp_path / "run"
    made = branch(folder, source, [], "train.steps=4", "checkpoint.every=2")
    if saved:
        train(made, run)
        shutil.rmtree(run / "checkpoints" / "step-000004")
    else:
        with monkeypatch.context() as patch:
            patch.setattr(train_module.TrainingRun, "advance", killed)
            with pytest.raises(Killed):
                train(made, run)
    moved = source.rename(tmp_path / "moved")
    train(recipe(folder, "train.steps=2", DENSE), source)  # another model of that name
    if not saved:
        with pytest.raises(Act24Error, match=r"source has other weights than .* began with .*in another --r"):
            train(made, run, resume="auto")
    other = made.model_copy(update={"model": made.model.model_copy(update={"pretrained": str(moved)})})
    wrong = made.model_copy(update={"model": made.model.model_copy(update={"pretrained": f"{source}/."})})
    with pytest.raises(Act24Error, match="has other weights than this recipe began with"):
        train(wrong, run, resume="auto")
    assert train(other, run, resume="auto").finished
    train(branch(folder, warm, [], "train.steps=4"), tmp_path / "whole")
    assert all(torch.equal(value, weights(run)[name]) for name, value in weights(tmp_path / "whole").items())


CONFIGS = {
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}


@pytest.mark.parametrize("kind", slow_after(1, CONFIGS))
def test_other_classes_are_trained_by_the_same_loop(folder, warm, tmp_path, kind):
    torch.manual_seed(0)
    sizes = {
        **TINY_SIZES,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "tie_word_embeddings": kind == "qwen3",
    }
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind](**sizes))
    model.save_pretrained(tmp_path / kind)
    source = tmp_path / kind
    (source / "tokenizer.json").write_text(load(warm).tokenizer.to_json())
    passes = [{"use": "weight24", "method": "ste"}]
    run = tmp_path / "run"
    outcome = train(branch(folder, source, passes, "train.steps=3", "checkpoint.every=1"), run)
    assert outcome.evaluation is not None
    built = load(run)
    assert type(built.model) is type(model)
    assert sum(name.endswith("24_mask") for name in built.model.state_dict()) == 14
    # The first step's loss is that of the class itself, 2:4 weights and all: compare without the pass.
    plain = train(branch(folder, source, [], "train.steps=1"), tmp_path / "plain")
    from act24.tools.data import open_rows, open_tokenizer

    made = branch(folder, source, [])
    tokenizer = open_tokenizer(made.data, made.tokenizer)
    with open_rows(made.data, tokenizer, batch_size=8, vocab_size=300) as rows:
        batch = next(rows)
    with torch.no_grad():
        logits = model.eval()(batch.input_ids).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, batch.labels.flatten())
    assert plain.loss == pytest.approx(float(loss), rel=1e-5)
    # It goes on bit for bit.
    import shutil

    end = weights(run)
    shutil.rmtree(run / "checkpoints" / "step-000003")
    train(branch(folder, source, passes, "train.steps=3", "checkpoint.every=1"), run, resume="auto")
    assert all(torch.equal(end[name], value) for name, value in weights(run).items())


def test_a_class_that_changes_its_logits_is_refused(tmp_path, folder, warm):
    config = transformers.Gemma2Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.01, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gemma")
    (tmp_path / "gemma" / "tokenizer.json").write_text(load(warm).tokenizer.to_json())
    with pytest.raises(Act24Error, match="Gemma2ForCausalLM changes its logits behind the head"):
        train(branch(folder, tmp_path / "gemma", []), tmp_path / "run")


# -------------------------------------------------------------------------------- keeping zeros


def zeros_are_kept(run, pruned):
    masks = read_masks(pruned)
    state, before = weights(run), load_file(pruned / "model.safetensors")
    changed = 0
    for name, mask in masks.masks.items():
        assert (state[name][~mask] == 0).all(), name
        assert not torch.signbit(state[name][state[name] == 0]).any()
        changed += int((state[name] != before[name]).sum())
    return changed


OPTIMIZERS = {
    "adamw": ("optimizer.weight_decay=0.1",),
    "bf16": ("train.dtype=bfloat16", "optimizer.weight_decay=0.1"),
    "accumulation": ("train.batch_size=2",),
    "autocast": ("train.dtype=bfloat16_autocast",),
    "muon": ("optimizer.name=muon",),  # mixes entries, so zeros have to be imposed again
}


@pytest.mark.parametrize("kind", slow_but(("adamw",), OPTIMIZERS))
def test_dense_training_of_what_was_kept(kind, folder, pruned, tmp_path):
    run = tmp_path / "run"
    made = branch(folder, pruned, [{"use": "sparse_mask"}], "train.steps=8", *OPTIMIZERS[kind])
    outcome = train(made, run)
    assert zeros_are_kept(run, pruned) > 1000
    first = train(
        branch(folder, pruned, [{"use": "sparse_mask"}], "train.steps=1", "optimizer.lr=1e-30"),
        tmp_path / "no",
    )
    assert outcome.evaluation.loss < first.evaluation.loss


def test_a_kept_weight_that_is_zero_stays_trainable(folder, pruned, tmp_path):
    """The mask is the truth, not W == 0."""
    import shutil

    from safetensors.torch import save_file

    source = tmp_path / "source"
    shutil.copytree(pruned, source)
    name = "model.layers.0.self_attn.q_proj.weight"
    state, mask = load_file(source / "model.safetensors"), read_masks(source).masks[name]
    row, column = mask.nonzero()[0].tolist()
    state[name][row, column] = 0
    save_file(state, source / "model.safetensors", {"format": "pt"})
    train(branch(folder, source, [{"use": "sparse_mask"}], "train.steps=2"), tmp_path / "run")
    assert weights(tmp_path / "run")[name][row, column] != 0
    zeros = [{"use": "sparse_mask", "masks": "zeros"}]
    train(branch(folder, source, zeros, "train.steps=2"), tmp_path / "zeros")
    assert weights(tmp_path / "zeros")[name][row, column] == 0


def test_zeros_come_back_after_an_optimizer_that_breaks_them(folder, pruned):
    """A step that writes into everything, as Muon's does, or a momentum from before the mask."""
    from act24.passes import SparseMask, apply_
    from act24.passes.recovery import check_zeros, impose_zeros_, set_masks_

    model = transformers.AutoModelForCausalLM.from_pretrained(pruned)
    pipeline = apply_(model, [SparseMask()])
    set_masks_(pipeline, read_masks(pruned).masks)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(1e-3 * torch.randn_like(parameter))
    with pytest.raises(Act24Error, match="pruned are not zero"):
        check_zeros(pipeline)
    impose_zeros_(pipeline)
    check_zeros(pipeline)


@pytest.mark.parametrize("use", slow_but(("masked_lora",), ["lora", "masked_lora"]))
def test_adapters_leave_the_base_bit_for_bit(use, folder, pruned, tmp_path):
    run, p = tmp_path / "run", {"use": use, "targets": ["*.q_proj", "*.v_proj", "*.up_proj"]}
    outcome = train(branch(folder, pruned, [p], "train.steps=8", "optimizer.weight_decay=0.1"), run)
    state, before = weights(run), load_file(pruned / "model.safetensors")
    assert all(torch.equal(state[name], value) for name, value in before.items())
    moved = [name for name in state if name.endswith("lora_B")]
    assert len(moved) == 6
    assert all(state[name].abs().max() > 0 for name in moved)
    still = branch(folder, pruned, [p], "train.steps=1", "optimizer.lr=1e-30")
    assert outcome.evaluation.loss < train(still, tmp_path / "still").evaluation.loss


@pytest.mark.parametrize("use", slow_but(("masked_lora",), ["sparse_mask", "lora", "masked_lora"]))
def test_killed_and_resumed_in_the_middle(use, folder, pruned, tmp_path):
    import shutil

    made = branch(folder, pruned, [{"use": use}], "train.steps=6", "checkpoint.every=3", "checkpoint.keep=3")
    train(made, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000006")
    train(made, tmp_path / "run", resume="auto")
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_two_runs_of_an_adapter_with_dropout_are_one(folder, pruned, tmp_path):
    """Dropout draws from torch's global generator, which starts otherwise in every process."""
    made = branch(folder, pruned, [{"use": "lora", "dropout": 0.3}], "train.steps=3")
    for name, start in (("one", 1), ("other", 2)):
        torch.manual_seed(start)
        train(made, tmp_path / name)
    other = branch(folder, pruned, [{"use": "lora", "dropout": 0.3}], "train.steps=3", "train.seed=7")
    train(other, tmp_path / "another seed")
    one, other, another = (weights(tmp_path / name) for name in ("one", "other", "another seed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not all(torch.equal(one[name], another[name]) for name in one)


def test_bad_input_is_one_line(folder, warm, pruned, tmp_path):
    run = tmp_path / "run"

    def refused(match, made):
        with pytest.raises(Act24Error, match=match):
            train(made(), run)
        assert not (run / "checkpoints").exists()

    refused("no masks lie beside", lambda: branch(folder, warm, [{"use": "sparse_mask"}]))
    refused("there is no .*nowhere: expected a run", lambda: branch(folder, folder / "nowhere", []))
    with pytest.raises(Act24Error, match="hidden_size cannot be given beside pretrained"):
        load_recipe(str(folder / "branch.toml"), ["model.hidden_size=32"])
    with pytest.raises(Act24Error, match="needs preset, or else pretrained"):
        load_recipe(str(folder / "branch.toml"), ["model.preset=llama-9m"])


def test_weights_whose_zeros_no_pass_keeps_are_named(folder, pruned, tmp_path, caplog):
    """A mask of some weights is none of the others; what was exported then is not called 2:4 as a whole."""
    networks = branch(folder, pruned, [{"use": "sparse_mask", "scope": "mlp"}], "train.steps=2")
    plan(networks)
    train(networks, tmp_path / "run")
    told = "no pass keeps the zeros of model.layers.0.self_attn.q_proj.weight"
    assert caplog.text.count(told) == 2
    assert caplog.text.count("and 4 more") == 2
    message = export_run(tmp_path / "run", tmp_path / "out")
    assert "6 of its weights are 2:4: of every 4 along the inputs 2 stay" in message
    caplog.clear()
    plan(branch(folder, pruned, [{"use": "sparse_mask"}]))  # nor do masks start fresh
    assert not caplog.text


def test_weight24_on_a_pruned_model_says_that_it_chooses_its_own(folder, pruned, tmp_path, caplog):
    train(branch(folder, pruned, [{"use": "weight24", "method": "ste"}], "train.steps=1"), tmp_path / "run")
    assert "weight24 chooses masks of its own" in caplog.text


def test_a_dense_run_branches_from_lost_without_an_activation(folder, tmp_path):
    """W = γ W_out W_in, and (1 - γ) W_columns at the columns that are kept."""
    lost = '{use="lost", attn_rank=4, mlp_rank=4, bottleneck="none", gamma=0.5, sparsity=0.1}'
    train(recipe(folder, "train.steps=1", f"passes=[{lost}]"), tmp_path / "lost")
    still = ("train.steps=1", "optimizer.lr=1e-30", "optimizer.weight_decay=0.0")
    train(branch(folder, tmp_path / "lost", [], *still), tmp_path / "run")
    name, before = "model.layers.0.mlp.up_proj.weight", weights(tmp_path / "lost")
    whole = 0.5 * before[f"{name}_out"] @ before[f"{name}_in"]
    indices = before[name.replace("weight", "column_indices")]
    whole[:, indices] += 0.5 * before[f"{name}_columns"]
    torch.testing.assert_close(weights(tmp_path / "run")[name], whole, rtol=1e-5, atol=1e-6)
