"""What a checkpoint says of itself: `manifest.json` names every file with its size and SHA-256.

Neither torch.distributed.checkpoint nor safetensors notices a flipped byte in a tensor. What the files mean
is not known here; that is `checkpoint.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from act24.errors import Act24Error

FORMAT = 1
MANIFEST = "manifest.json"


class CheckpointError(Act24Error):
    """A checkpoint could not be written, is damaged, or belongs to something else."""


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
    manifest = read_manifest_alone(folder)
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


def read_manifest_alone(folder: Path) -> dict[str, Any]:
    """The manifest alone: its own bytes are as they were written, and every field is of its type."""
    path = folder / MANIFEST
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise CheckpointError(f"{path} is damaged: it is no file")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if not folder.exists():
            raise CheckpointError(
                f"{folder} is not a checkpoint: it does not exist. Name one that is there, or its "
                "run for the last; which stay, checkpoint.keep, keep_every and keep_best say"
            ) from None
        raise CheckpointError(f"{folder} is not a checkpoint: it has no {MANIFEST}") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} is damaged") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    try:
        manifest = json.loads(text)
        version = manifest["format"]
        intact = text == render(manifest)
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


def manifest_or_none(folder: Path) -> dict[str, Any] | None:
    try:
        return read_manifest_alone(folder)
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


def render(manifest: dict[str, Any]) -> str:
    """The manifest's only valid text. It holds its own SHA-256; any other spelling counts as damaged."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1) + "\n"
