"""Merging, adapters in PEFT's format, blockwise recovery: files that were written."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from slow import slow_but

from act24.errors import Act24Error
from act24.pruning.pattern import Pattern
from act24.tools.commands.recovery import calibration_data
from act24.tools.huggingface.export import export_run
from act24.tools.pruning.blockwise import _relative, recover_blockwise
from act24.tools.pruning.folder import prune_model
from act24.tools.pruning.masks import Masks, read_masks, write_masks
from act24.tools.pruning.merge import merge
from act24.tools.run.build import load
from act24.tools.run.opening import open_any
from act24.tools.run.train import train
from tests.tools.run.test_pretrained import DENSE, branch, recipe
from tests.tools.tiny import write_recipe

MODULES = ["q_proj", "v_proj"]
TARGETS = [f"*.{name}" for name in MODULES]
IDS = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recovery")
    write_recipe(folder)
    train(recipe(folder, "train.steps=40", DENSE), folder / "warm")
    data = calibration_data(str(folder / "train-*.txt"), ())
    prune_model(str(folder / "warm"), folder / "pruned", data=data, samples=16, seqlen=16)
    for use in ("lora", "masked_lora"):
        table = {"use": use, "targets": TARGETS}
        train(branch(folder, folder / "pruned", [table], "train.steps=6", "train.batch_size=8"), folder / use)
    return folder


def logits_of(path):
    model = open_any(path).model
    with torch.no_grad():
        return model(IDS)


def theirs(path):
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        return model, model(IDS).logits


def sparsity(model):
    linears = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    return sum(int((p == 0).sum()) for p in linears) / sum(p.numel() for p in linears)


def test_a_masked_adapter_merges_without_losing_a_zero(folder, tmp_path):
    told = merge(str(folder / "masked_lora"), tmp_path / "merged")
    model, logits = theirs(tmp_path / "merged")
    built = load(folder / "masked_lora")
    with torch.no_grad():
        torch.testing.assert_close(logits, built.model(IDS), rtol=1e-4, atol=1e-4)
    assert "0.5000 → 0.5000" in told
    before, masks = load_file(folder / "pruned" / "model.safetensors"), read_masks(tmp_path / "merged")
    for name, mask in masks.masks.items():
        weight = model.state_dict()[name]
        assert (weight[~mask] == 0).all()
        assert ((weight == 0).unflatten(1, (-1, 4)).sum(-1) == 2).all()
        assert torch.equal(weight, before[name]) is not any(leaf in name for leaf in MODULES)
    # An export is the same function.
    export_run(folder / "masked_lora", tmp_path / "exported")
    torch.testing.assert_close(theirs(tmp_path / "exported")[1], logits, rtol=1e-5, atol=1e-5)
    assert read_masks(tmp_path / "exported").pattern == "2:4"


def test_a_plain_adapter_is_refused_with_the_sparsity_that_it_would_leave(folder, tmp_path):
    share = 2 * 32 * 32 / (4 * 32 * 32 + 3 * 32 * 48)  # of q and v among the matrices of a block
    with pytest.raises(Act24Error, match=rf"would leave sparsity {0.5 * (1 - share):.2f}\d+ of 0.5000"):
        merge(str(folder / "lora"), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    merge(str(folder / "lora"), tmp_path / "merged", allow_dense=True)
    model, logits = theirs(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(logits, load(folder / "lora").model(IDS), rtol=1e-4, atol=1e-4)
    assert sparsity(model) == pytest.approx(0.5 * (1 - share), abs=1e-3)
    kept = {n for n in read_masks(folder / "pruned").masks if not any(leaf in n for leaf in MODULES)}
    assert set(read_masks(tmp_path / "merged").masks) == kept


def test_peft_opens_the_adapter(folder, tmp_path):
    peft = pytest.importorskip("peft")
    export_run(folder / "lora", tmp_path / "adapter", "peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "pruned")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, load(folder / "lora").model(IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use", slow_but(("masked_lora",), ["lora", "masked_lora"]))
def test_an_adapter_in_a_folder_merges_as_the_run_does(use, folder, tmp_path):
    export_run(folder / use, tmp_path / "adapter", "peft")
    dense = use == "lora"
    merge(str(folder / use), tmp_path / "run", allow_dense=dense)
    merge(str(folder / "pruned"), tmp_path / "folder", tmp_path / "adapter", allow_dense=dense)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "folder"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_adapters_of_another_base_or_damaged_are_refused(folder, tmp_path):
    export_run(folder / "lora", tmp_path / "adapter", "peft")
    shutil.copytree(folder / "pruned", tmp_path / "base")
    state = load_file(tmp_path / "base" / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"] + 1
    save_file(state, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    out = tmp_path / "out"

    def refused(match, *arguments):
        with pytest.raises(Act24Error, match=match):
            merge(*arguments)
        assert not out.exists()

    refused("trained on other weights", str(tmp_path / "base"), out, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    whole, content = load_file(file), bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)
    refused("adapter_model.safetensors is damaged", str(folder / "pruned"), out, tmp_path / "adapter")
    save_file({n: v[..., :3].contiguous() if "lora_A" in n else v for n, v in whole.items()}, file)
    refused("the adapter is of another base", str(folder / "pruned"), out, tmp_path / "adapter")
    file.write_bytes(file.read_bytes()[:-9])
    refused("cannot read the adapter", str(folder / "pruned"), out, tmp_path / "adapter")
    refused("has an adapter, and this one has 0", str(folder / "warm"), out)
    with pytest.raises(Act24Error, match="this one has 0"):
        export_run(folder / "warm", out, "peft")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda mask: mask[:16].contiguous(), r"its mask is \[16, 32\], and it is \[32, 32\]"),
        (lambda mask: mask.roll(1, 0), "pruned are not zero"),
    ],
    ids=["of another shape", "of other weights"],
)
def test_masks_of_another_model_are_refused(change, why, folder, tmp_path):
    """Merging under them would drop weights that the model has, without a word."""
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(folder / "pruned", base)
    masks, name = read_masks(base), "model.layers.1.self_attn.q_proj.weight"
    write_masks(base, replace(masks, masks={**masks.masks, name: change(masks.masks[name])}))
    export_run(folder / "masked_lora", tmp_path / "adapter", "peft")
    for call in (
        lambda: merge(str(base), out, tmp_path / "adapter"),
        lambda: recover_blockwise(str(base), out, **options(folder)),
        lambda: train(branch(folder, base, [{"use": "sparse_mask"}]), out),
    ):
        with pytest.raises(Act24Error, match=rf"{name}: .*{why}|{name} is not zero where its mask says so"):
            call()
        assert not (out / "config.json").exists()
        assert not (out / "checkpoints").exists()
        assert not out.with_name("out.partial").exists()


def test_masks_of_a_model_with_other_names_are_refused(folder, tmp_path):
    """They said nothing of the weights that there are, which were trained dense."""
    base = shutil.copytree(folder / "pruned", tmp_path / "base")
    masks = read_masks(base)
    other = {f"transformer.{name}": mask for name, mask in masks.masks.items()}
    write_masks(base, Masks(other, {name: Pattern(0.5, 2, 4) for name in other}))
    with pytest.raises(Act24Error, match=r"has no transformer.model.*, of which there is a mask"):
        train(branch(folder, base, [{"use": "sparse_mask"}]), tmp_path / "run")


@pytest.mark.slow
def test_a_run_with_masks_is_a_base_too(folder, tmp_path):
    """Masks of the run that an adapter's run began with, and the dense model, go on with what is merged."""
    train(branch(folder, folder / "pruned", [{"use": "sparse_mask"}], "train.steps=2"), tmp_path / "masked")
    made = branch(folder, tmp_path / "masked", [{"use": "masked_lora", "targets": TARGETS}], "train.steps=3")
    train(made, tmp_path / "run")
    merge(str(tmp_path / "run"), tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(logits_of(tmp_path / "merged"), load(tmp_path / "run").model(IDS))
    assert read_masks(tmp_path / "merged").sparsity == 0.5
    merge(str(folder / "masked_lora"), tmp_path / "more")
    assert recover_blockwise(str(tmp_path / "more"), tmp_path / "fitted", **options(folder, epochs=1))


def test_an_export_of_dense_training_brings_its_masks(folder, tmp_path):
    made = branch(folder, folder / "pruned", [{"use": "sparse_mask"}], "train.steps=3")
    train(made, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["act24_weight_pattern"] == "2:4"
    one, other = read_masks(folder / "pruned"), read_masks(tmp_path / "out")
    assert all(torch.equal(one.masks[name], other.masks[name]) for name in one.masks)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tmp_path / "out")[1], load(tmp_path / "run").model(IDS))


# ------------------------------------------------------------------------------------ blockwise


def options(folder, **changes):
    data = calibration_data(str(folder / "train-*.txt"), ())
    return {"data": data, "samples": 16, "seqlen": 16, "lr": 5e-2, "epochs": 8} | changes


def heldout_loss(path, folder):
    from act24.tools.run.protocol import perplexity

    return perplexity(open_any(path), [str(folder / "heldout.txt")], seqlen=16).loss


def test_blocks_are_fitted_with_their_zeros(folder, tmp_path):
    lines = []
    errors = recover_blockwise(str(folder / "pruned"), tmp_path / "out", **options(folder), say=lines.append)
    assert len(errors) == len(lines) == 2
    for line in lines:
        before, after = (float(x) for x in line.split("outputs ")[1].split(",")[0].split(" → "))
        assert after < 0.8 * before
    state = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(folder / "pruned" / "model.safetensors")
    for name, mask in read_masks(folder / "pruned").masks.items():
        assert (state[name][~mask] == 0).all()
        assert not torch.signbit(state[name][state[name] == 0]).any()
        assert not torch.equal(state[name], before[name])
    outside = [name for name in state if ".layers." not in name]
    assert all(torch.equal(state[name], before[name]) for name in outside)
    assert heldout_loss(tmp_path / "out", folder) < heldout_loss(folder / "pruned", folder)


def test_an_interrupted_recovery_goes_on(folder, tmp_path, monkeypatch):
    from act24.tools.pruning.kept import BlockFiles

    recover_blockwise(str(folder / "pruned"), tmp_path / "whole", **options(folder))
    write = BlockFiles.write

    def killed(self, index, tensors, content):
        if index == 1:
            raise KeyboardInterrupt
        write(self, index, tensors, content)

    monkeypatch.setattr(BlockFiles, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        recover_blockwise(str(folder / "pruned"), tmp_path / "out", **options(folder))
    monkeypatch.undo()
    lines = []
    recover_blockwise(str(folder / "pruned"), tmp_path / "out", **options(folder), say=lines.append)
    assert ["found finished" in line for line in lines] == [True, False]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_second_round_is_fitted_to_the_dense_model_too(folder, tmp_path):
    """Not to the pruned one, whose outputs a fitted one left behind."""
    lines = []
    quick = options(folder, epochs=1)
    first = recover_blockwise(str(folder / "pruned"), tmp_path / "one", **quick)
    recover_blockwise(str(tmp_path / "one"), tmp_path / "two", **quick, say=lines.append)
    assert json.loads((tmp_path / "two" / "prune.json").read_text())["dense"] == str(folder / "warm")
    # It begins where the first round ended, by the same measure.
    assert f"outputs {first['model.layers.0']:.4f} →" in lines[0]


def test_what_is_pruned_twice_is_fitted_to_the_dense_model_too(folder, tmp_path):
    lines = []
    rows = {"data": options(folder)["data"], "samples": 4, "seqlen": 16, "say": lines.append}
    prune_model(str(folder / "pruned"), tmp_path / "twice", pattern="1:4", **rows)
    assert "is pruned already: new masks take the place of its own" in lines[0]
    recover_blockwise(str(tmp_path / "twice"), tmp_path / "out", **options(folder, epochs=1))
    assert json.loads((tmp_path / "out" / "prune.json").read_text())["dense"] == str(folder / "warm")


def test_a_dense_model_that_is_another_by_now_is_refused(folder, tmp_path):
    """Trained on, or somewhere else: what a report names is not what it was."""
    pruned = shutil.copytree(folder / "pruned", tmp_path / "pruned")
    report = json.loads((pruned / "prune.json").read_text())
    for changed, why in (
        ({"weights": "0" * 64}, "has other weights than .* was pruned from: give --dense"),
        ({"source": "elsewhere"}, "was pruned from: there is no elsewhere.*--dense names it"),
        ({"dense": str(folder / "warm"), "dense_weights": "0" * 64}, "has other weights"),
    ):
        (pruned / "prune.json").write_text(json.dumps(report | changed))
        with pytest.raises(Act24Error, match=why):
            recover_blockwise(str(pruned), tmp_path / "out", **options(folder))
    (pruned / "prune.json").unlink()
    with pytest.raises(Act24Error, match="does not say what it was pruned from: give --dense"):
        recover_blockwise(str(pruned), tmp_path / "out", **options(folder))
    assert not (tmp_path / "out").exists()
    quick = options(folder, epochs=1)
    assert recover_blockwise(str(pruned), tmp_path / "out", **quick, dense=str(folder / "warm"))


def test_blockwise_refuses_what_it_cannot_begin_with(folder, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Act24Error, match="has no masks"):
        recover_blockwise(str(folder / "warm"), out, **options(folder))
    with pytest.raises(Act24Error, match="expected a run"):
        recover_blockwise(str(folder / "pruned"), out, **options(folder), dense="nowhere at all")
    assert not out.exists()


def test_errors_are_of_tokens_and_not_of_the_longest_one():
    """By hand: a first token a thousand times as long as the others has one vote; padding has none."""
    generator = torch.Generator().manual_seed(0)
    wanted, noise = (torch.randn(2, 3, 8, generator=generator) for _ in range(2))
    wanted[:, 0] *= 1000
    pads = torch.tensor([[False, False, False], [False, False, True]])
    output = wanted + noise
    output[1, 2] = 1e6
    each = [
        sum((float(a) - float(b)) ** 2 for a, b in zip(output[i, t], wanted[i, t], strict=True))
        / sum(float(b) ** 2 for b in wanted[i, t])
        for i in range(2)
        for t in range(3)
        if not pads[i, t]
    ]
    assert float(_relative(output, wanted, pads)) == pytest.approx(sum(each) / 5, rel=1e-4)


def test_what_fitting_makes_worse_stays_as_it_was(folder, tmp_path):
    lines = []
    recover_blockwise(
        str(folder / "pruned"), tmp_path / "out", **options(folder, lr=1e4, epochs=1), say=lines.append
    )
    assert all("left as it was: fitting came to" in line for line in lines)
    report = json.loads((tmp_path / "out" / "prune.json").read_text())
    assert report["left"] == ["model.layers.0", "model.layers.1"]
    state, before = (load_file(path / "model.safetensors") for path in (tmp_path / "out", folder / "pruned"))
    assert all(torch.equal(value, before[name]) for name, value in state.items())


def test_biases_that_begin_as_zeros_learn_as_slowly_as_the_rest(folder, tmp_path):
    """GPT-2's: with a rate as of values of size 1 they drowned what the weights had learnt."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=0))
    model.save_pretrained(tmp_path / "gpt2")
    shutil.copyfile(folder / "pruned" / "tokenizer.json", tmp_path / "gpt2" / "tokenizer.json")
    chosen = options(folder, epochs=2, lr=1e-2)
    rows = {key: chosen[key] for key in ("data", "samples", "seqlen")}
    prune_model(str(tmp_path / "gpt2"), tmp_path / "pruned", method="sparsegpt", **rows)
    lines = []
    recover_blockwise(str(tmp_path / "pruned"), tmp_path / "out", **chosen, say=lines.append)
    for line in lines:
        before, after = (float(x) for x in line.split("outputs ")[1].split(",")[0].split(" → "))
        assert after < before
        assert "left as it was" not in line


def test_two_calls_do_not_write_one_folder(folder, tmp_path):
    """The second is told at once, and nothing of the first is lost."""
    rows = {"data": options(folder)["data"], "samples": 4, "seqlen": 16}

    def second(line):
        with pytest.raises(
            Act24Error, match=r"pruned.partial is in use by process .*another folder with --out"
        ):
            prune_model(str(folder / "warm"), tmp_path / "pruned", **rows)

    prune_model(str(folder / "warm"), tmp_path / "pruned", **rows, say=second)
    assert read_masks(tmp_path / "pruned") is not None
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]
    assert not (tmp_path / "pruned" / ".lock").exists()
    with pytest.raises(Act24Error, match="exists already"):
        prune_model(str(folder / "warm"), tmp_path / "pruned", **rows)
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]
