"""Bytes to text: UTF-8 unless the file says or shows otherwise.

A byte-order mark decides. Without one UTF-8 is tried; a few stray bytes become U+FFFD, because one bad byte
in gigabytes is no reason to end a run. Above `LIMIT` it is another encoding, which `charset-normalizer`
detects, and for Latin script `latin.py`. What they cannot tell is refused, and so is a file that goes on
in another encoding: a model would learn characters that nobody wrote, and its loss would look better.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import BinaryIO, TextIO

from act24.errors import Act24Error
from act24.tools.data.latin import ENCODINGS, check_alike, readings
from act24.tools.data.tally import LIMIT, Records, Tally

SAMPLE = 2**18  # bytes by which a stream's encoding is detected
BLOCK = 2**12  # bytes at several places that have to be in the encoding of the whole
LEAST = 60  # bytes that are not ASCII, in different words: of fewer the detection is often wrong
_MARKS = (  # UTF-32's begins like UTF-16's
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_WIDE = ("utf-16", "utf_16", "utf-32", "utf_32")
_STRAY = re.compile("[\udc80-\udcff]")  # how "surrogateescape" spells a byte that is no text
_CONTROL = re.compile("[\0\x80-\x9f]")
_ISO2022_JP = re.compile(rb"\x1b\$[@B]")  # which is UTF-8 by the letter
_WORDS = re.compile(rb"[^\s]*[\x80-\xff][^\s]*")
#: Those in which nobody wrote text files; they read much that is something else.
_UNUSUAL = ["cp1006", "cp1125", "ptcp154", "kz1048", "hp_roman8", "koi8_t", "utf_7"]
_UNUSUAL += ["shift_jis_2004", "shift_jisx0213", "euc_jis_2004", "euc_jisx0213"]
_SHIFT_JIS = ["cp932", "shift_jis"]
_SEVERAL_BYTES = ("gb", "big5", "euc", "shift_jis", "cp932", "cp949", "cp950", "johab")
_HALF_WIDTH = re.compile("[\uff61-\uff9f]")  # katakana, as which Shift-JIS reads most bytes
_SPACE, _SEVERAL = (
    rb"[\t\n\r -~]",
    rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}",
)
#: UTF-8 within other encodings, longer than chance makes it: of UTF-16, which has no ASCII, and of the rest.
_UTF8_IN_WIDE = re.compile(rb"(?:" + _SPACE + rb"|" + _SEVERAL + rb"){64,}")
_UTF8_IN_BYTES = re.compile(rb"(?:" + _SEVERAL + rb")(?:" + _SPACE + rb"*(?:" + _SEVERAL + rb")){15,}")
#: ASCII in UTF-16 of the other byte order, or off by one byte.
_SWAPPED = re.compile("[" + "".join(chr(code << 8) for code in (9, 10, 13, *range(32, 127))) + "]{16,}")


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
    if encoding:
        _check_given(encoding, content[:SAMPLE], name, len(content) <= SAMPLE)
    codec = encoding or _encoding_of(content, name, tally)
    text = content.decode(codec, "replace")
    implausible = 0 if encoding else implausible_characters(text, codec, content)
    try:
        content.decode(codec)
    except UnicodeDecodeError:
        implausible += text.count("�")
    else:
        held = Records(name, False, tally, refuses=encoding is None)
        held.good(text)
        held.check_replaced()
    implausible = min(implausible, len(text))  # some may be both
    tally.replaced += implausible
    check_replaced(implausible, len(text), codec, name, given=encoding is not None)
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def open_text(file: BinaryIO, encoding: str | None, name: str, tally: Tally) -> tuple[TextIO, str]:
    """A stream as lines of text, and its encoding; of bytes that are no text `take_stray` says how many.

    Args:
        file: from its beginning; the encoding shows in the first `SAMPLE` bytes.
    """
    buffered = io.BufferedReader(file, SAMPLE)  # type: ignore[arg-type]  # read-only streams of any library
    sample = buffered.peek(SAMPLE)[:SAMPLE]
    if encoding:
        _check_given(encoding, sample, name, False)
    codec = encoding or _encoding_of(sample, name, tally, whole=False)
    errors = "replace" if codec.startswith(_WIDE) else "surrogateescape"
    if sample.startswith(codecs.BOM_UTF8) and codec.lower() in ("utf-8", "utf8", "utf_8"):
        codec = "utf-8-sig"
    return io.TextIOWrapper(buffered, encoding=codec, errors=errors), codec


def plausible(lines: Iterable[str], codec: str, name: str, tally: Tally) -> Iterator[str]:
    """The lines of a stream whose encoding was detected, as they are.

    Raises:
        Act24Error: too much of them is in another encoding, or only now does one of Latin script read them
            otherwise.
    """
    batch: list[str] = []
    characters = implausible = 0
    rivals = ENCODINGS if codec in ENCODINGS else []

    def check() -> None:
        nonlocal characters, implausible, rivals
        text = "".join(batch)
        if rivals and not text.isascii():
            found = readings(text.encode(codec, "surrogateescape"), rivals, codec)
            check_alike(found, name)
            rivals = [*found] or rivals
        count = implausible_characters(text, codec)
        characters, implausible = characters + len(text), implausible + count
        tally.replaced += count
        check_replaced(implausible, characters, codec, name)
        batch.clear()

    size = 0
    for line in lines:
        batch.append(line)
        size += len(line)
        if size >= SAMPLE:
            check()
            size = 0
        yield line
    check()


def take_stray(line: str) -> tuple[str, int]:
    """The line with U+FFFD where a byte was no text, and how often."""
    if line.isascii():
        return line, 0
    return _STRAY.subn("�", line)


def check_replaced(replaced: int, characters: int, encoding: str, name: str, given: bool = False) -> None:
    """
    Args:
        given: the encoding is not one that was detected.

    Raises:
        Act24Error: more than `LIMIT` of the characters were replaced.
    """
    if replaced > LIMIT * characters:
        detect = ", leave it out to detect it" if given else ""
        raise Act24Error(
            f"{name}: {replaced / characters:.1%} of its {characters:,} characters are no text in {encoding}"
            f"; set data.encoding to the one that it is in{detect}, or convert a file that "
            "mixes several"
        )


def implausible_characters(text: str, codec: str, content: bytes | None = None) -> int:
    """How many characters stand for bytes of another encoding, though the codec takes them; U+FFFD not among
    them.

    Args:
        text: decoded.
        codec: that was detected.
        content: which was decoded; None if it is to be made of `text`.
    """
    if codec.startswith("utf-8"):
        return text.count("\0")
    odd = [c for c in set(text) if unicodedata.category(c) == "Cn" or c == "\0" or "\x80" <= c <= "\x9f"]
    count = len(text) - len(text.translate(dict.fromkeys(map(ord, odd)))) if odd else 0
    if content is None:
        content = text.encode(codec, "replace" if codec.startswith(_WIDE) else "surrogateescape")
    if codec.startswith(_WIDE):
        count += sum(len(run[0]) for run in _SWAPPED.finditer(text))
        return count + sum(len(run[0].decode()) for run in _UTF8_IN_WIDE.finditer(content))
    count += sum(len(run[0].decode("utf-8", "replace")) for run in _UTF8_IN_BYTES.finditer(content))
    stride = min(len(content), SAMPLE) // 8
    size = min(stride, BLOCK)
    for end in range(len(content), size, -stride) if size > BLOCK // 8 else ():
        block = content[end - size : end].partition(b"\n")[2]
        if _bytes_not_ascii(block) > size // 8 and not _is_in(codec, block):
            count += len(block.decode(codec, "replace")) * stride // size
    return count


def _is_in(codec: str, block: bytes) -> bool:
    """Whether some text may be in that encoding, and shows no sign of another."""
    import charset_normalizer

    if codec in ENCODINGS or codec.startswith(_SEVERAL_BYTES):
        found = _detected(block)
        if found is None or (codec in ENCODINGS and found in ENCODINGS):
            return True
        text, other = block.decode(codec, "replace"), block.decode(found, "replace")
        return len(text) == len(other) and sum(map(str.__ne__, text, other)) <= 0.01 * len(text)
    return (
        charset_normalizer.from_bytes(block, cp_isolation=[codec], preemptive_behaviour=False).best()
        is not None
    )


def _check_given(encoding: str, content: bytes, name: str, whole: bool) -> None:
    """
    Args:
        content: from the beginning.
        whole: it does not end within a character.

    Raises:
        Act24Error: a byte-order mark, or bytes that only UTF-8 writes, or that are no text in an encoding
            though it takes them, show that it is another.
    """
    given = codecs.lookup(encoding).name.replace("_", "-")
    for mark, marked in _MARKS:
        if content.startswith(mark):
            marked = marked[:6].removesuffix("-")
            if not given.startswith(marked):
                raise Act24Error(_GIVEN.format(name, encoding, f"its byte-order mark says {marked}"))
            return
    wide, text = given.startswith(_WIDE), content.decode(encoding, "replace")
    shows = len(content) if wide else _bytes_not_ascii(content)
    if not given.startswith("utf-8") and b"\0" not in content and shows >= LEAST:
        with contextlib.suppress(UnicodeDecodeError):
            if codecs.getincrementaldecoder("utf-8")().decode(content, final=whole) != text:
                raise Act24Error(_GIVEN.format(name, encoding, "its bytes are UTF-8"))
    odd = len(_CONTROL.findall(text))
    if odd > LIMIT * len(text):
        said = f"{odd / len(text):.1%} of its characters are control characters in that"
        raise Act24Error(_GIVEN.format(name, encoding, said))


_GIVEN = '{}: data.encoding = "{}", and {}: set it to the one that it is in, or leave it out to detect it'


def _encoding_of(content: bytes, name: str, tally: Tally, whole: bool = True) -> str:
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return encoding
    if _ISO2022_JP.search(content):
        tally.encodings[name] = "iso2022_jp"
        return "iso2022_jp"
    wide = b"\0" in content  # UTF-16 without a mark may well be UTF-8 by the letter
    decoder = codecs.getincrementaldecoder("utf-8")
    text = decoder("replace").decode(content, final=whole)
    replaced = text.count("�")
    if replaced > LIMIT * len(text):
        try:
            decoder().decode(content, final=whole)
            replaced = 0  # they are in the file itself
        except UnicodeDecodeError:
            pass
    if not wide and replaced <= LIMIT * len(text):
        return "utf-8"
    found = _detected(content, whole)
    if found is None or wide != found.startswith(_WIDE):
        check_replaced(replaced, len(text), "UTF-8, and what else it may be is ambiguous", name)
        return "utf-8"
    if found in ENCODINGS:
        check_alike(readings(content), name)
    tally.encodings[name] = found
    return found


def _detected(content: bytes, whole: bool = False) -> str | None:
    """The encoding of some text, if it is certain and not UTF-8; of Latin script the most plausible.

    Args:
        whole: it does not end within a character.
    """
    import charset_normalizer

    wide = b"\0" in content
    if wide:
        sample, whole = content[:SAMPLE], whole and len(content) <= SAMPLE
    else:  # what is ASCII says nothing, and of long text the library looks at pieces
        sample, whole = (
            b"\n".join(dict.fromkeys(_WORDS.findall(content)))[: 4 * BLOCK],
            whole and len(content) <= 4 * BLOCK,
        )
    best = None
    for missing in range(1 if whole else 4):
        part = sample[: len(sample) - missing]
        for excluded in (_UNUSUAL, _UNUSUAL + _SHIFT_JIS):
            found = charset_normalizer.from_bytes(part, cp_exclusion=excluded, preemptive_behaviour=False)
            best = found.best()
            if best is None or 4 * len(_HALF_WIDTH.findall(str(best))) < len(str(best)):
                break
        if best is not None:
            break
    if best is None and not wide:  # among words of many kinds ASCII tells what the others are
        best = charset_normalizer.from_bytes(content[:SAMPLE], cp_exclusion=_UNUSUAL).best()
    if wide:
        return best.encoding if best is not None and best.encoding.startswith(_WIDE) else None
    if best is None:
        return None
    latin = next(iter(readings(content)), None)
    others = [character for character in str(best) if not character.isascii()]
    letters = [c for c in others if c.isalpha()]
    if 2 * sum(c < "\u0300" or "\u1e00" <= c <= "\u1eff" for c in letters) >= len(letters):
        return latin
    enough = len("".join(others).encode(best.encoding)) >= LEAST
    return best.encoding if enough and latin is None else None


def _bytes_not_ascii(content: bytes) -> int:
    return len(content.translate(None, bytes(range(128))))
