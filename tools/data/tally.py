"""What is wrong with text and does not end a run, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from act24.errors import Act24Error
from act24.words import counted

LIMIT = 0.001  # of a file's characters: more replaced ones are refused
MANY = 10**6  # characters, of which a share means something wherever in a file they stand
REMEMBERED = 2**18  # documents by which repeated ones are found: 25 MB, and no more for larger corpora
TOO_MANY_DROPPED = 0.01  # of a file's records
FEW = 10  # dropped records are never too many
#: What `Tally.counts` counts, one and several of it.
_FAULTS = {
    "replaced_characters": ("replaced character", "replaced characters"),
    "dropped_records": ("dropped record", "dropped records"),
    "empty_documents": ("empty document", "empty documents"),
    "repeated_documents": ("repeated document", "repeated documents"),
    "retries": ("retry", "retries"),
}
_COUNTED = ("documents", "characters", "replaced", "dropped", "empty", "repeated", "retries")


@dataclass
class Tally:
    """Counts of what one process of a run read (of text that it read twice, twice).

    Attributes:
        documents: that had text.
        characters: of them.
        replaced: characters that stand for bytes that are no text, or for half a surrogate pair, and U+FFFD
            that a file itself holds.
        dropped: records left out because they could not be used.
        empty: records without text.
        repeated: documents equal to one of the first `REMEMBERED`, in the first epoch.
        retries: of a failing network.
        encodings: what was detected, by file; those in UTF-8 are not among them.
        unknown: files in folders given that are of no known kind.
        held_out: files to train on with the content of one that is held out.
        touched: large files that were modified since they were first looked at.
    """

    documents: int = 0
    characters: int = 0
    replaced: int = 0
    dropped: int = 0
    empty: int = 0
    repeated: int = 0
    retries: int = 0
    encodings: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    touched: list[str] = field(default_factory=list)

    @classmethod
    def summed(cls, tallies: Sequence[Tally]) -> Tally:
        """The counts of several parts of a text."""
        total = cls()
        total.load_state_dict({name: sum(getattr(tally, name) for tally in tallies) for name in _COUNTED})
        for tally in tallies:
            total.encodings.update(tally.encodings)
            total.unknown += [name for name in tally.unknown if name not in total.unknown]
            total.held_out += [name for name in tally.held_out if name not in total.held_out]
            total.touched += [name for name in tally.touched if name not in total.touched]
        return total

    def state_dict(self) -> dict[str, int]:
        """The counts, JSON-able. Which documents there were is not kept: repeats are counted anew."""
        return {name: getattr(self, name) for name in _COUNTED}

    def load_state_dict(self, state: dict[str, int]) -> None:
        for name in _COUNTED:
            setattr(self, name, state.get(name, 0))

    def counts(self) -> dict[str, int]:
        """What there is of each fault, the absent left out."""
        counts = {
            "replaced_characters": self.replaced,
            "dropped_records": self.dropped,
            "empty_documents": self.empty,
            "repeated_documents": self.repeated,
            "retries": self.retries,
        }
        return {name: count for name, count in counts.items() if count}

    def lines(self) -> list[str]:
        """The same for people, one line each."""
        lines = [
            f"{counted(count, 'file is', 'files are')} read as {name}, as detected; data.encoding sets "
            "another"
            for name, count in sorted(Counter(self.encodings.values()).items())
        ]
        if self.unknown:
            left = counted(len(self.unknown), "file of unknown kind is", "files of unknown kind are")
            lines.append(f"{left} left out: {_some(self.unknown)}")
        if self.held_out:
            trained_on = counted(
                len(self.held_out),
                "file of data.train_files has the content of one in data.heldout_files, and is",
                "files of data.train_files have the content of files in data.heldout_files, and are",
            )
            lines.append(f"{trained_on} trained on: {_some(self.held_out)}")
        if self.touched:
            modified = counted(
                len(self.touched),
                "large file was modified while it is read",
                "large files were modified while they are read",
            )
            lines.append(
                f"{modified}: size and sampled content are the same, what lies between the samples was not "
                f"compared: {_some(self.touched)}"
            )
        counts = [counted(count, *_FAULTS[name]) for name, count in self.counts().items()]
        if counts:
            lines.append(f"of {counted(self.documents, 'document')} read so far: {', '.join(counts)}")
        return lines


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


class Records:
    """The records of one file or shard, and how many of them could not be used.

    Args:
        refuses: a file that holds U+FFFD in place of more than `LIMIT` of its characters.
    """

    def __init__(self, name: str, skip: bool, tally: Tally, refuses: bool = False) -> None:
        self._name, self._skip, self._tally, self._refuses = name, skip, tally, refuses
        self._seen = self._dropped = self._characters = self._replaced = 0

    def good(self, text: str) -> None:
        """
        Raises:
            Act24Error: see `check_replaced`.
        """
        replaced = 0 if text.isascii() else text.count("\ufffd")
        self._seen, self._characters = self._seen + 1, self._characters + len(text)
        self._replaced, self._tally.replaced = self._replaced + replaced, self._tally.replaced + replaced
        if self._characters >= MANY:  # not only at the end, when a model has read the file
            self.check_replaced()

    def check_replaced(self) -> None:
        """
        Raises:
            Act24Error: the file holds too much U+FFFD, and is one to be refused for it.
        """
        if self._refuses and self._replaced > LIMIT * self._characters:
            raise Act24Error(
                f"{self._name}: {self._replaced / self._characters:.1%} of its {self._characters:,} "
                "characters are U+FFFD, which whoever wrote it put in place of text: write it anew from its "
                'source, or set data.encoding = "utf-8" to train on them'
            )

    def bad(self, error: Act24Error) -> None:
        """
        Raises:
            Act24Error: records are not to be skipped, or too many of them are bad.
        """
        if not self._skip:
            raise Act24Error(
                f'{error}; data.on_bad_record = "skip", or --skip-bad-records of `data prepare`, leaves such '
                "records out, and counts them"
            ) from error
        self._seen += 1
        self._dropped += 1
        self._tally.dropped += 1
        if self._dropped > max(FEW, TOO_MANY_DROPPED * self._seen):
            seen = counted(self._seen, "record")
            raise Act24Error(
                f"{self._dropped} of the first {seen} of {self._name} cannot be used: {error}"
            ) from error
