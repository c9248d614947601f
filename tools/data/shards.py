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

from act24.errors import Act24Error

FORMAT = "act24 token shards 1"


class TokenShards:
    """One split of such a folder, as if it were one array of tokens.

    Opening it compares the size and hash of each file: about a second for every 1 to 2 GB, once a run.

    Attributes:
        fingerprint: identifies folder content and split.
        tokens: how many, the first end-of-text included.
        documents: how many.

    Raises:
        Act24Error: no such folder, or a file that is missing, cut short or altered.
    """

    def __init__(self, folder: Path, split: str) -> None:
        index = read_index(folder)
        part = index["splits"][split]
        self.fingerprint = {"source": "shards", "split": split, "files": _hash_of_json(index)}
        self._shards = [
            np.memmap(verified(folder, name, file), index["dtype"], "r")
            for name, file in part["shards"].items()
        ]
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        (name, file), *_ = part["boundaries"].items()
        self._documents = np.memmap(verified(folder, name, file), "<u8", "r")
        self.tokens = int(self._ends[-1])
        self.documents = len(self._documents) - 1

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


def read_index(folder: Path) -> dict[str, Any]:
    """The content of `index.json`.

    Raises:
        Act24Error: it is missing, no JSON, or of another format.
    """
    path = folder / "index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Act24Error(f"{folder} is not a folder written by `act24 data prepare`: {error}") from error
    found = index.get("format") if isinstance(index, dict) else None
    if found != FORMAT:
        raise Act24Error(f"{path}: format {found!r}, expected {FORMAT!r}; prepare the data again")
    return index


def verified(folder: Path, name: str, file: dict[str, Any]) -> Path:
    """The path of a file of the folder, with the size and hash that the index says.

    Raises:
        Act24Error: it is not so.
    """
    path = folder / name
    if not path.is_file() or path.stat().st_size != file["bytes"] or _sha256(path) != file["sha256"]:
        raise Act24Error(f"{path} is missing or corrupt: not the file that `act24 data prepare` wrote")
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
