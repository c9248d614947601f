"""Text documents in an order that any later process can continue.

Every source is a list of shards (files, or the shards of a Hub data set), and a shard is a sequence of
records. So one class owns the order, the split by rank, the held-out rule and the position for all of them;
what differs is only how a shard is read. In particular the position is ours and not the `datasets` library's,
whose own resume repeated or lost rows in several releases.
"""

from __future__ import annotations

import itertools
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from act24.errors import Act24Error
from act24.recipes.schema import Data
from act24.tools.data.encoding import known_encoding
from act24.tools.data.files import TEXT, Reading, find_files, known_as, read_documents, suffix
from act24.tools.data.hub import hub_shards
from act24.tools.data.identity import (
    Listing,
    changed,
    check_unchanged,
    combined,
    identities,
    matched,
    shared,
)
from act24.tools.data.position import PositionError
from act24.tools.data.shard import Shard, Split, is_heldout, part_by_hash, part_by_position, short_hash
from act24.tools.data.shards import read_index
from act24.tools.data.tally import REMEMBERED, Tally
from act24.words import counted

FRUITLESS = 100  # epochs in a row without a document for a rank, where others have some, that end the run


class Documents(Iterator[str]):
    """The non-empty documents of one rank.

    Rank r of W takes every W-th shard where W divides their number, and otherwise reads all shards and takes
    every W-th record: always disjoint, together complete, and in the second case W times the reading.

    Args:
        shards: what there is to read.
        fingerprint: what identifies the text, JSON-able, its values short; a state is refused under another
            one.
        files: where the shards are files, their `identities` and names: a state finds them again by content.
        part: what of a document belongs to this split; nothing if it is empty.
        shuffle_seed: each epoch visits the shards in an order of its own, drawn from (seed, epoch); None
            keeps the given order. Records inside a shard keep theirs.
        endless: start a new epoch after the last shard; otherwise stop there.
        empty: the error message for an epoch without any document.
        tally: counts what is wrong with the text; given where reading it counts too.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        fingerprint: dict[str, Any],
        *,
        files: tuple[Sequence[str], Sequence[str]] | None = None,
        part: Callable[[str], str] = lambda text: text,
        shuffle_seed: int | None = None,
        endless: bool = False,
        rank: int = 0,
        world_size: int = 1,
        empty: str = "no document",
        tally: Tally | None = None,
    ) -> None:
        self.tally = tally or Tally()
        self._hashes: set[int] = set()
        self._fingerprint = {
            **fingerprint,
            "shuffle_seed": shuffle_seed,
            "rank": rank,
            "world_size": world_size,
        }
        self._shards = shards
        self._present, self._names = files or ((), ())
        self._listing = Listing(tuple(self._present), ((0, len(shards)),))
        self._places = list(range(len(shards)))  # of the listing's entries among the shards
        self._part = part
        self._shuffle_seed = shuffle_seed
        self._endless = endless
        self._rank, self._world_size = rank, world_size
        self._empty = empty
        self._fruitless = 0
        self.load_state_dict({"epoch": 0, "shard": 0, "record": 0, "passed": 0})

    @property
    def only(self) -> str | None:
        """What there is only one of, so that nothing can be shuffled: "file", or "document" where it is one
        text; else None."""
        if len(self._shards) > 1:
            return None
        return "document" if any(suffix(Path(name)) in TEXT for name in self._names) else "file"

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies documents and order."""
        return self._fingerprint | ({"files": self._listing.as_json()} if self._present else {})

    def adopt(self, fingerprint: dict[str, Any], epoch: int, grow: bool) -> list[str]:
        """Take the files in the order in which a run counted them, wherever they are now.

        Args:
            fingerprint: of that run.
            epoch: the last that it has begun.
            grow: read files that were added, from the next epoch on.

        Returns:
            warnings.

        Raises:
            Act24Error: files are gone, changed or new.
        """
        if not self._present:
            if grow:
                raise Act24Error('--data grow is for data.source = "files"')
            return []
        saved = Listing.from_json(fingerprint.get("files"))
        self._listing, self._places, warnings = matched(saved, self._present, self._names, epoch, grow)
        return warnings

    @property
    def epoch(self) -> int:
        """Of the last document."""
        return self._epoch

    @staticmethod
    def epochs(state: dict[str, Any]) -> tuple[int, int]:
        """Of a state: the epoch of the document before it, and the last that was begun. They differ in a
        buffer."""
        return state["epoch"], state["epoch"]

    def state_dict(self) -> dict[str, Any]:
        """Where the next document is looked for: epoch; position in this epoch's order of shards; record in
        that shard; records in this epoch's earlier shards; and the counts up to there."""
        place = {"epoch": self._epoch, "shard": self._shard, "record": self._record, "passed": self._passed}
        return {**place, "tally": self.tally.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tally.load_state_dict(state.get("tally", {}))
        self._epoch, self._passed = state["epoch"], state["passed"]
        self._shard, self._record = state["shard"], state["record"]
        self._found = self._record > 0 or self._passed > 0  # anything in this epoch, or it counts as empty
        self._order = self._order_of(self._epoch)
        if self._shard > len(self._order):
            raise PositionError(f"shard {self._shard} of {len(self._order)} is no saved position")
        self._records = self._open()

    def __next__(self) -> str:
        while True:
            for index, text in self._records:
                self._record = index + 1
                if text is None:
                    continue
                self.tally.empty += not text
                if text and (mine := self._part(text)):
                    self._found, self._fruitless = True, 0
                    self._count(mine)
                    return mine
            self._next_shard()

    def _count(self, text: str) -> None:
        self.tally.documents += 1
        self.tally.characters += len(text)
        if self._epoch == 0:
            hashed = short_hash(text)
            self.tally.repeated += hashed in self._hashes
            if len(self._hashes) < REMEMBERED:
                self._hashes.add(hashed)

    def _next_shard(self) -> None:
        if self._shard < len(self._order):
            self._check_unchanged()  # while it was read
            self._shard, self._record, self._passed = self._shard + 1, 0, self._passed + self._record
        if self._shard == len(self._order):
            if not self._found:
                self._end_without_a_document()
            if not self._endless:
                raise StopIteration
            self._epoch, self._shard, self._passed, self._found = self._epoch + 1, 0, 0, False
            self._order = self._order_of(self._epoch)
        self._records = self._open()

    def _end_without_a_document(self) -> None:
        """An epoch may have none for one rank of many: the next one deals the shards anew.

        Raises:
            Act24Error: there is none for any rank, or this one has come away empty too often.
        """
        self._fruitless += 1
        if self._world_size == 1 or not self._endless or self._fruitless == FRUITLESS or not self._any():
            raise Act24Error(self._empty)

    def _any(self) -> bool:
        """Whether this epoch has a document for some rank."""
        shards = self._places[: self._listing.count(self._epoch)]
        texts = itertools.chain.from_iterable(self._shards[place](lambda index: True) for place in shards)
        return any(text and self._part(text) for text in texts)

    def _open(self) -> Iterator[tuple[int, str | None]]:
        if self._shard == len(self._order):
            return iter(())
        start, passed, by_shard = self._record, self._passed, self._by_shard

        def wanted(index: int) -> bool:
            mine = by_shard or (passed + index) % self._world_size == self._rank
            return mine and index >= start

        self._check_unchanged()
        shard = self._shards[self._places[self._order[self._shard]]]
        return _from_record(start, shard(wanted))

    def _check_unchanged(self) -> None:
        """Raises Act24Error where the file at hand is not the one by which positions know it."""
        if not self._present:
            return
        place = self._places[self._order[self._shard]]
        name = self._names[place]
        if check_unchanged(Path(name), self._present[place]) and name not in self.tally.touched:
            self.tally.touched.append(name)

    def _order_of(self, epoch: int) -> list[int]:
        count = self._listing.count(epoch)
        self._by_shard = count % self._world_size == 0
        order = list(range(count))
        if self._shuffle_seed is not None:  # sorted by a hash: the same on every version of every library
            order.sort(key=lambda shard: short_hash(f"{self._shuffle_seed}/{epoch}/{shard}"))
        return order[self._rank :: self._world_size] if self._by_shard else order


def open_documents(
    data: Data,
    split: Split,
    *,
    shuffle_seed: int | None = None,
    endless: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Documents:
    """The documents of `data` (any source but "shards", which holds tokens and no text).

    Where nothing says what is held out (`builtin`; `files` without `heldout_files`; `hf` with `heldout_split`
    equal to `train_split`), it is the documents whose hash is 0 modulo 20: about 5 %, the same ones whatever
    stands around them. Files with so few documents that one of the splits would be empty are split by
    position instead: the last twentieth of each document is held out.

    Raises:
        Act24Error: files that are missing or of an unknown kind, a Hub data set that cannot be reached; and,
            while iterating, whatever is wrong with a file or record, or no document at all.
    """
    rule, files = "given", None
    encoding = None if data.encoding is None else known_encoding(data.encoding)
    how = Reading(data.text_field, encoding, data.on_bad_record == "skip")
    if data.source == "hf":
        rule = "hash" if data.heldout_split == data.train_split else "given"
        name = data.train_split if split == "train" else data.heldout_split
        shards, fingerprint = hub_shards(data, name, how)
        what = f"{data.dataset}, split {name!r}"
    elif data.source in ("files", "builtin"):
        paths = builtin_files() if data.source == "builtin" else _given_files(data, split, how.tally)
        shards = [partial(read_documents, path, how) for path in paths]
        fingerprint = {"source": data.source, "text_field": data.text_field}
        files = (identities(paths), [str(path) for path in paths])
        if data.source == "builtin":
            rule = "hash"
        elif not data.heldout_files:
            rule = _rule_for(tuple(paths), tuple(files[0]), how.text_field, how.encoding, how.skip_bad)
        elif split == "train":  # or a run would go on after its held-out text was replaced
            held_out = identities(find_files(data.heldout_files))
            fingerprint["heldout_files"] = combined(held_out)
            how.tally.held_out += [str(paths[place]) for place in shared(files[0], held_out)]
        what = f"{counted(len(paths), 'file')} ({paths[0]}{', …' if len(paths) > 1 else ''})"
    else:
        raise Act24Error(
            'data.source = "shards" holds tokens, not text; use the source they were prepared from'
        )

    empty = f"no document to {'evaluate' if split == 'heldout' else 'train'} on in {what}"
    if world_size > 1:
        empty += f" for rank {rank} of {world_size}"
    if split == "heldout" and rule != "given":
        empty += ": there is too little text to hold some out"
        empty += "; name data.heldout_files" if data.source == "files" else ""
    parts = {"hash": part_by_hash, "position": part_by_position}
    return Documents(
        shards,
        {**fingerprint, "split": split, "heldout_by": rule},
        files=files,
        part=partial(parts[rule], split) if rule in parts else lambda text: text,
        shuffle_seed=shuffle_seed,
        endless=endless,
        rank=rank,
        world_size=world_size,
        empty=empty,
        tally=how.tally,
    )


def other_heldout_text(data: Data, saved: dict[str, Any]) -> str | None:
    """In what the held-out text differs from that of a run; None if it does not. Of a data set on the Hub it
    cannot, at the commit of the run.

    Args:
        saved: the fingerprint of the run's position, with its "files".

    Raises:
        Act24Error: a file cannot be found or read.
        PositionError: the fingerprint does not say what was held out.
    """
    if data.source == "hf":
        return None
    if data.source == "shards":
        same = saved.get("index") == read_index(Path(str(data.shards))).hash
        return None if same else "the content of data.shards is another"
    if data.source == "files" and data.heldout_files:
        if "heldout_files" not in saved:
            raise PositionError("its position does not say what was held out")
        same = saved["heldout_files"] == combined(identities(find_files(data.heldout_files)))
        return None if same else "the content of data.heldout_files is another"
    paths = builtin_files() if data.source == "builtin" else _given_files(data, "heldout", Tally())
    count = changed(Listing.from_json(saved.get("files")).files, identities(paths))
    others = "is another" if count == 1 else "are others"
    return f"{count} of the files of which a part is held out {others}" if count else None


def _from_record(start: int, records: Iterator[str | None]) -> Iterator[tuple[int, str | None]]:
    """Records from `start` on, with their index."""
    index = -1
    for index, text in enumerate(records):
        if index >= start:
            yield index, text
    if index + 1 < start:
        raise PositionError(f"record {start} in a shard of {index + 1} is no saved position")


@cache
def _rule_for(paths: tuple[Path, ...], files: tuple[str, ...], *how: Any) -> str:
    """What divides files of which nobody said what is held out: "hash", unless one split would be empty.

    Reads until it has met a document of each split, which for all but very few documents is soon.

    Args:
        files: the identities of `paths`: for the same content the answer is the same.
        how: of a `Reading`, without its tally: what is read here is read and counted again.
    """
    met = set()
    for path in paths:
        for text in read_documents(path, Reading(*how), lambda index: True):
            if text:
                met.add(is_heldout(text))
            if len(met) == 2:
                return "hash"
    return "position"


def _given_files(data: Data, split: Split, tally: Tally) -> list[Path]:
    heldout = find_files(data.heldout_files) if data.heldout_files else []
    if split == "heldout" and heldout:
        return heldout
    # `train_files = ["text/*.md"], heldout_files = ["text/last.md"]` must not train on what it evaluates on.
    kept_out = {name for path in heldout for name in known_as(path)}
    unknown: set[str] = set()
    files = [path for path in find_files(data.train_files, unknown) if kept_out.isdisjoint(known_as(path))]
    tally.unknown += sorted(unknown)
    if not files:
        raise Act24Error("every file of data.train_files is also in data.heldout_files")
    return files


def builtin_files() -> list[Path]:
    """The standard library's own modules: real text, code and prose, that is wherever Python is."""
    root = sysconfig.get_path("stdlib")
    elsewhere = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in elsewhere]  # not to walk all that is installed
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    # A package may begin with an empty file, of which a first run would warn.
    files = [file for file in files if file.is_file() and file.stat().st_size]
    if not files:
        raise Act24Error(f"no Python source beneath {root}; use data.source = 'files'")
    return sorted(files)
