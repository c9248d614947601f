"""A run of two processes: text that grows, data that fail on one of them, a signal to one of them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from children import run_ranks
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import text, write_recipe

from act24.errors import Act24Error
from act24.recipes.load import load_recipe
from act24.tools.checkpoints import folder as checkpoint_folder
from act24.tools.data import TokenRows
from act24.tools.run import train as train_module
from act24.tools.run.step import TrainingStep
from act24.tools.run.train import TrainingError, train

pytestmark = pytest.mark.slow  # two processes each, for ten seconds

SHORT = ["schedule.warmup_steps=2", "eval.every=0", "eval.tokens=100", "train.batch_size=2"]


@pytest.fixture
def own(tmp_path, tiny_file):
    """The tiny recipe with text of its own, which a test may change; the tokenizer's cache is shared."""
    return write_recipe(tmp_path)


def logged(run_dir, tag):
    events = EventAccumulator(str(run_dir), {"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def weights(run_dir, step):
    return load_file(checkpoint_folder.folder_of(run_dir, step) / "model.safetensors")


def noting(path: Path, of_step):
    """Each rank appends to a file of its own what `of_step(training_step, batches)` says of each step."""
    rank = os.environ.get("RANK", "0")
    original = TrainingStep.__call__

    def noted(self, batches, *arguments):
        result = original(self, batches, *arguments)
        with open(f"{path}-{rank}", "a") as file:
            file.write(json.dumps(of_step(self, batches)) + "\n")
        return result

    TrainingStep.__call__ = noted


def notes(path: Path, rank: int):
    return [json.loads(line) for line in Path(f"{path}-{rank}").read_text().splitlines()]


def trains(recipe, run_dir, resume, overrides, grow=False):
    noting(run_dir / "labels", lambda step, batches: [batch.labels.tolist() for batch in batches])
    train(load_recipe(str(recipe), [*SHORT, *overrides]), run_dir, resume=resume, grow=grow)


def refused(recipe, run_dir, overrides):
    with pytest.raises(Act24Error, match="1 file was added"):
        train(load_recipe(str(recipe), [*SHORT, *overrides]), run_dir, resume="auto")


def test_data_grow_on_two_processes(own, tmp_path):
    """What was added is read from the first epoch that had not begun, once, shared out over both; and the
    rows of each step are those that one process goes on with. A "~" is in the added file only, and a token of
    its own."""
    for index in range(4):
        (tmp_path / f"train-{index}.txt").write_text(text(50, index))
    run_dir, alone, many = tmp_path / "run", tmp_path / "alone", 70
    run_dir.mkdir()
    alone.mkdir()
    first = ["train.steps=3", "checkpoint.keep=9"]
    longer = ["train.steps=9", "checkpoint.keep=9"]
    run_ranks(2, trains, own, run_dir, "never", first)
    (tmp_path / "train-9.txt").write_text("~" * many)
    run_ranks(2, refused, own, run_dir, longer)
    begun = checkpoint_folder.folder_of(run_dir, 3)
    run_ranks(1, trains, own, alone, str(begun), longer, True)
    run_ranks(2, trains, own, run_dir, "auto", longer, True)

    said = [event.tensor_proto.string_val[0] for event in texts(run_dir, "changes/text_summary")]
    assert said == [] or all(b"train.steps" in line for line in said)
    epochs = dict(logged(run_dir, "text/epoch"))
    assert max(epochs.values()) >= 2
    first_of_2 = min(step for step, epoch in epochs.items() if epoch >= 2)  # epoch 1 had begun by step 3
    added, rows = [], []
    for rank in range(2):
        steps = notes(run_dir / "labels", rank)
        assert len(steps) == 9
        added.append([sum(ids.count(TILDE) for batch in step for ids in batch) for step in steps])
        rows.append(steps[3:])
    assert sum(added[0][: first_of_2 - 1]) == sum(added[1][: first_of_2 - 1]) == 0
    assert sum(added[0]) + sum(added[1]) >= many
    assert max(sum(a) for a in added) > 0
    one = notes(alone / "labels", 0)
    for step, mine in enumerate(one):  # one process's four micro-batches of two rows, and two of each of two
        dealt = [row for batch in mine for row in batch]
        assert dealt[0::2] == [row for batch in rows[0][step] for row in batch]
        assert dealt[1::2] == [row for batch in rows[1][step] for row in batch]


TILDE = ord("~") - ord("!") + 1  # of a byte-level BPE whose special token is 0


def texts(run_dir, tag):
    events = EventAccumulator(str(run_dir), {"tensors": 0}).Reload()
    return events.Tensors(tag) if tag in events.Tags()["tensors"] else []


def fails(recipe, run_dir, error, message):
    """Rows of the second process cannot be made from its 11th batch on."""
    make, made = TokenRows._make, [0]

    def failing(self):
        made[0] += 1
        if made[0] > 10 and os.environ["RANK"] == "1":
            raise error
        return make(self)

    TokenRows._make = failing
    with pytest.raises((TrainingError, type(error)), match=message):
        train(load_recipe(str(recipe), [*SHORT, "train.steps=8"]), run_dir)


def goes_on(recipe, run_dir):
    train(load_recipe(str(recipe), [*SHORT, "train.steps=8"]), run_dir, resume="auto")


@pytest.fixture(scope="module")
def straight(tiny_file, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("two") / "straight"
    run_ranks(2, goes_on, tiny_file, run_dir)
    return run_dir


def assert_goes_on_as(straight, recipe, run_dir):
    run_ranks(2, goes_on, recipe, run_dir)
    assert logged(run_dir, "loss/train") == logged(straight, "loss/train")
    then, now = weights(straight, 8), weights(run_dir, 8)
    assert all(torch.equal(then[name], now[name]) for name in then)


def test_data_that_fail_on_one_process_end_both_with_a_checkpoint(tiny_file, tmp_path, straight):
    """Two batches a step and process: the sixth step has none there, and none waits for it in vain."""
    message = r"the disk is gone; saved step 5 in .*step-000005"
    run_ranks(2, fails, tiny_file, tmp_path, Act24Error("the disk is gone"), message)
    (saved,) = checkpoint_folder.complete(tmp_path)
    assert saved.name == "step-000005"
    assert_goes_on_as(straight, tiny_file, tmp_path)


def is_stopped(recipe, run_dir):
    """The second process alone hears the signal, before the fourth step."""
    advance, made = train_module.TrainingRun.advance, [0]

    def signalled(self):
        made[0] += 1
        if made[0] == 4 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(self)

    train_module.TrainingRun.advance = signalled
    outcome = train(load_recipe(str(recipe), [*SHORT, "train.steps=8"]), run_dir)
    assert (outcome.step, outcome.stopped, outcome.finished) == (4, "SIGTERM", False)


def test_a_signal_to_one_process_stops_both(tiny_file, tmp_path, straight):
    run_ranks(2, is_stopped, tiny_file, tmp_path)
    assert_goes_on_as(straight, tiny_file, tmp_path)


def test_a_loop_around_torchrun_tells_a_stop_from_a_failure(tiny_file, tmp_path):
    def started(steps):
        words = ["train", tiny_file, "--run-dir", tmp_path, "--resume", "auto"]
        words += ["--set", f"train.steps={steps}", "--set", "checkpoint.every=2", "--set", "eval.tokens=100"]
        words += ["--set", "schedule.warmup_steps=1", "--set", "eval.every=0"]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "act24"]
        return subprocess.Popen([*launcher, *map(str, words)], start_new_session=True)

    def ended(process):
        try:
            return process.wait(240)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    first = started(20_000)
    while not checkpoint_folder.folders(tmp_path) and first.poll() is None:
        time.sleep(0.2)
    first.terminate()
    assert ended(first) == 1  # as of a failure
    note = (tmp_path / "stopped").read_text()
    step = checkpoint_folder.latest(tmp_path).name.removeprefix("step-")
    assert note == f"SIGTERM: saved step {int(step)}\n"
    assert ended(started(int(step) + 2)) == 0
    assert ended(started(1)) == 1  # behind its end already
    assert not (tmp_path / "stopped").exists()


DRAWN = 'passes=[{use="relu2_ffn"}, {use="activation24", method="mvue", backward="sparse"}]'


def draws(recipe, run_dir):
    def seeds(step, batches):
        buffers = step.summed_loss.named_buffers()
        return [int(value) for name, value in buffers if name.endswith("activation24_seed")]

    noting(run_dir / "seeds", seeds)
    train(load_recipe(str(recipe), [*SHORT, "train.steps=3", DRAWN]), run_dir)


def test_processes_have_seeds_of_their_own(tiny_file, tmp_path):
    run_ranks(2, draws, tiny_file, tmp_path)
    seeds = [seed for rank in range(2) for step in notes(tmp_path / "seeds", rank) for seed in step]
    assert len(seeds) == 2 * 3 * 2  # processes, steps, layers
    assert len(set(seeds)) == len(seeds)


def test_processes_with_unequal_tokens_train_on_their_common_mean(own, tmp_path):
    """Documents of one to twelve words, a row each: the second process has other lengths than the first."""
    for index in range(4):
        (tmp_path / f"train-{index}.txt").unlink()
    lines = "".join(json.dumps({"text": text(1 + i * i % 12, i)}) + "\n" for i in range(400))
    (tmp_path / "train.jsonl").write_text(lines)
    overrides = ["train.steps=6", f'data.train_files=["{tmp_path}/train.jsonl"]', 'data.rows="padded"']
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    # A run that one process began is one stream of rows, which two share.
    run_ranks(
        1, trains, own, tmp_path / "one", "never", [*overrides, "checkpoint.every=2", "checkpoint.keep=9"]
    )
    begun = str(checkpoint_folder.folder_of(tmp_path / "one", 2))
    run_ranks(2, trains, own, tmp_path / "two", begun, overrides)

    def counted(rank):
        steps = notes(tmp_path / "two" / "labels", rank)
        return [sum(id >= 0 for batch in step for row in batch for id in row) for step in steps]

    assert all(a != b for a, b in zip(counted(0), counted(1), strict=True))
    for tag in ("loss/train", "optim/grad_norm"):
        alone = dict(logged(tmp_path / "one", tag))
        for step, value in logged(tmp_path / "two", tag):
            assert value == pytest.approx(alone[step], rel=1e-4)
    then, now = weights(tmp_path / "one", 6), weights(tmp_path / "two", 6)
    for name in then:
        torch.testing.assert_close(then[name], now[name], rtol=1e-3, atol=1e-4)
