"""`act24 generate` as it is called, on a run, its checkpoint and what was exported of it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from children import Command
from transformers import AutoModelForCausalLM, AutoTokenizer

from act24.tools.commands.generate import open_generator, open_model
from act24.tools.huggingface.export import export_run
from act24.tools.run.build import load
from act24.tools.run.train import train


@pytest.fixture(scope="module")
def run(tiny_file, tmp_path_factory):
    from tiny import load_tiny

    folder = tmp_path_factory.mktemp("run")
    train(load_tiny(tiny_file, "train.steps=12", "eval.every=0"), folder)
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "arcee"
    export_run(run, folder)
    return folder


def test_greedy_text_is_that_of_transformers_on_the_exported_folder(act24, exported):
    prompts = ["low rank", "two of four tokens"]
    commands = [("generate", exported, "--prompt", p, "--tokens", 20, "--temperature", 0) for p in prompts]
    ours = [act24(*command) for command in commands]
    model, tokenizer = (kind.from_pretrained(exported) for kind in (AutoModelForCausalLM, AutoTokenizer))
    for prompt, (status, out, errors) in zip(prompts, ours, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        theirs = model.generate(ids, max_new_tokens=20, do_sample=False, cache_implementation="static")
        assert (status, errors) == (0, [])
        assert out == tokenizer.decode(theirs[0], skip_special_tokens=True) + "\n"


def test_a_run_with_dense_activations_is_the_exported_function(act24, run, exported):
    arguments = ("--prompt", "low rank", "--tokens", 20, "--temperature", 0)
    _, dense, _ = act24("generate", run, *arguments, "--activations", "dense")
    assert dense == act24("generate", exported, *arguments)[1]


def test_2_4_activations_stay_by_default(run):
    ids = torch.arange(24).reshape(2, 12)
    logits = [
        built.model(ids) for built in (load(run), open_model(run), open_model(run, activations="dense"))
    ]
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])


def test_2_4_activations_that_are_not_there_are_refused(act24, exported):
    status, out, errors = act24("generate", exported, "--prompt", "low", "--activations", "24")
    assert (status, out) == (2, "")
    assert errors == [
        f"act24: --activations 24: {exported} has no 2:4 activations in force at step 0, and what they "
        "would cost in loss nobody measured: leave the option out"
    ]


def test_what_was_tuned_on_this_machine_is_used(run, tmp_path, monkeypatch):
    from act24.sparse24.format.products import Measured, Product
    from act24.tools.run import tuning

    table = ((Product("y", 2048, 128, 32), Measured(4, 1.0, 2.0)),)
    monkeypatch.setattr(tuning, "cache_path", lambda: tmp_path / "products.json")
    monkeypatch.setattr(tuning, "machine", lambda _: "gpu")
    tuning.write_table(tmp_path / "products.json", "gpu", table)
    assert [p.algorithms for p in open_model(run).pipeline.active] == [()], "a CPU has no such products"
    monkeypatch.setattr(tuning, "obstacle", lambda _: "")
    assert [p.algorithms for p in open_model(run).pipeline.active] == [table]
    assert open_generator(open_model(run)).decoder.prompts.table == table, "of 2:4 weights"


def test_lines_come_in_order_whatever_the_batch(act24, run, tmp_path):
    prompts = ["low", "rank of two", "four", "the graph", "pass"]
    lines = "\n".join(json.dumps({"prompt": prompt}) for prompt in prompts)
    (tmp_path / "prompts.jsonl").write_text(lines + "\n\n")
    outputs = []
    for batch in (1, 2, 16):
        status, out, errors = act24(
            "generate", run, "--prompts", tmp_path / "prompts.jsonl", "--tokens", 9, "--batch", batch
        )
        assert (status, errors) == (0, [])
        outputs.append([json.loads(line) for line in out.splitlines()])
    assert [line["prompt"] for line in outputs[0]] == prompts
    assert all(line["tokens"] == 9 or line["reason"] == "end" for line in outputs[0])
    assert outputs[0] == outputs[1] == outputs[2]


def test_a_stop_string_ends_the_text_and_one_that_never_comes_is_told(act24, run):
    arguments = ("generate", run, "--prompt", "low rank", "--tokens", 30, "--temperature", 0)
    _, whole, _ = act24(*arguments)
    text = whole.removeprefix("low rank").removesuffix("\n")
    stop = text[len(text) // 2 :][:3]
    assert act24(*arguments, "--stop", stop) == (0, f"low rank{text[: text.index(stop)]}\n", [])
    status, out, errors = act24(*arguments, "--stop", "nowhere", "--stop", "never")
    assert (status, out) == (0, whole)
    assert errors == ["act24: no continuation met a stop string ('nowhere', 'never')"]


def test_weights_that_are_2_4_are_folded(tiny, tmp_path):
    passes = '{use="weight24"}'
    train(tiny("train.steps=6", "schedule.warmup_steps=1", "eval.every=0", f"passes=[{passes}]"), tmp_path)
    built, ids = open_model(tmp_path), torch.arange(24).reshape(2, 12)
    assert torch.allclose(built.model(ids), load(tmp_path).model(ids), atol=1e-6)
    weight = built.model.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert int((weight.unflatten(-1, (-1, 4)) != 0).sum(-1).max()) == 2
    assert open_generator(built).generate_ids([[1, 2]], 4)


def test_pruned_and_packed_folders_continue_text_alike(act24, exported, tmp_path):
    """2:4 weights from an export, packed, and dense again for the model."""
    from act24.pruning.pattern import parse_pattern
    from act24.sparse24.pattern.selection import top2_of_4
    from act24.tools.huggingface.folder import read_state, write_weights
    from act24.tools.pruning.masks import Masks, write_masks
    from act24.tools.pruning.packed import pack

    pruned, packed = tmp_path / "pruned", tmp_path / "packed"
    shutil.copytree(exported, pruned)
    state = read_state(pruned)
    masks = {n: top2_of_4(w.abs()) for n, w in state.items() if "proj.weight" in n}
    state |= {name: torch.where(mask, state[name], 0) for name, mask in masks.items()}
    write_weights(pruned, state)
    write_masks(pruned, Masks(masks, dict.fromkeys(masks, parse_pattern("2:4")), frozenset()))
    pack(pruned, packed)
    assert not (packed / "model.safetensors").exists()
    arguments = ("--prompt", "low rank", "--tokens", 20, "--temperature", 0)
    status, text, errors = act24("generate", packed, *arguments)
    assert (status, errors) == (0, [])
    assert text == act24("generate", pruned, *arguments)[1]
    built = open_model(packed)
    assert all(torch.equal(built.model.state_dict()[name], state[name]) for name in masks)


BAD = {
    "both": (("--prompt", "a", "--prompts", "x"), "give one of --prompt TEXT and --prompts FILE.jsonl"),
    "none": ((), "give one of --prompt TEXT and --prompts FILE.jsonl"),
    "empty": (("--prompt", ""), "the prompt is empty; give it at least one token"),
    "too long": (
        ("--prompt", "low rank " * 3000),
        r"the prompt has [\d,]+ tokens, and the model 2048 positions, with none left for a new one; .*",
    ),
    "too many": (
        ("--prompt", "low", "--tokens", "5000"),
        r"the prompt has [\d,]+ tokens, and the model 2048 positions: [\d,]+ tokens can be added, not 5000",
    ),
    "no file": (("--prompts", "nowhere.jsonl"), "cannot read nowhere.jsonl: No such file or directory"),
    "no dtype": (("--prompt", "a", "--dtype", "float31"), r"generate: dtype has no 'float31': .*float32.*"),
    "no device": (("--prompt", "a", "--device", "toaster"), r"device 'toaster': .*"),
    "no values": (("--prompt", "a", "--device", "meta"), r"device 'meta': .{20,120}"),
    "another build": (("--prompt", "a", "--device", "mps"), r"device 'mps': .{20,120}"),
    "top_p": (("--prompt", "a", "--top-p", "2"), r"Sampling: top_p has to be .*, got 2.0"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_ends_in_one_line(act24, run, kind):
    import re

    arguments, told = BAD[kind]
    status, out, errors = act24("generate", run, *arguments)
    assert (status, out) == (2, "")
    (line,) = errors
    assert re.fullmatch(f"act24: {told}", line)


@pytest.mark.parametrize("line", ["low", "{}", '{"prompt": 3}', "[1]"])
def test_a_line_that_is_no_prompt_is_named(act24, run, tmp_path, line):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n' + line)
    status, _, errors = act24("generate", run, "--prompts", tmp_path / "p.jsonl")
    assert status == 2
    assert errors == [f'act24: {tmp_path / "p.jsonl"}, line 2: expected {{"prompt": "…"}}, got {line}']


def test_a_prompt_that_is_too_long_is_named_before_any_other_is_continued(act24, run, tmp_path):
    lines = [json.dumps({"prompt": prompt}) for prompt in ("low", "rank", "two", "low rank " * 3000)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    status, out, errors = act24("generate", run, "--prompts", tmp_path / "p.jsonl", "--batch", "2")
    assert (status, out) == (2, "")
    assert errors[0].startswith("act24: prompt 3 has ")


def test_a_file_is_refused(act24, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    status, out, errors = act24("generate", tmp_path / "model.gguf", "--prompt", "a")
    assert (status, out) == (2, "")
    told = "is a file; give a run, a checkpoint or a Hugging Face folder"
    assert errors == [f"act24: {tmp_path / 'model.gguf'} {told}"]


def test_another_architecture_is_refused(act24, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    status, _, errors = act24("generate", tmp_path, "--prompt", "a")
    assert status == 2
    assert "model_type is 'bert'" in errors[0]


def test_a_reader_that_leaves_ends_it_without_a_word(run):
    with Command("generate", run, "--prompt", "low", "--tokens", "2000") as command:
        command.stdout.read(1)
        command.stdout.close()
        assert command.stderr.read() == ""
    assert command.process.exitcode == 1
