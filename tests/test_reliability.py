"""docs/reliability.md says what was tried: its tests exist, with as many cases; counts are those of files."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from mutate import MUTATIONS, ROOT

TEXT = (ROOT / "docs/reliability.md").read_text()
SOAK = json.loads((ROOT / "docs/results/soak.json").read_text())
#: Of each fault, the tests that inject it and how many cases they have.
FAULTS = {
    row.split("|")[1].strip(): (re.findall(r"`(test_\w+\.py)::(test_\w+)`", row), int(row.split("|")[-2]))
    for row in TEXT.splitlines()
    if "::test_" in row
}


def collected(names: set[str]) -> Counter[tuple[str, str]]:
    """How many cases the tests of files have that this session was not given."""
    files = sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if path.name in names)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", *files]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = re.findall(r"^(\S+\.py)::(test_\w+)", result.stdout, re.MULTILINE)
    return Counter((Path(file).name, test) for file, test in found)


def test_every_fault_has_a_test_and_says_how_many_cases(cases):
    named = {name for tests, _ in FAULTS.values() for name, _ in tests}
    if missing := named - {name for name, _ in cases}:
        cases = cases + collected(missing)  # whoever runs this file alone
    assert len(FAULTS) > 40
    assert {fault: sum(cases[test] for test in tests) for fault, (tests, _) in FAULTS.items()} == {
        fault: count for fault, (_, count) in FAULTS.items()
    }
    assert all(cases[test] for tests, _ in FAULTS.values() for test in tests)


def test_the_soak_is_as_it_was_written():
    struck = SOAK["struck"]
    row = [SOAK["kills"], SOAK["runs"], struck["before the first checkpoint"], struck["between checkpoints"]]
    row += [struck["a checkpoint was half written or half deleted"], len(SOAK["differences"])]
    assert f"| {' | '.join(map(str, row))} |" in TEXT
    assert sum(struck.values()) == SOAK["kills"] >= 200
    assert not SOAK["differences"]


def test_the_tally_of_fuzzing_has_no_traceback():
    """Each target of `tests/fuzz`: what was neither refused nor taken was a traceback."""
    tally = re.findall(r"^\| ([a-z ]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", TEXT, re.MULTILINE)
    counts = {name: [int(count.replace(",", "")) for count in row] for name, *row in tally}
    text = "".join(path.read_text() for path in (ROOT / "tests/fuzz").glob("test_*.py"))
    assert counts.keys() == {name.replace("_", " ") for name in re.findall(r"def test_(\w+)\(tried", text)}
    assert all(tries == refused + taken for tries, refused, taken in counts.values())


def test_the_mutations_are_counted():
    assert f"`make mutate` changes {len(MUTATIONS)} chosen lines" in TEXT


@pytest.mark.slow
def test_the_soak_finds_nothing_in_a_few_kills():
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests/soak.py"), "--kills", "4"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads(result.stdout[result.stdout.index("{") :])["kills"] == 4
