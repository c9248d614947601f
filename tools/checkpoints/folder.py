"""A checkpoint folder is whole or it is not a checkpoint.

    RUN/checkpoints/step-000500/                what is written here is complete
    RUN/checkpoints/step-000500.tmp-3f2a…/      what a save is still writing, or left when it was killed
    RUN/checkpoints/step-000500.old-8c41…/      what a save of the same step replaces, until that is in place
    RUN/checkpoints/step-000500.aside-71c0…/    what was in the way of a save and not one of ours

A save fills a temporary folder, forces every byte to disk, writes `manifest.json` last and renames the folder
(OLMo-core's protocol). The manifest names every file with its size and SHA-256, because neither
torch.distributed.checkpoint nor safetensors notices a flipped byte in a tensor. What the files mean is not
known here; that is `checkpoint.py`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from act24.errors import Act24Error

FORMAT = 1
MANIFEST = "manifest.json"
_TEMPORARY = re.compile(r"step-[0-9]{6,}\.tmp-[0-9a-f]{12}")
_REPLACED = re.compile(r"(step-[0-9]{6,})\.old-[0-9a-f]{12}")
_LITTER = (".nfs*", ".fuse_hidden*", ".DS_Store", "._*", "Thumbs.db", "desktop.ini")

logger = logging.getLogger("act24")


class CheckpointError(Act24Error):
    """A checkpoint could not be written, is damaged, or belongs to something else."""


def folder_of(run_dir: Path, step: int) -> Path:
    """The folder of the run's checkpoint after `step` optimizer steps, whether it exists or not."""
    return run_dir / "checkpoints" / f"step-{step:06d}"


def temporary(folder: Path) -> Path:
    """A fresh name beside `folder` for what is not yet, or no longer, that checkpoint. Nothing is created."""
    return _beside(folder, "tmp")


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f"{folder.name}.{what}-{uuid.uuid4().hex[:12]}")


def folders(run_dir: Path) -> list[Path]:
    """Everything of the run that is named like a checkpoint, whole or not, by step.

    Raises CheckpointError if the list cannot be read: that is not the same as an empty one.
    """
    parent, names = run_dir / "checkpoints", _names(run_dir)
    steps = {int(name.removeprefix("step-")): name for name in names if re.fullmatch(r"step-[0-9]{6,}", name)}
    return [parent / steps[step] for step in sorted(steps)]


def _names(run_dir: Path) -> list[str]:
    parent = run_dir / "checkpoints"
    try:
        return [entry.name for entry in os.scandir(parent)]
    except FileNotFoundError:
        if parent.is_symlink():
            raise CheckpointError(_away(parent)) from None
        return []
    except OSError as error:
        raise CheckpointError(f"{parent} cannot be read: {error.strerror}") from error


def _away(link: Path) -> str:
    return (
        f"{link} is a link to {os.readlink(link)}, and nothing is there: bring that back, or delete the link"
    )


def _replaced(run_dir: Path) -> dict[Path, Path]:
    """What a save that was cut off had taken away and not replaced: a whole checkpoint, by where it was."""
    parent, names = run_dir / "checkpoints", set(_names(run_dir))
    found = [(parent / match[1], parent / name) for name in names if (match := _REPLACED.fullmatch(name))]
    return {folder: old for folder, old in found if folder.name not in names and _manifest_or_none(old)}


def put_back(run_dir: Path) -> None:
    """Puts a checkpoint back that a save of the same step had taken away when it was cut off.

    For who holds the run's folder; others read it where it is. What cannot be put back is a warning, and
    stays.
    """
    for folder, old in _replaced(run_dir).items():
        try:
            old.rename(folder)
        except OSError as error:
            logger.warning("could not rename %s to %s: %s", old, folder.name, error)


def all_of(run_dir: Path) -> list[Path]:
    """Whatever is in the folder of checkpoints, by name. Raises OSError."""
    parent = run_dir / "checkpoints"
    return sorted(parent.iterdir()) if parent.is_dir() else []


def complete(run_dir: Path) -> list[Path]:
    """The run's checkpoints, in the order in which they were written.

    That is the order of the counter in their manifests: no clock has a say, and no step either, because after
    a run is resumed from an older checkpoint, what it writes from then on is what counts, although the
    abandoned branch had come further. A folder that only looks like a checkpoint is reported as a warning and
    left out. Sizes are compared here, hashes are not (`verify_files`).
    """
    usable, reasons = _sorted_out(run_dir)
    for reason in reasons:
        logger.warning("skipped: %s", reason)
    return usable


def latest(run_dir: Path) -> Path | None:
    """The checkpoint written last, or None where there is not even a damaged one.

    What was cut off or is damaged is skipped, with a warning. Raises CheckpointError if checkpoints exist and
    none can be used: whoever started anew there would write over them. The same if one is on a disk that is
    away: it may be the last.
    """
    for folder in folders(run_dir):
        if folder.is_symlink() and not folder.exists():
            raise CheckpointError(_away(folder))
    usable, reasons = _sorted_out(run_dir)
    if reasons and not usable:
        raise CheckpointError(
            f"no checkpoint in {run_dir / 'checkpoints'} can be used ({len(reasons)} there): {reasons[-1]}; "
            "mend or move them away, or name another folder"
        )
    for reason in reasons:
        logger.warning("skipped: %s", reason)
    return usable[-1] if usable else None


def next_sequence(run_dir: Path) -> int:
    """The counter of the checkpoint to be written next: above that of every other one of the run, also of
    those whose other files are damaged."""
    manifests = [_manifest_or_none(folder) for folder in (*folders(run_dir), *_replaced(run_dir).values())]
    return 1 + max((_order(manifest)[0] for manifest in manifests if manifest), default=0)


def _sorted_out(run_dir: Path) -> tuple[list[Path], list[str]]:
    """The usable checkpoints in the order of writing; and what is wrong with each of the others.

    One that is deleted while it is looked at is neither. If it was the last, there is a newer one now.
    """
    while True:
        found, reasons, deleted = [], [], False
        for folder in (*folders(run_dir), *_replaced(run_dir).values()):
            try:
                found.append((_order(read_manifest(folder)), folder))
            except CheckpointError as error:
                if os.path.lexists(folder):  # a link stays although nothing is behind it
                    reasons.append(str(error))
                else:
                    deleted = True
        if found or not deleted:
            return [folder for _, folder in sorted(found)], reasons


def _order(manifest: dict[str, Any]) -> tuple[int, int]:
    """What checkpoints of a run are sorted by. The first ones ever written had no counter."""
    return manifest.get("sequence", 0), manifest["step"]


def fingerprints(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of the named files. Raises OSError.

    Hashing 16 GB takes about 10 s a core; hashlib releases the interpreter lock, so files are hashed side by
    side.
    """

    def fingerprint(name: str) -> dict[str, Any]:
        with open(folder / name, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"bytes": file.tell(), "sha256": digest}

    names = list(names)
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(fingerprint, names), strict=True))


def sync(path: Path) -> None:
    """Forces to disk a file's bytes or a folder's list of names: till then a power cut can undo a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def contents(folder: Path) -> list[str]:
    """Every file under `folder` except the manifest: sorted paths relative to it, with forward slashes.

    Raises OSError if a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise error

    files = [
        Path(root, name).relative_to(folder).as_posix()
        for root, _, names in os.walk(folder, onerror=refuse)
        for name in names
    ]
    return sorted(name for name in files if name != MANIFEST)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all there, in their sizes.

    Files that the manifest does not name are nobody's business: network disks and file managers leave some.
    Raises CheckpointError naming the file that is missing, cut off, or unreadable.
    """
    manifest = _read_manifest(folder)
    for name, file in sorted(manifest["files"].items()):
        try:
            status = (folder / name).stat()
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointError(f"{folder / name} is missing") from None
        except OSError as error:
            raise CheckpointError(f"{folder / name} cannot be read: {error.strerror}") from None
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{folder / name} is damaged: it is no file")
        if status.st_size != file["bytes"]:
            raise CheckpointError(
                f"{folder / name} is damaged: it has {status.st_size} bytes, {file['bytes']} when written"
            )
    return manifest


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest alone: its own bytes are as they were written, and every field is of its type."""
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a checkpoint: it has no {MANIFEST}") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} is damaged") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    try:
        manifest = json.loads(text)
        version = manifest["format"]
        intact = text == _render(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        version, intact = FORMAT, False
    if not intact:
        raise CheckpointError(f"{path} is damaged")
    if version != FORMAT:
        raise CheckpointError(f"{path} has format {version}; this act24 reads format {FORMAT}")
    if not _is_sound(manifest):
        raise CheckpointError(f"{path} is no manifest of a checkpoint: a field is missing or of another type")
    if impossible := [name for name in manifest["files"] if not name or "\0" in name]:
        raise CheckpointError(
            f"{path} is no manifest of a checkpoint: no file can be called {impossible[0]!r}"
        )
    return manifest


def _is_sound(manifest: dict[str, Any]) -> bool:
    """Whether the fields that everything relies on are there: a hash that fits does not say so."""
    counters = [manifest.get("step"), manifest.get("sequence", 0), manifest.get("world_size", 1)]
    files, heldout = manifest.get("files"), manifest.get("heldout")
    if not isinstance(heldout, dict | None):
        return False
    return (
        all(type(counter) is int and counter >= 0 for counter in counters)
        and (heldout is None or (isinstance(heldout.get("loss"), float) and "data" in heldout))
        and isinstance(files, dict)
        and all(isinstance(file, dict) and type(file.get("bytes")) is int for file in files.values())
        and not any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in files)
    )


def _manifest_or_none(folder: Path) -> dict[str, Any] | None:
    try:
        return _read_manifest(folder)
    except CheckpointError:
        return None


def verify_files(folder: Path, manifest: dict[str, Any], names: Iterable[str]) -> None:
    """Hashes the named files again. Raises CheckpointError naming the first whose bytes have changed, or that
    cannot be read."""
    try:
        hashed = fingerprints(folder, names)
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from error
    for name, found in hashed.items():
        if found != manifest["files"][name]:
            raise CheckpointError(
                f"{folder / name} is damaged: its SHA-256 differs from {MANIFEST}; "
                "delete the folder to go back to the checkpoint before it"
            )


def publish(written: Path, folder: Path, manifest: dict[str, Any]) -> None:
    """Adds the manifest to the temporary folder `written` and renames that to `folder`: a checkpoint from
    then on.

    A checkpoint of the same step is replaced; anything else of that name is moved aside and stays. Raises
    OSError, and then what was there is there again. A folder cannot be renamed over another, so between two
    renames there is neither: whoever looks then, or after a kill, finds the old one (`put_back`).
    """
    (written / MANIFEST).write_text(_render(manifest), encoding="utf-8")
    sync(written / MANIFEST)
    for inner in (*(path for path in written.rglob("*") if path.is_dir()), written):
        sync(inner)
    aside = None
    if os.path.lexists(folder):
        if reason := why_not_ours(folder):
            aside = _beside(folder, "aside")
            logger.warning(
                "%s makes room for a new checkpoint, and is %s now: %s", folder, aside.name, reason
            )
        else:
            aside = _beside(folder, "old")  # for `prune` to delete
        folder.rename(aside)
    try:
        written.rename(folder)
    except OSError:
        if aside:
            aside.rename(folder)
        raise
    sync(folder.parent)


def prune(
    run_dir: Path, keep: int, written: Path | None = None, *, keep_every: int = 0, keep_best: int = 0
) -> None:
    """Deletes all but the `keep` checkpoints written last, and what interrupted saves left behind.

    Those whose step is a multiple of `keep_every` stay too, and the `keep_best` of least held-out loss, among
    those that have one, measured on the rows that the last such one was measured on. `written`, the one that
    was just published, stays whatever the others say. So does what is damaged, for
    whoever wants to look at it, and what holds somebody else's files; the latter and what cannot be deleted
    are warnings. A checkpoint is renamed before it is deleted, so that a deletion cut short leaves no half
    checkpoint.
    """
    put_back(run_dir)
    needed = _replaced(run_dir).values()
    leftovers = [path for path in all_of(run_dir) if _is_leftover(path) and path not in needed]
    all_complete = complete(run_dir)
    kept = {*all_complete[-keep:], *_best(all_complete, keep_best), written}
    kept |= {folder for folder in all_complete if keep_every and _step(folder) % keep_every == 0}
    old = [folder for folder in all_complete if folder not in kept]
    for folder in leftovers:
        _delete(folder)
    for folder in old:
        if reason := why_not_ours(folder):
            logger.warning("the old checkpoint %s is kept: %s", folder, reason)
        else:
            _delete(folder, rename=True)


def _is_leftover(path: Path) -> bool:
    if _TEMPORARY.fullmatch(path.name):
        return True
    return bool(_REPLACED.fullmatch(path.name)) and not why_not_ours(path)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-").partition(".")[0])


def _best(folders: list[Path], count: int) -> list[Path]:
    if not count:
        return []
    measured = [
        (folder, m["heldout"]) for folder in folders if (m := _manifest_or_none(folder) or {}).get("heldout")
    ]
    losses = [
        (heldout["loss"], folder)
        for folder, heldout in measured
        if heldout["data"] == measured[-1][1]["data"] and not math.isnan(heldout["loss"])
    ]
    return [folder for _, folder in sorted(losses)[:count]]


def _delete(folder: Path, rename: bool = False) -> None:
    try:
        shutil.rmtree(folder.rename(temporary(folder)) if rename else folder)
    except OSError as error:
        logger.warning("could not delete the old checkpoint %s: %s", folder, error)


def why_not_ours(folder: Path) -> str:
    """Why something among the checkpoints must not be deleted: it holds what no save wrote; "" if it may."""
    if _TEMPORARY.fullmatch(folder.name):
        return ""
    if folder.is_symlink():
        return f"{folder} is a link"
    try:
        manifest, present = _read_manifest(folder), contents(folder)
        other = _links_and_empty_folders(folder)
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    foreign = [name for name in present if name not in manifest["files"] and not _is_litter(name)] + other
    return f"{folder / foreign[0]} is not of this program" if foreign else ""


def _links_and_empty_folders(folder: Path) -> list[str]:
    """What no save writes, and no list of files tells. Raises OSError."""
    inside = sorted(folder.rglob("*"))
    odd = [path for path in inside if path.is_symlink() or (path.is_dir() and not any(path.iterdir()))]
    return [path.relative_to(folder).as_posix() for path in odd]


def _is_litter(name: str) -> bool:
    """Whether a file is what network disks and file managers leave, for as long as its folder exists."""
    return any(fnmatch(PurePosixPath(name).name, pattern) for pattern in _LITTER)


def _render(manifest: dict[str, Any]) -> str:
    """The manifest's only valid text. It holds its own SHA-256; any other spelling counts as damaged."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1) + "\n"
