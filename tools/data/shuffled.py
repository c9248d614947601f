"""Documents in another order than that of their files, within a buffer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from act24.tools.data.documents import Documents
from act24.tools.data.permutation import permuted
from act24.tools.data.position import PositionError
from act24.tools.data.tally import Tally


class ShuffledDocuments(Iterator[str]):
    """`documents`, `size` of them at a time in an order drawn from the seed.

    A buffer is read, handed out, and the next is read. That mixes less than one that is refilled document by
    document, and costs as much memory; but its state is the position before the buffer and how many are
    handed out, so that a run goes on exactly, for reading at most `size` documents again.
    """

    def __init__(self, documents: Documents, size: int, seed: int) -> None:
        self._documents, self._size, self._seed = documents, size, seed
        self._begin(documents.state_dict(), 0)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """That of the documents, and the size: another one is another order."""
        return {**self._documents.fingerprint, "shuffle_buffer": self._size}

    @property
    def only(self) -> str | None:
        """See `Documents.only`."""
        return self._documents.only

    @property
    def tally(self) -> Tally:
        return self._documents.tally

    def adopt(self, fingerprint: dict[str, Any], epoch: int, grow: bool) -> list[str]:
        """See `Documents.adopt`."""
        return self._documents.adopt(fingerprint, epoch, grow)

    @staticmethod
    def epochs(state: dict[str, Any]) -> tuple[int, int]:
        """See `Documents.epochs`. Of the k-th document that is handed out of a buffer, the epoch is that of
        the k-th that was read into it: so epochs only rise, and as fast as text is read."""
        last, begun = state["epochs"]
        return last, begun

    def state_dict(self) -> dict[str, Any]:
        """The position before the buffer at hand, how many of it are handed out, and its `epochs`."""
        epochs = [self._before["epoch"]]
        if self._taken:
            self._filled()
            epochs = self._epochs
        return {**self._before, "taken": self._taken, "epochs": [epochs[self._taken - 1], epochs[-1]]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._documents.load_state_dict(state)
        self._begin(state, state["taken"])

    def __next__(self) -> str:
        buffer = self._filled()
        while self._taken == len(buffer):
            if not buffer:
                raise StopIteration
            self._begin(self._documents.state_dict(), 0)
            buffer = self._filled()
        self._taken += 1
        return buffer[self._taken - 1]

    def _filled(self) -> list[str]:
        """The buffer at hand, in its order; empty after the last document."""
        if self._buffer is None:
            texts, self._epochs = [], []
            for text in itertools.islice(self._documents, self._size):
                texts.append(text)
                self._epochs.append(self._documents.epoch)
            if self._taken > len(texts):
                raise PositionError(f"taken {self._taken} of {len(texts)} documents is no saved position")
            # Drawn by the place of the buffer, so that it does not matter who reads it, and when.
            place = (self._before[key] for key in ("epoch", "shard", "record", "passed"))
            drawn = np.random.SeedSequence([self._seed, *place]).generate_state(1)[0]
            order = permuted(np.arange(len(texts)), len(texts), int(drawn), 0) if texts else []
            self._buffer = [texts[index] for index in order]
        return self._buffer

    def _begin(self, before: dict[str, Any], taken: int) -> None:
        self._before = {key: value for key, value in before.items() if key not in ("taken", "epochs")}
        self._taken = taken
        self._buffer: list[str] | None = None
        self._epochs: list[int] = []  # of its documents, as they were read
