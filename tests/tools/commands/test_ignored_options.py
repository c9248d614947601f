"""No option is ignored without a word: each is heeded whatever the others say, or stands here with what it
needs, and is refused without."""

import json
import re

import pytest
import typer.main
from tiny import load_tiny, text

from act24.tools.commands.cli import app
from act24.tools.data.shards import TokenShards
from act24.tools.run.train import train

#: By command what each heeds always: arguments, and options that change what it does or prints.
HEEDED = {
    "train": "recipe set_ run_dir resume dry_run data schedule scale_steps",  # test_dry_run.py, test_load.py
    "generate": "path prompt prompts tokens temperature top_k top_p stop seed activations device dtype",
    "sample": "path prompt tokens temperature top_k seed",
    "export": "path out form",
    "plan": "recipe set_ as_json scale_steps lang",
    "probe-decay": "recipe decay steps as_json",
    "demo": "run_dir",
    "compare": "runs as_markdown plot",
    "doctor": "lang",
    "eval": "path protocol as_json",
    "prune": "model out method pattern data samples seqlen table device",
    "recover": "model out blockwise dense data samples seqlen epochs lr device",
    "merge": "model out adapter allow_dense",
    "pack": "model out",
    "recipe ls": "",
    "recipe show": "recipe set_ scale_steps",
    "recipe keys": "as_markdown",
    "recipe validate": "recipe set_ scale_steps",
    "recipe cp": "recipe destination",
    "recipe from-flags": "as_markdown lang",
    "data prepare": "source out tokenizer max_tokens max_heldout_tokens end_of_text",
    "bench step": "recipe beside rows steps as_json",
    "bench train": "recipes rows steps turns without transformers as_json",
    "bench peers": "sizes precisions rows turns side as_json",
    "bench precision": "sizes precisions rows as_json",
    "bench limit": "kinds sizes as_json",
    "bench generate": "sizes batches prefill density layers transformers as_json",
    "bench decode": "path as_json",
    **dict.fromkeys(("bench pack", "bench gemm", "bench fp8", "bench weight", "bench ffn"), "as_json"),
}
PROTOCOL = ("--protocol", "wikitext", "--seqlen", "8", "--text", "TXT")
#: Command and option, with a command line in which it would be ignored, and what is said.
REFUSED = {
    ("generate", "batch"): (("RUN", "--prompt", "a", "--batch", "4"), "--batch .*one prompt"),
    ("export", "dense_weights"): (
        ("RUN", "NEW", "--dense-weights"),
        "--dense-weights .* no weight24 in force",
    ),
    ("probe-decay", "set_"): (
        ("demo", "-s", "passes.weight24.decay=1"),
        "--set passes.weight24.decay .*--decay",
    ),
    ("eval", "seqlen"): (("RUN", "--seqlen", "8"), "--seqlen .* belong to --protocol"),
    ("eval", "text"): (("RUN", "--text", "TXT"), "--text .* belong to --protocol"),
    ("eval", "windows"): (("RUN", "--windows", "8"), "--windows .* belong to --protocol"),
    ("eval", "beside"): (("RUN", "--beside", "TXT"), "--beside .* belong to --protocol"),
    ("eval", "device"): (("RUN", "--device", "cpu"), "--device .* belong to --protocol"),
    ("eval", "set_"): (("RUN", *PROTOCOL, "--set", "eval.tokens=9"), "--set .* with --protocol"),
    ("eval", "legacy_average"): (
        ("RUN", *PROTOCOL, "--legacy-average"),
        "--legacy-average .* with --protocol",
    ),
    ("prune", "set_"): (
        ("RUN", "--out", "NEW", "-s", "data.max_length=8"),
        "--set data.max_length .*--seqlen",
    ),
    ("recover", "set_"): (
        ("RUN", "--out", "NEW", "--blockwise", "-s", "data.max_length=8"),
        "--set data.max_length .*--seqlen",
    ),
    ("recipe from-flags", "arguments"): (("--markdown", "--", "--lr", "1"), "ARGUMENTS .*--markdown"),
    ("data prepare", "vocab_size"): (
        ("TXT", "NEW", "--tokenizer", "my.json", "--vocab-size", "300"),
        "--vocab-size .*the tokenizer is my.json, and has its own",
    ),
    ("data prepare", "text_field"): (("TXT", "NEW", "--text-field", "body"), "--text-field .*no records"),
    ("data prepare", "skip_bad_records"): (
        ("builtin", "NEW", "--skip-bad-records"),
        "--skip-bad-.*no records",
    ),
    ("data prepare", "encoding"): (
        ("PARQUET", "NEW", "--encoding", "gb18030"),
        "--encoding .*.parquet files",
    ),
    ("bench step", "set_"): (("demo", "--set", "train.batch_size=1"), "--set train.batch_size .*--rows"),
    ("bench train", "set_"): (("demo", "--set", "data.source=builtin"), "--set data.source .*of its own"),
}


@pytest.fixture(scope="module")
def places(tiny_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ignored")
    (folder / "a.txt").write_text(text(50, 0))
    (folder / "a.parquet").write_bytes(b"not looked into")
    run = train(load_tiny(tiny_file, "train.steps=5", "eval.tokens=100"), folder / "run").checkpoint
    return {"RUN": run, "TXT": folder / "a.txt", "PARQUET": folder / "a.parquet", "NEW": folder / "new"}


def commands(group, prefix=""):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", {option.name for option in command.params} - {"help"}


def test_what_each_option_does_is_known_here():
    found = dict(commands(typer.main.get_command(app)))
    needing = {name: {option for command, option in REFUSED if command == name} for name in found}
    assert found == {name: set(HEEDED[name].split()) | needing[name] for name in HEEDED}


@pytest.mark.parametrize(("command", "option"), REFUSED)
def test_an_option_that_would_be_ignored_is_refused(act24, places, command, option):
    words, said = REFUSED[command, option]
    status, _, errors = act24(*command.split(), *(places.get(word, word) for word in words))
    assert status == 2
    (line,) = errors
    assert re.search(said, line), line
    assert "would be ignored" in line
    assert not places["NEW"].exists()


def test_what_is_given_beside_a_recipe_goes_before_it(act24, tiny_file, tmp_path):
    out = tmp_path / "out"
    assert act24("data", "prepare", tiny_file, out, "--vocab-size", 270)[0] == 0
    assert TokenShards(out, "train").read(0, 1000).max() < 270  # the recipe has 300
    made = tmp_path / "tokenizer.json"
    made.write_bytes((out / "tokenizer.json").read_bytes())
    assert act24("data", "prepare", tiny_file, tmp_path / "again", "--tokenizer", made)[0] == 0
    then, now = (
        json.loads((folder / "index.json").read_text())["splits"] for folder in (out, tmp_path / "again")
    )
    assert then == now


def exported(folder, kind):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))


@pytest.mark.parametrize("kind", ["llama", "act24", "gpt2", "qwen2", ".gguf", "of the Hub"])
def test_eval_of_a_model_without_a_recipe_says_how(act24, tmp_path, kind):
    """Of other architectures it was said that the stock model does not compute them, of the Hub's nothing."""
    source = {".gguf": tmp_path / "x.gguf", "of the Hub": "org/model"}.get(kind, tmp_path / "exported")
    if kind == ".gguf":
        source.write_bytes(b"GGUF")
    elif kind != "of the Hub":
        exported(source, kind)
    status, _, (line,) = act24("eval", source)
    assert status == 2
    assert f"{source} holds a model and no recipe" in line
    assert line.endswith(f"act24 eval {source} --protocol wikitext --seqlen N --text FILE")
