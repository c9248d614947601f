"""Local files: which ones a list of globs means, and the text documents in each.

    .txt .md .rst .py        one file, one document
    .json .jsonl .ndjson     one object a line (C4's shards), or one array of objects
    .parquet                 one row, one document

All but .parquet may be gzipped (`.gz`). Text is UTF-8; a byte that is not becomes U+FFFD, because one stray
byte in gigabytes of text is no reason to end a run.
"""

from __future__ import annotations

import glob
import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO, cast

from act24.errors import Act24Error

TEXT = (".txt", ".md", ".rst", ".py")
LINES = (".json", ".jsonl", ".ndjson")
PARQUET = (".parquet",)
KNOWN = TEXT + LINES + PARQUET


def find_files(patterns: Iterable[str]) -> list[Path]:
    """The files that `patterns` (globs, `**` included; files; folders, for all known files beneath) mean.

    Sorted, so that the order is the same on every machine, and each file once, however it is spelled.

    Raises:
        Act24Error: a pattern that matches nothing, or a file of an unknown kind.
    """
    found: set[Path] = set()
    for pattern in patterns:
        matches = [Path(match) for match in glob.glob(str(Path(pattern).expanduser()), recursive=True)]
        files = {path for path in matches if path.is_file()}
        for path in files:
            if suffix(path) not in KNOWN:
                raise Act24Error(
                    f"{path}: not a kind of file that is read here ({', '.join(KNOWN)}; .gz of these)"
                )
        if not files:  # only then look beneath folders: `data/*` means the files, `data` all that is in it
            beneath = (path for folder in matches if folder.is_dir() for path in folder.rglob("*"))
            files = {path for path in beneath if path.is_file() and suffix(path) in KNOWN}
        if not files:
            raise Act24Error(f"no data file matches {pattern!r} (from {Path.cwd()})")
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


def read_documents(path: Path, text_field: str, wanted: Callable[[int], bool]) -> Iterator[str | None]:
    """One item a record of `path`, in order: its text where `wanted(index)`, else None without parsing it.

    Raises:
        Act24Error: the file cannot be read, is corrupt, or a record has no text in `text_field`.
    """
    try:
        yield from _READERS[suffix(path)](path, text_field, wanted)
    except (OSError, EOFError, zlib.error) as error:  # gzip says all three, depending on where the damage is
        raise Act24Error(f"cannot read {path}: {error or type(error).__name__}") from error


def text_of(record: Any, text_field: str, where: str) -> str:
    """`record[text_field]`, as text that can be encoded as UTF-8; null counts as empty.

    Raises:
        Act24Error: `record` is no mapping, lacks the field (the message lists those present) or holds no
            string.
    """
    if not isinstance(record, dict):
        raise Act24Error(
            f"{where}: expected an object with a field {text_field!r}, got {type(record).__name__}"
        )
    if text_field not in record:
        raise Act24Error(
            f"{where}: no field {text_field!r}; set data.text_field to one of: {', '.join(record)}"
        )
    text = "" if record[text_field] is None else record[text_field]
    if not isinstance(text, str):
        raise Act24Error(f"{where}: field {text_field!r} holds {type(text).__name__}, not text")
    # JSON may escape half of a surrogate pair, which no tokenizer accepts.
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def suffix(path: Path) -> str:
    """What kind of file it is, gzipped or not: ".jsonl" of "a.jsonl.gz"."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return cast(TextIO, gzip.open(path, "rt", encoding="utf-8", errors="replace"))
    return path.open(encoding="utf-8", errors="replace")


def _read_text(path: Path, text_field: str, wanted: Callable[[int], bool]) -> Iterator[str | None]:
    if not wanted(0):
        yield None
        return
    with _open(path) as file:
        yield file.read()


def _read_lines(path: Path, text_field: str, wanted: Callable[[int], bool]) -> Iterator[str | None]:
    with _open(path) as file:
        first = file.readline()
        if first.lstrip().startswith("["):
            for index, record in enumerate(_parse(first + file.read(), str(path))):
                yield text_of(record, text_field, f"{path}, item {index}") if wanted(index) else None
            return
        for index, line in enumerate(itertools.chain([first], file)):
            where = f"{path}, line {index + 1}"
            yield text_of(_parse(line, where), text_field, where) if wanted(index) and line.strip() else None


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise Act24Error(
            f"{where}: expected one JSON object a line, or one array of objects: {error}"
        ) from error


def _read_parquet(path: Path, text_field: str, wanted: Callable[[int], bool]) -> Iterator[str | None]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                text_of(dict.fromkeys(names), text_field, str(path))  # says so, with the fields there are
            index = 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if any(wanted(i) for i in range(index, index + count)):
                    column = file.read_row_group(group, columns=[text_field]).column(0).to_pylist()
                else:
                    column = [None] * count  # a row group that was read before a resume is skipped unread
                for text in column:
                    yield (
                        text_of({text_field: text}, text_field, f"{path}, row {index}")
                        if wanted(index)
                        else None
                    )
                    index += 1
    except pyarrow.ArrowException as error:
        raise Act24Error(f"cannot read {path}: {error}") from error


_READERS = {
    **dict.fromkeys(TEXT, _read_text),
    **dict.fromkeys(LINES, _read_lines),
    **dict.fromkeys(PARQUET, _read_parquet),
}
