"""A checkpoint folder is whole or it is not a checkpoint.

    RUN/checkpoints/step-000500/                what is written here is complete
    RUN/checkpoints/step-000500.tmp-3f2a…/      what a save is still writing, or left when it was killed
    RUN/checkpoints/step-000500.old-8c41…/      what a save of the same step replaces, until that is in place
    RUN/checkpoints/step-000500.gone-55d0…/     what is being deleted
    RUN/checkpoints/step-000500.aside-71c0…/    what was in the way of a save and not one of ours

A save fills a temporary folder, forces every byte to disk, writes `manifest.json` last and renames the
folder (OLMo-core's protocol). A temporary folder with a manifest and all its files is a checkpoint already:
after a kill before the rename it is read where it is, and whoever holds the run's lock puts it in place.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import re
import shutil
import uuid
from pathlib import Path, PurePosixPath
from typing import Any

from act24.tools.checkpoints.manifest import (
    MANIFEST,
    CheckpointError,
    contents,
    manifest_or_none,
    read_manifest,
    read_manifest_alone,
    render,
    sync,
)

_NAMED = re.compile(r"(step-([0-9]{6,}))(?:\.(tmp|old|gone)-[0-9a-f]{12})?")
_LITTER = re.compile(r"\.nfs[0-9a-f]+|\.fuse_hidden[0-9a-f]+|\.DS_Store|Thumbs\.db|desktop\.ini")
#: What a save writes (`checkpoint.py`), torch.distributed.checkpoint's own files among it.
_WRITTEN = re.compile(
    r"(model\.safetensors|(state|optimizer|plan|tokenizer|manifest|rank-[0-9]{5,})\.json|recipe\.toml"
    r"|optimizer/(\.metadata(\.tmp)?|__[0-9]+_[0-9]+\.distcp))"
)

logger = logging.getLogger("act24")


def folder_of(run_dir: Path, step: int) -> Path:
    """The folder of the run's checkpoint after `step` optimizer steps, whether it exists or not."""
    return run_dir / "checkpoints" / f"step-{step:06d}"


def is_named_like_one(path: Path) -> bool:
    """Whether a folder is meant to be a checkpoint, be it damaged, by its name; a run may have that too, and
    is known by its folder of checkpoints."""
    return bool(re.match(r"step-[0-9]{6,}(\.|$)", path.name)) and not os.path.lexists(path / "checkpoints")


def temporary(folder: Path) -> Path:
    """A fresh name beside `folder` for what is not yet there. Nothing is created."""
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


def _places(run_dir: Path) -> dict[Path, Path]:
    """Where the checkpoint of each step is, whole or not, by the name that it has or is to have.

    A kill between a save's manifest and its last rename leaves it elsewhere. Of two the counter decides.
    """
    parent = run_dir / "checkpoints"
    found: dict[Path, tuple[tuple[int, int], bool, Path]] = {}
    for name in _names(run_dir):
        if match := _NAMED.fullmatch(name):
            order, folder = _order_of(parent / name, int(match[2]), match[3]), parent / match[1]
            if order is not None:
                candidate = (order, match[3] is None, parent / name)
                found[folder] = max(candidate, found.get(folder, candidate))
    return {folder: path for folder, (_, _, path) in found.items()}


def _order_of(path: Path, step: int, kind: str | None) -> tuple[int, int] | None:
    """The order of what may be the checkpoint of a step; None if it cannot be.

    What has the name of one is one, be it damaged. What a save had not yet named has to be whole: a failed
    save, which says so, may have left a part.
    """
    if kind == "gone" or (kind == "tmp" and path.is_symlink()):
        return None
    try:
        manifest = read_manifest(path) if kind == "tmp" else read_manifest_alone(path)
    except CheckpointError:
        return None if kind else (-1, step)
    return None if kind == "tmp" and manifest["step"] != step else _order(manifest)


def check_writable(run_dir: Path, dry_run: bool = False) -> None:
    """Raises CheckpointError where no save of a run could write beside the checkpoints that it has; in a dry
    run as far as that shows without an attempt."""
    parent = run_dir / "checkpoints"
    if not parent.is_dir():
        return
    attempt = temporary(folder_of(run_dir, 0))  # left by a kill, it is what a save left
    try:
        if not dry_run:
            attempt.mkdir()
            attempt.rmdir()
        elif not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "Permission denied")
    except OSError as error:
        raise CheckpointError(
            f"{parent} cannot be written: {error.strerror}; make it writable, or choose another folder with "
            "--run-dir"
        ) from None


def put_back(run_dir: Path) -> None:
    """Makes the renames that a save had before it when it was cut off: the newer checkpoint gets its name.

    For who holds the run's folder; others read it where it is. What cannot be renamed is a warning, and
    stays.
    """
    for folder, path in _places(run_dir).items():
        if path != folder:
            try:
                _put_in_place(path, folder)
            except OSError as error:
                logger.warning("could not rename %s to %s: %s", path, folder.name, error)


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
    those whose other files are damaged, or that are being deleted."""
    manifests = [manifest_or_none(path) for path in all_of(run_dir) if _NAMED.fullmatch(path.name)]
    return 1 + max((_order(manifest)[0] for manifest in manifests if manifest), default=0)


def _sorted_out(run_dir: Path) -> tuple[list[Path], list[str]]:
    """The usable checkpoints in the order of writing; and what is wrong with each of the others.

    Looked at until two looks see the same: a list that is read while a run renames may miss both names.
    """
    seen = None
    while True:
        found, reasons = [], []
        for path in _places(run_dir).values():
            try:
                found.append((_order(read_manifest(path)), path))
            except CheckpointError as error:
                reasons.append(str(error))
        now = ([path for _, path in sorted(found)], sorted(reasons))
        if now == seen:
            return now
        seen = now


def _order(manifest: dict[str, Any]) -> tuple[int, int]:
    """What checkpoints of a run are sorted by. The first ones ever written had no counter."""
    return manifest.get("sequence", 0), manifest["step"]


def publish(written: Path, folder: Path, manifest: dict[str, Any]) -> None:
    """Adds the manifest to the temporary folder `written` and renames that to `folder`: a checkpoint from
    then on.

    A checkpoint of the same step is replaced; anything else of that name is moved aside and stays. Raises
    OSError, and then what was there is there again. A folder cannot be renamed over another, so between two
    renames there is neither: whoever looks then, or after a kill, finds the old one (`put_back`).
    """
    (written / MANIFEST).write_text(render(manifest), encoding="utf-8")
    sync(written / MANIFEST)
    for inner in (*(path for path in written.rglob("*") if path.is_dir()), written):
        sync(inner)
    _put_in_place(written, folder)


def _put_in_place(written: Path, folder: Path) -> None:
    """Renames a whole folder to what it is; what has that name stays beside it, and has it again if that
    raises OSError."""
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


def abandon(written: Path) -> None:
    """Deletes what a save that failed has written, the manifest first: the rest is no checkpoint. What cannot
    be deleted stays."""
    with contextlib.suppress(OSError):
        (written / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(written, ignore_errors=True)


def prune(
    run_dir: Path, keep: int, written: Path | None = None, *, keep_every: int = 0, keep_best: int = 0
) -> None:
    """Deletes all but the `keep` checkpoints written last, and what interrupted saves left behind.

    Those whose step is a multiple of `keep_every` stay too, and the `keep_best` of least held-out loss, among
    those that have one. Losses of other rows cannot be compared: where a run came to be evaluated on others,
    the best of each stay, which is a warning when the first of them is `written`. `written`, the one that
    was just published, stays whatever the others say. So does what is damaged, for whoever wants to look at
    it, and what holds somebody else's files, also among what is left behind; the latter and what cannot be
    deleted are warnings. A checkpoint is renamed before it is deleted, so that a deletion cut short leaves no
    half checkpoint.
    """
    put_back(run_dir)
    needed = _places(run_dir).values()
    leftovers = [path for path in all_of(run_dir) if _is_leftover(path) and path not in needed]
    all_complete = complete(run_dir)
    kept = {*all_complete[-keep:], *_best(all_complete, keep_best, written), written}
    kept |= {folder for folder in all_complete if keep_every and _step(folder) % keep_every == 0}
    old = [folder for folder in all_complete if folder not in kept]
    for folder in (*leftovers, *old):
        if reason := why_not_ours(folder):
            logger.warning("%s is kept: %s", folder, reason)
        else:
            _delete(folder)


def _is_leftover(path: Path) -> bool:
    match = _NAMED.fullmatch(path.name)
    return bool(match and match[3])


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-").partition(".")[0])


def _best(folders: list[Path], count: int, written: Path | None) -> list[Path]:
    by_rows: dict[str, list[tuple[float, Path]]] = {}
    for folder in folders if count else ():
        heldout = (manifest_or_none(folder) or {}).get("heldout")
        if heldout and math.isfinite(heldout["loss"]):
            by_rows.setdefault(heldout["data"], []).append((heldout["loss"], folder))
    best = [folder for losses in by_rows.values() for _, folder in sorted(losses)[:count]]
    is_first = any([folder for _, folder in losses] == [written] for losses in by_rows.values())
    if is_first and len(by_rows) > 1:
        logger.warning(
            "%s was evaluated on other held-out rows than %s: their losses cannot be compared, and the best "
            "of each stay (checkpoint.keep_best)",
            written,
            ", ".join(folder.name for folder in best if folder != written),
        )
    return best


def _delete(folder: Path) -> None:
    try:
        shutil.rmtree(folder.rename(_beside(folder.with_name(folder.name.partition(".")[0]), "gone")))
    except OSError as error:
        logger.warning("could not delete the old checkpoint %s: %s", folder, error)


def why_not_ours(folder: Path) -> str:
    """Why something among the checkpoints must not be deleted: it holds what no save wrote; "" if it may."""
    if folder.is_symlink():
        return f"{folder} is a link"
    match = _NAMED.fullmatch(folder.name)
    unfinished = match and match[3] in ("tmp", "gone")  # and so maybe without a manifest
    try:
        present, other = contents(folder), _links_and_empty_folders(folder)
        if unfinished:
            named = [name for name in present if _WRITTEN.fullmatch(name)]
            other = [name for name in other if name != "optimizer" or (folder / name).is_symlink()]
        else:
            named = list(read_manifest_alone(folder)["files"])
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    foreign = [name for name in present if name not in named and not _is_litter(name, present)] + other
    return f"{folder / foreign[0]} is not of this program" if foreign else ""


def _links_and_empty_folders(folder: Path) -> list[str]:
    """What no save writes, and no list of files tells. Raises OSError."""
    inside = sorted(folder.rglob("*"))
    odd = [path for path in inside if path.is_symlink() or (path.is_dir() and not any(path.iterdir()))]
    return [path.relative_to(folder).as_posix() for path in odd]


def _is_litter(name: str, present: list[str]) -> bool:
    """Whether a file is what network disks and file managers leave, for as long as its folder exists."""
    path = PurePosixPath(name)
    beside = path.name.startswith("._") and str(path.with_name(path.name[2:])) in present  # of a Mac
    return beside or bool(_LITTER.fullmatch(path.name))
