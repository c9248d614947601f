"""Text to token shards (`act24 data prepare`): tokenise once, train many times, shuffle the whole corpus.

What is written grows in `OUT.partial` and is renamed when it is whole. A journal in there says up to where
everything is on the disk: every `JOURNAL_TOKENS`, behind each split, and where the source fails or the user
interrupts. The same command goes on from there, after a kill or a full disk as well. A failure before the
first such point leaves nothing; a kill there leaves files that the same command says it writes anew. The
journal goes only once the folder has its name: until then there is something to go on from.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from pydantic import ConfigDict

from act24.errors import Act24Error, reading
from act24.recipes.schema import Data
from act24.tools.data.documents import open_documents
from act24.tools.data.files import KNOWN, suffix
from act24.tools.data.hashed_file import HashedFile
from act24.tools.data.hub import pinned
from act24.tools.data.position import Count, DocumentPosition, Saved, check_saved
from act24.tools.data.rows import encoded
from act24.tools.data.shard import Split
from act24.tools.data.shards import FORMAT, token_dtype
from act24.tools.data.tokenizer import Tokenizer
from act24.tools.files import plain_text, whole_file

SHARD_TOKENS = 2**28  # after which a new shard begins: half a gigabyte in uint16
JOURNAL_TOKENS = 2**24  # lost at most by a kill: well below a minute's work
JOURNAL = "journal.json"
LOCK = "lock"
_WRITTEN = re.compile(
    r"lock|journal\.json(\.tmp-\w+)?|tokenizer\.json|index\.json|(train|heldout)-(\d{5,}|documents)\.bin|\.nfs.*"
)

logger = logging.getLogger("act24")

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
    describes, or finish what an earlier call with the same arguments began.

    Training documents are written in the order of epoch 0, held-out ones in their own. The folder is whole or
    not there.

    Args:
        max_tokens, max_heldout_tokens: stop each split after the document that reaches this; None:
            everything.

    Returns:
        The content of `index.json`.

    Raises:
        Act24Error: `out` cannot be made (`refuse_taken`) or written, something is wrong with the source, or
            what was begun is of another source or tokenizer.
    """
    refuse_taken(out)
    with _partial(_partial_of(out)) as folder:
        journal = _Journal(folder)
        # The held-out split comes first: it is small, and a source that lacks one should say so now.
        limits: list[tuple[Split, int | None]] = [("heldout", max_heldout_tokens), ("train", max_tokens)]
        splits: dict[str, Any] = {
            split: _Writing(data, tokenizer, folder, split, limit, journal).finish(progress)
            for split, limit in limits
        }
        with HashedFile(folder / "tokenizer.json") as file:
            file.write(tokenizer.to_json().encode())
        index = {
            "format": FORMAT,
            "dtype": token_dtype(tokenizer.vocab_size),
            "tokenizer": {
                "name": tokenizer.name,
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "eos_id": tokenizer.eos_id,
                "end_of_text": tokenizer.token(tokenizer.eos_id),
                "file": file.facts(),
            },
            "splits": splits,
        }
        with HashedFile(folder / "index.json") as file:
            file.write(json.dumps(index, indent=1).encode())
        try:
            os.replace(folder, out)
        except OSError as error:
            raise Act24Error(f"{folder} is whole, but cannot become {out}: {error.strerror}") from error
        _remove_notes(out)
    return index


def refuse_taken(out: Path) -> None:
    """Find out before the work, which may take days, whether a new folder may have that name in the end.

    Raises:
        Act24Error: it is taken, no name, or something onto which no folder can be renamed.
    """
    if out.name in ("", ".."):
        raise Act24Error(f"'{out}' is no name for a new folder: say what it is to be called")
    if out.is_symlink():
        raise Act24Error(f"{out} is a link to {os.readlink(out)}: name the folder itself")
    if os.path.ismount(out):
        raise Act24Error(f"{out} is where a disk is mounted: name a folder on it")
    with reading(f"cannot write {out}"):
        if out.is_dir() and (out / LOCK).is_file() and not _foreign(out):
            _remove_notes(out)  # a kill came just behind the last rename
        if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
            raise Act24Error(f"{out} exists already")


def _remove_notes(folder: Path) -> None:
    """What only an unfinished folder has; the lock last, by which a kill in between is known."""
    for path in folder.glob(f"{JOURNAL}*"):  # what a kill left of one that was being written, too
        path.unlink(missing_ok=True)
    (folder / LOCK).unlink(missing_ok=True)


def data_from_argument(source: str) -> Data:
    """The data that one word on the command line means: "builtin"; a file, folder or glob; or a data set of
    the Hub, `OWNER/NAME` or `OWNER/NAME:SUBSET`. What exists here goes before what may exist on the Hub.

    Raises:
        Act24Error: it is none of these.
    """
    if source == "builtin":
        return Data(source="builtin")
    with reading(
        f"cannot look for {source!r}", RuntimeError
    ):  # "~" and no such user; a path that is too long
        local = glob.has_magic(source) or Path(source).expanduser().exists() or suffix(Path(source)) in KNOWN
    if local:
        return Data(source="files", train_files=(source,))
    if match := re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?", source):
        dataset, subset = match.groups()
        default = Data().subset if dataset == Data().dataset else ""
        return Data(source="hf", dataset=dataset, subset=subset or default)
    raise Act24Error(
        f"no data source {source!r}: expected 'builtin', a file, folder or glob, "
        "or a data set of the Hub as OWNER/NAME[:SUBSET]"
    )


def pinned_for(data: Data, out: Path) -> Data:
    """The data with the commit of the Hub's data set that an earlier call began with, or else the newest.

    Raises:
        Act24Error: the Hub cannot be reached.
    """
    if data.source == "hf" and data.revision is None and (_partial_of(out) / JOURNAL).exists():
        data = data.model_copy(update={"revision": _Journal(_partial_of(out)).revision()})
    return pinned(data)


def _partial_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


@contextmanager
def _partial(folder: Path) -> Iterator[Path]:
    """The folder in which a call works, alone; gone after a failure that left nothing to go on from.

    Raises:
        Act24Error: another process works in it, or it is none of these folders.
    """
    lock = filelock.FileLock(folder / LOCK)
    try:
        if foreign := _foreign(folder):
            raise Act24Error(
                f"{folder} is in the way: `act24 data prepare` did not write {foreign[0]}; move it away"
            )
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise Act24Error(f"another process is writing {folder}") from None
    except OSError as error:
        raise Act24Error(f"cannot write {folder}: {error}") from error
    try:
        yield folder
    except BaseException as error:
        if not (folder / JOURNAL).exists() and not _foreign(folder):
            shutil.rmtree(folder, ignore_errors=True)
        if not isinstance(error, Act24Error | OSError):
            raise
        failed = str(error) if isinstance(error, Act24Error) else f"cannot write {folder}: {error}"
        if folder.exists():
            failed += f". What is written stays in {folder}: the same command goes on from there"
        raise Act24Error(failed) from error
    finally:
        lock.release()


def _foreign(folder: Path) -> list[str]:
    """What somebody else put there; everything, where no call has left its lock. Raises OSError."""
    entries = sorted(folder.iterdir()) if folder.exists() else []
    locked = (folder / LOCK).is_file()
    return [
        path.name
        for path in entries
        if not (locked and _WRITTEN.fullmatch(path.name)) or path.is_symlink() or path.is_dir()
    ]


class _Facts(Saved):
    bytes: Count
    sha256: str


class _Place(Saved):
    position: DocumentPosition
    tokens: Count
    documents: Count
    shards: dict[str, _Facts]
    shard_bytes: Count
    boundary_bytes: Count


class _Entry(Saved):
    request: dict[str, Any]
    place: _Place


class _Entries(Saved):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    heldout: _Entry | None = None
    train: _Entry | None = None


class _Journal:
    """Up to where the folder is on the disk: by split the fingerprint of its text, and the place."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / JOURNAL
        self._splits: dict[str, Any] = {}
        self._unwritten = 0
        if self._path.exists():
            with reading(f"cannot go on from {self._path}; remove {folder} to begin anew"):
                self._splits = json.loads(plain_text(self._path))
                check_saved(_Entries, self._splits)

    def revision(self) -> str | None:
        """The commit of the Hub's data set that it was begun with."""
        return next((split["request"].get("revision") for split in self._splits.values()), None)

    def place(self, split: Split, request: dict[str, Any]) -> dict[str, Any] | None:
        """Where to go on in a split, or None.

        Raises:
            Act24Error: it was begun with another text or tokenizer.
        """
        if split not in self._splits:
            return None
        began = self._splits[split]["request"]
        if changed := [name for name in sorted({*began, *request}) if began.get(name) != request.get(name)]:
            raise Act24Error(
                f"{self._folder} was begun with other data ({', '.join(changed)}); "
                "finish it with the same command, or remove it to begin anew"
            )
        return self._splits[split]["place"]

    def due(self, tokens: int) -> bool:
        """Whether so many tokens more are worth an entry."""
        self._unwritten += tokens
        return self._unwritten >= JOURNAL_TOKENS

    def write(self, split: Split, request: dict[str, Any], place: dict[str, Any]) -> None:
        """Everything up to `place` is on the disk."""
        self._unwritten = 0
        self._splits[split] = {"request": request, "place": place}
        with whole_file(self._path) as partial, HashedFile(partial) as file:
            file.write(json.dumps(self._splits).encode())


class _Writing:
    """One split as it is written: the shard at hand and the file of boundaries are open, and no others."""

    def __init__(
        self,
        data: Data,
        tokenizer: Tokenizer,
        folder: Path,
        split: Split,
        limit: int | None,
        journal: _Journal,
    ) -> None:
        self._documents = open_documents(
            data, split, shuffle_seed=data.shuffle_seed if split == "train" else None
        )
        self._tokenizer, self._folder, self._journal = tokenizer, folder, journal
        self._split: Split = split
        self._dtype = np.dtype(token_dtype(tokenizer.vocab_size))
        self._limit = limit
        self._request = json.loads(
            json.dumps({**self._documents.fingerprint, "tokenizer": tokenizer.fingerprint, "limit": limit})
        )
        self._place: dict[str, Any] | None = None  # behind the last document that this call wrote
        place = journal.place(split, self._request)
        self._done: dict[str, Any] = place["shards"] if place else {}  # shards that are full
        self._tokens, self._count = (place["tokens"], place["documents"]) if place else (1, 0)
        boundaries = folder / f"{split}-documents.bin"
        if boundaries.exists() and not place:
            logger.warning(
                "%s: the %s split was cut off before its first %d tokens were noted; it begins anew",
                folder,
                split,
                JOURNAL_TOKENS,
            )
        self._remove_shards_behind()
        self._boundaries = HashedFile(boundaries, place["boundary_bytes"] if place else 0)
        self._shard = HashedFile(self._path(), place["shard_bytes"] if place else 0)
        if place:
            self._documents.load_state_dict(place["position"])
        else:
            self._boundaries.write(np.uint64(self._tokens).astype("<u8").tobytes())
            self._shard.write(np.array([tokenizer.eos_id], self._dtype).tobytes())

    def finish(self, progress: Progress) -> dict[str, Any]:
        """Write what is left of the split; what `index.json` says of it."""
        with self._boundaries, self._shard_at_hand():
            if not self._full():
                try:
                    self._write_on(progress)
                except (Act24Error, KeyboardInterrupt):  # not of this disk: what is written so far is good
                    self._save()
                    raise
                self._save()
        return {
            "documents_written_from": self._documents.fingerprint,
            "tokens": self._tokens,
            "documents": self._count,
            "shards": {**self._done, self._shard.path.name: self._shard.facts()},
            "boundaries": {self._boundaries.path.name: self._boundaries.facts()},
            "remarks": self._documents.tally.lines(),
        }

    def _write_on(self, progress: Progress) -> None:
        for position, document in encoded(self._documents, self._tokenizer, late=True):
            self._add(document)
            self._place = {
                "position": position,
                "tokens": self._tokens,
                "documents": self._count,
                "shards": self._done,
                "shard_bytes": self._shard.bytes,
                "boundary_bytes": self._boundaries.bytes,
            }
            progress(self._split, self._count, self._tokens)
            if self._journal.due(len(document)):
                self._save()
            if self._full():
                break

    def _full(self) -> bool:
        return self._limit is not None and self._tokens > self._limit

    def _add(self, document: np.ndarray) -> None:
        if self._shard.bytes >= SHARD_TOKENS * self._dtype.itemsize:
            self._shard.close()
            self._done = {**self._done, self._shard.path.name: self._shard.facts()}
            self._shard = HashedFile(self._path())
        self._shard.write(document.astype(self._dtype).tobytes())
        self._tokens, self._count = self._tokens + len(document), self._count + 1
        self._boundaries.write(np.uint64(self._tokens).astype("<u8").tobytes())

    def _save(self) -> None:
        """Note the place behind the last document, if there is one."""
        if self._place is None:
            return
        self._shard.sync()
        self._boundaries.sync()
        self._journal.write(self._split, self._request, self._place)

    def _remove_shards_behind(self) -> None:
        """What a kill left behind the place from which it goes on, which this call may not reach."""
        for path in self._folder.glob(f"{self._split}-[0-9]*.bin"):
            if path.name not in self._done and path != self._path():
                path.unlink()

    def _path(self) -> Path:
        return self._folder / f"{self._split}-{len(self._done):05d}.bin"

    @contextmanager
    def _shard_at_hand(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._shard.close()
