"""What every source is a list of, and the rules that say which of its text is held out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Literal

Split = Literal["train", "heldout"]
Shard = Callable[[Callable[[int], bool]], Iterator[str | None]]
"""`shard(wanted)` yields one item a record: its text where `wanted(index)`, else None."""

HELDOUT_ONE_IN = 20


def is_heldout(text: str) -> bool:
    """Whether the document is among the 5 % that are held out by their own hash."""
    return short_hash(text) % HELDOUT_ONE_IN == 0


def part_by_hash(split: Split, text: str) -> str:
    """The document, or nothing where it is of the other split."""
    return text if is_heldout(text) == (split == "heldout") else ""


def part_by_position(split: Split, text: str) -> str:
    """The first 95 % of the document to train on, the rest to evaluate on. It is cut behind a line, or else
    behind a word, or else anywhere; a document of less than `HELDOUT_ONE_IN` characters is trained on whole.
    """
    cut = len(text) - len(text) // HELDOUT_ONE_IN
    for mark in ("\n", " "):
        before = text.rfind(mark, cut // 2, cut) + 1
        if before:
            cut = before
            break
    return text[cut:] if split == "heldout" else text[:cut]


def short_hash(text: str) -> int:
    """64 bits of BLAKE2, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
