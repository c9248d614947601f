"""What a saved position may be: its numbers may have been written by somebody else.

The ranges that no text has to be known for are checked here, before any of it is opened. Whether a shard has
so many records, or a document so many tokens, shows when it is read: `PositionError` there.
"""

from __future__ import annotations

import reprlib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from act24.errors import Act24Error

Count = Annotated[int, Field(ge=0, lt=2**63)]


class PositionError(Act24Error):
    """A saved position that the text does not have."""


class Saved(BaseModel):
    """Part of a file that a run wrote, its types exact: no count is a text, a fraction or a truth value."""

    model_config = ConfigDict(strict=True, frozen=True)


class DocumentPosition(Saved):
    """Of `Documents`, and of `ShuffledDocuments`, which adds `taken` and `epochs`."""

    epoch: Count
    shard: Count
    record: Count
    passed: Count
    tally: dict[str, Count] = {}
    taken: Count = 0
    epochs: Annotated[list[Count], Field(min_length=2, max_length=2)] | None = None


class _OfText(Saved):
    """Of `DocumentRows`; those of an older act24 have no `epochs`, which is said later."""

    document: DocumentPosition
    offset: Count
    epochs: Annotated[list[Count], Field(min_length=2, max_length=2)] | None = None

    @model_validator(mode="after")
    def _ascends(self) -> _OfText:
        if self.epochs and not self.document.epoch <= self.epochs[0] <= self.epochs[1]:
            raise ValueError(f"epochs {self.epochs} for a document of epoch {self.document.epoch}")
        return self


class _OfShards(Saved):
    """Of `ShardRows`."""

    epoch: Count
    row: Count


def _kind(position: Any) -> Literal["<text>", "<shards>"]:
    return "<text>" if isinstance(position, dict) and "document" in position else "<shards>"


class _Stream(Saved):
    rows: Count
    position: Annotated[
        Annotated[_OfText, Tag("<text>")] | Annotated[_OfShards, Tag("<shards>")], Discriminator(_kind)
    ]


class _Rows(Saved):
    row: Count
    streams: dict[str, _Stream]


class _Fingerprint(Saved):
    streams: Annotated[int, Field(gt=0, lt=2**31)]


class _Position(Saved):
    """Of `TokenRows`."""

    fingerprint: _Fingerprint
    position: _Rows
    epoch: Count = 0


def check_position(state: Any) -> None:
    """
    Raises:
        ValueError: it is no state of `TokenRows`, or a number of it is out of range; names the field.
    """
    check_saved(_Position, state)


def check_saved(model: type[Saved], value: Any) -> None:
    """
    Raises:
        ValueError: `value` is no such thing; one line that names the first field that is wrong.
    """
    try:
        model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(key) for key in first["loc"] if key not in ("<text>", "<shards>")) or "it"
        found = "" if first["type"] == "missing" else f", found {reprlib.repr(first['input'])}"
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{where}: {message[:1].lower()}{message[1:]}{found}") from None
