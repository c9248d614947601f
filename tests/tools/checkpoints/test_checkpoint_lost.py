"""No moment without a whole checkpoint, and nothing deleted that is somebody else's or the only copy."""

import errno
import logging
import math
import os
import re
import shutil
from pathlib import Path

import pytest
from test_checkpoint_folder import FILES, verify, write

from act24.tools.checkpoints import folder as cf
from act24.tools.checkpoints.manifest import (
    FORMAT,
    MANIFEST,
    CheckpointError,
    contents,
    fingerprints,
    read_manifest,
    render,
)


class Killed(BaseException):
    """A kill: nothing after it is run."""


def test_a_kill_between_the_two_renames_of_a_save_leaves_the_new_checkpoint(tmp_path, monkeypatch):
    """There used to be two temporary folders, both whole, which `prune` then deleted."""
    before, after = write(tmp_path, 2), write(tmp_path, 4)
    rename = Path.rename

    def killed(self, target):
        rename(self, target)
        if self == after:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(Killed):
            write(tmp_path, 4, {"state.json": b"new"})
    reading = cf.latest(tmp_path)  # of somebody who renames nothing
    assert reading.name.startswith("step-000004.tmp-")
    verify(reading)
    assert cf.next_sequence(tmp_path) == 4
    cf.put_back(tmp_path)
    assert cf.latest(tmp_path) == after
    assert (after / "state.json").read_bytes() == b"new"
    verify(after)
    assert cf.complete(tmp_path) == [before, after]
    cf.prune(tmp_path, keep=1)
    assert [path.name for path in after.parent.iterdir()] == ["step-000004"]


COUNTERS = {"absent": (), "older": (1, 2, 3), "newer": (6, 5, 4)}  # of two that are newer the first is


@pytest.mark.parametrize("named", ["absent", "older", "newer"])
@pytest.mark.parametrize("old", ["absent", "older", "newer"])
@pytest.mark.parametrize("tmp", ["absent", "older", "newer", "without a file", "of another step"])
def test_of_all_that_kills_leave_of_a_step_the_counter_decides(tmp_path, named, old, tmp):
    folder = cf.folder_of(tmp_path, 4)
    folder.parent.mkdir()
    whole = {}
    for index, (suffix, state) in enumerate({"": named, ".old-": old, ".tmp-": tmp}.items()):
        if state == "absent":
            continue
        path = folder.with_name(f"step-000004{suffix and suffix + '0123456789ab'}")
        path.mkdir()
        (path / "state.json").write_text(f"{suffix} {state}")
        (path / "plan.json").write_text("")
        sequence = COUNTERS[state][index] if state in COUNTERS else 9
        manifest = {"format": FORMAT, "step": 6 if state == "of another step" else 4, "sequence": sequence}
        manifest["files"] = fingerprints(path, contents(path))
        (path / MANIFEST).write_text(render(manifest))
        if state == "without a file":
            (path / "plan.json").unlink()
        if state in COUNTERS:
            whole[sequence] = f"{suffix} {state}"
    assert cf.next_sequence(tmp_path) > max(whole, default=0)
    if not whole:
        assert cf.latest(tmp_path) is None
        return
    last = whole[max(whole)]
    assert (cf.latest(tmp_path) / "state.json").read_text() == last
    cf.put_back(tmp_path)
    assert cf.latest(tmp_path) == folder
    cf.prune(tmp_path, keep=1)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert (folder / "state.json").read_text() == last


def test_a_list_that_is_read_while_names_change_is_read_again(tmp_path, monkeypatch):
    """A folder's entries may miss one that is renamed meanwhile, under both of its names."""
    folder = write(tmp_path, 4)
    scandir, looks = os.scandir, []

    def misses_one(path):
        looks.append(path)
        with scandir(path) as entries:
            return [entry for entry in entries if len(looks) > 1 or entry.name != folder.name]

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", misses_one)
        assert cf._sorted_out(tmp_path) == ([folder], [])


def fails_to_publish(path, target, rename=Path.rename):
    if ".tmp-" in path.name:
        raise OSError(errno.EIO, "Input/output error", str(path))
    return rename(path, target)


def test_what_a_failed_save_cannot_delete_is_no_checkpoint(tmp_path, monkeypatch):
    """It said that it failed, and its bytes may be nowhere but in memory."""
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails_to_publish)
        with pytest.raises(OSError, match="Input/output error"):
            write(tmp_path, 4)
    (left,) = (tmp_path / "checkpoints").iterdir()
    assert cf.latest(tmp_path) == left
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        cf.abandon(left)
    assert sorted(path.name for path in left.iterdir()) == ["optimizer", "state.json"]
    assert cf.latest(tmp_path) is None


def test_prune_never_deletes_the_only_whole_copy(tmp_path, monkeypatch):
    folder = write(tmp_path, 4)
    old = folder.rename(folder.with_name("step-000004.old-0123456789ab"))
    with monkeypatch.context() as patch:
        patch.setattr(
            Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error"))
        )
        cf.prune(tmp_path, keep=1)
    verify(old)
    cf.prune(tmp_path, keep=1)
    verify(folder)
    assert not old.exists()


def test_what_was_replaced_is_deleted_once_the_new_one_is_there(tmp_path):
    for content in (b"old", b"new"):
        folder = write(tmp_path, 4, {"state.json": content})
    assert len(list(folder.parent.iterdir())) == 2
    cf.prune(tmp_path, keep=1)
    assert [path.name for path in folder.parent.iterdir()] == ["step-000004"]


def test_a_disk_that_fails_at_the_second_rename_has_the_old_checkpoint_again(tmp_path, monkeypatch):
    folder = write(tmp_path, 4)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails_to_publish)
        with pytest.raises(OSError, match="Input/output error"):
            write(tmp_path, 4, {"state.json": b"new"})
    verify(folder)
    assert (folder / "state.json").read_bytes() == FILES["state.json"]


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a good one"])
def test_a_checkpoint_on_a_disk_that_is_away_is_a_refusal(tmp_path, beside):
    """It used to spin for ever, or to go on from an older one without a word."""
    (tmp_path / "checkpoints").mkdir()
    if beside:
        write(tmp_path, 2)
    link = cf.folder_of(tmp_path, 4)
    link.symlink_to(tmp_path / "away")
    with pytest.raises(CheckpointError, match=rf"^{link} is a link to .*away, and nothing is there: bring"):
        cf.latest(tmp_path)
    assert [path.name for path in cf.complete(tmp_path)] == ["step-000002"] * beside


def test_checkpoints_on_a_disk_that_is_away_are_a_refusal(tmp_path):
    (tmp_path / "checkpoints").symlink_to(tmp_path / "away")
    with pytest.raises(CheckpointError, match=r"checkpoints is a link to .*away, and nothing is there"):
        cf.latest(tmp_path)


def test_a_link_in_the_way_of_a_save_is_moved_aside(tmp_path):
    link = cf.folder_of(tmp_path, 4)
    link.parent.mkdir()
    link.symlink_to(tmp_path / "away")
    verify(write(tmp_path, 4))
    (aside,) = (path for path in link.parent.iterdir() if path.is_symlink())
    assert os.readlink(aside) == str(tmp_path / "away")


ODD = {
    "an empty folder": lambda folder: (folder / "notes").mkdir(),
    "a link to a file": lambda folder: (folder / "notes").symlink_to(folder / "state.json"),
    "a link to a folder": lambda folder: (folder / "notes").symlink_to(folder / "optimizer"),
    "a link to nothing": lambda folder: (folder / "notes").symlink_to("/nowhere"),
}


@pytest.mark.parametrize("add", ODD.values(), ids=ODD.keys())
def test_prune_keeps_a_checkpoint_with_links_and_empty_folders(tmp_path, caplog, add):
    old = write(tmp_path, 1)
    add(old)
    new = write(tmp_path, 2)
    with caplog.at_level(logging.WARNING, "act24"):
        cf.prune(tmp_path, keep=1, written=new)
    assert os.path.lexists(old / "notes")
    assert "notes is not of this program" in caplog.text
    verify(old)


def test_prune_keeps_a_checkpoint_that_is_a_link(tmp_path, caplog):
    old = write(tmp_path, 1)
    there = old.rename(tmp_path / "there")
    old.symlink_to(there)
    new = write(tmp_path, 2)
    with caplog.at_level(logging.WARNING, "act24"):
        cf.prune(tmp_path, keep=1, written=new)
    assert os.readlink(old) == str(there)
    verify(there)
    assert f"{old} is a link" in caplog.text


@pytest.mark.parametrize(
    ("losses", "kept"),
    [([3.0, math.nan, 1.0, 2.0], [3, 4]), ([math.inf, 2.0], [2]), ([math.inf, math.nan], [2])],
)
def test_a_loss_that_is_not_finite_is_never_the_best(tmp_path, losses, kept):
    for step, loss in enumerate(losses, start=1):
        measured(tmp_path, step, loss, "a")
    cf.prune(tmp_path, keep=1, keep_best=1)
    assert cf.folders(tmp_path) == [cf.folder_of(tmp_path, step) for step in kept]


def measured(run_dir, step, loss, rows):
    folder = write(run_dir, step)
    manifest = read_manifest(folder) | {"heldout": {"loss": loss, "data": rows}}
    (folder / MANIFEST).write_text(render(manifest))
    return folder


#: Of each step its loss, the rows, what is there after its save, and whether that is said.
EVALUATED = [
    (2.0, "a", [1], False),
    (3.0, "a", [1, 2], False),
    (9.0, "b", [1, 3], True),  # another eval.tokens: step 1 was deleted without a word
    (9.5, "b", [1, 3, 4], False),
    (8.0, "b", [1, 5], False),  # a better one that can be compared with step 3
    (1.0, "a", [5, 6], False),  # and one with step 1
]


def test_the_best_on_other_rows_stays_until_a_better_one_on_those(tmp_path, caplog):
    for step, (loss, rows, kept, said) in enumerate(EVALUATED, start=1):
        caplog.clear()
        written = measured(tmp_path, step, loss, rows)
        cf.prune(tmp_path, keep=1, written=written, keep_best=1)
        assert cf.folders(tmp_path) == [cf.folder_of(tmp_path, step) for step in kept]
        assert ("other held-out rows than step-00000" in caplog.text) == said


@pytest.mark.parametrize("name", ["a\0b", ""])
def test_a_name_that_no_file_can_have_is_named(tmp_path, name):
    folder = write(tmp_path, 1)
    manifest = read_manifest(folder)
    manifest["files"][name] = {"bytes": 0, "sha256": ""}
    (folder / MANIFEST).write_text(render(manifest))
    with pytest.raises(CheckpointError, match=f"no file can be called {re.escape(repr(name))}"):
        read_manifest(folder)
