"""Bytes to text: UTF-8 unless the file says or shows otherwise.

A byte-order mark decides. Without one UTF-8 is tried; a few stray bytes become U+FFFD, because one bad byte
in gigabytes is no reason to end a run. Above `LIMIT` it is another encoding, which `charset-normalizer`
detects; what it cannot tell is refused: a model would learn replacement characters, and its loss would look
better.
"""

from __future__ import annotations

import codecs
import io
import re
from typing import BinaryIO, TextIO

from act24.errors import Act24Error
from act24.tools.data.tally import LIMIT, Tally

SAMPLE = 2**18  # bytes by which a stream's encoding is detected
_MARKS = (  # UTF-32's begins like UTF-16's
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_STRAY = re.compile("[\udc80-\udcff]")  # how "surrogateescape" spells a byte that is no text


def known_encoding(name: str) -> str:
    """The name, if Python has such an encoding of text.

    Raises:
        Act24Error: it has not.
    """
    try:
        if codecs.lookup(name)._is_text_encoding:
            return name
    except (LookupError, ValueError):
        pass
    raise Act24Error(f'data.encoding = "{name}" is no encoding of text; for example "utf-8", "gb18030"')


def decoded(content: bytes, encoding: str | None, name: str, tally: Tally) -> str:
    """A whole file as text, line ends as "\\n", without a byte-order mark.

    Args:
        encoding: None to detect it.
        name: of the file.
        tally: to count replaced characters and detected encodings in.

    Raises:
        Act24Error: too much of it is no text in that encoding, or in any that can be detected.
    """
    codec = encoding or _encoding_of(content, name, tally)
    text = content.decode(codec, "replace")
    if replaced := text.count("�"):  # which may also be in the file itself
        tally.replaced += replaced
        try:
            content.decode(codec)
        except UnicodeDecodeError:
            check_replaced(replaced, len(text), codec, name)
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def open_text(file: BinaryIO, encoding: str | None, name: str, tally: Tally) -> tuple[TextIO, str]:
    """A stream as lines of text, and its encoding; of bytes that are no text `take_stray` says how many.

    Args:
        file: from its beginning; the encoding shows in the first `SAMPLE` bytes.
    """
    buffered = io.BufferedReader(file, SAMPLE)  # type: ignore[arg-type]  # read-only streams of any library
    sample = buffered.peek(SAMPLE)[:SAMPLE]
    codec = encoding or _encoding_of(sample, name, tally, whole=False)
    errors = "replace" if codec.startswith(("utf-16", "utf_16", "utf-32", "utf_32")) else "surrogateescape"
    if sample.startswith(codecs.BOM_UTF8) and codec.lower() in ("utf-8", "utf8", "utf_8"):
        codec = "utf-8-sig"
    return io.TextIOWrapper(buffered, encoding=codec, errors=errors), codec


def take_stray(line: str) -> tuple[str, int]:
    """The line with U+FFFD where a byte was no text, and how often."""
    if line.isascii():
        return line, 0
    return _STRAY.subn("�", line)


def check_replaced(replaced: int, characters: int, encoding: str, name: str) -> None:
    """
    Raises:
        Act24Error: more than `LIMIT` of the characters were replaced.
    """
    if replaced > LIMIT * characters:
        raise Act24Error(
            f"{name}: {replaced / characters:.1%} of its {characters:,} characters are no text in {encoding}"
            "; set data.encoding to the one that it is in, or convert a file that mixes several"
        )


def _encoding_of(content: bytes, name: str, tally: Tally, whole: bool = True) -> str:
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return encoding
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(content, final=whole)
    wide = b"\0" in content  # UTF-16 without a mark may well be UTF-8 by the letter
    if not wide and text.count("�") <= LIMIT * len(text):
        return "utf-8"
    found = _detected(content, whole)
    if found is None or wide != found.startswith(("utf_16", "utf_32")):
        check_replaced(text.count("�"), len(text), "UTF-8, nor in any encoding that was detected", name)
        return "utf-8"  # with zero bytes in it, which are characters
    tally.encodings[name] = found
    return found


def _detected(content: bytes, whole: bool) -> str | None:
    import charset_normalizer

    if not whole or len(content) > SAMPLE:  # to the end of a line, which is no character's middle
        end = content.rfind(b"\n", 0, SAMPLE) + 1 or min(SAMPLE, len(content))
        content = content[: end // 4 * 4 if b"\0" in content else end]
    for missing in range(4):  # or of a character
        best = charset_normalizer.from_bytes(content[: len(content) - missing]).best()
        if best is not None:
            return None if best.encoding in ("utf_8", "ascii") else best.encoding
        if whole and len(content) <= SAMPLE:
            break
    return None
