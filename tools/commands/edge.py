"""Where a command ends: what a user can mend is one line and status 2, a bug is a traceback.

Whoever reads a file says what is wrong with it (`act24.errors.reading`). What is caught here may come from
any line of a command: the disk, memory, a reader that went away, a terminal that cannot print a character.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from act24.errors import Act24Error, reason

TRACEBACK = "ACT24_TRACEBACK"


@contextmanager
def ends_in_one_line() -> Iterator[None]:
    """Run a command in here."""
    # What was closed (`>&-`) is nobody's wish to read. Without it the next file opened would be the output.
    sys.stdout, sys.stderr = sys.stdout or _nowhere(), sys.stderr or _nowhere()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a latin-1 terminal has no "→", which must not end a run
            stream.reconfigure(errors="replace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # a full disk shows here, or when nobody can say so any more
    except Act24Error as error:
        _end(str(error), error)
    except BrokenPipeError:  # `act24 recipe ls | head -1`
        _forget_output()
        sys.exit(1)
    except (OSError, MemoryError, UnicodeError) as error:
        _end(_named(error), error)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, known by name: `--help` imports no torch
            raise
        _end(f"{_named(error)}; a smaller train.batch_size takes less", error)


def _nowhere() -> TextIO:
    return open(os.devnull, "w")


def _forget_output() -> None:
    """Or Python's last flush would fail once more, and say so."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _named(error: BaseException) -> str:
    file = getattr(error, "filename", None)
    kind = "out of memory" if isinstance(error, MemoryError | RuntimeError) else "failed"
    return f"{kind}: {reason(error)}{f': {file}' if file else ''} ({TRACEBACK}=1 shows where)"


def _end(text: str, error: BaseException) -> None:
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    try:
        sys.stdout.flush()
    except OSError:
        _forget_output()
    for line in text.splitlines():
        print(f"act24: {line}", file=sys.stderr)
    sys.exit(2)
