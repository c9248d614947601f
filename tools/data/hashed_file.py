"""A file that knows what it holds while it is written."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from act24.errors import Act24Error


class HashedFile:
    """A file that knows its size and SHA-256, and is on the disk when it is closed.

    Args:
        keep: bytes of the file that is there which stay and are written on from; 0 begins anew.

    Raises:
        Act24Error: there are fewer.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        self.path = path
        self.bytes = 0
        self._hash = hashlib.sha256()
        self._file = path.open("r+b" if keep else "wb")
        while self.bytes < keep:
            piece = self._file.read(min(2**20, keep - self.bytes))
            if not piece:
                self._file.close()
                raise Act24Error(f"{path} has {self.bytes} bytes, and {keep} were written")
            self._hash.update(piece)
            self.bytes += len(piece)
        self._file.seek(keep)
        self._file.truncate()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.bytes += len(data)

    def facts(self) -> dict[str, Any]:
        return {"bytes": self.bytes, "sha256": self._hash.hexdigest()}

    def sync(self) -> None:
        """Force what was written to the disk; a closed file has been."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if not self._file.closed:
            with self._file:
                self.sync()

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
