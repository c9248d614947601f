"""One run a folder: a second start is told who is there, and a lock dies with its process."""

import errno
import fcntl
import logging
import os
import signal

import pytest
from children import CONTEXT, Command, run_ranks

from act24.errors import Act24Error
from act24.tools.checkpoints.folder import complete
from act24.tools.run.build import load
from act24.tools.run.lock import LOCK, RunError, lock_on_the_first, run_lock
from act24.tools.run.processes import open_processes
from act24.tools.run.train import train


def test_a_held_folder_is_refused_with_its_holder(tmp_path):
    run_dir = tmp_path / "runs" / "a"
    with run_lock(run_dir):
        (run_dir / "recipe.toml").write_text("")
        with (
            pytest.raises(RunError, match=rf"a is in use by process {os.getpid()} on .* since .*--run-dir"),
            run_lock(run_dir),
        ):
            pass
    with run_lock(run_dir):  # free again, and the folder stays as something is in it
        pass
    assert {path.name for path in run_dir.iterdir()} == {"recipe.toml", LOCK}


def test_a_folder_in_which_nothing_was_written_is_gone_again(tmp_path):
    with run_lock(tmp_path / "runs" / "a"):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    with run_lock(tmp_path / "empty"):
        pass
    assert (tmp_path / "empty").is_dir()  # it was there before


def holds(run_dir, ready):
    with run_lock(run_dir):
        (run_dir / "recipe.toml").write_text("")
        ready.set()
        signal.pause()


def test_a_killed_process_holds_nothing(tmp_path):
    ready = CONTEXT.Event()
    child = CONTEXT.Process(target=holds, args=(tmp_path, ready))
    child.start()
    assert ready.wait(60)
    with pytest.raises(RunError, match=f"in use by process {child.pid} "), run_lock(tmp_path):
        pass
    child.kill()
    child.join()
    with run_lock(tmp_path):
        pass


def test_a_lock_file_deleted_by_its_last_holder_locks_nothing(tmp_path, monkeypatch):
    """Between opening the file and locking it the holder may end and delete it: then another can make a new
    one, and both would hold a lock."""
    flock = fcntl.flock
    calls = []

    def deleted_meanwhile(descriptor, operation):
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", deleted_meanwhile)
    with run_lock(tmp_path):
        assert len(calls) == 2
        with pytest.raises(RunError), run_lock(tmp_path):
            pass


def test_a_disk_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def unsupported(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with caplog.at_level(logging.WARNING, "act24"), run_lock(tmp_path):
        assert "this disk has no locks (No locks available), so nothing keeps a second run out" in caplog.text


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    folder, said = tmp_path / "file" / "a", r"cannot write the folder .*; choose another with --out$"
    with pytest.raises(RunError, match=said), run_lock(folder, "--out"):
        pass


def both_refused(run_dir):
    refused = pytest.raises(Act24Error, match="is in use by process")
    with open_processes(), refused, lock_on_the_first(run_dir):
        pass


def test_all_processes_of_a_run_are_refused(tmp_path):
    with run_lock(tmp_path):
        run_ranks(2, both_refused, tmp_path)


def test_a_second_start_waits_outside_and_readers_do_not(tiny, tiny_file, tmp_path):
    run_dir = tmp_path / "run"
    words = ("train", tiny_file, "--run-dir", run_dir, "--set", "train.steps=1_000_000")
    with Command(*words, "--set", "checkpoint.every=3") as command:
        process = command.process
        assert any(line.startswith("step ") for line in iter(command.stdout.readline, ""))
        while not complete(run_dir):  # by name alone a folder that is still written may look whole
            assert process.is_alive()
        for resume in ("never", "auto"):
            with pytest.raises(RunError, match=f"is in use by process {process.pid} on "):
                train(tiny("train.steps=1_000_000"), run_dir, resume=resume)
        steps = [load(run_dir).step for _ in range(5)]  # while checkpoints come and go
        assert steps == sorted(steps)
        process.kill()
    with run_lock(run_dir):
        assert load(run_dir).step >= steps[-1]
