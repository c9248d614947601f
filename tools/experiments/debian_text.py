"""English text from Debian's documentation packages, for machines that cannot reach C4.

    apt-get download anarchism python3.11-doc perl-doc dict-gcide linux-doc-6.1
    python -m act24.tools.experiments.debian_text TEXT *.deb
    act24 data prepare TEXT SHARDS --vocab-size 32000

Prose, manuals and a dictionary, about 90 MB. More packages make more text: of one that has no sources of its
pages, HTML is read. Losses on it are not losses on C4: compare runs with each other.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
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


class _Page(HTMLParser):
    """The text of a page, without its menus; paragraphs are lines, and so are those of preformatted
    text, without what indents the first."""

    _HIDDEN = frozenset(("head", "script", "style", "nav", "header", "footer", "select", "button"))
    _INLINE = frozenset(
        ("a", "abbr", "b", "code", "em", "font", "i", "kbd", "span", "strong", "sub", "sup", "tt", "var")
    )

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = self._preformatted = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._hidden = 0 if tag == "body" else self._hidden + (tag in self._HIDDEN)  # a head may stay open
        self._preformatted += tag == "pre"
        if tag not in self._INLINE:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = max(self._hidden - (tag in self._HIDDEN), 0)
        self._preformatted = max(self._preformatted - (tag == "pre"), 0)
        if tag not in self._INLINE:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data if self._preformatted else re.sub(r"\s+", " ", data))


def pages(root: Path) -> Iterator[str]:
    """The texts of HTML pages."""
    for path in sorted(root.rglob("*.html")):
        if path.is_file() and not path.is_symlink():
            page = _Page()
            page.feed(path.read_text(encoding="utf-8", errors="replace"))
            page.close()
            yield re.sub(r"\s*\n\s*?\n\s*?(?=\S|$)", "\n", "".join(page.parts))


def main() -> None:
    """Unpack the packages named on the command line and write one file a document into a folder."""
    out, packages = Path(sys.argv[1]), sys.argv[2:]
    out.mkdir(parents=True)
    seen: set[str] = set()
    for package in packages:
        with tempfile.TemporaryDirectory() as unpacked:
            subprocess.run(["dpkg-deb", "-x", package, unpacked], check=True)
            texts = documents(Path(unpacked))
            first = next(texts, None)
            for text in pages(Path(unpacked)) if first is None else itertools.chain((first,), texts):
                for start in range(0, len(text), _DOCUMENT):
                    part = text[start : start + _DOCUMENT]
                    digest = hashlib.sha256(part.encode()).hexdigest()[:16]
                    if len(part) > 200 and digest not in seen:
                        seen.add(digest)
                        (out / f"{digest}.txt").write_text(part, encoding="utf-8")
    print(f"{len(seen)} documents in {out}")


if __name__ == "__main__":
    main()
