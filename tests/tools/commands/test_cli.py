"""What commands do and print, and one clear line for whatever is wrong with what they are given."""

import contextlib
import errno
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import tomllib

import pytest
import torch
from children import Command
from slow import slow_after

from act24.llama import LlamaForCausalLM, llama_config
from act24.recipes.load import load_recipe, recipe_names
from act24.tools.checkpoints import checkpoint


@pytest.fixture(scope="module")
def run_dir(tiny_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    words = (
        "train",
        tiny_file,
        "--run-dir",
        folder,
        "--set",
        "train.steps=12",
        "--set",
        "checkpoint.every=6",
    )
    with Command(*words) as command:
        status, out, error = command.end()
    assert (status, error) == (0, "")
    (folder / "stdout.txt").write_text(out)
    return folder


def test_probe_decay_says_where_to_look(act24, tiny_file):
    passes = 'passes=[{use="weight24", scope="mlp", mask_every=2}]'
    command = ("probe-decay", tiny_file, "--set", passes, "--decay", "0", "--decay", "10", "--steps", 12)
    status, out, errors = act24(*command)
    assert (status, errors) == (0, [])
    lines = out.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == ["dense", "λ = 0", "λ = 10"]
    within = [0.6 <= float(re.search(r"μ = ([\d.]+)", line)[1]) <= 0.95 for line in lines[1:3]]
    assert within[1] is False, "a decay of 10 lets hardly a mask change"
    told = ("no μ is within 0.60 to 0.95: try λ between 0 and 10", "μ is within 0.60 to 0.95 for λ = 0")
    assert lines[-1] == told[within[0]]

    status, out, errors = act24(*command, "--json")
    assert (status, errors) == (0, lines), "progress, and nothing else"
    result = json.loads(out)
    assert (result["steps"], result["bounds"], result["verdict"]) == (12, [0.6, 0.95], lines[-1])
    assert [run["decay"] for run in result["runs"]] == [None, 0.0, 10.0]
    assert [run["healthy"] for run in result["runs"]] == [None, *within]
    rates = [run["flip_rate"] for run in result["runs"]]
    assert [run["ratio"] for run in result["runs"]] == [rate / rates[0] for rate in rates]


@pytest.mark.slow
def test_probe_decay_by_default(act24, tiny_file):
    passes = 'passes=[{use="weight24", scope="mlp", mask_every=1}]'
    status, out, errors = act24("probe-decay", tiny_file, "--set", passes, "--json")
    result = json.loads(out)
    assert (status, len(errors), result["steps"]) == (0, 6, 10)
    decays = [run["decay"] for run in result["runs"][1:]]
    assert {6e-5, 2e-4} < set(decays), "those of the released scripts"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to time")
@pytest.mark.parametrize("name", ["pack", "gemm", "ffn", "fp8"])
def test_a_benchmark_without_a_gpu_says_so(act24, name):
    assert act24("bench", name) == (2, "", ["act24: this benchmark times a GPU, and there is none here"])


def test_doctor_names_versions_and_paths(act24):
    status, out, errors = act24("doctor")
    assert (status, errors) == (0, [])
    assert torch.__version__ in out


def test_export_says_what_it_wrote(act24, run_dir, tmp_path):
    status, out, errors = act24("export", run_dir, tmp_path / "out")
    assert (status, errors) == (0, [])
    assert out.startswith(f"{tmp_path / 'out'}: a Hugging Face checkpoint (ArceeForCausalLM), step ")
    assert "Held-out loss with 2:4" in out
    assert act24("export", run_dir, tmp_path / "out")[::2] == (
        2,
        [f"act24: {tmp_path / 'out'} exists already"],
    )


def test_whatever_advises_to_scale_steps_can(act24):
    """The line that names the option comes from every command that reads a recipe."""
    steps = ("c4/60m-low-rank-restarts", "--set", "train.steps=1000")
    for command in (("plan",), ("recipe", "show"), ("recipe", "validate")):
        status, _, (*_, last) = act24(*command, *steps)
        assert (status, last) == (2, "act24: --scale-steps scales them with train.steps")
        assert act24(*command, *steps, "--scale-steps")[0] == 0
    assert act24("recipe", "show", *steps, "--scale-steps")[1].count("warmup_steps = 100\n") == 1


def test_recipe_ls_and_show(act24):
    status, out, errors = act24("recipe", "ls")
    assert (status, errors) == (0, [])
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines())
    assert lines == {name: load_recipe(name).description for name in recipe_names()}
    status, out, errors = act24("recipe", "show", "demo", "--set", "train.steps=70", "-s", "log.every=3")
    assert (status, errors) == (0, [])
    table = tomllib.loads(out)
    assert (table["train"]["steps"], table["log"]["every"]) == (70, 3)
    assert [p["use"] for p in table["passes"]] == ["relu2_ffn", "activation24"]


@pytest.mark.parametrize("name", slow_after(1, ["demo", "c4/60m-relu2-act24"]))
def test_recipe_cp_gives_a_recipe_that_is_valid(act24, tmp_path, name):
    status, out, errors = act24("recipe", "cp", name, tmp_path)
    copy = tmp_path / f"{name.rpartition('/')[2]}.toml"
    assert (status, out, errors) == (0, f"{copy}\n", [])
    assert load_recipe(str(copy)) == load_recipe(name)
    assert act24("recipe", "validate", copy) == (0, f"{copy}: valid\n", [])
    assert act24("recipe", "cp", name, copy) == (2, "", [f"act24: {copy} exists already"])


def test_plan_counts_what_is_there(act24, tiny_file):
    status, out, errors = act24("plan", tiny_file, "--json")
    assert (status, errors) == (0, [])
    table = json.loads(out)
    config = llama_config(
        "llama-9m",
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    stock = LlamaForCausalLM(config)
    assert table["parameters_before"] == sum(p.numel() for p in stock.parameters())
    assert table["parameters_after"] == table["parameters_before"] + 2 * (2 - 3) * 32 * 48 + 2 * 2 * 32 * 80
    text = ("matches", "misses", "coverage", "checked")
    assert all(type(table[key]) is int for key in table if key not in text)
    assert [one["reached"] for one in table["coverage"]] == [one["total"] for one in table["coverage"]]
    assert table["checked"] == "nothing was checked: its parameters are on the meta device"
    assert all(
        type(row[key]) is int for row in table["matches"] for key in row if key.startswith("parameters")
    )
    attention, head = 4 * 32 * 32, 300 * 32
    assert table["flops_per_token_before"] == 2 * (2 * (attention + 3 * 32 * 48) + head)
    assert table["flops_per_token_after"] == 2 * (2 * (attention + 32 * 128 + 32 * 128 // 2) + head)
    status, out, errors = act24("plan", tiny_file)
    assert (status, errors) == (0, [])
    assert f"parameters {table['parameters_before']:,} → {table['parameters_after']:,}" in out


def test_train_eval_sample(act24, run_dir):
    status, out, errors = act24("eval", run_dir)
    assert (status, errors) == (0, [])
    head, dense, sparse = out.splitlines()
    assert head.split() == ["loss", "perplexity", "bits", "per", "byte", "tokens"]
    assert (dense.split()[0], sparse.split()[0]) == ("dense", "2:4")
    assert f"held-out loss        {sparse.split()[1]} " in (run_dir / "stdout.txt").read_text()

    status, out, errors = act24(
        "eval", run_dir / "checkpoints" / "step-000006", "--json", "--set", "eval.tokens=64"
    )
    assert (status, errors) == (0, [])
    assert {name: form["tokens"] for name, form in json.loads(out).items()} == {"dense": 64, "2:4": 64}
    status, out, errors = act24("eval", run_dir, "--legacy-average")
    assert "legacy n+1 loss  legacy perplexity" in out.splitlines()[0]

    arguments = ("sample", run_dir, "--prompt", "low rank", "--tokens", 5, "--temperature", 0)
    status, out, errors = act24(*arguments)
    assert (status, errors) == (0, [])
    assert out.startswith("low rank")
    assert act24(*arguments) == (status, out, errors)


def test_a_pipe_gets_whole_lines(run_dir):
    out = (run_dir / "stdout.txt").read_text()
    assert "\x1b" not in out
    lines = out.splitlines()
    assert max(map(len, lines)) > 100  # of the path: longer than any terminal that rich would assume
    plan = lines.index("in model.layers.{0..1}:")
    assert [line.split()[:2] for line in lines[plan + 4 : plan + 6]] == [
        ["activation24", "mlp"],
        ["from", "step"],
    ]
    assert any(
        re.match(r"step 1/12  loss \d\.\d{4}  lr 0\.00e\+00  grad [\d.]+  tokens/s [\d,]+$", line)
        for line in lines
    )
    assert any(line.startswith("step 10: held-out loss ") for line in lines)
    assert lines[-1].endswith(f"tensorboard --logdir {run_dir}")
    assert lines[-2].split() == ["checkpoint", f"{run_dir}/checkpoints/step-000012"]


def on_a_terminal(command, columns=80):
    """What a program writes to a terminal of that width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color"}
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        written = b""
        with contextlib.suppress(OSError):  # how a terminal says that the other side has closed it
            while chunk := os.read(ours, 65536):
                written += chunk
    os.close(ours)
    assert process.returncode == 0
    return written.decode()


def test_a_terminal_gets_a_bar(tiny_file, tmp_path):
    command = [sys.executable, "-m", "act24", "train", str(tiny_file), "--run-dir", str(tmp_path / "run")]
    text = on_a_terminal([*command, "--set", "train.steps=12"])
    assert re.search(r"\d+/12.*━.*loss \d\.\d{4}", text)
    assert "\x1b[" in text
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))
    assert any(re.fullmatch(r"step 10: held-out loss .* over 512 tokens", line) for line in lines)
    assert any(re.match(r"activation24  mlp +linear", line) for line in lines)
    assert "from step 10" in [line.strip() for line in lines]
    assert not any(line.startswith("step 12/12  loss") for line in lines)  # that is for logs
    end = [line.rstrip() for line in lines[lines.index(next(line for line in lines if "12 of 12" in line)) :]]
    path = f"{tmp_path}/run/checkpoints/step-000012"
    assert path in "".join(line[21:] for line in end)  # on two lines, but all there


TRAIN = ("train", "RECIPE", "--run-dir", "NEW")

#: Command lines, and the line each ends in. RECIPE, RUN (a finished one), NEW, EMPTY (a file) are paths.
BAD_INPUT = {
    "unknown recipe": (
        ("train", "demi"),
        r"unknown recipe 'demi': did you mean 'demo'\? \(files end in \.toml\)",
    ),
    "no masked decay to probe": (
        ("probe-decay", "RECIPE"),
        r"passes: probing the decay needs a recipe with weight24, method transposable or sr_ste; "
        r"this one has relu2_ffn, activation24",
    ),
    "too few steps to probe": (
        ("probe-decay", "RECIPE", "--set", 'passes=[{use="weight24", scope="mlp"}]', "--steps", "8"),
        r"8 steps are too few: masks are renewed every 40, take 160 or more",
    ),
    "unknown key": (
        (*TRAIN, "--set", "train.step=4"),
        r"RECIPE: train\.step: unknown key: did you mean 'steps'\?",
    ),
    "wrong type": (
        (*TRAIN, "--set", "train.steps=many"),
        r"RECIPE: train\.steps: Input should be a valid integer, got 'many'",
    ),
    "unknown pass": (
        (*TRAIN, "--set", "passes.0.use=relu_ffn"),
        r"RECIPE: passes\.0\.use: there is no pass named 'relu_ffn': did you mean 'relu2_ffn'\?",
    ),
    "pass without match": (
        (*TRAIN, "--set", 'passes.relu2_ffn.targets=["*.attn"]'),
        r"relu2_ffn matches nothing within targets \['\*\.attn'\], "
        r"which leaves out model\.layers\.0\.mlp and 1 more: name it in targets",
    ),
    "step range on a structural pass": (
        (*TRAIN, "--set", "passes.relu2_ffn.from_step=4"),
        r"RECIPE: passes\.0\.from_step: relu2_ffn changes parameters: it holds all run long, .*",
    ),
    "small vocabulary": (
        (*TRAIN, "--set", "model.vocab_size=200"),
        r"RECIPE: tokenizer\.vocab_size: 300 tokens are more than the vocabulary of the model has, "
        r"model\.vocab_size = 200",
    ),
    "missing data": (
        (*TRAIN, "--set", 'data.train_files=["no/*.txt"]'),
        r"no data file matches 'no/\*\.txt' \(from .*\)",
    ),
    "empty corpus": (
        (*TRAIN, "--set", 'data.train_files=["EMPTY"]'),
        r"no document to train on in 1 file \(EMPTY\)",
    ),
    "rows that do not divide": (
        (*TRAIN, "--set", "train.total_batch_size=9"),
        r"RECIPE: train\.total_batch_size \(9\) must be a multiple of train\.batch_size \(4\)",
    ),
    "a checkpoint of another recipe": (
        ("train", "RECIPE", "--set", "train.seed=7", "--run-dir", "RUN", "--resume", "auto"),
        r"RUN/checkpoints/step-000012 is a checkpoint of another recipe: .*train\.seed was 0 and is 7.*",
    ),
    "a run that is there": (
        ("train", "RECIPE", "--run-dir", "RUN"),
        r"RUN already holds a run: go on with --resume auto, or choose another with --run-dir",
    ),
    "no checkpoint to evaluate": (
        ("eval", "NEW"),
        r"'NEW' is neither a checkpoint nor a run with one \(.*\), nor a Hugging Face folder with .*",
    ),
    "no checkpoint to go on with": (
        (*TRAIN, "--resume", "yes"),
        r"'yes' is neither a checkpoint nor a run with one \(.*\)",
    ),
    "a file for a folder": (
        ("train", "RECIPE", "--run-dir", "EMPTY"),
        r"cannot write the folder EMPTY: .*",
    ),
    "an empty prompt": (
        ("sample", "RUN", "--prompt", ""),
        r"the prompt is empty; give it at least one token",
    ),
    "no source": (("data", "prepare", "nowhere", "NEW"), r"no data source 'nowhere': expected .*"),
}


@pytest.mark.parametrize("kind", BAD_INPUT)
def test_bad_input_ends_in_one_clear_line(act24, tiny_file, run_dir, tmp_path, kind):
    (tmp_path / "empty.txt").write_text("")
    places = {"RECIPE": tiny_file, "RUN": run_dir, "NEW": tmp_path / "new", "EMPTY": tmp_path / "empty.txt"}
    before = sorted(run_dir.rglob("*"))
    arguments, message = BAD_INPUT[kind]
    for name, path in places.items():
        arguments = [argument.replace(name, str(path)) for argument in arguments]
        message = message.replace(name, re.escape(str(path)))
    status, out, errors = act24(*arguments)
    assert (status, out) == (2, "")
    (line,) = errors
    assert re.fullmatch(f"act24: {message}", line)
    assert sorted(run_dir.rglob("*")) == before  # and nothing half done
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def test_a_damaged_checkpoint_is_named(act24, tiny_file, tmp_path):
    train = (
        "train",
        tiny_file,
        "--run-dir",
        tmp_path,
        "--set",
        "train.steps=5",
        "--set",
        "checkpoint.every=4",
    )
    assert act24(*train)[0] == 0
    damaged = tmp_path / "checkpoints" / "step-000005" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-100] ^= 1
    damaged.write_bytes(content)
    for command in (("eval", tmp_path), ("sample", tmp_path), (*train, "--resume", "auto")):
        status, out, errors = act24(*command)
        assert (status, out) == (2, "")
        assert errors == [
            f"act24: {damaged} is damaged: its SHA-256 differs from manifest.json; "
            "delete the folder to go back to the checkpoint before it"
        ]


def test_a_full_disk_while_saving(act24, tiny_file, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", full)
    status, _, errors = act24("train", tiny_file, "--run-dir", tmp_path, "--set", "train.steps=5")
    assert status == 2
    assert errors == [
        f"act24: step 5 could not be saved in {tmp_path}/checkpoints: [Errno 28] No space left on device; "
        "there is no older checkpoint"
    ]


@pytest.mark.parametrize("command", [("plan",), ("recipe", "validate")])
def test_what_is_likely_not_meant_is_said_before_training(act24, tiny_file, command):
    status, _, errors = act24(*command, tiny_file, "--set", "train.steps=10")
    assert status == 0
    assert errors == [
        "warning: passes.1.from_step: activation24 comes into force at step 10, and the run ends at 10: it "
        "is trained without"
    ]
    assert act24(*command, tiny_file)[2] == []
