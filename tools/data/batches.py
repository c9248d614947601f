"""Rows to batches: endless ones to train on, with their position, and the fixed ones to evaluate on."""

from __future__ import annotations

import hashlib
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from act24.errors import Act24Error
from act24.recipes.schema import Data
from act24.tools.data.background import Background
from act24.tools.data.dealt import DealtRows
from act24.tools.data.documents import open_documents
from act24.tools.data.rows import PackedRows, PaddedRows, Rows, ShardRows
from act24.tools.data.shard import Split
from act24.tools.data.shards import TokenShards
from act24.tools.data.shuffled import ShuffledDocuments
from act24.tools.data.tokenizer import Tokenizer, check_ids, check_vocabulary, unused_vocabulary

IGNORED = -100  # a label that is no token; `torch.nn.functional.cross_entropy` skips it by default
PREFETCHED = 4  # batches
_LOOK_AGAIN = 0.2  # seconds
_HELD_OUT = {
    "position": "the end of each document, as there was too little text for whole ones",
    "hash": "whole documents",
    "given": "what the recipe names",
}


@dataclass(frozen=True)
class Batch:
    """B rows of S = `data.max_length` positions.

    Attributes:
        input_ids: int64 `[B, S]`; `pad_id` where a row is short.
        labels: int64 `[B, S]`, already shifted: `labels[b, s]` is the token after `input_ids[b, s]`, or -100
            where nothing is predicted.
        starts: int32 `[B, S]`, the position at which the document of each token begins; None where attention
            is to know nothing of documents.
        state: the position after this batch, JSON-able; empty for held-out batches.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    starts: torch.Tensor | None = None
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def pads(self) -> torch.Tensor | None:
        """Boolean `[B, S]`, what fills up short rows; None where every position is predicted from.

        A row's last token predicts nothing and is no padding: padding begins behind it.
        """
        nothing = self.labels == IGNORED
        if not nothing.any():
            return None
        return nothing & nothing.roll(1, dims=1).index_fill(1, torch.tensor([0]), False)


class TokenRows(Iterator[Batch]):
    """Endless training batches of `batch_size` rows, made in one background thread.

    Positions are by row, so a run may go on with another batch size, and `state_dict()` is that of the last
    batch handed out, never of one that was only prefetched. Use as a context manager, or `close()`, to stop
    the thread.

    Attributes:
        warnings: what is worth saying about the text, one line each.
        grown: numbers of files, at the saved position and now, where some were added since.

    Args:
        within_documents: batches say where documents begin (`Batch.starts`).

    Raises (while iterating):
        Act24Error: whatever is wrong with the source, or an id that a model of `vocab_size` tokens cannot
            take.
    """

    def __init__(
        self,
        rows: Rows,
        tokenizer: Tokenizer,
        max_length: int,
        batch_size: int,
        vocab_size: int,
        within_documents: bool = False,
    ) -> None:
        self._rows = rows
        self._end_of_text = tokenizer.eos_id if within_documents else None
        self._tokenizer = tokenizer
        self._max_length, self._batch_size, self._vocab_size = max_length, batch_size, vocab_size
        self._thread = Background("act24-data")
        self._end = weakref.finalize(self, self._thread.close)  # at the latest as the interpreter ends
        self._prefetched: deque[Future[Batch]] = deque()
        self.warnings = [*rows.warnings]
        self.grown: tuple[int, int] | None = None
        self._said: set[str] = set()
        self._state = self._state_of_rows()

    def start(self, count: int = 1) -> None:
        """Wait for the first `count` batches, which are handed out later: what is wrong with the source shows
        now."""
        self._prefetch()
        if failure := self.failure(count):
            raise failure

    def failure(self, count: int, stop: Callable[[], object] = lambda: False) -> BaseException | None:
        """Wait for the next `count` batches, which are handed out later; what keeps one from being made.

        Args:
            stop: whether to wait no longer, which is None; a network may be away for days.
        """
        while len(self._prefetched) < count:
            self._prefetched.append(self._thread.submit(self._make))
        for future in itertools.islice(self._prefetched, count):
            while not wait([future], _LOOK_AGAIN).done:
                if stop():
                    return None
            if (failure := future.exception()) is not None:
                return failure
        return None

    def __next__(self) -> Batch:
        batch = self._prefetch().result()  # an error stays at the front: a gap is before what follows it
        self._prefetched.popleft()
        self._state = batch.state
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch handed out, with the fingerprint of the data."""
        return self._state

    @property
    def epoch(self) -> int:
        """Of the text with which the last batch handed out ended; the first is 0."""
        return self._state["epoch"]

    def remarks(self) -> list[str]:
        """The warnings, and what was wrong with the text so far, one line each; what was not said before."""
        lines = [*self.warnings, *self._rows.tally.lines()]
        new = [line for line in lines if line not in self._said]
        self._said.update(new)
        return new

    def faults(self) -> dict[str, int]:
        """Counts of what was wrong with the text so far, to be logged."""
        return self._rows.tally.counts()

    def load_state_dict(self, state: dict[str, Any], grow: bool = False) -> None:
        """Continue with the row after that position: one of `state_dict`, or of `merged_state`.

        Args:
            grow: read files that were added since, from the next epoch on.

        Raises:
            Act24Error: the state is of other data, another tokenizer or row length.
        """
        for future in self._prefetched:
            future.cancel()
        self._prefetched.clear()
        # In the thread, and so after the batch that it may still be at.
        self._state = self._thread.submit(self._continue, state, grow).result()

    def _continue(self, state: dict[str, Any], grow: bool) -> dict[str, Any]:
        was, own, position = state["fingerprint"], self._rows.fingerprint, state["position"]
        changed = [
            _change(key, was.get(key), own.get(key))
            for key in sorted((was.keys() | own.keys()) - {"files"})
            if was.get(key) != own.get(key)
        ]
        try:
            if changed:
                raise Act24Error("; ".join(changed))
            self.warnings += self._rows.adopt(was, position, grow)
        except Act24Error as error:
            raise type(error)(f"the data are not those of the saved position: {error}") from error
        self._rows.load_state_dict(position)
        state = self._state_of_rows()
        before, now = _files(position), _files(state["position"])
        self.grown = (before, now) if before != now else None
        return state

    def close(self) -> None:
        """Stop the thread (`Background.close`)."""
        self._end()

    def __enter__(self) -> TokenRows:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _prefetch(self) -> Future[Batch]:
        while len(self._prefetched) <= PREFETCHED:
            self._prefetched.append(self._thread.submit(self._make))
        return self._prefetched[0]

    def _make(self) -> Batch:
        rows = list(itertools.islice(self._rows, self._batch_size))
        check_ids(rows, self._tokenizer, self._vocab_size)
        pad_id, state = self._tokenizer.pad_id, self._state_of_rows()
        return collate(rows, self._max_length, pad_id, self._end_of_text, state)

    def _state_of_rows(self) -> dict[str, Any]:
        return {
            "fingerprint": self._rows.fingerprint,
            "position": self._rows.state_dict(),
            "epoch": self._rows.epoch,
        }


def _files(position: dict[str, Any]) -> int:
    """How many files the streams of a position list; 0 where the source has none of its own."""
    listings = [stream["files"] for stream in position["streams"].values() if stream.get("files")]
    return max((len(listing["files"]) for listing in listings), default=0)


@dataclass(frozen=True)
class HeldoutRows:
    """The rows to evaluate on: the first of the held-out stream, the same for any batch size and number of
    processes.

    Attributes:
        rows: of this rank: every `world_size`-th.
        total_rows: of all ranks.
        tokens: predicted tokens, of all ranks.
        bytes: of UTF-8 text that those tokens stand for (`Tokenizer.token_bytes`).
        fingerprint: sha256 of all rows' tokens. Losses under different ones are not comparable.
        warnings: what is worth saying about the text, one line each.
        end_of_text: the token, where batches say where documents begin.
    """

    rows: list[np.ndarray]
    total_rows: int
    tokens: int
    bytes: int
    fingerprint: str
    max_length: int
    pad_id: int
    world_size: int
    warnings: tuple[str, ...] = ()
    end_of_text: int | None = None

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Batches of exactly `batch_size` rows, as many on every rank: rows without labels fill the last
        ones, so that shapes stay fixed and collectives match. Average over tokens, not over batches."""
        rows_a_rank = -(-self.total_rows // self.world_size)
        nothing = np.array([self.pad_id])
        for start in range(0, rows_a_rank, batch_size):
            rows = self.rows[start : start + batch_size]
            rows = rows + [nothing] * (batch_size - len(rows))
            yield collate(rows, self.max_length, self.pad_id, self.end_of_text)


def open_rows(
    data: Data,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    vocab_size: int,
    rank: int = 0,
    world_size: int = 1,
    streams: int | None = None,
) -> TokenRows:
    """Training batches of `data` for one rank.

    Args:
        streams: of a run that goes on: as many as it had processes when it began (`DealtRows`).
        batch_size: rows in a batch of this rank.
        vocab_size: of the model; see `check_vocabulary`.

    Raises:
        Act24Error: the source cannot be opened, or the tokenizer does not fit the model.
    """
    check_vocabulary(tokenizer, vocab_size)
    count = streams or world_size
    rows = DealtRows(lambda stream: _rows(data, tokenizer, "train", stream, count), count, rank, world_size)
    within = data.attention == "document"
    opened = TokenRows(rows, tokenizer, data.max_length, batch_size, vocab_size, within)
    opened.warnings += unused_vocabulary(tokenizer, vocab_size)
    return opened


def heldout_rows(
    data: Data, tokenizer: Tokenizer, tokens: int, *, vocab_size: int, rank: int = 0, world_size: int = 1
) -> HeldoutRows:
    """Whole held-out rows until they predict at least `tokens` tokens, or all there are. Read once, kept in
    memory.

    Raises:
        Act24Error: the source cannot be opened, holds nothing out, or the tokenizer does not fit the model.
    """
    check_vocabulary(tokenizer, vocab_size)
    mine, total, predicted, size = [], 0, 0, 0
    digest = hashlib.sha256()
    rows = _rows(data, tokenizer, "heldout", 0, 1)
    for row in rows:
        check_ids([row], tokenizer, vocab_size)
        if total % world_size == rank:
            mine.append(row)
        total += 1
        predicted += len(row) - 1
        size += int(tokenizer.token_bytes[row[1:]].sum())
        digest.update(row.astype(np.int64).tobytes())
        if predicted >= tokens:
            break
    warnings = [f"held-out text: {line}" for line in rows.tally.lines()]
    if predicted < tokens:
        warnings.append(
            f"the held-out text has {predicted:,} predicted tokens, fewer than eval.tokens = {tokens:,}: "
            "all of it is measured"
        )
    return HeldoutRows(
        mine,
        total,
        predicted,
        size,
        digest.hexdigest(),
        data.max_length,
        tokenizer.pad_id,
        world_size,
        tuple(warnings),
        tokenizer.eos_id if data.attention == "document" else None,
    )


def collate(
    rows: Sequence[np.ndarray],
    max_length: int,
    pad_id: int,
    end_of_text: int | None = None,
    state: dict[str, Any] | None = None,
) -> Batch:
    """Rows of up to `max_length` + 1 tokens to a batch, shifted and filled up on the right.

    Args:
        end_of_text: the token; None: nothing is said of documents.
    """
    input_ids = np.full((len(rows), max_length), pad_id, dtype=np.int64)
    labels = np.full((len(rows), max_length), IGNORED, dtype=np.int64)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = row[:max_length]
        labels[index, : len(row) - 1] = row[1:]
    starts = None if end_of_text is None else torch.from_numpy(document_starts(input_ids, end_of_text))
    return Batch(torch.from_numpy(input_ids), torch.from_numpy(labels), starts, state or {})


def document_starts(input_ids: np.ndarray, end_of_text: int) -> np.ndarray:
    """int32 `[B, S]`, where the document of each token begins: at the last end-of-text up to it, or where the
    row does.

    From the end-of-text in front of it a document's first token is predicted, and from nothing else: so the
    input is the first of the document behind it. As the target of the one before it, it is a label.
    """
    begins = np.where(input_ids == end_of_text, np.arange(input_ids.shape[1], dtype=np.int32), 0)
    return np.maximum.accumulate(begins, axis=1, dtype=np.int32)


def _change(key: str, was: Any, now: Any) -> str:
    if key == "heldout_files":
        return "the content of data.heldout_files is another"
    if key == "heldout_by":
        return (
            f"it held out {_HELD_OUT.get(was, was)}, and would hold out {_HELD_OUT.get(now, now)} now, and "
            "train on what it was evaluated on: go on with data.train_files and data.heldout_files as they "
            "were, or begin another run with model.pretrained = the checkpoint"
        )
    return f"{key} was {was!r} and is {now!r}"


def _rows(data: Data, tokenizer: Tokenizer, split: Split, rank: int, world_size: int) -> Rows:
    training = split == "train"
    seed = data.shuffle_seed if training else None
    if data.source == "shards":
        shards = TokenShards(Path(str(data.shards)), split)
        return ShardRows(
            shards,
            data.rows,
            data.max_length,
            shuffle_seed=seed,
            endless=training,
            rank=rank,
            world_size=world_size,
        )
    documents = open_documents(
        data, split, shuffle_seed=seed, endless=training, rank=rank, world_size=world_size
    )
    if training and data.shuffle_buffer:
        documents = ShuffledDocuments(documents, data.shuffle_buffer, data.shuffle_seed)
    return (PackedRows if data.rows == "packed" else PaddedRows)(documents, tokenizer, data.max_length)
