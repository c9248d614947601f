"""Tokens of one row into text that can be shown: whole characters, and nothing that a stop string may still
begin."""

from __future__ import annotations

from collections.abc import Callable, Sequence

#: What decoders put for bytes that are no whole character yet.
_INCOMPLETE = "\ufffd"


class RowText:
    """The text of a row as it grows.

    Attributes:
        text: what was shown so far.
        stopped: the stop string that ended it, or the empty string.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str]) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._ids: list[int] = []
        self._begin = self._done = 0  # of the ids: where decoding starts over, and what `_held` has
        self._held = ""
        self.text = ""
        self.stopped = ""

    def add(self, token: int) -> str:
        """Take a token. Returns the text that can be shown now, which may be empty."""
        self._ids.append(token)
        # Some tokenizers decode the first token of a text differently, so earlier tokens are decoded again
        # with it.
        before = self._decode(self._ids[self._begin : self._done])
        text = self._decode(self._ids[self._begin :])
        if text.endswith(_INCOMPLETE) or len(text) <= len(before):
            return ""
        self._begin, self._done = self._done, len(self._ids)
        return self._show(text[len(before) :])

    def finish(self) -> str:
        """The text that was held back, when no token follows."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._begin : self._done])
        rest = self._held + self._decode(self._ids[self._begin :])[len(before) :]
        self._held, self._begin, self._done = "", self._done, len(self._ids)
        self.text += rest
        return rest

    def _show(self, new: str) -> str:
        text = self._held + new
        places = [(text.find(stop), stop) for stop in self._stop if stop in text]
        if places:
            place, self.stopped = min(places)
            text, self._held = text[:place], ""
        else:
            kept = max((_overlap(text, stop) for stop in self._stop), default=0)
            text, self._held = text[: len(text) - kept], text[len(text) - kept :]
        self.text += text
        return text


def _overlap(text: str, stop: str) -> int:
    """The most last characters of the text that a stop string begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
