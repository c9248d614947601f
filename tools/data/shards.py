"""Token shards: text that was tokenised once, read by memory map.

A folder holds, for each split, the stream of its tokens and where its documents begin:

    index.json               what follows, with the size and sha256 of every file
    tokenizer.json           the tokenizer
    train-00000.bin …        tokens, uint16 (uint32 from 65,537 ids on); a document lies in one shard
    train-documents.bin      uint64: where in the stream each document begins, and where the last one ends
    heldout-00000.bin …      likewise

The stream begins with one end-of-text token, and every document ends with one. So row k of L tokens is
`stream[k * L : (k + 1) * L + 1]`, exactly what packing the text itself would give.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from act24.errors import Act24Error, reading
from act24.tools.files import plain_text

FORMAT = "act24 token shards 1"
BOUNDARY_BYTES = 8
PIECE = 2**20  # boundaries compared at once


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class File(_Part):
    """A file of the folder as it was written."""

    bytes: int = Field(gt=0)
    sha256: str


class Written(_Part):
    """The tokenizer of a folder."""

    name: str
    fingerprint: str
    vocab_size: int = Field(gt=0)
    eos_id: int = Field(ge=0)
    end_of_text: str | None = None
    file: File


class SplitFiles(_Part):
    """One split: how much there is, and the files by name."""

    tokens: int
    documents: int
    shards: dict[str, File]
    boundaries: dict[str, File]
    remarks: list[str] = []


class Index(_Part):
    """`index.json`. A dtype or a split that its files cannot have is an error: they would open, and be
    nonsense, or train on what is held out.

    Attributes:
        dtype: of tokens, as numpy writes it.
        hash: of the whole file.
    """

    dtype: str
    tokenizer: Written
    splits: dict[str, SplitFiles]
    hash: str

    @model_validator(mode="after")
    def _fits_together(self) -> Index:
        expected = token_dtype(self.tokenizer.vocab_size)
        if self.dtype != expected:
            raise ValueError(
                f"dtype {self.dtype!r} for {self.tokenizer.vocab_size} ids, which take {expected!r}"
            )
        if sorted(self.splits) != ["heldout", "train"]:
            raise ValueError(f"splits {sorted(self.splits)}, expected heldout and train")
        for name, split in self.splits.items():
            if list(split.boundaries) != [f"{name}-documents.bin"] or list(split.shards) != [
                f"{name}-{index:05d}.bin" for index in range(max(len(split.shards), 1))
            ]:
                raise ValueError(f"the files of split {name!r} are {[*split.shards, *split.boundaries]}")
            sizes = (
                sum(file.bytes for file in split.shards.values()),
                *(file.bytes for file in split.boundaries.values()),
            )
            if sizes != (split.tokens * np.dtype(expected).itemsize, (split.documents + 1) * BOUNDARY_BYTES):
                raise ValueError(f"the files of split {name!r} do not hold its tokens and documents")
        return self


def token_dtype(vocab_size: int) -> str:
    """What tokens are stored in: two bytes where they do."""
    return "<u2" if vocab_size <= 2**16 else "<u4"


class TokenShards:
    """One split of such a folder, as if it were one array of tokens.

    Opening it compares the size and hash of each file: about a second for every 1 to 2 GB, once a run.

    Attributes:
        fingerprint: identifies folder content and split.
        tokens: how many, the first end-of-text included.
        documents: how many.
        remarks: what was wrong with the text that they were made of.

    Raises:
        Act24Error: no such folder, or a file that is missing, cut short or altered.
    """

    def __init__(self, folder: Path, split: str) -> None:
        index = read_index(folder)
        part = index.splits[split]
        self.fingerprint = {"source": "shards", "split": split, "index": index.hash}
        self._shards = [
            np.memmap(verified(folder, name, file), index.dtype, "r") for name, file in part.shards.items()
        ]
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        ((name, file),) = part.boundaries.items()
        self._documents = np.memmap(verified(folder, name, file), "<u8", "r")
        self.remarks = [f"the text of {folder}: {line}" for line in part.remarks]
        self.tokens = int(self._ends[-1])
        self.documents = len(self._documents) - 1
        ends = (self._documents[0], self._documents[-1])
        if ends != (1, self.tokens) or not _ascends(self._documents):
            raise Act24Error(f"{folder / name} does not fit the tokens beside it; prepare the data again")

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop` of the stream, or to its end."""
        stop = min(stop, self.tokens)
        pieces = []
        for shard in range(int(np.searchsorted(self._ends, start, side="right")), len(self._shards)):
            offset = int(self._ends[shard]) - len(self._shards[shard])
            pieces.append(self._shards[shard][max(start - offset, 0) : stop - offset])
            if stop <= self._ends[shard]:
                break
        return np.concatenate(pieces)

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, end-of-text included."""
        return self.read(int(self._documents[index]), int(self._documents[index + 1]))


def _ascends(boundaries: np.ndarray) -> bool:
    """Whether each document has a token; then, with the ends right, all of them lie within the stream. C4's
    365 million take some tenths of a second."""
    return all(
        bool((piece[1:] > piece[:-1]).all())
        for start in range(0, len(boundaries), PIECE)
        if len(piece := boundaries[start : start + PIECE + 1]) > 1
    )


def read_index(folder: Path) -> Index:
    """The content of `index.json`, checked: what it says of itself and of the files fits together.

    Raises:
        Act24Error: it is missing, no JSON, of another format, or was altered.
    """
    path = folder / "index.json"
    with reading(f"{folder} is not a folder written by `act24 data prepare`"):
        index = json.loads(plain_text(path))
    found = index.get("format") if isinstance(index, dict) else None
    if found != FORMAT:
        raise Act24Error(f"{path}: format {found!r}, expected {FORMAT!r}; prepare the data again")
    try:
        return Index.model_validate({**index, "hash": _hash_of_json(index)})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the index"
        raise Act24Error(
            f"{path} was altered: {where}: {first['msg'].removeprefix('Value error, ')}; "
            "prepare the data again"
        ) from error


def verified(folder: Path, name: str, file: File) -> Path:
    """The path of a file of the folder, with the size and hash that the index says.

    Raises:
        Act24Error: it is not so.
    """
    path = folder / name
    with reading(f"cannot read {path}"):
        if not path.is_file() or path.stat().st_size != file.bytes or _sha256(path) != file.sha256:
            raise Act24Error(f"{path} is missing or corrupt: not the file that `act24 data prepare` wrote")
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
