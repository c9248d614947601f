"""Files and folders that are whole or not there: written under another name, then renamed."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from act24.errors import Act24Error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, which is moved onto it at the end, and removed if writing fails.

    Whoever reads `path` sees the old content or the new. Several processes may write it: each has a name of
    its own, and the last one wins.

    Raises:
        OSError: it cannot be moved; or whatever the body raises.
    """
    partial = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:12]}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` to write to, which becomes `out` at the end, and is deleted if writing
    fails.

    Raises:
        Act24Error: the body could not write, or `out` has come to be a folder with something in it; or
            whatever else the body raises.
    """
    written = out.with_name(f"{out.name}.tmp-{uuid.uuid4().hex[:12]}")
    try:
        written.mkdir(parents=True)
        yield written
        written.rename(out)
    except (OSError, SafetensorError) as error:
        raise Act24Error(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(written, ignore_errors=True)
