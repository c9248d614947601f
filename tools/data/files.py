"""Local files: which ones a list of globs means, and the text documents in each.

    .txt .md .rst .py        one file, one document
    .json .jsonl .ndjson     one object a line (C4's shards), or one array of objects
    .parquet .arrow          one row, one document (.arrow in either of Arrow's two formats)

Text may be compressed (`.gz`, `.zst`), and is in any encoding (`encoding.py`).
"""

from __future__ import annotations

import glob
import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from act24.errors import Act24Error, reading
from act24.tools.data.encoding import check_replaced, decoded, open_text, plausible, take_stray
from act24.tools.data.tally import Records, Tally

TEXT = (".txt", ".md", ".rst", ".py")
LINES = (".json", ".jsonl", ".ndjson")
PARQUET = (".parquet",)
ARROW = (".arrow",)
KNOWN = TEXT + LINES + PARQUET + ARROW
COMPRESSED = (".gz", ".zst")
ROWS = 1024  # of a table at once
_NO_KIND = f"not a kind of file that is read here ({', '.join(KNOWN)}; {', '.join(COMPRESSED)} of these)"
ENOUGH = 10_000  # characters, of which a share means something

Wanted = Callable[[int], bool]
"""`wanted(index)`: whether a record is to be parsed."""


@dataclass(frozen=True)
class Reading:
    """How text is read.

    Attributes:
        text_field: of a record.
        encoding: of text files and JSON; None to detect it.
        skip_bad: leave out records that cannot be used.
        tally: counts what is wrong.
    """

    text_field: str = "text"
    encoding: str | None = None
    skip_bad: bool = False
    tally: Tally = field(default_factory=Tally)


def find_files(patterns: Iterable[str], unknown: set[str] | None = None) -> list[Path]:
    """The files that `patterns` (globs, `**` included; files; folders, for all known files beneath) mean.

    Files of unknown kind in folders are added to `unknown`. Sorted, so that the order is the same on every
    machine, and each file once, however it is spelled.

    Raises:
        Act24Error: a pattern that matches nothing, or a file of an unknown kind.
    """
    found: set[Path] = set()
    for pattern in patterns:
        with reading(f"cannot look for {pattern!r}", RuntimeError):  # "~" and no such user
            matches = [Path(match) for match in glob.glob(str(Path(pattern).expanduser()), recursive=True)]
            files = {path for path in matches if path.is_file()}
        for path in files:
            if suffix(path) not in KNOWN:
                raise Act24Error(f"{path}: {_NO_KIND}")
        if not files:  # only then look beneath folders: `data/*` means the files, `data` all that is in it
            beneath = [path for folder in matches if folder.is_dir() for path in _beneath(folder)]
            files = {path for path in beneath if suffix(path) in KNOWN}
            if beneath and not files:
                others = f" and {len(beneath) - 1} more" if len(beneath) > 1 else ""
                raise Act24Error(f"{min(beneath)}{others}: {_NO_KIND}")
            if unknown is not None:
                unknown.update(str(path) for path in beneath if path not in files)
        if not files:
            empty = any(path.is_dir() for path in matches)
            none = f"there is no file in {pattern!r}" if empty else f"no data file matches {pattern!r}"
            raise Act24Error(f"{none} (from {Path.cwd()})")
        found |= files
    once: dict[Path, Path] = {}
    for path in sorted(found):
        once.setdefault(resolved(path), path)
    return list(once.values())


def resolved(path: Path) -> Path:
    """Which file it is, by whatever path or link it was found.

    Raises:
        Act24Error: links that go in a circle, or folders that may not be read.
    """
    try:
        return path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise Act24Error(f"cannot read {path}: {error}") from error


def known_as(path: Path) -> set[Path | tuple[int, int]]:
    """By what else a path of the same file is recognised: where links lead, and, as hard links lead nowhere,
    its number on its device, where the file system has numbers.

    Raises:
        Act24Error: see `resolved`.
    """
    target = resolved(path)
    with reading(f"cannot read {path}"):
        facts = target.stat()
    return {target, (facts.st_dev, facts.st_ino)} if facts.st_ino else {target}


def read_documents(path: Path, how: Reading, wanted: Wanted) -> Iterator[str | None]:
    """One item a record of `path`, in order: its text where `wanted(index)`, else None without parsing it.
    None stands for a record that was skipped, too.

    Raises:
        Act24Error: the file cannot be read, is corrupt, is not in the encoding, or a record has no text in
            `how.text_field`.
    """
    import pyarrow

    # gzip has three errors of its own, depending on where the damage is; pyarrow one for each layer.
    with reading(f"cannot read {path}", zlib.error, pyarrow.ArrowException):
        yield from _READERS[suffix(path)](path, how, wanted)


def text_of(record: Any, how: Reading, where: str) -> str:
    """The text of a record, as text that can be encoded as UTF-8; null counts as empty.

    Raises:
        Act24Error: `record` is no mapping, lacks the field (the message lists those present, and which of
            them hold text) or holds no string.
    """
    text_field = how.text_field
    if not isinstance(record, dict):
        raise Act24Error(
            f"{where}: expected an object with a field {text_field!r}, got {type(record).__name__}"
        )
    if text_field not in record:
        raise Act24Error(f"{where}: no field {text_field!r}{_instead(record)}")
    text = "" if record[text_field] is None else record[text_field]
    if not isinstance(text, str):
        remedy = ": cast the column to strings" if isinstance(text, bytes) else ""
        raise Act24Error(f"{where}: field {text_field!r} holds {type(text).__name__}, not text{remedy}")
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:  # JSON may escape half of a surrogate pair, which no tokenizer accepts
        whole = text.encode("utf-8", "replace").decode("utf-8")
        how.tally.replaced += whole.count("?") - text.count("?")
        return whole


def _instead(record: dict[Any, Any]) -> str:
    """What a record has in place of the field; a value that is not known, None, may be text."""
    texts = [name for name, value in record.items() if value is None or isinstance(value, str)]
    others = [name for name in record if name not in texts]
    if not texts:
        return f", and no text in its fields: {_names(others)}" if others else ": the record is empty"
    left = f", not {_names(others)}, where there is no text" if others else ""
    return f"; set data.text_field to one of: {_names(texts)}{left} (--text-field of `data prepare`)"


def _names(fields: list[Any]) -> str:
    return ", ".join(str(field)[:30] for field in fields[:6]) + (", …" if len(fields) > 6 else "")


def suffix(path: Path) -> str:
    """What kind of file it is, compressed or not: ".jsonl" of "a.jsonl.gz"."""
    name = path.name
    for compressed in COMPRESSED:
        name = name.removesuffix(compressed)
    return Path(name).suffix.lower()


def _beneath(folder: Path) -> Iterator[Path]:
    """All files, but for hidden ones and those in hidden folders."""
    for path in folder.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".zst":
        import pyarrow

        return cast(BinaryIO, pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _read_text(path: Path, how: Reading, wanted: Wanted) -> Iterator[str | None]:
    if not wanted(0):
        yield None
        return
    with _open(path) as file:
        content = file.read()
    yield decoded(content, how.encoding, str(path), how.tally)


def _read_lines(path: Path, how: Reading, wanted: Wanted) -> Iterator[str | None]:
    records = _records(path, how)
    replaced, characters, given = 0, 0, how.encoding is not None
    with _open(path) as binary:
        file, encoding = open_text(binary, how.encoding, str(path), how.tally)
        first = file.readline().removeprefix("\ufeff")
        lines = itertools.chain([first], file)
        if how.encoding is None and not encoding.startswith("utf-8"):
            lines = plausible(lines, encoding, str(path), how.tally)
        if first.lstrip().startswith("["):
            content, replaced = take_stray("".join(lines))
            check_replaced(replaced, len(content), encoding, str(path), given)
            for index, record in enumerate(_parse(content, str(path))):
                where = f"{path}, item {index}"
                yield _usable(record, how, where, records) if wanted(index) else None
            records.check_replaced()
            return
        for index, line in enumerate(lines):
            line, stray = take_stray(line)
            replaced, characters = replaced + stray, characters + len(line)
            if stray and characters >= ENOUGH:  # not only at the end, when a model has read the file
                check_replaced(replaced, characters, encoding, str(path), given)
            if not (wanted(index) and line.strip()):
                yield None
                continue
            where = f"{path}, line {index + 1}"
            try:
                record = _parse(line, where)
            except Act24Error as error:
                records.bad(error)
                yield None
                continue
            yield _usable(record, how, where, records)
    check_replaced(replaced, characters, encoding, str(path), given)
    records.check_replaced()


def _records(path: Path, how: Reading) -> Records:
    """To count those of a file in. Who names an encoding has looked at what is in it."""
    return Records(str(path), how.skip_bad, how.tally, refuses=how.encoding is None)


def _usable(record: Any, how: Reading, where: str, records: Records) -> str | None:
    try:
        text = text_of(record, how, where)
    except Act24Error as error:
        records.bad(error)
        return None
    records.good(text)
    return text


def _parse(text: str, where: str) -> Any:
    with reading(f"{where}: expected one JSON object a line, or one array of objects"):
        return json.loads(text)


def _read_parquet(path: Path, how: Reading, wanted: Wanted) -> Iterator[str | None]:
    from pyarrow.parquet import ParquetFile

    records = _records(path, how)
    with ParquetFile(path) as file:
        _check_column(file.schema_arrow.names, how, path)
        index = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if not any(wanted(i) for i in range(index, index + count)):
                yield from itertools.repeat(None, count)  # read before a resume, and now skipped unread
                index += count
                continue
            for batch in file.iter_batches(ROWS, row_groups=[group], columns=[how.text_field]):
                yield from _column(batch.column(0).to_pylist(), index, path, how, wanted, records)
                index += batch.num_rows
    records.check_replaced()


def _read_arrow(path: Path, how: Reading, wanted: Wanted) -> Iterator[str | None]:
    import pyarrow

    records = _records(path, how)
    with pyarrow.memory_map(str(path)) as source:
        magic = source.read(6)
        source.seek(0)
        if not magic:
            raise Act24Error(f"cannot read {path}: it is empty, and an Arrow file begins with a schema")
        if magic == b"ARROW1":
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            batches = reader = pyarrow.ipc.open_stream(source)
        _check_column(reader.schema.names, how, path)
        index = 0
        for batch in batches:
            column = batch.column(how.text_field)
            column.validate(full=True)  # Arrow trusts offsets in a file: a damaged one ends the process
            yield from _column(column.to_pylist(), index, path, how, wanted, records)
            index += batch.num_rows
    records.check_replaced()


def _check_column(names: list[str], how: Reading, path: Path) -> None:
    if how.text_field not in names:
        text_of(dict.fromkeys(names), how, str(path))  # says so, with the columns that there are


def _column(
    column: list[Any], start: int, path: Path, how: Reading, wanted: Wanted, records: Records
) -> Iterator[str | None]:
    for index, text in enumerate(column, start):
        where = f"{path}, row {index}"
        yield _usable({how.text_field: text}, how, where, records) if wanted(index) else None


_READERS = {
    **dict.fromkeys(TEXT, _read_text),
    **dict.fromkeys(LINES, _read_lines),
    **dict.fromkeys(PARQUET, _read_parquet),
    **dict.fromkeys(ARROW, _read_arrow),
}
