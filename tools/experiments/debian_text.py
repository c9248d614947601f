"""English text from Debian's documentation packages, for machines that cannot reach C4.

    apt-get download anarchism python3.11-doc perl-doc dict-gcide linux-doc-6.1
    python -m act24.tools.experiments.debian_text TEXT *.deb
    act24 data prepare TEXT SHARDS --vocab-size 32000

Prose, manuals and a dictionary, about 90 MB. Losses on it are not losses on C4: compare runs with each other.
"""

from __future__ import annotations

import gzip
import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_DOCUMENT = 50_000  # characters; longer files are cut there, so that held-out documents are of every kind


def documents(root: Path) -> Iterator[str]:
    """The texts in unpacked packages: Markdown, reStructuredText, pod and the GCIDE dictionary."""
    for path in sorted(root.rglob("*")):
        name = path.name
        if not path.is_file() or path.is_symlink() or "translations" in path.parts:
            continue
        if name.endswith((".md.gz", ".rst.gz", ".dict.dz")):
            yield gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
        elif name.endswith((".rst.txt", ".pod")):
            yield path.read_text(encoding="utf-8", errors="replace")


def main() -> None:
    """Unpack the packages named on the command line and write one file a document into a folder."""
    out, packages = Path(sys.argv[1]), sys.argv[2:]
    out.mkdir(parents=True)
    seen: set[str] = set()
    with tempfile.TemporaryDirectory() as unpacked:
        for package in packages:
            subprocess.run(["dpkg-deb", "-x", package, unpacked], check=True)
        for text in documents(Path(unpacked)):
            for start in range(0, len(text), _DOCUMENT):
                part = text[start : start + _DOCUMENT]
                digest = hashlib.sha256(part.encode()).hexdigest()[:16]
                if len(part) > 200 and digest not in seen:
                    seen.add(digest)
                    (out / f"{digest}.txt").write_text(part, encoding="utf-8")
    print(f"{len(seen)} documents in {out}")


if __name__ == "__main__":
    main()
