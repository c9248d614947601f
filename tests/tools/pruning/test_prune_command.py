"""`act24 prune` and `act24 eval --protocol` from outside: files that were written, and what is said."""

import json
import math
import pathlib
import random
import struct

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load, load_file, save_file
from slow import slow_after, slow_but

from act24.errors import Act24Error
from act24.tools.pruning.calibration import window
from act24.tools.pruning.folder import prune_model
from act24.tools.pruning.kept import BlockFiles
from act24.tools.pruning.masks import check_pruned, read_masks
from act24.tools.run.opening import open_any
from act24.tools.run.protocol import compared, perplexity
from tests.tools.tiny import TINY_SIZES, text, write_recipe

SIZES = {
    **TINY_SIZES,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 0,
}

CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "arcee": transformers.ArceeConfig(**SIZES),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=8),
    "gpt2": transformers.GPT2Config(
        vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=0
    ),
}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Text files, and a tokenizer that puts a token in front, as LLaMA's does."""
    folder = tmp_path_factory.mktemp("words")
    write_recipe(folder)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text(2000, 3)], trainer)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def model_folder(words, tmp_path):
    def make(kind="llama", **options):
        torch.manual_seed(0)
        folder = tmp_path / kind
        transformers.AutoModelForCausalLM.from_config(CONFIGS[kind], **options).save_pretrained(folder)
        (folder / "tokenizer.json").write_text((words / "tokenizer.json").read_text())
        return folder

    return make


def options(words, **changes):
    from act24.tools.commands.recovery import calibration_data

    data = calibration_data(str(words / "train-*.txt"), ())
    return {"data": data, "samples": 8, "seqlen": 32} | changes


@pytest.mark.parametrize("kind", slow_but(("llama", "gpt2"), CONFIGS))
def test_the_folder_opens_in_transformers_and_here(kind, model_folder, words, tmp_path):
    source, out = model_folder(kind), tmp_path / "out"
    done = prune_model(str(source), out, **options(words))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    before = transformers.AutoModelForCausalLM.from_pretrained(source)
    masks = read_masks(out)
    assert masks.masks.keys() == done.masks.keys()
    for name, parameter in theirs.named_parameters():
        if name not in masks.masks:
            assert torch.equal(parameter, before.get_parameter(name)), name
            continue
        conv = name in masks.transposed
        weight = parameter.detach().T if conv else parameter.detach()
        assert ((weight == 0).unflatten(1, (-1, 4)).sum(-1) == 2).all()
        assert torch.equal(parameter != 0, masks.masks[name])
    assert len(masks.masks) == {"gpt2": 8, "arcee": 12}.get(kind, 14)
    ids = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    ours = open_any(out)
    with torch.no_grad():
        logits = ours.model(ids)
        logits = logits if isinstance(logits, torch.Tensor) else logits.logits
        torch.testing.assert_close(logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    assert json.loads((out / "config.json").read_text())["act24_weight_pattern"] == "2:4"
    report = json.loads((out / "prune.json").read_text())
    assert report["sparsity"] == 0.5
    assert (report["calibration"]["samples"], report["calibration"]["seqlen"]) == (8, 32)
    assert report["calibration"]["tokens"] == 256
    assert len(report["layers"]) == len(masks.masks)
    assert not [*out.glob("block-*"), *out.glob("interrupted.json")]
    assert (out / "tokenizer.json").is_file()
    bits = load_file(out / "masks.safetensors")
    assert all(value.dtype is torch.uint8 for value in bits.values())
    assert sum(v.numel() for v in bits.values()) == sum(m.numel() for m in masks.masks.values()) // 8


def test_the_report_is_on_tensorboard(model_folder, words, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = prune_model(str(model_folder()), tmp_path / "out", **options(words))
    events = EventAccumulator(str(tmp_path / "out"))
    events.Reload()
    for layer in done.layers:
        _, _, block, *leaf, _ = layer.name.split(".")
        tag = f"prune_error/layer_{block}/{'_'.join(leaf)}"
        assert events.Scalars(tag)[0].value == pytest.approx(layer.error, rel=1e-5)


@pytest.mark.parametrize("method", slow_after(1, ["wanda", "sparsegpt"]))
def test_killed_and_called_again(method, model_folder, words, tmp_path, monkeypatch):
    source = model_folder()
    whole = prune_model(str(source), tmp_path / "whole", method=method, **options(words))
    from act24.tools.pruning import folder

    save = folder._Kept.save

    def killed(self, index, weights, done):
        if index == 1:
            raise KeyboardInterrupt
        save(self, index, weights, done)

    monkeypatch.setattr(folder._Kept, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        prune_model(str(source), tmp_path / "out", method=method, **options(words))
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    with pytest.raises(Act24Error, match="interrupted call with another calibration"):
        prune_model(str(source), tmp_path / "out", method=method, **options(words, samples=4))
    lines = []
    prune_model(str(source), tmp_path / "out", method=method, **options(words), say=lines.append)
    assert "found finished" in lines[0]
    assert "found finished" not in lines[1]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    masks = read_masks(tmp_path / "out")
    assert all(torch.equal(masks.masks[name], mask) for name, mask in whole.masks.items())


def test_long_windows_are_cut_where_nothing_is_said():
    """T12: models of today know 131,072 positions, and no document is as long."""
    assert [window(None, known) for known in (512, 2048, 131_072)] == [512, 2048, 2048]
    assert window(4096, 131_072) == 4096


def test_one_file_is_said_to_give_its_first_rows(model_folder, words, tmp_path, caplog):
    from act24.tools.commands.recovery import calibration_data

    data = calibration_data(str(words / "train-0.txt"), ())
    prune_model(str(model_folder()), tmp_path / "out", **options(words, data=data, method="magnitude"))
    assert "one document cannot be shuffled" in caplog.text


def test_attention_within_documents_is_not_calibrated_on(model_folder, words, tmp_path):
    from act24.tools.commands.recovery import calibration_data

    data = calibration_data(str(words / "train-0.txt"), ("data.attention=document",))
    with pytest.raises(Act24Error, match=r"with causal attention; --set data\.attention=causal"):
        prune_model(str(model_folder()), tmp_path / "out", **options(words, data=data, method="magnitude"))
    assert not (tmp_path / "out").exists()


def test_padded_rows_are_excluded(model_folder, words, tmp_path):
    """Short documents, one a row: the tokens counted are those of the text."""
    lines = tmp_path / "short.jsonl"
    texts = [" ".join(random.Random(i).choices(["two", "of", "four"], k=3 + i % 7)) for i in range(40)]
    lines.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    from act24.tools.commands.recovery import calibration_data

    data = calibration_data(str(lines), ("data.rows=padded",))
    prune_model(str(model_folder()), tmp_path / "out", data=data, samples=8, seqlen=32)
    report = json.loads((tmp_path / "out" / "prune.json").read_text())
    assert 0 < report["calibration"]["tokens"] < 8 * 32


def refused(match, call, *args, **kwargs):
    with pytest.raises(Act24Error, match=match):
        call(*args, **kwargs)


def test_bad_input_is_one_line_and_leaves_nothing(model_folder, words, tmp_path):
    source, out = str(model_folder()), tmp_path / "out"
    refused("no pruning method named 'search'", prune_model, source, out, **options(words, method="search"))
    refused("write the share that goes", prune_model, source, out, **options(words, pattern="2:4:8"))
    refused("knows 64 positions", prune_model, source, out, **options(words, seqlen=65))
    refused("multiple of 7, not 32", prune_model, source, out, **options(words, pattern="3:7"))
    refused("there is no nowhere", prune_model, "nowhere", out, **options(words))
    refused("neither a checkpoint nor", prune_model, str(tmp_path), out, **options(words))
    refused("calibration text has", prune_model, source, out, **options(words, samples=10**6))
    short = tmp_path / "short.txt"
    short.write_text("two of four")
    from act24.tools.commands.recovery import calibration_data

    few = calibration_data(str(short), ())
    refused(
        "fewer than one row|holds nothing|no document", prune_model, source, out, **options(words, data=few)
    )
    for table, why in (
        ({"*": "dense"}, "no linear was pruned"),
        ({"*.1.mlp.*": "3:7"}, r"layers\.1\.mlp\.gate_proj.* multiple of 7, not 32"),
        ({"*.2.mlp.*": "dense"}, r"by_layer: '\*\.2\.mlp\.\*' takes none .* one is model\.layers\.1\."),
    ):
        refused(why, prune_model, source, out, **options(words, by_layer=table))
    refused("takes data", calibration_data, "builtin", ("train.steps=3",))
    assert not out.exists()
    assert not out.with_name("out.partial").exists()
    out.mkdir()
    refused("exists already", prune_model, source, out, **options(words))


def test_a_damaged_file_of_masks_is_refused(model_folder, words, tmp_path):
    prune_model(str(model_folder()), tmp_path / "out", **options(words))
    file = tmp_path / "out" / "masks.safetensors"
    whole = file.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0] + 8
    file.write_bytes(whole[:-5])
    refused("cannot read .*masks.safetensors", read_masks, file.parent)
    flipped = bytearray(whole)
    flipped[size + 3] ^= 4
    file.write_bytes(flipped)
    refused(r"masks\.safetensors is damaged", read_masks, file.parent)
    file.write_bytes(whole)
    opened = open_any(file.parent)
    masks = read_masks(file.parent)
    check_pruned(opened.state(), masks, "out")
    name = next(iter(masks.masks))
    state = opened.state()
    state[name] = state[name].clone()
    state[name][~masks.masks[name]] = 1
    refused(f"{name}: .* pruned are not zero", check_pruned, state, masks, "out")


@pytest.mark.parametrize("kind", slow_but(("gpt2",), ["llama", "gpt2"]))
def test_flipped_weights_are_refused(kind, model_folder, words, tmp_path):
    """Of a file that act24 wrote; what another program has written over it is not judged."""
    out = tmp_path / "out"
    prune_model(str(model_folder(kind)), out, **options(words, method="magnitude"))
    file = out / "model.safetensors"
    whole, state = file.read_bytes(), load(file.read_bytes())  # no map of the file
    assert file.stat().st_mode == (out / "config.json").stat().st_mode
    flipped = bytearray(whole)
    flipped[-3] ^= 4
    file.write_bytes(flipped)
    refused(r"model\.safetensors is damaged", open_any, out)
    save_file({name: value + 0 for name, value in load_file(file).items()}, file, {"format": "pt"})
    open_any(out)
    file.write_bytes(whole)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(theirs[name], value) for name, value in state.items())


def test_a_flipped_block_of_an_interrupted_call_is_refused(tmp_path):
    kept = BlockFiles(tmp_path / "out.partial", {"method": "wanda"})
    kept.write(0, {"weight": torch.ones(4, 4)}, {"layers": []})
    file = tmp_path / "out.partial" / "block-00000.safetensors"
    flipped = bytearray(file.read_bytes())
    flipped[-3] ^= 4
    assert torch.equal(kept.read(0)[0]["weight"], torch.ones(4, 4))
    file.write_bytes(flipped)
    refused(r"block-00000\.safetensors \(remove it, .* not those that were written", kept.read, 0)


# ------------------------------------------------------------------------------------------ eval


def test_perplexity_is_that_of_the_published_loop(model_folder, words):
    """Written from `lib/eval.py`: windows i*s:(i+1)*s of one tokenisation, mean of window losses."""
    source = model_folder()
    files = [str(words / "heldout.txt"), str(words / "train-0.txt")]
    found = perplexity(open_any(source), files, seqlen=48)
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"))
    joined = "\n\n".join(pathlib.Path(file).read_text() for file in files)
    ids = torch.tensor([tokenizer(joined)["input_ids"]])
    assert (ids == 1).sum() == 1  # one token in front of all
    total, count = 0.0, ids.numel() // 48
    for i in range(count):
        window = ids[:, i * 48 : (i + 1) * 48]
        with torch.no_grad():
            total += model(window, labels=window).loss.item()
    assert (found.windows, found.seqlen, found.dropped) == (count, 48, ids.numel() - 48 * count)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert "at 48 tokens a window" in str(found)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "arcee"])
def test_perplexity_of_other_classes(kind, model_folder, words):
    source = model_folder(kind)
    found = perplexity(open_any(source), [str(words / "heldout.txt")], seqlen=32, windows=3)
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"))
    ids = torch.tensor(tokenizer((words / "heldout.txt").read_text())["input_ids"])[: 3 * 32].view(3, 1, 32)
    with torch.no_grad():
        mean = sum(model(window, labels=window).loss.item() for window in ids) / 3
    assert found.loss == pytest.approx(mean, rel=1e-5)


def test_results_of_other_windows_are_not_compared(model_folder, words, tmp_path):
    opened, files = open_any(model_folder()), [str(words / "heldout.txt")]
    one, other = perplexity(opened, files, seqlen=48), perplexity(opened, files, seqlen=32)
    file = tmp_path / "result.json"
    file.write_text(json.dumps(one.as_dict()))
    assert "× 1.0000" in compared(one, file)
    refused("not comparable: seqlen is 32 here and 48", compared, other, file)
    refused("takes 2 to 64", perplexity, opened, files, seqlen=65)
    refused("cannot read", perplexity, opened, ["nowhere.txt"], seqlen=32)
    refused("needs --text", perplexity, opened, [], seqlen=32)
