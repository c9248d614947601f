"""Which of the encodings of Latin script: told by the accented letters.

To `charset-normalizer` "très" and "trčs" are equally clean, and it takes one. Languages differ in their
accented letters far more than encodings do: under each encoding the words with such letters have a
likelihood in each language. What wins by less than `ODDS` stays undecided.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from math import log

ODDS = log(100)
ENOUGH = 2**13  # bytes of different words
ENCODINGS = {  # how likely each is beforehand; of those that read a text alike the first is named
    **dict.fromkeys(("cp1252", "cp1250", "iso8859_2"), 0.0),
    **dict.fromkeys(("iso8859_15", "cp1254", "cp1257"), log(0.03)),
    **dict.fromkeys(("mac_roman", "cp850", "cp852", "cp437"), log(0.1)),
    **dict.fromkeys(("mac_latin2", "mac_turkish", "cp775", "cp857", "iso8859_3", "iso8859_14"), log(1e-2)),
}
_LANGUAGES = """
    English é70 è5 ê3 ï5 ö5 ü5 ä3 ñ5 ç3 á4 í3 ó3 â1 ô1 î1 ø1 å1
    French é150 à49 è27 ê22 ç9 ù6 â5 î5 ô2 œ2 ë1 ï1 û1 æ.1
    German ü100 ä58 ö44 ß31 é1
    Spanish ó83 í72 á50 é43 ñ31 ú17 ü1 º1 ª1
    Portuguese ã73 ç53 é34 ê25 á40 í30 ó30 ú20 õ10 à7 â6 ô6 º1 ª1
    Catalan à70 ó60 é50 í50 è30 ò30 ç25 ú20 ï10 ü5
    Italian à64 è40 ò25 ù17 é8 ì5
    Dutch ë60 é40 ï40 ö10 è8 ü8 ê3 ó3 á2 ç1 í1
    Swedish ä180 å134 ö131 é5
    Danish å119 ø94 æ87 é3
    Finnish ä358 ö44 å1
    Icelandic ð439 á180 í157 þ146 ó99 æ87 ö78 é65 ú61 ý23
    Irish í120 á90 é60 ó60 ú50
    Welsh ŵ60 â40 ŷ30 ô30 ê20 î20 ï5
    Esperanto ĉ70 ĝ60 ŝ50 ŭ60 ĵ10 ĥ1
    Estonian ä150 õ100 ü80 ö20 š1 ž1
    Albanian ë350 ç50
    Polish ł211 ó114 ę104 ś81 ć74 ż71 ą70 ń36 ź8
    Czech í164 ě122 ý100 á87 ž72 š69 é63 č46 ř38 ů20 ú5 ó2 ď2 ť1 ň1
    Slovak á150 í90 č90 ý90 é80 ú80 š80 ž80 ľ40 ť40 ô15 ň15 ď15 ä10 ó10 ĺ1 ŕ1
    Hungarian á344 é316 ö96 ó98 ő87 í65 ü60 ú25 ű20
    Romanian ă250 ș150 î120 ț110 â80
    Romanian ă250 ş150 î120 ţ110 â80
    Croatian č90 š90 ž60 ć60 đ25
    Slovene č150 š100 ž60
    Turkish ı511 ü185 ş178 ç116 ğ112 ö78 â1
    Latvian ā390 ī180 ē180 š180 ņ60 ū50 ž30 ļ30 ķ20 ģ20 č10
    Lithuanian ė170 ų130 š130 ž90 į60 ū50 č40 ą30 ę20
"""  # about how many of ten thousand letters; only the order of magnitude matters
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
_MARKS = frozenset("’‘“”„‚«»‹›–—…•·°§€£©®™²³½¼±¿¡\xa0")
_WITHIN_WORDS = frozenset("’‘–—·…\xa0\xad")
_MARK, _ODD_MARK, _NEVER = log(0.1), log(1e-4), log(1e-6)
_FOREIGN = 0.01  # of accented letters, those in names from another language
_SMALLEST = -4.0  # likelihood of a character on average: below, a text is of none of the languages
_WORD = re.compile(rb"[A-Za-z\x80-\xff]*[\x80-\xff][A-Za-z\x80-\xff]*")


def latin_encoding(content: bytes) -> str | None:
    """The encoding of a text in Latin script, if its words decide.

    Returns:
        One of `ENCODINGS`; None if none fits, or several do and read different text.
    """
    words = b"\n".join(dict.fromkeys(_WORD.findall(content)))[:ENOUGH]
    accents = len(words.translate(None, bytes(range(128))))
    if len(words) > 100 and accents > 0.6 * len(words):
        return None  # Cyrillic, Chinese
    found: dict[str, tuple[float, str]] = {}
    for encoding, beforehand in ENCODINGS.items():
        text = words.decode(encoding, "replace")
        if text not in found:
            found[text] = beforehand + _likelihood(text), encoding
    (best, encoding, text), *others = sorted(
        ((score, encoding, text) for text, (score, encoding) in found.items()), reverse=True
    )
    rivals = [score for score, _, other in others if not alike(text, other, 0.02 * accents)]
    decided = all(best - score >= ODDS for score in rivals[:1])
    return encoding if decided and best > _SMALLEST * accents else None


def alike(one: str, other: str, few: float) -> bool:
    """Whether two encodings read the same text, but for a few characters in which variants differ."""
    return len(one) == len(other) and sum(map(str.__ne__, one, other)) <= few


def _likelihood(text: str) -> float:
    """Its logarithm, in the language in which it is largest."""
    letters: Counter[str] = Counter()
    score = 0.0
    languages, others = _shares()
    for found in _NOT_ASCII.finditer(text):
        character, before = found[0], text[max(found.start() - 1, 0) : found.start()]
        if character.isalpha():
            letters[character.lower()] += 1
            score += _NEVER if character.isupper() and before.islower() else 0
        elif character not in _MARKS:
            score += _ODD_MARK if character in "¨´¸¯¦" else _NEVER
        elif character in _WITHIN_WORDS or not (before.isalpha() and text[found.end() :][:1].isalpha()):
            score += _MARK
        else:
            score += _ODD_MARK
    return score + max(
        sum(
            count * log(shares.get(letter, 0) + _FOREIGN * others.get(letter, 1e-4))
            for letter, count in letters.items()
        )
        for shares in languages
    )


@cache
def _shares() -> tuple[list[dict[str, float]], dict[str, float]]:
    """For each language, and on average, each accented letter's share of them."""
    languages: list[dict[str, float]] = []
    average: Counter[str] = Counter()
    for line in _LANGUAGES.strip().splitlines():
        counts = {entry[0]: float(entry[1:]) for entry in line.split()[1:]}
        total = sum(counts.values())
        languages.append({letter: count / total for letter, count in counts.items()})
        average.update(languages[-1])
    return languages, {letter: share / len(languages) for letter, share in average.items()}
