"""Text to token shards (`act24 data prepare`): tokenise once, train many times, shuffle the whole corpus."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from act24.errors import Act24Error
from act24.recipes.schema import Data
from act24.tools.data.documents import Split, open_documents
from act24.tools.data.files import KNOWN, suffix
from act24.tools.data.rows import encoded
from act24.tools.data.shards import FORMAT
from act24.tools.data.tokenizer import Tokenizer

SHARD_TOKENS = 2**28  # after which a new shard begins: half a gigabyte in uint16

Progress = Callable[[Split, int, int], None]
"""`progress(split, documents, tokens)`: what is written so far."""


def prepare_shards(
    data: Data,
    tokenizer: Tokenizer,
    out: Path,
    *,
    max_tokens: int | None = None,
    max_heldout_tokens: int | None = None,
    progress: Progress = lambda split, documents, tokens: None,
) -> dict[str, Any]:
    """Write both splits of `data` as token shards into the new folder `out`, in the format that `shards.py`
    describes.

    Training documents are written in the order of epoch 0, held-out ones in their own. The folder is whole or
    not there: it is written under another name, synced and renamed.

    Args:
        max_tokens, max_heldout_tokens: stop each split after the document that reaches this; None:
            everything.

    Returns:
        The content of `index.json`.

    Raises:
        Act24Error: `out` is not empty or cannot be written, or something is wrong with the source.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise Act24Error(f"{out} exists already")
    folder = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    splits = {}
    try:
        folder.mkdir(parents=True)
        # The held-out split comes first: it is small, and a source that lacks one should say so now.
        limits: list[tuple[Split, int | None]] = [("heldout", max_heldout_tokens), ("train", max_tokens)]
        for split, limit in limits:
            splits[split] = _write_split(data, tokenizer, folder, split, dtype, limit, progress)
        with _HashedFile(folder / "tokenizer.json") as file:
            file.write(tokenizer.to_json().encode())
        index = {
            "format": FORMAT,
            "dtype": dtype.str,
            "tokenizer": {
                "name": tokenizer.name,
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "eos_id": tokenizer.eos_id,
                "file": file.facts(),
            },
            "splits": splits,
        }
        with _HashedFile(folder / "index.json") as file:
            file.write(json.dumps(index, indent=1).encode())
        os.replace(folder, out)
    except OSError as error:
        raise Act24Error(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return index


def data_from_argument(source: str) -> Data:
    """The data that one word on the command line means: "builtin"; a file, folder or glob; or a data set of
    the Hub, `OWNER/NAME` or `OWNER/NAME:SUBSET`. What exists here goes before what may exist on the Hub.

    Raises:
        Act24Error: it is none of these.
    """
    if source == "builtin":
        return Data(source="builtin")
    if glob.has_magic(source) or Path(source).expanduser().exists() or suffix(Path(source)) in KNOWN:
        return Data(source="files", train_files=(source,))
    if match := re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?", source):
        dataset, subset = match.groups()
        default = Data().subset if dataset == Data().dataset else ""
        return Data(source="hf", dataset=dataset, subset=subset or default)
    raise Act24Error(
        f"no data source {source!r}: expected 'builtin', a file, folder or glob, "
        "or a data set of the Hub as OWNER/NAME[:SUBSET]"
    )


def _write_split(
    data: Data,
    tokenizer: Tokenizer,
    folder: Path,
    split: Split,
    dtype: np.dtype,
    limit: int | None,
    progress: Progress,
) -> dict[str, Any]:
    """Write `split`; what `index.json` says of it."""
    documents = open_documents(data, split, shuffle_seed=data.shuffle_seed if split == "train" else None)
    shards: list[_HashedFile] = []
    tokens, count = 1, 0
    with ExitStack() as stack:
        begins = stack.enter_context(_HashedFile(folder / f"{split}-documents.bin"))
        begins.write(np.uint64(tokens).astype("<u8").tobytes())
        for _, document in encoded(documents, tokenizer):
            if not shards or shards[-1].bytes >= SHARD_TOKENS * dtype.itemsize:
                shards.append(stack.enter_context(_HashedFile(folder / f"{split}-{len(shards):05d}.bin")))
                if len(shards) == 1:
                    shards[0].write(np.array([tokenizer.eos_id], dtype).tobytes())
            shards[-1].write(document.astype(dtype).tobytes())
            tokens, count = tokens + len(document), count + 1
            begins.write(np.uint64(tokens).astype("<u8").tobytes())
            progress(split, count, tokens)
            if limit is not None and tokens > limit:
                break
    return {
        "documents_written_from": documents.fingerprint,
        "tokens": tokens,
        "documents": count,
        "shards": {file.path.name: file.facts() for file in shards},
        "boundaries": {begins.path.name: begins.facts()},
    }


class _HashedFile:
    """A file that knows its size and sha256, and is on the disk when it is closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self._hash = hashlib.sha256()
        self._file = path.open("wb")

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.bytes += len(data)

    def facts(self) -> dict[str, Any]:
        return {"bytes": self.bytes, "sha256": self._hash.hexdigest()}

    def __enter__(self) -> _HashedFile:
        return self

    def __exit__(self, *exception: object) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
