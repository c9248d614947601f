"""Whatever ends a run saves what was made of it, says so, and leaves a status that a script can tell."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from threading import Timer

import pytest
import torch
from children import Command
from safetensors.torch import load_file
from slow import slow_after
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import load_tiny

from act24.errors import Act24Error
from act24.tools.checkpoints import checkpoint
from act24.tools.checkpoints import folder as checkpoint_folder
from act24.tools.commands import demo, prepare
from act24.tools.data import HeldoutRows, TokenRows, background
from act24.tools.data.background import pause
from act24.tools.run import progress
from act24.tools.run import train as train_module
from act24.tools.run.lock import run_lock
from act24.tools.run.signals import Stopped, stop_on_signal
from act24.tools.run.train import TrainingError, train

RECIPE = ("train.steps=8", "schedule.warmup_steps=2", "eval.every=4", "eval.tokens=300")


def logged(run_dir, tag):
    events = EventAccumulator(str(run_dir), {"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.fixture(scope="module")
def straight(tiny_file, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("ends") / "straight"
    train(load_tiny(tiny_file, *RECIPE), run_dir)
    return run_dir


def assert_goes_on_as(straight, run_dir, recipe):
    """Resumed, the run logs and ends exactly as one that nothing ended."""
    assert train(recipe, run_dir, resume="auto").finished
    for tag in ("loss/train", "loss/val", "optim/lr"):
        assert logged(run_dir, tag) == logged(straight, tag)
    then, now = (
        load_file(checkpoint_folder.latest(run) / "model.safetensors") for run in (straight, run_dir)
    )
    assert all(torch.equal(then[name], now[name]) for name in then)


def kill_before(monkeypatch, owner, name, call, number=signal.SIGTERM):
    """A signal to this process at the start of the `call`-th call of a function."""
    original, calls = getattr(owner, name), [0]

    def signalled(*arguments, **options):
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, signalled)


@pytest.mark.parametrize("number", slow_after(1, [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]))
@pytest.mark.parametrize(
    "name", ["open_processes", "tokenizer_of_run", "heldout_rows", "open_rows", "tune_", "build_optimizer"]
)
def test_a_signal_while_a_run_is_prepared_ends_it_at_once(tiny, tmp_path, monkeypatch, name, number):
    """It used to be heeded after the first step, by when a batch system has killed the process."""
    kill_before(monkeypatch, train_module, name, 1, number)
    run_dir = tmp_path / "run"
    with pytest.raises(Stopped, match=number.name):
        train(tiny(*RECIPE), run_dir)
    assert list(tmp_path.iterdir()) == []
    with run_lock(run_dir):
        pass


@pytest.mark.parametrize(("which", "step"), slow_after(1, [(1, 4), (2, 8)]), ids=["in between", "at the end"])
def test_an_evaluation_that_a_stop_cuts_off_is_made_when_the_run_goes_on(
    tiny, tmp_path, monkeypatch, straight, which, step
):
    original, evaluations, batches = HeldoutRows.batches, [0], [0]

    def signalled(self, size):
        evaluations[0] += 1
        for index, batch in enumerate(original(self, size)):
            batches[0] += evaluations[0] == which
            if (evaluations[0], index) == (which, 1):
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(HeldoutRows, "batches", signalled)
        outcome = train(tiny(*RECIPE), tmp_path)
    assert (outcome.step, outcome.stopped, outcome.finished) == (step, "SIGTERM", False)
    assert batches[0] == 2  # and not one more
    assert checkpoint.load(outcome.checkpoint).state["evaluation_due"]
    assert outcome.evaluation is None
    assert_goes_on_as(straight, tmp_path, tiny(*RECIPE))
    last = checkpoint.load(checkpoint_folder.latest(tmp_path))
    assert not last.state["evaluation_due"]
    assert last.manifest["heldout"]["loss"] == pytest.approx(logged(straight, "loss/val")[-1][1], rel=1e-6)


def test_a_stop_at_a_step_with_an_evaluation_does_not_lose_it(tiny, tmp_path, monkeypatch, straight):
    with monkeypatch.context() as patch:
        kill_before(patch, train_module.TrainingRun, "advance", 4)
        outcome = train(tiny(*RECIPE), tmp_path)
    assert (outcome.step, outcome.stopped) == (4, "SIGTERM")
    assert_goes_on_as(straight, tmp_path, tiny(*RECIPE))


def test_an_evaluation_at_a_boundary_is_made_up_with_the_passes_that_were_in_force(
    tiny, tmp_path, monkeypatch
):
    """The weights of step 4 are of four dense updates, measured with the 2:4 with which the fifth begins."""
    recipe = tiny(*RECIPE, "passes.activation24.from_step=4", "passes.activation24.method=soft_dynamic")
    train(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_before(patch, train_module.TrainingRun, "advance", 4)
        assert train(recipe, tmp_path / "stopped").stopped == "SIGTERM"
    assert_goes_on_as(tmp_path / "whole", tmp_path / "stopped", recipe)


def fail_at(monkeypatch, row, error):
    """Rows cannot be made from the `row`-th batch on."""
    make, made = TokenRows._make, [0]

    def failing(self):
        made[0] += 1
        if made[0] > row:
            raise error
        return make(self)

    monkeypatch.setattr(TokenRows, "_make", failing)


def away_from(batch, wait=pause):
    """Rows cannot be made from the `batch`-th batch on: a network, or with `time.sleep` a disk, is away. A
    scheduler ends the wait."""
    make, made = TokenRows._make, [0]

    def waiting(self):
        made[0] += 1
        if made[0] > batch:
            Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()  # by when the run waits
            wait(1e9)
        return make(self)

    TokenRows._make = waiting


def test_a_stop_while_the_text_is_away_saves_what_was_made(tiny, tmp_path, monkeypatch, straight):
    """The run waited for the next batch, and looked at nothing else, for as long as the outage lasted."""
    with monkeypatch.context() as patch:
        patch.setattr(TokenRows, "_make", TokenRows._make)
        away_from(11)  # two batches a step: the sixth step has one of them
        outcome = train(tiny(*RECIPE), tmp_path)
    assert (outcome.step, outcome.stopped) == (5, "SIGTERM")
    assert "act24-data" not in [thread.name for thread in threading.enumerate()]
    assert_goes_on_as(straight, tmp_path, tiny(*RECIPE))


def network_away_before_the_first_step():
    away_from(1)  # of the two batches of a step


def disk_away_before_the_first_step():
    background.PATIENCE = 0.2
    away_from(0, time.sleep)


def disk_away_later():
    background.PATIENCE = 0.2
    away_from(6, time.sleep)


@pytest.mark.parametrize(
    ("away", "said"),
    [
        (
            network_away_before_the_first_step,
            "act24: SIGTERM: stopped before the first step, nothing to save",
        ),
        (disk_away_before_the_first_step, "act24: SIGTERM: stopped before the first step, nothing to save"),
        (disk_away_later, "SIGTERM: saved step 3 in "),
    ],
)
def test_a_process_whose_text_is_away_ends_with_its_stop(tiny_file, tmp_path, away, said):
    """It said so, and then waited for the thread that waits for the text."""
    with Command("train", tiny_file, "--run-dir", tmp_path / "run", *LONG, before=away) as command:
        status, out, error = command.end()
    assert status == 75
    assert said in out + error


@pytest.mark.parametrize("error", slow_after(1, [Act24Error("the disk is gone"), RuntimeError("a bug")]))
def test_a_data_error_saves_what_was_made(tiny, tmp_path, monkeypatch, straight, error):
    with monkeypatch.context() as patch:
        fail_at(patch, 10, error)  # two batches a step: the sixth step has none
        expected = TrainingError if isinstance(error, Act24Error) else RuntimeError
        with pytest.raises(expected) as caught:
            train(tiny(*RECIPE), tmp_path)
    if expected is TrainingError:
        assert str(caught.value) == f"the disk is gone; saved step 5 in {tmp_path}/checkpoints/step-000005"
    assert_goes_on_as(straight, tmp_path, tiny(*RECIPE))


def test_data_that_fail_where_an_evaluation_is_due_put_it_off(tiny, tmp_path, monkeypatch, straight):
    with monkeypatch.context() as patch:
        fail_at(patch, 8, Act24Error("the disk is gone"))
        with pytest.raises(TrainingError, match="saved step 4 in"):
            train(tiny(*RECIPE), tmp_path)
    events = EventAccumulator(str(tmp_path), {"scalars": 0}).Reload()
    assert "loss/val" not in events.Tags()["scalars"]
    assert_goes_on_as(straight, tmp_path, tiny(*RECIPE))


LONG = ("--set", "train.steps=1_000_000", "--set", "log.every=1", "--set", "eval.tokens=100")


def every_step_is_a_line():
    progress._PLAIN_SECONDS = 0.0


def test_a_reader_that_goes_away_is_a_clear_end_with_a_checkpoint(tiny_file, tmp_path):
    """`act24 train … | head -1`."""
    words = ("train", tiny_file, "--run-dir", tmp_path, *LONG)
    ends = ("--set", "train.steps=200")  # also if nobody notices
    with Command(*words, *ends, before=every_step_is_a_line) as command:
        assert any(line.startswith("step 2/") for line in iter(command.stdout.readline, ""))
        command.stdout.close()
        error = command.stderr.read()
    (folder,) = checkpoint_folder.complete(tmp_path)
    assert (
        error == f"act24: nobody reads the output any more; saved step {int(folder.name[5:])} in {folder}\n"
    )
    assert command.process.exitcode == 2
    assert checkpoint.load(folder).step >= 2


def full_disk():
    sys.stdout = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")


def test_an_output_on_a_full_disk_is_a_clear_end_with_a_checkpoint(tiny_file, tmp_path):
    run_dir = tmp_path / "run"
    with Command("train", tiny_file, "--run-dir", run_dir, *LONG, before=full_disk) as command:
        status, _, error = command.end()
    assert status == 2
    message = "act24: the output cannot be written: No space left on device; saved step 1 in "
    assert error == f"{message}{run_dir / 'checkpoints' / 'step-000001'}\n"
    assert checkpoint.load(checkpoint_folder.latest(run_dir)).step == 1


def small_disk():
    """No file may have more than 20 kB: less than the weights, and than what is logged of 20 steps."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_full_disk_is_said_once_and_ends_with_the_save(tiny_file, tmp_path):
    """TensorBoard's writer thread used to print a traceback in between."""
    run_dir = tmp_path / "run"
    words = ("train", tiny_file, "--run-dir", run_dir, "--set", "train.steps=20", "--set", "eval.every=0")
    with Command(*words, before=small_disk) as command:
        status, out, error = command.end()
    assert (status, "step 20/20" in out) == (2, True)
    patterns = (
        r"nothing more is written for TensorBoard: \[Errno 27\] File too large",
        r"TensorBoard lacks \d+ groups of values, pictures and texts",
        r"act24: step 20 could not be saved in .*File too large; there is no older checkpoint",
    )
    assert re.fullmatch(
        "\n".join(patterns), error.replace("[Errno 27] File too large;", "File too large;").strip()
    )
    assert checkpoint_folder.all_of(run_dir) == []


def closed_output():
    """What Python begins with under `>&-`: the next file that is opened has the output's number."""
    os.close(1)
    sys.stdout = None


def test_a_closed_output_ends_nothing(tiny_file, tmp_path):
    """`act24 train … >&-` used to be a traceback."""
    words = ("train", tiny_file, "--run-dir", tmp_path, "--set", "train.steps=6")
    with Command(*words, before=closed_output) as command:
        assert command.end() == (0, "", "")
    assert checkpoint.load(checkpoint_folder.latest(tmp_path)).step == 6


def test_a_stop_of_the_demo_has_the_status_of_a_stop(tiny, monkeypatch, act24, tmp_path):
    """In its evaluation, which no handler of training covers."""
    monkeypatch.setattr(demo, "load_recipe", {"demo": tiny("train.steps=6")}.__getitem__)
    kill_before(monkeypatch, demo, "evaluate_checkpoint", 1)
    status, _, error = act24("demo", "--run-dir", tmp_path / "run")
    assert status == 75
    assert error[-1] == "act24: SIGTERM: stopped before its end; the same command begins it anew"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_of_data_prepare_has_a_status_of_its_own(monkeypatch, act24, tmp_path, number):
    (tmp_path / "a.txt").write_text("some words " * 500)
    out, command = (
        tmp_path / "out",
        ("data", "prepare", tmp_path / "a.txt", tmp_path / "out", "--vocab-size", 300),
    )
    with monkeypatch.context() as patch:
        kill_before(patch, prepare, "prepare_shards", 1, number)
        status, _, error = act24(*command)
    assert status == 75
    assert error[-1] == f"act24: {number.name}: stopped; the same command goes on where it was"
    assert not out.exists()


def latin_terminal():
    sys.stdout = os.fdopen(1, "w", encoding="latin-1", closefd=False)


def test_a_terminal_that_lacks_a_character_ends_nothing(tiny_file, tmp_path):
    recipe = tmp_path / "recept-β.toml"
    recipe.write_text(tiny_file.read_text())
    words = ("train", recipe, "--run-dir", tmp_path / "run-β", "--set", "train.steps=6")
    with Command(*words, before=latin_terminal) as command:
        status, out, error = command.end()
    assert status == 0, error
    assert "/checkpoints/step-000006" in out
    assert "run-?/checkpoints" in out


def ignored_hangup():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_nohup_is_heeded(tiny_file, tmp_path):
    """A hangup that was ignored when the run began stays ignored."""
    words = ("train", tiny_file, "--run-dir", tmp_path, *LONG)

    with Command(*words, before=ignored_hangup) as command:
        assert any(line.startswith("step 1/") for line in iter(command.stdout.readline, ""))
        os.kill(command.process.pid, signal.SIGHUP)
        assert any(line.startswith("step ") for line in iter(command.stdout.readline, ""))
        command.process.terminate()
        status, out, _ = command.end()
    assert status == 75
    assert "SIGTERM: saved step " in out


def test_a_stop_before_the_first_step_has_the_status_of_a_stop(tiny, monkeypatch, act24, tiny_file, tmp_path):
    kill_before(monkeypatch, train_module, "tune_", 1)
    status, _, error = act24("train", tiny_file, "--run-dir", tmp_path / "run")
    assert (status, error) == (75, ["act24: SIGTERM: stopped before the first step, nothing to save"])


def test_a_stop_while_libraries_are_loaded_has_it_too(tiny_file, tmp_path):
    """Which takes seconds: the process would otherwise end with 143, as one that was killed."""
    code = f"""
import builtins, os, signal, sys
load = builtins.__import__
def loading(name, *arguments):
    if name == "torch":
        builtins.__import__ = load
        os.kill(os.getpid(), signal.SIGTERM)
    return load(name, *arguments)
builtins.__import__ = loading
from act24.tools.commands.cli import main
sys.argv = ["act24", "train", {str(tiny_file)!r}, "--run-dir", {str(tmp_path / "run")!r}]
main()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    stopped = "act24: SIGTERM: stopped before the first step, nothing to save\n"
    assert (result.returncode, result.stderr) == (75, stopped)
    assert list(tmp_path.iterdir()) == []


def stop_after_three_steps():
    advance, made = train_module.TrainingRun.advance, [0]

    def stopping(self):
        advance(self)
        made[0] += 1
        if made[0] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    train_module.TrainingRun.advance = stopping


def test_a_requeue_loop_comes_to_the_end(tiny_file, tmp_path, straight):
    """`until act24 train …; do [ $? = 75 ] || exit; done` against a scheduler that stops it now and then."""
    statuses = []
    words = ["train", tiny_file, "--run-dir", tmp_path, "--resume", "auto"]
    words += [word for override in RECIPE for word in ("--set", override)]
    while not statuses or statuses[-1] == 75:
        with Command(*words, before=stop_after_three_steps) as command:
            status, _, error = command.end()
        statuses.append(status)
        assert len(statuses) < 9, error
    assert statuses == [75, 75, 0]
    assert logged(tmp_path, "loss/train") == logged(straight, "loss/train")
    assert logged(tmp_path, "loss/val") == logged(straight, "loss/val")
    starts = [json.loads(line)["step"] for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert starts == [0, 3, 6]


def test_below_torchrun_a_stop_leaves_a_note_and_nothing_else_does(tiny, tmp_path, monkeypatch, straight):
    """torchrun makes 1 of 75: `until torchrun …; do rm RUN/stopped || exit; done`."""
    with monkeypatch.context() as patch:
        kill_before(patch, train_module.TrainingRun, "advance", 2)
        assert train(tiny(*RECIPE), tmp_path / "alone").stopped == "SIGTERM"  # its status says so
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    run_dir, note = tmp_path / "run", tmp_path / "run" / "stopped"
    for step in (3, 6):
        with monkeypatch.context() as patch:
            kill_before(patch, train_module.TrainingRun, "advance", 3)
            assert train(tiny(*RECIPE), run_dir, resume="auto").step == step
        assert note.read_text() == f"SIGTERM: saved step {step}\n"
    with monkeypatch.context() as patch:  # where one process fails, torchrun stops the others by SIGTERM
        kill_before(patch, train_module, "build_optimizer", 1)
        with pytest.raises(Stopped):
            train(tiny(*RECIPE), run_dir, resume="auto")
        assert not note.exists()
    assert_goes_on_as(straight, run_dir, tiny(*RECIPE))
    assert not any(path.name == "stopped" for path in tmp_path.rglob("*"))
    note.write_text("SIGTERM: saved step 3\n")
    with pytest.raises(Act24Error, match="already holds a run"):
        train(tiny(*RECIPE), run_dir)
    assert note.exists()  # a start that is refused leaves all as it was


def test_an_ignored_signal_is_left_alone():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
