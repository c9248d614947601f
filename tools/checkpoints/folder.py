"""A checkpoint folder is whole or it is not a checkpoint.

    RUN/checkpoints/step-000500/                what is written here is complete
    RUN/checkpoints/step-000500.tmp-3f2a…/      what a save is still writing, or left when it was killed

A save fills a temporary folder, forces every byte to disk, writes `manifest.json` last and renames the folder
(OLMo-core's protocol). The manifest names every file with its size and SHA-256, because neither
torch.distributed.checkpoint nor safetensors notices a flipped byte in a tensor. What the files mean is not
known here; that is `checkpoint.py`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from act24.errors import Act24Error

FORMAT = 1
MANIFEST = "manifest.json"

logger = logging.getLogger("act24")


class CheckpointError(Act24Error):
    """A checkpoint could not be written, is damaged, or belongs to something else."""


def folder_of(run_dir: Path, step: int) -> Path:
    """The folder of the run's checkpoint after `step` optimizer steps, whether it exists or not."""
    return run_dir / "checkpoints" / f"step-{step:06d}"


def temporary(folder: Path) -> Path:
    """A fresh name beside `folder` for what is not yet, or no longer, that checkpoint. Nothing is created."""
    return folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:12]}")


def complete(run_dir: Path) -> list[Path]:
    """The run's checkpoints, in the order in which they were written.

    The order is that of writing, not of steps: after a run is resumed from an older checkpoint, what it
    writes from then on is what counts, although the abandoned branch had come further. A folder that only
    looks like a checkpoint is reported as a warning and left out. Sizes are compared here, hashes are not
    (`verify_files`).
    """
    found = []
    for folder in sorted((run_dir / "checkpoints").glob("step-*")):
        if re.fullmatch(r"step-\d{6,}", folder.name):
            try:
                found.append((read_manifest(folder)["written"], folder))
            except CheckpointError as error:
                logger.warning("skipped: %s", error)
    return [folder for _, folder in sorted(found)]


def latest(run_dir: Path) -> Path | None:
    """The checkpoint written last, or None; what was cut off or is damaged is skipped, with a warning."""
    folders = complete(run_dir)
    return folders[-1] if folders else None


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
    """Every file under `folder` except the manifest: sorted paths relative to it, with forward slashes."""
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in files if name != MANIFEST)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all there, in their sizes, and no others.

    Raises CheckpointError naming the file that is missing, extra, cut off, or unreadable.
    """
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a checkpoint: it has no {MANIFEST}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    try:
        manifest = json.loads(text)
        version = manifest["format"]
        intact = text == _render(manifest)
    except (ValueError, KeyError, TypeError, AttributeError):
        version, intact = FORMAT, False
    if not intact:
        raise CheckpointError(f"{path} is damaged")
    if version != FORMAT:
        raise CheckpointError(f"{path} has format {version}; this act24 reads format {FORMAT}")

    listed, present = manifest["files"], contents(folder)
    for name in sorted(set(listed) | set(present)):
        if name not in present:
            raise CheckpointError(f"{folder / name} is missing")
        if name not in listed:
            raise CheckpointError(f"{folder / name} is not in the checkpoint's {MANIFEST}; remove that file")
        size = (folder / name).stat().st_size
        if size != listed[name]["bytes"]:
            written = listed[name]["bytes"]
            raise CheckpointError(f"{folder / name} is damaged: it has {size} bytes, {written} when written")
    return manifest


def verify_files(folder: Path, manifest: dict[str, Any], names: Iterable[str]) -> None:
    """Hashes the named files again. Raises CheckpointError naming the first whose bytes have changed."""
    for name, found in fingerprints(folder, names).items():
        if found != manifest["files"][name]:
            raise CheckpointError(
                f"{folder / name} is damaged: its SHA-256 differs from {MANIFEST}; "
                "delete the folder to go back to the checkpoint before it"
            )


def publish(written: Path, folder: Path, manifest: dict[str, Any]) -> None:
    """Adds the manifest to the temporary folder `written` and renames that to `folder`: a checkpoint from
    then on.

    A checkpoint of the same step is replaced. Raises OSError.
    """
    (written / MANIFEST).write_text(_render(manifest), encoding="utf-8")
    sync(written / MANIFEST)
    for inner in (*(path for path in written.rglob("*") if path.is_dir()), written):
        sync(inner)
    if (
        folder.exists()
    ):  # a folder cannot be renamed over another: move the old one aside, for `prune` to delete
        folder.rename(temporary(folder))
    written.rename(folder)
    sync(folder.parent)


def prune(run_dir: Path, keep: int) -> None:
    """Deletes all but the `keep` checkpoints written last, and what interrupted saves left behind.

    A checkpoint is renamed before it is deleted, so that a deletion cut short leaves no half checkpoint.
    Damaged folders stay, for whoever wants to look at them. What cannot be deleted is a warning.
    """
    leftovers = (run_dir / "checkpoints").glob("step-*.tmp-*")
    for folder in (*leftovers, *complete(run_dir)[:-keep]):
        try:
            shutil.rmtree(folder if ".tmp-" in folder.name else folder.rename(temporary(folder)))
        except OSError as error:
            logger.warning("could not delete the old checkpoint %s: %s", folder, error)


def _render(manifest: dict[str, Any]) -> str:
    """The manifest's only valid text. It holds its own SHA-256; any other spelling counts as damaged."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1) + "\n"
