"""`history.jsonl` of a run's folder: when it began and was taken up again, from where, with what changes.

One line a start. It decides what a run goes on from that has saved nothing since, so each line is of the form
that `describe_run` writes, or the file is refused.
"""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from act24.tools.checkpoints import folder as checkpoint_folder
from act24.tools.checkpoints.checkpoint import Checkpoint
from act24.tools.checkpoints.manifest import CheckpointError, manifest_or_none, read_manifest
from act24.tools.data.position import Count, Saved, check_saved
from act24.tools.files import is_plain
from act24.tools.run.lock import RunError

HISTORY = "history.jsonl"
_BEGINNING = '{"step": '  # of a line
_WENT_ON = re.compile(r'\{"step": [1-9]')

logger = logging.getLogger("act24")


class _Entry(Saved):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    step: Count
    act24: str
    time: str
    # Of one that went on: the checkpoint's folder, the same from the run's, and the hash in its manifest.
    from_: str | None = Field(default=None, alias="from", min_length=1)
    from_relative: str | None = Field(default=None, min_length=1)
    from_sha256: str | None = None
    sequence: Count | None = None  # of the first checkpoint that is written from here on
    weights: str | None = None  # of one that began with those of a folder that its recipe does not name
    changes: dict[str, Annotated[list[Any], Field(min_length=2, max_length=2)]] = Field(default={})
    schedule_steps: Count | None = Field(default=None, gt=0)
    sha256: dict[str, str] = Field(default={})  # of what was written beside it; an older act24 kept none


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run went on from, at its last start.

    Attributes:
        recorded: where it was then.
        places: where it may be now, since the run's folder may have been moved with it or without.
        sha256: that of its manifest; None where an older act24 kept none.
        sequence: counter of the first checkpoint that the run writes itself, where it is known.
    """

    recorded: Path
    places: tuple[Path, ...]
    sha256: str | None
    sequence: int | None

    def found(self, whole: bool = False) -> Path | None:
        """Where it is, if it is anywhere; `whole`: with all its files in their sizes."""
        here = (place for place in self.places if self._is_at(place))
        return next((place for place in here if not whole or _is_whole(place)), None)

    def is_beside(self, folder: Path) -> bool:
        """Whether a checkpoint is this one, or one of the same run."""
        parent = Path(os.path.abspath(folder)).parent.resolve()
        beside = (folder, parent / self.recorded.name) if self.sha256 else ()
        return parent == self.recorded.parent.resolve() or any(map(self._is_at, beside))

    def is_behind(self, last: Path) -> bool:
        """Whether the run's last checkpoint was written since."""
        manifest = manifest_or_none(last) or {}
        return self.sequence is None or manifest.get("sequence", 0) >= self.sequence

    def _is_at(self, place: Path) -> bool:
        return place.exists() and self.sha256 in (None, (manifest_or_none(place) or {}).get("sha256"))


def _is_whole(checkpoint: Path) -> bool:
    try:
        read_manifest(checkpoint)
    except CheckpointError:
        return False
    return True


@dataclass(frozen=True)
class History:
    """What a run's folder says of its starts.

    Attributes:
        entries: one a start; none where there is no file.
        cut_off: the last line is not whole, and was that of a start which went on: from where is not known.
    """

    entries: tuple[dict[str, Any], ...]
    cut_off: bool = False

    @property
    def last(self) -> dict[str, Any]:
        """The last entry; nothing where there is none."""
        return self.entries[-1] if self.entries else {}


def read_history(run_dir: Path) -> History:
    """The history of a run. A line that a full disk cut off, under an older act24, is left out, and said.

    Raises:
        RunError: the file is not one that a run wrote; names the line and what is wrong.
    """
    path = run_dir / HISTORY
    if not os.path.lexists(path):
        return History(())
    if not is_plain(path):
        raise RunError(in_the_way(path, "it is no file"))
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise RunError(in_the_way(path, getattr(error, "strerror", None) or "it is no text")) from None
    entries, cut_off = [], False
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            entry = json.loads(line)
            check_saved(_Entry, entry)
        except json.JSONDecodeError:
            if not (line.startswith(_BEGINNING) or _BEGINNING.startswith(line)):
                raise RunError(in_the_way(path, f"line {number} is no JSON")) from None
            logger.warning("%s: line %d was cut off, and is left out", path, number)
            cut_off = bool(_WENT_ON.match(line))
        except (ValueError, RecursionError) as error:
            why = "nested too deep" if isinstance(error, RecursionError) else error
            raise RunError(in_the_way(path, f"line {number}: {why}")) from None
        else:
            entries.append(entry)
            cut_off = False
    return History(tuple(entries), cut_off)


def in_the_way(path: Path, why: str = "") -> str:
    """What is said of somebody's file where a run writes its own."""
    return (
        f"{path} is not as act24 wrote it{f' ({why})' if why else ''}, and would be written over: move it to "
        "another folder, or choose another for the run with --run-dir"
    )


def origin_of(run_dir: Path, history: History) -> Origin | None:
    """What the run went on from at its last start; None where that began it."""
    last = history.last
    if "from" not in last:
        return None
    recorded = Path(last["from"])
    places = [recorded]
    if "from_relative" in last:  # first: what was moved or copied with the run is its own
        places.insert(0, Path(os.path.normpath(run_dir.resolve() / last["from_relative"])))
    return Origin(recorded, tuple(places), last.get("from_sha256"), last.get("sequence"))


def origin_entry(run_dir: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """What an entry says of the checkpoint from which a run goes on."""
    folder = checkpoint.folder
    return {
        "step": checkpoint.step,
        "from": os.path.abspath(folder),
        "from_relative": os.path.relpath(folder.resolve(), run_dir.resolve()),
        "from_sha256": checkpoint.manifest["sha256"],
        "sequence": checkpoint_folder.next_sequence(run_dir),
    }
