"""Which of the encodings of Latin script.

To `charset-normalizer` "très" and "trčs" are equally clean, and it takes one. So all usual encodings read the
text: where those that make words of it differ, who has the file has to say which.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from act24.errors import Act24Error

ENCODINGS = [  # of those that read a text alike the first is named
    *("cp1252", "cp1250", "iso8859_15", "iso8859_2", "cp1254", "cp1257", "mac_roman", "cp850", "cp852"),
    *("cp437", "mac_latin2", "mac_turkish", "cp775", "cp857", "iso8859_3", "iso8859_13", "iso8859_14"),
    "iso8859_16",
]
_WORD = re.compile(rb"[A-Za-z\x80-\xff]*[\x80-\xff][A-Za-z\x80-\xff]*")
_LATIN = [chr(code) for code in (*range(0x250), *range(0x1E00, 0x1F00))]
_LOWER, _UPPER = ("".join(c for c in _LATIN if unicodedata.category(c) == kind) for kind in ("Ll", "Lu"))
_LETTER = f"[{_LOWER}{_UPPER}]"
_ODD = re.compile(f"[{_LOWER}][{_UPPER}]|{_LETTER}[^{_LOWER}{_UPPER}’‘–—·…\xa0\xad\n]+(?={_LETTER})")
_NO_TEXT = re.compile("[\x80-\x9f\ufffd]")


def readings(content: bytes, encodings: Iterable[str] = ENCODINGS, chosen: str = "") -> dict[str, str]:
    """What a text in Latin script may say.

    Args:
        content: of it.
        encodings: to read it in.
        chosen: one of them that stays, whatever it makes of the words.

    Returns:
        By encoding, the most plausible first, its different words that are not ASCII, one a line. Empty if no
        encoding makes words of them.
    """
    words = b"\n".join(dict.fromkeys(_WORD.findall(content)))
    if len(words.translate(None, bytes(range(128)))) > 0.6 * len(words):
        return {}  # Cyrillic, Chinese
    texts = {encoding: words.decode(encoding, "replace") for encoding in encodings}
    most = 0.01 * (words.count(b"\n") + 1)
    odd = {encoding: len(_ODD.findall(text)) for encoding, text in texts.items()}
    return {
        encoding: texts[encoding]
        for encoding in sorted(odd, key=odd.__getitem__)
        if encoding == chosen or (odd[encoding] <= most and not _NO_TEXT.search(texts[encoding]))
    }


def check_alike(found: dict[str, str], name: str) -> None:
    """
    Args:
        found: `readings`.
        name: of the file.

    Raises:
        Act24Error: they differ; with the word in which most do.
    """
    if len(set(found.values())) < 2:
        return
    words = zip(*(text.split("\n") for text in found.values()), strict=True)
    word = max(words, key=lambda read: (len(set(read)), min(len(read[0]), 4), -len(read[0])))
    ways = [f'{[*found][word.index(read)]} ("{read[:30]}")' for read in dict.fromkeys(word)]
    *most, last = [*ways[:3], *(["another"] if len(ways) > 3 else [])]
    raise Act24Error(f"{name} is {', '.join(most)} or {last}: say which with data.encoding")
