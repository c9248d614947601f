"""What is counted reads right where there is one of it, and where there are two."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from act24.passes.report import _by_reason
from act24.tools.data.rows import too_short
from act24.tools.data.tally import Tally
from act24.tools.watch.sparsity_watch import alarms
from act24.tools.watch.statistics import SiteStatistics
from act24.words import counted


def loud(others):
    site = SiteStatistics(0, "mlp", 0.5, 0.1, 0.1, dropped_energy=0.05)
    return alarms([site, *(replace(site, layer=n + 1, dropped_energy=0.02) for n in range(others))])[0]


def tallied(**counts):
    return Tally(**counts).lines()[0]


CASES = [
    (loud, "at 1 other", "at 2 others"),
    (
        lambda n: tallied(unknown=["a.pdf"] * n),
        "1 file of unknown kind is left out: a.pdf",
        "2 files of unknown kind are left out: a.pdf, a.pdf",
    ),
    (
        lambda n: tallied(encodings={f"{i}.txt": "gb18030" for i in range(n)}),
        "1 file is read as gb18030",
        "2 files are read as gb18030",
    ),
    (
        lambda n: tallied(held_out=["a"] * n),
        "1 file of data.train_files has the content of one in data.heldout_files, and is trained on",
        "2 files of data.train_files have the content of files in data.heldout_files, and are trained on",
    ),
    (
        lambda n: tallied(touched=["a"] * n),
        "1 large file was modified while it is read",
        "2 large files were modified while they are read",
    ),
    (
        lambda n: tallied(documents=n, replaced=n, dropped=n, empty=n, repeated=n, retries=n),
        "of 1 document read so far: 1 replaced character, 1 dropped record, 1 empty document, "
        "1 repeated document, 1 retry",
        "of 2 documents read so far: 2 replaced characters, 2 dropped records, 2 empty documents, "
        "2 repeated documents, 2 retries",
    ),
    (lambda n: too_short(n, 8), "has 1 token, fewer", "has 2 tokens, fewer"),
    (lambda n: _by_reason([(str(i), str(i)) for i in range(4 + n)]), "and 1 more reason", "2 more reasons"),
    (lambda n: counted(1000 * n, "token"), "1,000 tokens", "2,000 tokens"),
]


@pytest.mark.parametrize(("text", "one", "two"), CASES)
def test_one_and_two_read_right(text, one, two):
    for number, expected in enumerate((one, two), start=1):
        assert re.search(rf"{re.escape(expected)}\b|{re.escape(expected)}$", text(number)), text(number)
