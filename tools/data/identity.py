"""Which text it is: files are the same when their content is, wherever they lie and whatever they are called.

A file of up to 64 MiB is hashed whole. Of a larger one the size and sixteen pieces of 64 KiB are, first and
last included, and its time of modification is kept beside that: an edit that keeps the size may lie between
the pieces, and a copy has another time, so another time alone is said and not refused. The cost is what
reading these bytes takes, at about 1 GB/s a core: 1 GB for C4's 1,024 files, once a process. Whenever
a file is read, its size and time are looked at before and after, and its content where these have changed.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from act24.errors import Act24Error
from act24.tools.data.position import PositionError
from act24.words import counted

WHOLE = 64 * 2**20  # bytes; larger files are sampled
PIECES, PIECE = 16, 64 * 2**10
GROW = "grow"
_WAYS_ON = "put back what was there and go on, or begin another run, from model.pretrained = the checkpoint"


def identities(files: Sequence[Path]) -> list[str]:
    """Twelve hexadecimal digits a file, by size and content; behind an "@" the time of one that was sampled.

    Raises:
        Act24Error: a file cannot be read.
    """
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(_identity, files))


def check_unchanged(path: Path, identity: str) -> bool:
    """Compare a file with what it was, and return whether it was touched all the same: of a large file only
    pieces are compared. A look at size and time, and only where these are others, at its content.

    Raises:
        Act24Error: its content is another, or it cannot be read.
    """
    now = _identity(path)
    if _content(now) != _content(identity):
        raise Act24Error(f"{path} was changed while it is read, and is another text from here on: {_WAYS_ON}")
    return now != identity


def combined(files: Sequence[str]) -> str:
    """One short hash of identities, their order included and times left out."""
    return hashlib.sha256(" ".join(_content(file) for file in files).encode()).hexdigest()[:16]


def shared(files: Sequence[str], others: Sequence[str]) -> list[int]:
    """The places of those files whose content is that of one of the others, by identities."""
    contents = {_content(file) for file in others}
    return [place for place, file in enumerate(files) if _content(file) in contents]


def changed(saved: Sequence[str], present: Sequence[str]) -> int:
    """How many contents are in only one of two lists of identities."""
    then, now = Counter(map(_content, saved)), Counter(map(_content, present))
    return max((then - now).total(), (now - then).total())


@dataclass(frozen=True)
class Listing:
    """The files of a source in the order by which positions count them, and how many of them each epoch has.

    Attributes:
        files: `identities`; those that were added while a run went on stand at the end.
        epochs: (first epoch, number of files from then on), ascending.
    """

    files: tuple[str, ...]
    epochs: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, files: Sequence[str]) -> Listing:
        return cls(tuple(files), ((0, len(files)),))

    @classmethod
    def from_json(cls, saved: Any) -> Listing:
        """
        Raises:
            PositionError: it is no listing, or of an older act24.
        """
        try:
            listing = cls(tuple(saved["files"]), tuple((first, count) for first, count in saved["epochs"]))
            firsts, counts = zip(*listing.epochs, strict=True)
            known = all(isinstance(file, str) for file in listing.files)
            whole = all(type(number) is int for number in (*firsts, *counts))
            ascends = firsts[0] == 0 and all(a < b for a, b in itertools.pairwise(firsts))
            good = known and whole and ascends and min(counts) > 0 and max(counts) <= len(listing.files)
        except (TypeError, ValueError, KeyError) as error:
            raise PositionError("its list of files is not one that this act24 reads") from error
        if not good:
            raise PositionError(
                f"its list of files is not one that this act24 writes: epochs {saved['epochs']}"
            )
        return listing

    def as_json(self) -> dict[str, Any]:
        return {"files": list(self.files), "epochs": [list(entry) for entry in self.epochs]}

    def count(self, epoch: int) -> int:
        """How many files that epoch reads."""
        return next(count for first, count in reversed(self.epochs) if first <= epoch)


def matched(
    saved: Listing, present: Sequence[str], names: Sequence[str], epoch: int, grow: bool
) -> tuple[Listing, list[int], list[str]]:
    """How the files that are there continue a saved listing.

    Args:
        present: identities of the files that there are now.
        names: theirs, for messages.
        epoch: the last that is begun at the saved position: its order stays.
        grow: take files that were added, from the epoch after that on; otherwise they are refused.

    Returns:
        the listing from now on; for each of its entries the place in `present`; warnings.

    Raises:
        Act24Error: a file of the saved listing is no longer there with the same content, or there are others
            and `grow` is not set.
    """
    places: dict[str, deque[int]] = defaultdict(deque)
    for place, file in enumerate(present):
        places[_content(file)].append(place)
    order: list[int] = []
    touched, lost = [], 0
    for file in saved.files:
        if not (there := places[_content(file)]):
            lost += 1
            continue
        order.append(there.popleft())
        if present[order[-1]] != file:
            touched.append(names[order[-1]])
    added = sorted(place for left in places.values() for place in left)
    shown = ", ".join(names[place] for place in added[:3]) + (", …" if len(added) > 3 else "")
    if lost:
        gone = "is gone or its" if lost == 1 else "are gone or their"
        raise Act24Error(
            f"{lost} of {counted(len(saved.files), 'file')} {gone} content has changed"
            + (f"; not known to the run: {shown}" if added else "")
            + f"; {_WAYS_ON}"
        )
    more = f"{counted(len(added), 'file was', 'files were')} added ({shown})"
    if added and not grow:
        raise Act24Error(f"{more}; --data {GROW} reads what was added from the next epoch on")
    warnings = []
    if touched:
        first = f"{touched[0]}{', …' if len(touched) > 1 else ''}"
        warnings.append(
            f"{counted(len(touched), 'large file was', 'large files were')} modified or copied since the "
            f"checkpoint ({first}): size and sampled content are the same, what lies between the samples was "
            "not compared"
        )
    epochs: tuple[tuple[int, int], ...] = saved.epochs
    if added:
        warnings.append(f"{more}: read from epoch {epoch + 1} on")
        epochs = (*(entry for entry in epochs if entry[0] <= epoch), (epoch + 1, len(present)))
    order += added
    return Listing(tuple(present[place] for place in order), epochs), order, warnings


def _content(file: str) -> str:
    return file.partition("@")[0]


def _identity(path: Path) -> str:
    try:
        facts = path.stat()
        return _hashed(path, facts.st_size, facts.st_mtime_ns)
    except OSError as error:
        raise Act24Error(f"cannot read {error.filename}: {error.strerror}") from error


@cache
def _hashed(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        if size <= WHOLE:
            digest = hashlib.file_digest(file, "sha256")
            digest.update(f" {size}".encode())
            return digest.hexdigest()[:12]
        digest = hashlib.sha256(f"{size}".encode())
        for piece in range(PIECES):
            file.seek((size - PIECE) * piece // (PIECES - 1))
            digest.update(file.read(PIECE))
    return f"{digest.hexdigest()[:12]}@{modified // 10**9}"
