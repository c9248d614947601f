"""Runs that go on otherwise: longer, with another learning rate, on other processes; what changes is said."""

import functools
import json
import math
import re
import shlex
import shutil

import pytest
import torch
from children import run_ranks
from safetensors.torch import load_file
from slow import slow_after, slow_but
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import load_tiny

from act24.recipes.load import load_recipe
from act24.tools.checkpoints import checkpoint
from act24.tools.checkpoints import folder as checkpoint_folder
from act24.tools.run import step as step_module
from act24.tools.run.folder import describe_run, resume_point
from act24.tools.run.lock import RunError
from act24.tools.run.train import TrainingError, train

SHORT = ("train.steps=8", "checkpoint.every=4", "schedule.warmup_steps=2", "eval.tokens=100")


def logged(run_dir, tag):
    events = EventAccumulator(str(run_dir), {"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def weights(run_dir, step):
    return load_file(checkpoint_folder.folder_of(run_dir, step) / "model.safetensors")


@pytest.fixture(scope="module")
def short(tiny_file, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("changes") / "short"
    train(load_tiny(tiny_file, *SHORT), run_dir)
    return run_dir


def cosine(step, steps):
    """Of optimizer.lr = 0.01, warm-up over 2 updates, down to a tenth."""
    if step < 2:
        return 0.01 * step / 2
    return 0.001 + 0.009 * 0.5 * (1 + math.cos(math.pi * (step - 2) / (steps - 2)))


LENGTHENED = {
    "held": ("hold", lambda step: cosine(min(step, 7), 8), "stays at its last value, 0.0016"),
    "stretched": ("stretch", lambda step: cosine(step, 12), "recomputed for 12 steps"),
}


@pytest.mark.parametrize("own", slow_after(1, [True, False]), ids=["its own", "of another run"])
def test_a_run_that_goes_on_from_its_end_saves_that_end(short, tiny_file, tmp_path, own):
    """It ended in success, with no checkpoint, or with that of a later step as the last."""
    run_dir = tmp_path / "run"
    if own:
        shutil.copytree(short, run_dir)
    begun = checkpoint_folder.folder_of(run_dir if own else short, 4)
    recipe = load_tiny(tiny_file, *SHORT, "train.steps=4", "checkpoint.keep=9")
    outcome = train(recipe, run_dir, resume=str(begun))
    assert outcome.finished
    assert outcome.checkpoint == checkpoint_folder.folder_of(run_dir, 4) == checkpoint_folder.latest(run_dir)
    saved = checkpoint.load(outcome.checkpoint)
    assert outcome.evaluation
    assert saved.manifest["heldout"]["loss"] == outcome.evaluation.loss
    assert all(torch.equal(value, saved.weights[name]) for name, value in weights(short, 4).items())
    assert logged(run_dir, "loss/val") == [(4, pytest.approx(outcome.evaluation.loss, rel=1e-6))]
    again = train(recipe, run_dir, resume="auto")
    assert (again.evaluation, again.checkpoint) == (None, outcome.checkpoint)


@pytest.mark.parametrize("saved", [True, False], ids=["saved", "killed before its first save"])
def test_a_run_of_scaled_steps_is_lengthened_with_its_own_recipe(tiny_file, tmp_path, saved):
    """The command with another train.steps is of another recipe, and said so without a way out."""
    run_dir = tmp_path / "a run"
    recipe = lambda n: load_recipe(str(tiny_file), [f"train.steps={n}", "eval.tokens=100"], scale_steps=True)  # noqa: E731
    if saved:
        train(recipe(4), run_dir)
    else:
        run_dir.mkdir()
        describe_run(run_dir, recipe(4), "", None)
    with pytest.raises(RunError, match=r"passes\.1 was .*--scale-steps scales these: .*own recipe") as error:
        resume_point(run_dir, "auto", recipe(12))
    program, *words = shlex.split(str(error.value).rpartition("without it: ")[2])
    assert (program, words[0]) == ("act24", "train")
    assert words[4:] == ["--run-dir", str(run_dir), "--resume", "auto"]
    start = resume_point(run_dir, "auto", load_recipe(words[1], [words[3]]))
    assert [change.key for change in start.changes] == ["train.steps"] if saved else start is None
    other = load_recipe(str(tiny_file), ["train.steps=8", "train.seed=3"], scale_steps=True)
    with pytest.raises(RunError) as error:
        resume_point(run_dir, "auto", other)
    assert "--scale-steps" not in str(error.value)


@pytest.mark.parametrize(
    ("schedule", "rate", "said"), slow_after(1, LENGTHENED.values()), ids=LENGTHENED.keys()
)
def test_a_finished_run_is_lengthened(tiny, short, tmp_path, capsys, schedule, rate, said):
    longer = tiny(*SHORT, "train.steps=12")
    outcome = train(longer, tmp_path, resume=str(short), schedule=schedule)
    assert (outcome.step, outcome.finished) == (12, True)
    assert [value for _, value in logged(tmp_path, "optim/lr")] == pytest.approx(
        [rate(step) for step in range(8, 12)]
    )
    out = capsys.readouterr().out
    assert "from step 8 on: train.steps was 8 and is 12: " in out
    assert said in out
    entry = json.loads((tmp_path / "history.jsonl").read_text())
    assert entry["changes"] == {"train.steps": [8, 12]}
    assert entry["schedule_steps"] == {"hold": 8, "stretch": 12}[schedule]
    # The choice is the run's from here on: it goes on as it went.
    again = train(longer, tmp_path / "again", resume=str(checkpoint_folder.folder_of(tmp_path, 8 + 4)))
    assert again.step == 12
    state = checkpoint.load(checkpoint_folder.folder_of(tmp_path, 12)).state
    assert state["schedule_steps"] == entry["schedule_steps"]


@pytest.mark.parametrize("schedule", slow_but(("stretch",), ["hold", "stretch"]))
def test_a_lengthened_run_goes_on_bit_for_bit(tiny, short, tmp_path, schedule):
    """Interrupted in its new part, its schedule is neither forgotten nor recomputed."""
    recipe = tiny(*SHORT, "train.steps=14", "checkpoint.keep=9")
    train(recipe, tmp_path / "straight", resume=str(short), schedule=schedule)
    middle = checkpoint_folder.folder_of(tmp_path / "straight", 12)
    train(recipe, tmp_path / "resumed", resume=str(middle))
    then, now = weights(tmp_path / "straight", 14), weights(tmp_path / "resumed", 14)
    assert all(torch.equal(then[name], now[name]) for name in then)
    rates = dict(logged(tmp_path / "straight", "optim/lr"))
    assert dict(logged(tmp_path / "resumed", "optim/lr")) == {step: rates[step] for step in (13, 14)}


def test_a_run_is_shortened_and_not_below_where_it_is(tiny, short, tmp_path, capsys):
    begun = checkpoint_folder.folder_of(short, 4)
    outcome = train(tiny(*SHORT, "train.steps=6"), tmp_path / "a", resume=str(begun))
    assert (outcome.step, outcome.finished) == (6, True)
    assert [v for _, v in logged(tmp_path / "a", "optim/lr")] == pytest.approx([cosine(4, 8), cosine(5, 8)])
    assert "the schedule is still that of 8 steps (--schedule stretch" in capsys.readouterr().out
    with pytest.raises(
        RunError, match=r"train.steps is 3, and .*step-000004 is behind that already: set it to 4 or more, or"
    ):
        train(tiny(*SHORT, "train.steps=3"), tmp_path / "b", resume=str(begun))


def test_another_learning_rate_holds_from_here_on(tiny, short, tmp_path, capsys):
    begun = checkpoint_folder.folder_of(short, 4)
    train(tiny(*SHORT, "optimizer.lr=0.001"), tmp_path, resume=str(begun))
    assert [v for _, v in logged(tmp_path, "optim/lr")] == pytest.approx(
        [cosine(step, 8) / 10 for step in range(4, 8)]
    )
    assert "optimizer.lr was 0.01 and is 0.001" in capsys.readouterr().out
    assert json.loads((tmp_path / "history.jsonl").read_text())["changes"] == {"optimizer.lr": [0.01, 0.001]}


FREE = {
    "batch_size": "train.batch_size=2",
    "one micro-batch": "train.batch_size=8",
    "recomputation": "train.activation_checkpointing=true",
    "compile": "train.compile=on",
}


@pytest.mark.parametrize(
    "override", slow_but((FREE["batch_size"], FREE["compile"]), FREE.values()), ids=FREE.keys()
)
def test_micro_batches_and_compilation_change_no_more_than_rounding(
    tiny, short, tmp_path, monkeypatch, override, capsys
):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    begun = checkpoint_folder.folder_of(short, 4)
    train(tiny(*SHORT, override), tmp_path, resume=str(begun))
    key = override.partition("=")[0]
    assert f"from step 4 on: {key} was " in capsys.readouterr().out
    straight = dict(logged(short, "loss/train"))
    for step, loss in logged(tmp_path, "loss/train"):
        assert loss == pytest.approx(straight[step], rel=1e-4)
    then, now = weights(short, 8), weights(tmp_path, 8)
    for name in then:
        torch.testing.assert_close(then[name], now[name], rtol=1e-3, atol=1e-4)


def test_the_rows_of_a_step_may_not_change(tiny, short, tmp_path):
    with pytest.raises(
        RunError, match=r"another recipe: train.total_batch_size was 8 and is 16; undo .*--run-dir"
    ):
        train(tiny(*SHORT, "train.total_batch_size=16"), tmp_path, resume=str(short))


def trains(path, run_dir, resume, *overrides):
    train(load_tiny(path, *SHORT, *overrides), run_dir, resume=resume)


KEPT = ("checkpoint.keep=5", "train.batch_size=2")


@pytest.fixture(scope="module")
def straight(tiny_file, tmp_path_factory):
    """The folder of a whole run on so many processes, in that parallelism; made once."""

    @functools.cache
    def made(count, parallel):
        run_dir = tmp_path_factory.mktemp("changes") / "straight"
        run_ranks(count, trains, tiny_file, run_dir, "never", *KEPT, f"train.parallel={parallel}")
        return run_dir

    return made


MOVES = {
    "1 to 2, ddp": ((1, "ddp"), (2, "ddp")),
    "2 to 1, ddp": ((2, "ddp"), (1, "ddp")),
    "2 to 1, fsdp": ((2, "fsdp"), (1, "ddp")),
    "1 to 2, fsdp": ((1, "ddp"), (2, "fsdp")),
    "ddp to fsdp": ((2, "ddp"), (2, "fsdp")),
    "fsdp to ddp": ((2, "fsdp"), (2, "ddp")),
    "2 to 4": ((2, "ddp"), (4, "fsdp")),
}


@pytest.mark.parametrize(("then", "now"), MOVES.values(), ids=MOVES.keys())
def test_a_run_moves_to_other_processes(tiny_file, tmp_path, straight, then, now):
    """The second half on other processes is the second half on those of before, up to rounding: the same
    rows in each step, so the same losses."""
    (before, old), (after, new) = then, now
    begun = str(checkpoint_folder.folder_of(straight(*then), 4))
    run_ranks(after, trains, tiny_file, tmp_path, begun, *KEPT, f"train.parallel={new}")
    losses = dict(logged(straight(*then), "loss/train"))
    moved = logged(tmp_path, "loss/train")
    assert [step for step, _ in moved] == [5, 6, 7, 8]
    for step, loss in moved:
        assert loss == pytest.approx(losses[step], rel=1e-5)
    first, second = weights(straight(*then), 8), weights(tmp_path, 8)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-4)
    changed = json.loads((tmp_path / "history.jsonl").read_text())["changes"]
    assert changed.get("processes", [before, after]) == [before, after]
    assert changed.get("train.parallel", [old, new]) == [old, new]
    assert ("processes" in changed, "train.parallel" in changed) == (before != after, old != new)


class InfiniteGradient(torch.autograd.Function):
    """The identity, but for its gradient."""

    @staticmethod
    def forward(loss):
        return loss.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf


def overflowing(monkeypatch, *bad, spoiled=lambda loss: loss * torch.inf):
    """The losses of these steps are infinite, on every try; or are what `spoiled` makes of them."""
    update = step_module.TrainingStep.__call__
    model = step_module.SummedLoss.forward
    current = [0]

    def begin(self, batches, optimizer, step=0, without=()):
        current[0] = step + 1
        return update(self, batches, optimizer, step, without)

    def loss(self, input_ids, labels):
        total, count = model(self, input_ids, labels)
        return (spoiled(total) if current[0] in bad and self.training else total), count

    monkeypatch.setattr(step_module.TrainingStep, "__call__", begin)
    monkeypatch.setattr(step_module.SummedLoss, "forward", loss)


def test_a_run_that_died_of_one_batch_goes_on_without_it(tiny, tmp_path, monkeypatch, capsys):
    """It used to die at the same step for ever."""
    overflowing(monkeypatch, 6)
    for resume in ("never", "auto"):
        with pytest.raises(TrainingError, match=r"not finite at step 6; the last good .*step-000004"):
            train(tiny(*SHORT), tmp_path, resume=resume)
    outcome = train(tiny(*SHORT, "train.on_nonfinite=skip"), tmp_path, resume="auto")
    assert (outcome.finished, outcome.tokens) == (True, 7 * 8 * 16)
    out = capsys.readouterr().out
    assert "step 6: the loss or its gradient is not finite; the batch is left out" in out
    assert [step for step, _ in logged(tmp_path, "loss/train")] == [1, 2, 3, 4, 5, 7, 8]
    assert logged(tmp_path, "optim/skipped_batches") == [(7, 1), (8, 1)]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path, 8).values())


SPOILED = {"loss": lambda loss: loss * torch.inf, "gradient alone": InfiniteGradient.apply}


@pytest.mark.parametrize("spoiled", slow_after(1, SPOILED.values()), ids=SPOILED.keys())
def test_a_batch_that_is_left_out_changes_nothing(tiny, tmp_path, monkeypatch, spoiled):
    skips = (*SHORT, "train.on_nonfinite=skip", "checkpoint.every=1", "checkpoint.keep=9")
    overflowing(monkeypatch, 5, spoiled=spoiled)
    train(tiny(*skips), tmp_path)
    before, after = (checkpoint.load(checkpoint_folder.folder_of(tmp_path, step)) for step in (4, 5))
    for name, tensor in before.weights.items():
        assert torch.equal(tensor, after.weights[name])
    old, new = ((c.folder / "optimizer.json").read_text() for c in (before, after))
    assert [g["options"]["updates"] for g in json.loads(old)["groups"]] == [4, 4]
    assert [g["options"]["updates"] for g in json.loads(new)["groups"]] == [4, 4]


def test_without_a_fault_skipping_changes_no_bit(tiny, short, tmp_path):
    train(tiny(*SHORT, "train.on_nonfinite=skip"), tmp_path)
    then, now = weights(short, 8), weights(tmp_path, 8)
    assert all(torch.equal(then[name], now[name]) for name in then)


def test_too_many_in_a_row_end_the_run_and_are_not_forgotten(tiny, tmp_path, monkeypatch):
    overflowing(monkeypatch, 3, 4, 5, 6, 7, 8)
    recipe = tiny(*SHORT, "train.on_nonfinite=skip", "train.max_skips=3", "checkpoint.every=0")
    message = r"not finite at 3 steps in a row \(train.max_skips\): .*; saved step 5 in .*step-000005"
    with pytest.raises(TrainingError, match=message):
        train(recipe, tmp_path)
    with pytest.raises(TrainingError, match=r"at 3 steps in a row.*step-000006"):  # one more try each time
        train(recipe, tmp_path, resume="auto")


def test_a_run_that_gives_up_says_what_to_go_back_to(tiny, tmp_path, monkeypatch):
    """Not to what it saved among the batches that it left out: the weights in there are those that fail."""
    overflowing(monkeypatch, 5, 6, 7)
    skips = ("train.on_nonfinite=skip", "train.max_skips=3", "checkpoint.keep=9")
    recipe = tiny(*SHORT, *skips, "checkpoint.every=2")
    with pytest.raises(TrainingError) as error:
        train(recipe, tmp_path / "run")
    way = re.search(
        r": go back to (\S+) with --resume and a smaller optimizer\.lr, or .*max_skips; ", str(error.value)
    )
    assert way[1] == str(checkpoint_folder.folder_of(tmp_path / "run", 2))
    monkeypatch.undo()
    lower = tiny(*SHORT, *skips, "checkpoint.every=2", "optimizer.lr=0.001")
    assert train(lower, tmp_path / "run", resume=way[1]).finished
    overflowing(monkeypatch, 2, 3, 4)
    with pytest.raises(
        TrainingError, match=r": no checkpoint of this run is older .* begin anew .* train\.max_skips; "
    ):
        train(recipe, tmp_path / "early")


def test_skips_that_are_not_in_a_row_are_counted_and_end_nothing(tiny, tmp_path, monkeypatch):
    overflowing(monkeypatch, 2, 3, 6, 7)
    recipe = tiny(*SHORT, "train.on_nonfinite=skip", "train.max_skips=3", "checkpoint.keep=9")
    assert train(recipe, tmp_path / "straight").finished
    counts = [(4, 2), (5, 2), (8, 4)]
    assert logged(tmp_path / "straight", "optim/skipped_batches") == counts
    train(recipe, tmp_path / "on", resume=str(checkpoint_folder.folder_of(tmp_path / "straight", 4)))
    assert logged(tmp_path / "on", "optim/skipped_batches") == counts[1:]


def test_what_stays_beside_the_last(tiny, tmp_path):
    """Every fourth, the best two of those that were evaluated, and the last."""
    recipe = tiny(
        "train.steps=15",
        "eval.every=3",
        "eval.tokens=200",
        "checkpoint.every=1",
        "checkpoint.keep=1",
        "checkpoint.keep_every=4",
        "checkpoint.keep_best=2",
    )
    train(recipe, tmp_path)
    losses = {step: loss for step, loss in logged(tmp_path, "loss/val")}
    best = sorted(losses, key=losses.__getitem__)[:2]
    kept = {int(folder.name[5:]) for folder in checkpoint_folder.complete(tmp_path)}
    assert kept == {15, 4, 8, 12, *best}
    for step in best:
        heldout = checkpoint.load(checkpoint_folder.folder_of(tmp_path, step)).manifest["heldout"]
        assert heldout["loss"] == pytest.approx(losses[step], rel=1e-6)
    for step in kept - set(losses):  # nobody has measured those weights
        assert checkpoint.load(checkpoint_folder.folder_of(tmp_path, step)).manifest["heldout"] is None
