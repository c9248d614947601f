"""The training run: to the step and the bit, whatever ends it, and clear words for what stops it."""

import errno
import json
import math
import os
import pkgutil
import signal

import pytest
import torch
from children import Command, exit_code
from safetensors.torch import load_file
from slow import slow_after, slow_but
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import load_tiny

from act24.errors import Act24Error
from act24.tools.checkpoints import checkpoint
from act24.tools.checkpoints import folder as checkpoint_folder
from act24.tools.checkpoints.manifest import CheckpointError
from act24.tools.run.build import build, load
from act24.tools.run.folder import RunError
from act24.tools.run.optimizers import build_optimizer
from act24.tools.run.processes import Processes
from act24.tools.run.step import StepResult
from act24.tools.run.train import TrainingError, train
from act24.tools.watch.monitor import Monitor


def scalars(run_dir):
    """Every scalar in TensorBoard by tag, but for those that time gives."""
    events = EventAccumulator(str(run_dir), {"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("perf/")]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def weights(run_dir):
    return load_file(checkpoint_folder.latest(run_dir) / "model.safetensors")


def steps_saved(run_dir):
    return [int(folder.name.removeprefix("step-")) for folder in checkpoint_folder.complete(run_dir)]


def run_until(path, run_dir, overrides, moment):
    """Train on from the last checkpoint, and die by SIGKILL at the `call`-th call of a function."""
    if moment is not None:
        owner, name, call = moment
        original, calls = getattr(pkgutil.resolve_name(owner), name), 0

        def fatal(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(pkgutil.resolve_name(owner), name, fatal)
    train(load_tiny(path, *overrides), run_dir, resume="auto")


STEP = ("act24.tools.run.train:TrainingRun", "advance")
KILLS = {
    "at steps 7 and 13": [(*STEP, 8), (*STEP, 8)],
    "while saving": [
        ("act24.tools.checkpoints.checkpoint", "save_file", 1),  # step 3: nothing to resume from
        ("act24.tools.checkpoints.folder", "publish", 2),  # step 6, all but the manifest written
        ("pathlib:Path", "rename", 1),  # step 6, the manifest too
        ("act24.tools.checkpoints.folder", "prune", 3),  # step 12 is there, the oldest not yet gone
        ("shutil", "rmtree", 1),  # step 15, the oldest half gone
        ("act24.tools.watch.monitor:Monitor", "evaluated", 1),  # step 20, all steps made
    ],
}


@pytest.fixture(scope="module")
def straight(tiny_file, tmp_path_factory):
    """A run of 20 steps that nothing interrupts."""
    run_dir = tmp_path_factory.mktemp("straight")
    assert exit_code(run_until, tiny_file, run_dir, ["checkpoint.every=3"], None) == 0
    return run_dir


@pytest.mark.parametrize("moments", KILLS.values(), ids=KILLS.keys())
def test_a_killed_run_goes_on_bit_for_bit(tiny_file, tmp_path, straight, moments):
    overrides = ["checkpoint.every=3"]
    for moment in moments:
        assert exit_code(run_until, tiny_file, tmp_path, overrides, moment) == -signal.SIGKILL
    assert exit_code(run_until, tiny_file, tmp_path, overrides, None) == 0
    expected, found = scalars(straight), scalars(tmp_path)
    assert [step for step, _ in expected["loss/train"]] == list(range(1, 21))
    assert [step for step, _ in expected["loss/val"]] == [5, 10, 15, 20]
    assert found == expected
    then, now = weights(straight), weights(tmp_path)
    assert then.keys() == now.keys()
    assert all(torch.equal(then[name], now[name]) for name in then)
    assert steps_saved(tmp_path) == steps_saved(straight) == [18, 20]
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-000018", "step-000020"]  # of what the kills left, nothing
    ours, theirs = (checkpoint_folder.latest(run) for run in (tmp_path, straight))
    for name in ("state.json", "optimizer.json"):  # tokens and heatmaps; options and counts
        assert (ours / name).read_text() == (theirs / name).read_text()
    mine, other = (json.loads((folder / "rank-00000.json").read_text()) for folder in (ours, theirs))
    assert mine["state"] == other["state"]  # of the data
    assert mine["random"]["torch"] == other["random"]["torch"]


def test_a_run_to_its_end(tiny, straight):
    logged = scalars(straight)
    rates = [0.01 * step / 4 for step in range(4)]  # warm-up: the first update, of index 0, has rate 0
    rates += [0.001 + 0.009 * 0.5 * (1 + math.cos(math.pi * step / 16)) for step in range(16)]
    assert [value for _, value in logged["optim/lr"]] == pytest.approx(rates)
    losses = [value for _, value in logged["loss/train"]]
    assert losses[0] == pytest.approx(math.log(300), rel=0.02)  # it starts knowing nothing
    assert losses[-1] < losses[0] - 2
    assert checkpoint.load(straight / "checkpoints" / "step-000020").state["tokens"] == 20 * 8 * 16
    for tag in ("sparsity_relu", "sparsity_dropped_energy", "sparsity_dropped_nonzeros"):
        for layer in ("layer_0", "layer_1", "mean_across_layers"):
            values = [value for _, value in logged[f"{tag}/{layer}"]]
            assert len(values) == 20
            assert all(0 < value < 1 for value in values)
    unseen = [tag for tag in logged if tag.startswith(("weight_sparsity", "text/"))]  # all zero, all run long
    assert unseen == ["text/epoch"]
    assert not any("gate" in tag for tag in logged)
    assert (straight / "recipe.toml").read_text() == (
        straight / "checkpoints" / "step-000020" / "recipe.toml"
    ).read_text()
    assert (straight / "plan.txt").read_text().startswith("in model.layers.{0..1}:\npass ")


def test_a_finished_run_has_nothing_to_go_on_with(tiny, straight, capsys):
    before = sorted(path for path in straight.rglob("*") if "events" not in path.name)
    outcome = train(tiny("checkpoint.every=3"), straight, resume="auto")
    assert (outcome.step, outcome.finished, outcome.tokens) == (20, True, 20 * 8 * 16)
    assert "step-000020 is the end of this run: step 20 was its last" in capsys.readouterr().out
    assert sorted(path for path in straight.rglob("*") if "events" not in path.name) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_exits(tiny, tiny_file, tmp_path, number):
    run_dir = tmp_path / "run"
    words = (
        "train",
        tiny_file,
        "--run-dir",
        run_dir,
        "--set",
        "train.steps=1_000_000",
        "--set",
        "log.every=3",
    )
    with Command(*words) as command:
        assert any(line.startswith("step 3/1000000") for line in iter(command.stdout.readline, ""))
        os.kill(command.process.pid, number)
        status, out, error = command.end()
    assert (status, error) == (75, "")
    (step,) = steps_saved(run_dir)
    assert f"{number.name}: saved step {step} in {run_dir}/checkpoints/step-{step:06d}\n" in out
    assert f"steps              {step:,} of 1,000,000" in out
    assert load(run_dir).step == step
    logged = scalars(run_dir)["loss/train"]  # the last window is logged, though log.every is not due
    assert logged[-1][0] == step


def test_a_dry_run_writes_nothing(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    outcome = train(tiny(), tmp_path / "run", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    assert (outcome.step, outcome.finished, outcome.checkpoint, outcome.evaluation) == (1, False, None, None)
    assert outcome.loss == pytest.approx(math.log(300), rel=0.02)
    assert "\nactivation24  mlp " in capsys.readouterr().out


def test_logged_windows_average_their_steps(tiny, tmp_path, straight):
    train(tiny("log.every=4", "checkpoint.every=10"), tmp_path)
    each = dict(scalars(straight)["loss/train"])
    ends = [0, 4, 5, 8, 10, 12, 15, 16, 20]  # evaluations and checkpoints end a window too
    for start, (end, loss) in zip(ends, scalars(tmp_path)["loss/train"], strict=False):
        assert end == ends[ends.index(start) + 1]
        assert loss == pytest.approx(sum(each[step] for step in range(start + 1, end + 1)) / (end - start))


@pytest.mark.parametrize("every", [1, 0])
def test_a_loss_that_is_not_finite_stops_the_run(tiny, tmp_path, every):
    recipe = tiny("optimizer.lr=1e30", "schedule.warmup_steps=0", "log.every=4", f"checkpoint.every={every}")
    good = f"the last good checkpoint is {tmp_path}/checkpoints/step-000001"
    with pytest.raises(TrainingError) as caught:
        train(recipe, tmp_path)
    message = "the loss or its gradient is not finite at step 2; "
    message += good if every else "there is no checkpoint before it"
    assert str(caught.value) == message + '; train.on_nonfinite = "skip" leaves such batches out'
    assert steps_saved(tmp_path) == [1] * every


def test_a_gradient_that_is_not_finite_is_seen_too(tiny):
    built = build(tiny(), torch.device("cpu"))
    alone = Processes(0, 1, torch.device("cpu"))
    optimizer = build_optimizer(built.model, built.recipe.optimizer)
    monitor = Monitor(built.recipe, built, optimizer, alone, None, None, None)
    for step, norm in enumerate((1.0, math.inf, 1.0), start=1):
        values = (torch.tensor(value) for value in (2.0, norm, 5))
        monitor.add(step, StepResult(*values), rate=0.1, waited=0.0)
    assert monitor.flush(3).first_bad_step == 2


def test_a_full_disk_leaves_what_was_saved_before(tiny, tmp_path, monkeypatch):
    saves = []

    def full(*arguments, **options):
        saves.append(arguments)
        if len(saves) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save_file(*arguments, **options)

    save_file = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", full)
    recipe = tiny("checkpoint.every=5")
    match = r"step 10 could not be saved.*No space left on device; the last good checkpoint is .*step-000005"
    with pytest.raises(CheckpointError, match=match):
        train(recipe, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000005"]
    assert train(recipe, tmp_path, resume="auto").finished


def test_a_run_is_not_overwritten(tiny, straight):
    before = sorted(straight.rglob("*"))
    with pytest.raises(RunError, match=r"already holds a run: go on with --resume auto, .*--run-dir"):
        train(tiny(), straight)
    assert sorted(straight.rglob("*")) == before


def test_a_run_goes_on_only_with_its_own_recipe(tiny, straight, tmp_path):
    other = tiny("optimizer.eps=0.02", "passes.activation24.from_step=11", "log.every=7")
    with pytest.raises(RunError) as caught:
        train(other, straight, resume="auto")
    assert "is a checkpoint of another recipe: optimizer.eps was 1e-08 and is 0.02; passes.1 was" in str(
        caught.value
    )
    assert "log" not in str(caught.value)  # what is only watched may change
    with pytest.raises(RunError, match="is neither a checkpoint nor a run"):
        train(tiny(), tmp_path / "new", resume=str(tmp_path))


def test_a_run_branches_off_a_checkpoint(tiny, straight, tmp_path):
    outcome = train(tiny(), tmp_path, resume=str(straight / "checkpoints" / "step-000018"))
    assert outcome.finished
    assert [step for step, _ in scalars(tmp_path)["loss/train"]] == [19, 20]
    then, now = weights(straight), weights(tmp_path)
    assert all(torch.equal(then[name], now[name]) for name in then)


MORE_STATE = {  # buffers that move, exact updates, moments that are reset
    "soft_dynamic": [
        'passes=[{use="relu2_ffn"}, {use="activation24", from_step=5, method="soft_dynamic"}]',
        "passes.activation24.dynamic_steps=3",
        "passes.activation24.calibration_samples=4",
    ],
    "mvue": [
        'passes=[{use="relu2_ffn"}, {use="activation24", from_step=5, method="mvue", backward="sparse"}]'
    ],
    "weight24": ['passes=[{use="weight24", from_step=5, mask_every=3}]'],
    "low_rank": [
        'passes=[{use="low_rank", attn_rank=8, mlp_rank=8}]',
        "optimizer.name=loro_adamw",
        "optimizer.exact_every=4",
    ],
    "fp8": [
        'passes=[{use="relu2_ffn"}, {use="activation24", backward="split_gemm", from_step=3}, '
        '{use="fp8", head=true}]',
        "model.vocab_size=304",
        "train.dtype=bfloat16_autocast",
    ],
    "lost": [
        'passes=[{use="relu2_ffn"}, {use="lost", attn_rank=8, mlp_rank=8}]',
        "optimizer.name=lost_adamw",
        "optimizer.momentum_reset_steps=4",
    ],
}


#: Those with the most of it; the others are gone on with in `test_served.py` and `test_low_rank_training.py`.
MOST_STATE = ("weight24", "fp8", "lost")


@pytest.mark.parametrize(
    "overrides",
    slow_but([MORE_STATE[name] for name in MOST_STATE], MORE_STATE.values()),
    ids=MORE_STATE.keys(),
)
def test_whatever_a_method_keeps_goes_on_too(tiny, tmp_path, overrides):
    recipe = tiny(*overrides, "train.steps=14", "checkpoint.every=7")
    train(recipe, tmp_path / "straight")
    middle = tmp_path / "straight" / "checkpoints" / "step-000007"
    train(recipe, tmp_path / "resumed", resume=str(middle))
    then, now = weights(tmp_path / "straight"), weights(tmp_path / "resumed")
    assert all(torch.equal(then[name], now[name]) for name in then)
    assert scalars(tmp_path / "straight")["loss/train"][7:] == scalars(tmp_path / "resumed")["loss/train"]


def test_a_flipped_byte_is_named(tiny, tmp_path):
    train(tiny("train.steps=5", "checkpoint.every=4"), tmp_path)
    damaged = tmp_path / "checkpoints" / "step-000005" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-100] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step-000005/model\.safetensors is damaged"):
        train(tiny("train.steps=5"), tmp_path, resume="auto")


NOTHING_WRITTEN = {
    "warmup_steps": ("schedule.warmup_steps=20", r"warmup_steps \(20\)"),
    "rows": ("train.batch_size=3", "train.total_batch_size .8. must be a multiple"),
    "missing data": ('data.train_files=["nowhere/*.txt"]', r"no data file matches 'nowhere/\*\.txt'"),
    "vocabulary": ("model.vocab_size=200", "300 tokens are more than the vocabulary of the model has"),
    "short corpus": ("data.max_length=100000", "fewer than one row"),
    "model": ("model.num_attention_heads=5", "hidden_size 32 is not a multiple of num_attention_heads 5"),
    "pass": ('passes.relu2_ffn.targets=["nowhere"]', "relu2_ffn matches nothing"),
}


@pytest.mark.parametrize(("override", "message"), NOTHING_WRITTEN.values(), ids=NOTHING_WRITTEN.keys())
def test_wrong_input_leaves_nothing_behind(tiny, tmp_path, override, message):
    with pytest.raises(Act24Error, match=message):
        train(tiny(override), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_device_without_fp8_is_refused_at_the_start(tiny, tmp_path, monkeypatch):
    """Not in the first 2:4 step, behind the dense warm-up."""
    monkeypatch.setattr("act24.tools.run.build.why_no_fp8", lambda _: "this GPU has none")
    with pytest.raises(Act24Error, match="has none"):
        train(
            tiny('passes.activation24.precision="fp8"', "passes.activation24.from_step=5"), tmp_path / "run"
        )
    assert list(tmp_path.iterdir()) == []


def test_an_empty_corpus_leaves_nothing_behind(tiny, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    override = f'data.train_files=["{tmp_path}/empty.txt"]'
    with pytest.raises(Act24Error, match=r"no document to train on in 1 file \(.*empty\.txt"):
        train(tiny(override), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write the folder .*file: .*(exists|Not a directory)"):
        train(tiny(), tmp_path / "file")


@pytest.mark.parametrize("dtype", slow_after(1, ["bfloat16", "bfloat16_autocast"]))
def test_lower_precision_trains_saves_and_loads(tiny, tmp_path, dtype):
    recipe = tiny(f"train.dtype={dtype}", "train.steps=12")
    outcome = train(recipe, tmp_path)
    assert outcome.loss < 3.5
    stored = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    assert {tensor.dtype for tensor in weights(tmp_path).values()} == {stored}
    assert {p.dtype for p in load(tmp_path).model.parameters()} == {stored}


def test_recomputed_activations_save_under_the_same_names(tiny, straight, tmp_path):
    train(tiny("train.activation_checkpointing=true"), tmp_path)
    then, now = weights(straight), weights(tmp_path)
    assert then.keys() == now.keys()
    assert all(torch.equal(then[name], now[name]) for name in then)
    expected, found = scalars(straight), scalars(tmp_path)
    assert found.keys() == expected.keys()
    for tag, values in expected.items():  # what is counted again is another sum of float32
        exact = tag.startswith(("loss/", "optim/"))
        assert found[tag] == (values if exact else [(step, pytest.approx(value)) for step, value in values])
    assert load(tmp_path).step == 20


def test_statistics_of_every_second_step(tiny, tmp_path):
    """Logged every step, counted at every second one; the steps themselves are the same."""
    losses = []
    for every in (1, 2):
        overrides = ("train.steps=6", "eval.every=0", f"log.activation_statistics_every={every}")
        train(tiny(*overrides, "passes.activation24.from_step=1"), tmp_path / str(every))
        logged = scalars(tmp_path / str(every))
        assert [step for step, _ in logged["sparsity_relu/layer_0"]] == list(range(every, 7, every))
        losses.append(logged["loss/train"])
    assert losses[0] == losses[1]
