"""Text or token shards to rows of tokens, for the two protocols: packed and padded.

A row is a 1-D int array of at most `max_length` + 1 tokens: each token but the last is an input, each but the
first is predicted from those before it. What is shorter is filled up when rows become a batch.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from act24.errors import Act24Error
from act24.tools.data.documents import Documents
from act24.tools.data.permutation import permuted
from act24.tools.data.position import PositionError
from act24.tools.data.shards import TokenShards
from act24.tools.data.shuffled import ShuffledDocuments
from act24.tools.data.tally import Tally
from act24.tools.data.tokenizer import Tokenizer
from act24.words import counted

GROUP_DOCUMENTS = 64  # encoded at once, so that all cores have work …
GROUP_CHARACTERS = 1_000_000  # … but long documents do not pile up
Texts = Documents | ShuffledDocuments
BLOCK = 4096  # places of a shuffled order computed at once


class Rows(Iterator[np.ndarray], ABC):
    """Rows with a position. `fingerprint` identifies them: a position means nothing under another one.

    Attributes:
        tally: counts what is wrong with the text.
        warnings: what is worth saying about it before it is read.
    """

    tally: Tally
    warnings: Sequence[str] = ()

    @property
    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What identifies text, tokens and order, JSON-able; "files" only for `adopt` to compare."""

    @property
    @abstractmethod
    def epoch(self) -> int:
        """Of the text with which the last row ended; the first is 0."""

    @abstractmethod
    def adopt(self, fingerprint: dict[str, Any], position: dict[str, Any], grow: bool) -> list[str]:
        """See `Documents.adopt`; `position` is that of the run."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Where the next row begins; JSON-able."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go there. The state must come from rows of the same fingerprint."""


def encoded(
    documents: Texts, tokenizer: Tokenizer, late: bool = False
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Each document's tokens, end-of-text added, with the position of `documents` after it.

    Args:
        late: raise what is wrong with the text behind all documents that stand before it. Otherwise it shows
            a group ahead, at the start of a run rather than soon after.
    """
    failure: Act24Error | None = None
    while failure is None:
        positions, texts, characters = [], [], 0
        while len(texts) < GROUP_DOCUMENTS and characters < GROUP_CHARACTERS:
            try:
                text = next(documents, None)
            except Act24Error as error:
                if not late:
                    raise
                failure = error
                break
            if text is None:
                break
            positions.append(documents.state_dict())
            texts.append(text)
            characters += len(text)
        if not texts and failure is None:
            return
        for position, tokens in zip(positions, tokenizer.encode_batch(texts), strict=True):
            yield position, np.append(tokens, np.int32(tokenizer.eos_id))
    raise failure


class DocumentRows(Rows):
    """Rows made from text as it is read.

    The position is the one before the document in which the next row begins, and how many of its tokens are
    done. Resuming therefore encodes that one document again, and a state stays a few integers however long
    documents are. That document may be the first of an epoch after the position's, so `Documents.epochs` of
    the text that was handed out stand beside it.
    """

    layout: str

    def __init__(self, documents: Texts, tokenizer: Tokenizer, max_length: int) -> None:
        self.tally = documents.tally
        self.warnings = list(_warnings(documents))
        self._documents = documents
        self._tokenizer = tokenizer
        self._max_length = max_length
        beginning = documents.state_dict()
        epochs = documents.epochs(beginning)
        self.load_state_dict({"document": beginning, "offset": 0, "epochs": epochs})

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {
            **self._documents.fingerprint,
            "tokenizer": self._tokenizer.fingerprint[:16],
            "rows": self.layout,
            "max_length": self._max_length,
        }

    @property
    def epoch(self) -> int:
        return self._epochs[0]

    def adopt(self, fingerprint: dict[str, Any], position: dict[str, Any], grow: bool) -> list[str]:
        if "epochs" not in position:
            raise Act24Error("its position is not one that this act24 reads: it does not say its epoch")
        return self._documents.adopt(fingerprint, position["epochs"][1], grow)

    def state_dict(self) -> dict[str, Any]:
        return {"document": self._before, "offset": self._offset, "epochs": [*self._epochs]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._documents.load_state_dict(state["document"])
        self._encoded = encoded(self._documents, self._tokenizer)
        self._tokens: np.ndarray | None = None  # of the document at hand
        self._before = self._after = state["document"]  # the positions around it
        self._offset: int = state["offset"]
        last, begun = map(operator.index, state["epochs"])
        self._epochs: tuple[int, int] = last, begun

    def _document(self) -> np.ndarray | None:
        """The tokens of the document at hand, or else of the next; None after the last."""
        if self._tokens is None:
            self._after, self._tokens = next(self._encoded, (self._after, None))
            if self._tokens is not None:
                if (size := len(self._tokens)) <= self._offset:
                    raise PositionError(
                        f"offset {self._offset} in a document of {size} tokens is no saved position"
                    )
                self._epochs = self._documents.epochs(self._after)
        return self._tokens

    def _drop_document(self) -> None:
        self._tokens, self._before, self._offset = None, self._after, 0


def _warnings(documents: Texts) -> Iterator[str]:
    given = documents.fingerprint
    if given.get("heldout_by") == "position" and given["split"] == "train":
        yield (
            "there are too few documents to hold whole ones out: the last twentieth of each is held out; "
            "data.heldout_files names others"
        )
    if documents.only == "document" and given["shuffle_seed"] is not None:
        yield (
            "one document cannot be shuffled: each epoch reads it from its beginning to its end; "
            "`act24 data prepare` makes token shards, whose rows are shuffled"
        )
    if documents.only == "file" and given["shuffle_seed"] is not None and "shuffle_buffer" not in given:
        yield (
            "one file cannot be shuffled: each epoch has its documents in their order; "
            "data.shuffle_buffer mixes them, `act24 data prepare` makes token shards, which are shuffled"
        )


class PackedRows(DocumentRows):
    """Documents one after another, cut every `max_length` tokens.

    A row begins with the token before the ones it predicts (end-of-text at the very start), so every token,
    the end-of-text tokens included, is predicted exactly once. Only the last row of a single pass may be
    short.

    Raises (while iterating):
        Act24Error: an endless source has fewer tokens than one row. (One rank's share of an epoch may: it
            fills the row from the next.)
    """

    layout = "packed"

    def __next__(self) -> np.ndarray:
        pieces: list[np.ndarray] = []
        missing = self._max_length
        from_start = (
            self._before["epoch"] == self._before["record"] == self._before["passed"] == self._offset == 0
        )
        while missing and (tokens := self._document()) is not None:
            if from_start and self._after["epoch"] > 0 and self.fingerprint["world_size"] == 1:
                raise Act24Error(too_short(self._max_length - missing, self._max_length))
            if not pieces:
                before = tokens[self._offset - 1] if self._offset else self._tokenizer.eos_id
                pieces.append(np.array([before], dtype=np.int32))
            pieces.append(tokens[self._offset : self._offset + missing])
            missing -= len(pieces[-1])
            self._offset += len(pieces[-1])
            if self._offset == len(tokens):
                self._drop_document()
        if not pieces:
            raise StopIteration
        return np.concatenate(pieces)


class PaddedRows(DocumentRows):
    """One document a row, cut to `max_length` tokens of which the last is end-of-text: GaLore's protocol.

    The rest of a long document is dropped. (T5's tokenizer, as GaLore's scripts call it, ends truncated
    documents with "</s>" too. Those scripts shuffle documents in a buffer of 1,000 besides; here only shards
    are shuffled.)
    """

    layout = "padded"

    def __next__(self) -> np.ndarray:
        tokens = self._document()
        if tokens is None:
            raise StopIteration
        self._drop_document()
        return truncated(tokens, self._max_length)


class ShardRows(Rows):
    """The same rows from token shards, where the whole corpus can be shuffled: each epoch visits all packed
    rows, or all documents, in an order of its own. Rank r takes every `world_size`-th place of it.

    Args:
        layout: "packed" or "padded".
        shuffle_seed: None keeps the order of the shards.
        endless: start a new epoch after the last row; otherwise stop there.

    Raises:
        Act24Error: fewer tokens than one row (endless), or fewer rows than ranks.
    """

    def __init__(
        self,
        shards: TokenShards,
        layout: str,
        max_length: int,
        *,
        shuffle_seed: int | None = None,
        endless: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._fingerprint = {
            **shards.fingerprint,
            "rows": layout,
            "max_length": max_length,
            "shuffle_seed": shuffle_seed,
            "rank": rank,
            "world_size": world_size,
        }
        self.tally = Tally()  # of text that was read when the shards were made
        self.warnings = shards.remarks
        self._shards = shards
        self._layout, self._max_length = layout, max_length
        self._count = shards.documents if layout == "padded" else -(-(shards.tokens - 1) // max_length)
        self._shuffle_seed, self._endless = shuffle_seed, endless
        self._rank, self._world_size = rank, world_size
        if endless and layout == "packed" and shards.tokens <= max_length:
            raise Act24Error(too_short(shards.tokens - 1, max_length))
        if endless and self._count < world_size:
            rows = counted(self._count, "row")
            raise Act24Error(f"the training text has {rows} for {world_size} processes")
        self.load_state_dict({"epoch": 0, "row": 0})

    @property
    def fingerprint(self) -> dict[str, Any]:
        return self._fingerprint

    @property
    def epoch(self) -> int:
        return self._epoch

    def adopt(self, fingerprint: dict[str, Any], position: dict[str, Any], grow: bool) -> list[str]:
        if grow:
            raise Act24Error('--data grow is for data.source = "files"')
        return []

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "row": self._row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._epoch, self._row = state["epoch"], state["row"]
        if self._row > max(0, -(-(self._count - self._rank) // self._world_size)):
            raise PositionError(f"row {self._row} of {self._count} rows an epoch is no saved position")
        self._block, self._places = -1, np.empty(0, dtype=np.int64)

    def __next__(self) -> np.ndarray:
        place = self._row * self._world_size + self._rank
        if place >= self._count:
            if not self._endless:
                raise StopIteration
            self.load_state_dict({"epoch": self._epoch + 1, "row": 0})
            place = self._rank
        self._row += 1
        index = self._at(place)
        if self._layout == "padded":
            return truncated(self._shards.document(index), self._max_length)
        start = index * self._max_length
        return self._shards.read(start, start + self._max_length + 1)

    def _at(self, place: int) -> int:
        if self._shuffle_seed is None:
            return place
        block, offset = divmod(place, BLOCK)
        if block != self._block:
            places = np.arange(block * BLOCK, min((block + 1) * BLOCK, self._count))
            self._block, self._places = block, permuted(places, self._count, self._shuffle_seed, self._epoch)
        return int(self._places[offset])


def truncated(tokens: np.ndarray, max_length: int) -> np.ndarray:
    """A document that ends with end-of-text, cut to at most `max_length` tokens that still do."""
    return tokens if len(tokens) <= max_length else np.append(tokens[: max_length - 1], tokens[-1])


def too_short(tokens: int, max_length: int) -> str:
    """The message for a corpus that does not fill one row."""
    there = counted(tokens, "token")
    return f"the text has {there}, fewer than one row of {max_length} (data.max_length, or --seqlen)"
