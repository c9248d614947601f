"""Rows in an order of the whole run, which any number of processes can go on with.

The text is read as a fixed number of streams V, as many as the run had processes when it began, each shuffled
and packed by itself. Row g of the run is row g // V of stream g % V, and of W processes process r trains on
rows r, r + W, r + 2 W, … So the rows of an optimizer step, and their order, do not depend on W. With W = V,
or a divisor of it, every process reads text of its own; with other numbers some text is read and encoded by
more than one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from act24.tools.data.rows import Rows
from act24.tools.data.tally import Tally


class DealtRows(Rows):
    """The rows of one process. A state is that of the run after the same number of rows on every process.

    Args:
        open_stream: opens stream v, at its beginning.
        streams: V.
    """

    def __init__(self, open_stream: Callable[[int], Rows], streams: int, rank: int, world_size: int) -> None:
        self._open_stream, self._count = open_stream, streams
        self._rank, self._world_size = rank, world_size
        self._streams: dict[int, Rows] = {}
        self._read: dict[int, int] = {}  # rows of each
        self._go_to(rank)
        self.warnings = next(iter(self._streams.values())).warnings

    @property
    def tally(self) -> Tally:  # type: ignore[override]
        """Of all streams that this process reads."""
        return Tally.summed([stream.tally for stream in self._streams.values()])

    @property
    def fingerprint(self) -> dict[str, Any]:
        shared = next(iter(self._streams.values())).fingerprint
        return {key: shared[key] for key in shared if key not in ("rank", "world_size", "files")} | {
            "streams": self._count
        }

    @property
    def epoch(self) -> int:
        """Of the stream that is behind the others."""
        return min(stream.epoch for stream in self._streams.values())

    def adopt(self, fingerprint: dict[str, Any], position: dict[str, Any], grow: bool) -> list[str]:
        self._go_to(position["row"] + self._rank)
        warnings = []
        for index, stream in self._streams.items():
            saved = position["streams"][str(index)]
            warnings += stream.adopt({"files": saved["files"]}, saved["position"], grow)
        return list(dict.fromkeys(warnings))

    def _go_to(self, row: int) -> None:
        """Make `row` of the run the next one, and open the streams that it and those after it are from."""
        self._row = row
        reached = range(row, row + self._world_size * self._count, self._world_size)
        needed = dict.fromkeys(row % self._count for row in reached)
        self._streams = {index: self._streams.get(index) or self._open_stream(index) for index in needed}
        self._read = {index: self._read.get(index, 0) for index in needed}

    def state_dict(self) -> dict[str, Any]:
        """Rows of the run that are done, and of each stream of this process how many were read of it, the
        position after them, and the files."""
        streams = {
            str(index): {
                "rows": self._read[index],
                "position": stream.state_dict(),
                "files": stream.fingerprint.get("files"),
            }
            for index, stream in self._streams.items()
        }
        return {"row": self._row - self._rank, "streams": streams}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._row = state["row"] + self._rank
        for index, stream in self._streams.items():
            saved = state["streams"][str(index)]
            self._read[index] = saved["rows"]
            stream.load_state_dict(saved["position"])

    def __next__(self) -> np.ndarray:
        row, index = divmod(self._row, self._count)
        stream = self._streams[index]
        while self._read[index] < row:  # rows of other processes
            next(stream)
            self._read[index] += 1
        tokens = next(stream)
        self._read[index] += 1
        self._row += self._world_size
        return tokens


def merged_state(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The position of a run, from the states of all its processes at one step, each as `check_position` says.

    Raises:
        ValueError: they are no such states, or of different steps.
    """
    try:
        rows = {state["position"]["row"] for state in states}
        streams: dict[str, Any] = {}
        for state in states:
            for index, stream in state["position"]["streams"].items():
                if index not in streams or streams[index]["rows"] < stream["rows"]:
                    streams[index] = stream
        fingerprint = states[0]["fingerprint"]
        count = len(streams)
        complete = fingerprint["streams"] == count and set(streams) == {str(v) for v in range(count)}
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"it holds no position that this act24 reads ({error!r})") from error
    if len(rows) != 1 or not complete:
        raise ValueError(f"its processes stand at different rows, or some are missing: {sorted(rows)}")
    row = rows.pop()
    for index, stream in streams.items():
        due = len(range(int(index), row, count))
        if stream["rows"] != due:
            raise ValueError(
                f"position.streams.{index}.rows: {stream['rows']}, and {due} of {row} rows are of it"
            )
    return {"fingerprint": fingerprint, "position": {"row": row, "streams": streams}}
