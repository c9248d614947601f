"""Folders are whole or no checkpoints: what is damaged, cut off or left over is never taken for one."""

import logging
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from act24.tools.checkpoints import folder as cf
from act24.tools.checkpoints.checkpoint import MODEL_FILES
from act24.tools.checkpoints.manifest import (
    FORMAT,
    MANIFEST,
    CheckpointError,
    contents,
    fingerprints,
    read_manifest,
    render,
    verify_files,
)
from act24.tools.run.build import open_checkpoint

FILES = {
    "state.json": b'{"tokens": 7}',
    "optimizer/.metadata": bytes(range(256)),
    "optimizer/__0_0.distcp": b"x",
}


def write(run: Path, step: int, files: dict[str, bytes] = FILES) -> Path:
    """A checkpoint of plain bytes, made with the functions that `checkpoint.save` uses."""
    folder = cf.folder_of(run, step)
    unfinished = cf.temporary(folder)
    for name, content in files.items():
        (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
        (unfinished / name).write_bytes(content)
    manifest = {"format": FORMAT, "step": step, "sequence": cf.next_sequence(run)}
    cf.publish(unfinished, folder, {**manifest, "files": fingerprints(unfinished, contents(unfinished))})
    return folder


def verify(folder: Path) -> None:
    manifest = read_manifest(folder)
    verify_files(folder, manifest, manifest["files"])


def test_a_whole_folder_is_a_checkpoint(tmp_path):
    folder = write(tmp_path, 500)
    verify(folder)
    assert folder == tmp_path / "checkpoints" / "step-000500"
    assert cf.latest(tmp_path) == folder
    assert sorted(read_manifest(folder)["files"]) == sorted(FILES)
    assert [path.name for path in folder.parent.iterdir()] == ["step-000500"]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write(tmp_path_factory.mktemp("run"), 1)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_found_and_its_file_named(published, data):
    name = data.draw(st.sampled_from([*FILES, MANIFEST]))
    path = published / name
    whole = path.read_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytearray(whole)
    flipped[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(flipped)
    try:
        with pytest.raises(CheckpointError) as error:
            verify(published)
        assert str(path) in str(error.value)
    finally:
        path.write_bytes(whole)
    verify(published)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("damage", ["missing", "shorter", "longer", "empty"])
def test_files_missing_or_of_another_length_are_named_and_not_latest(tmp_path, caplog, name, damage):
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    path = bad / name
    whole = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"shorter": whole[:-1], "longer": whole + b"\n", "empty": b""}[damage])
    with pytest.raises(CheckpointError) as error:
        read_manifest(bad)
    assert name in str(error.value)
    with caplog.at_level(logging.WARNING, "act24"):
        assert cf.latest(tmp_path) == good
    assert str(bad) in caplog.text


LITTER = [".nfs000000000123", ".DS_Store", "._state.json", "optimizer/.nfs0001"]
FOREIGN = [*LITTER, "notes.txt", "._notes", ".nfsthesis"]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_nobodys_business(tmp_path, name):
    folder = write(tmp_path, 1)
    (folder / name).write_text("mine")
    verify(folder)
    assert cf.latest(tmp_path) == folder


@pytest.mark.parametrize("name", FOREIGN)
def test_prune_deletes_litter_and_keeps_what_somebody_wrote(tmp_path, caplog, name):
    old = write(tmp_path, 1)
    (old / name).write_text("mine")
    new = write(tmp_path, 2)
    with caplog.at_level(logging.WARNING, "act24"):
        cf.prune(tmp_path, keep=1, written=new)
    if name not in LITTER:
        assert (old / name).read_text() == "mine"
        assert "is kept" in caplog.text
        assert f"{name} is not of this program" in caplog.text
        verify(old)
    else:
        assert [path.name for path in new.parent.iterdir()] == [new.name]


@pytest.mark.parametrize("kind", ["tmp", "gone"])
@pytest.mark.parametrize("name", ["thesis.txt", "optimizer/notes.txt", "photos/cat.jpg", "._notes"])
def test_prune_keeps_a_leftover_that_holds_what_no_save_writes(tmp_path, caplog, kind, name):
    """A folder of such a name was never looked into."""
    new = write(tmp_path, 2)
    left = new.with_name(f"step-000001.{kind}-0123456789ab")
    (left / name).parent.mkdir(parents=True)
    (left / name).write_text("mine")
    (left / "state.json").write_text("{")
    with caplog.at_level(logging.WARNING, "act24"):
        cf.prune(tmp_path, keep=1, written=new)
    assert (left / name).read_text() == "mine"
    assert f"{left} is kept: {left / name} is not of this program" in caplog.text


@pytest.mark.parametrize("kind", ["tmp", "gone"])
@pytest.mark.parametrize("link", ["", "optimizer", "state.json"], ids=["itself", "a folder", "a file"])
def test_prune_keeps_a_leftover_with_a_link(tmp_path, caplog, kind, link):
    there = tmp_path / "precious"
    there.mkdir()
    (there / ".metadata").write_text("mine")
    new = write(tmp_path, 2)
    left = new.with_name(f"step-000001.{kind}-0123456789ab")
    if link:
        left.mkdir()
    (left / link).symlink_to(there)
    with caplog.at_level(logging.WARNING, "act24"):
        cf.prune(tmp_path, keep=1, written=new)
    assert (left / link).is_symlink()
    assert (there / ".metadata").read_text() == "mine"
    assert f"{left} is kept" in caplog.text


@pytest.mark.parametrize("kind", ["tmp", "gone"])
def test_prune_deletes_what_a_save_left_at_any_point(tmp_path, kind):
    new = write(tmp_path, 2)
    names = [*FILES, *MODEL_FILES, "optimizer.json", "rank-00000.json", "optimizer/.metadata.tmp"]
    for count in range(-1, len(names)):
        left = new.with_name(f"step-000001.{kind}-{count + 1:012x}")
        (left / "optimizer" if count >= 0 else left).mkdir(parents=True)
        for name in names[: max(count, 0)]:
            (left / name).write_text("{")
    cf.prune(tmp_path, keep=1, written=new)
    assert [path.name for path in new.parent.iterdir()] == [new.name]


@pytest.mark.parametrize("what", ["checkpoint with a note", "folder"])
def test_what_is_in_the_way_of_a_save_and_not_ours_is_moved_aside(tmp_path, caplog, what):
    if what == "folder":
        folder = cf.folder_of(tmp_path, 1)
        folder.mkdir(parents=True)
    else:
        folder = write(tmp_path, 1)
    (folder / "notes.txt").write_text("mine")
    with caplog.at_level(logging.WARNING, "act24"):
        assert write(tmp_path, 1, {"state.json": b"new"}) == folder
    cf.prune(tmp_path, keep=1, written=folder)
    verify(folder)
    aside, kept = sorted(folder.parent.iterdir(), key=lambda path: path.name == folder.name)
    assert kept == folder
    assert (aside / "notes.txt").read_text() == "mine"
    assert aside.name in caplog.text
    assert cf.latest(tmp_path) == folder


@pytest.mark.parametrize("clock", ["1970-01-01T00:00:00+00:00", "9999-12-31T23:59:59+00:00"])
def test_no_clock_decides_which_checkpoint_is_last(tmp_path, monkeypatch, clock):
    """With the time in the manifest as the order, a clock behind by more than the saving interval had every
    new checkpoint deleted as it was written."""
    for step in (10, 20):
        write(tmp_path, step)
    for folder in cf.complete(tmp_path):  # as if another machine had written them, at another time
        manifest = {**read_manifest(folder), "written": clock}
        (folder / MANIFEST).write_text(render(manifest))
    for step in (30, 40):
        folder = write(tmp_path, step)
        cf.prune(tmp_path, keep=2, written=folder)
        assert cf.latest(tmp_path) == folder
    assert [path.name for path in cf.complete(tmp_path)] == ["step-000030", "step-000040"]


def test_what_was_just_written_stays_whatever_the_counters_say(tmp_path):
    for step in (1, 2):
        write(tmp_path, step)
    written = write(tmp_path, 3)
    manifest = {**read_manifest(written), "sequence": 0}
    (written / MANIFEST).write_text(render(manifest))
    cf.prune(tmp_path, keep=1, written=written)
    verify(written)


def test_the_counter_is_above_that_of_a_damaged_checkpoint(tmp_path):
    damaged = write(tmp_path, 9)
    (damaged / "state.json").unlink()
    assert read_manifest(write(tmp_path, 3))["sequence"] == 2


def test_checkpoints_without_a_counter_are_in_the_order_of_steps_and_before_all_others(tmp_path):
    for step in (5, 7):
        folder = write(tmp_path, step)
        manifest = read_manifest(folder)
        del manifest["sequence"]
        (folder / MANIFEST).write_text(render(manifest))
    assert cf.latest(tmp_path) == cf.folder_of(tmp_path, 7)
    assert cf.latest(tmp_path) != write(tmp_path, 6)
    assert cf.latest(tmp_path) == cf.folder_of(tmp_path, 6)


def test_checkpoints_of_which_none_can_be_used_are_not_nothing(tmp_path, monkeypatch):
    assert cf.latest(tmp_path) is None
    for step in (1, 2):
        (write(tmp_path, step) / "state.json").write_bytes(b"{")
    with pytest.raises(
        CheckpointError, match=r"can be used \(2 there\): .*step-000002/state.json is damaged"
    ):
        cf.latest(tmp_path)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(CheckpointError, match="checkpoints cannot be read: Permission denied"):
        cf.latest(tmp_path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["a pipe", "a folder"])
def test_what_is_no_file_in_a_manifests_place_is_not_waited_for(tmp_path, make):
    folder = write(tmp_path, 1)
    (folder / MANIFEST).unlink()
    make(folder / MANIFEST)
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged: it is no file"):
        read_manifest(folder)
    for path in (folder, tmp_path):
        with pytest.raises(CheckpointError, match=r"manifest\.json is damaged: it is no file"):
            open_checkpoint(path)


def test_a_manifest_of_a_later_format_says_so(tmp_path):
    folder = write(tmp_path, 1)
    manifest = read_manifest(folder)
    later = cf.folder_of(tmp_path, 2)
    cf.publish(folder, later, {**manifest, "format": FORMAT + 1})
    with pytest.raises(CheckpointError, match=f"has format {FORMAT + 1}"):
        read_manifest(later)


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"format": 1}', "\x00"])
def test_a_manifest_of_something_else_is_damaged(tmp_path, content):
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        read_manifest(tmp_path)


def test_what_is_no_folder_is_no_checkpoint(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        read_manifest(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_manifest(tmp_path / "file")
    assert cf.latest(tmp_path / "nothing") is None


def test_latest_is_the_one_written_last_and_no_temporary_one(tmp_path):
    write(tmp_path, 400)
    write(tmp_path, 500)
    resumed = write(tmp_path, 350)  # the run went back to 300 and was saved on its new way
    unfinished = cf.temporary(cf.folder_of(tmp_path, 600))
    resumed_copy = {path.name: path.read_bytes() for path in resumed.iterdir() if path.is_file()}
    unfinished.mkdir()
    for name, content in resumed_copy.items():
        (unfinished / name).write_bytes(content)
    assert cf.latest(tmp_path) == resumed
    assert [folder.name for folder in cf.complete(tmp_path)] == ["step-000400", "step-000500", "step-000350"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    write(tmp_path, 1)
    folder = write(tmp_path, 1, {"state.json": b"new"})
    verify(folder)
    assert (folder / "state.json").read_bytes() == b"new"
    cf.prune(tmp_path, keep=1)
    assert [path.name for path in folder.parent.iterdir()] == ["step-000001"]


@given(steps=st.permutations(range(1, 7)), keep=st.integers(1, 8))
@settings(max_examples=15, deadline=None)
def test_prune_keeps_the_last_written_and_what_is_damaged(tmp_path_factory, steps, keep):
    run = tmp_path_factory.mktemp("run")
    damaged = write(run, 10)
    (damaged / "state.json").unlink()
    cf.temporary(cf.folder_of(run, 11)).mkdir()
    for step in steps:
        write(run, step)
    cf.prune(run, keep)
    expected = {f"step-{step:06d}" for step in steps[-keep:]} | {"step-000010"}
    assert {path.name for path in damaged.parent.iterdir()} == expected


def test_what_cannot_be_deleted_is_a_warning_and_the_rest_is_deleted(tmp_path, monkeypatch, caplog):
    stuck, other, last = write(tmp_path, 1), write(tmp_path, 2), write(tmp_path, 3)
    rename = Path.rename

    def refuse(self, target):
        if self == stuck:
            raise PermissionError(13, "Permission denied", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with caplog.at_level(logging.WARNING, "act24"):
        cf.prune(tmp_path, keep=1)
    assert "could not delete" in caplog.text
    assert "step-000001" in caplog.text
    assert stuck.exists()
    assert not other.exists()
    verify(last)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc to see what was synced")
def test_all_names_and_the_manifest_are_on_disk_before_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, Path.rename

    def logged_fsync(descriptor):
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def logged_rename(self, target):
        events.append(("rename", str(self)))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(Path, "rename", logged_rename)
    folder = write(tmp_path, 1)
    renamed = [i for i, (kind, _) in enumerate(events) if kind == "rename"]
    assert len(renamed) == 1
    unfinished = events[renamed[0]][1]
    before = [path.removeprefix(unfinished) for _, path in events[: renamed[0]]]
    assert before == [f"/{MANIFEST}", "/optimizer", ""]
    assert events[renamed[0] + 1 :] == [("sync", str(folder.parent))]


def test_a_checkpoint_that_is_deleted_while_it_is_looked_at_is_not_damaged(tmp_path, monkeypatch):
    old, read = write(tmp_path, 1), read_manifest

    def pruned_meanwhile(folder):
        if old.exists():
            write(tmp_path, 2)
            old.rename(tmp_path / "gone")
        return read(folder)

    monkeypatch.setattr(cf, "read_manifest", pruned_meanwhile)
    assert cf.latest(tmp_path) == cf.folder_of(tmp_path, 2)
