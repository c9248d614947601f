"""Files that are whole or not there: written under another name, then renamed."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
