"""Changes chosen lines of the run's machinery, one at a time, and runs the tests that should notice.

    python tests/mutate.py [WORD ...]        those whose description has one of the words, or all

The lines stand in `tests/mutations/`. Works on a copy, so the checkout stays as it is. Prints one line a
mutation; the status is 1 if one survived.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
#: Loaded once, and inherited by the process of each mutation: PyTorch alone takes seconds.
_LIBRARIES = ("torch", "torch.distributed.fsdp", "tensorboard.backend.event_processing.event_accumulator")
_LIBRARIES += ("hypothesis", "datasets", "tokenizers", "typer", "pydantic", "rich.progress", "pytest")
_MOST_SECONDS = 900


class Mutation(NamedTuple):
    """A line, what becomes of it, and who has to notice: files of tests, and after them perhaps -k and a
    word."""

    what: str
    file: str
    old: str
    new: str
    tests: str


def _read() -> list[Mutation]:
    tables = [tomllib.loads(path.read_text()) for path in sorted((ROOT / "tests/mutations").glob("*.toml"))]
    return [Mutation(**entry) for table in tables for entry in table["mutation"]]


MUTATIONS = _read()


def survives(mutation: Mutation) -> bool:
    """Whether its tests pass.

    Raises:
        RuntimeError: no test ran, or pytest itself failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkout"
        skipped = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "docs", "runs")
        shutil.copytree(ROOT, copy, symlinks=True, ignore=skipped)
        path = copy / mutation.file
        path.write_text(path.read_text().replace(mutation.old, mutation.new))
        output = Path(folder) / "output"
        status = _run_tests(copy, mutation.tests, output)
        if status not in (0, 1):
            raise RuntimeError(f"{mutation.what}: pytest ended with {status}\n{output.read_text()[-3000:]}")
        return status == 0


def _run_tests(checkout: Path, tests: str, output: Path) -> int:
    """The status of pytest, in a process that is forked from this one."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        file = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.chdir(checkout)
        os.environ["PYTHONPATH"] = str(checkout)
        sys.path[:] = [str(checkout), *(entry for entry in sys.path if entry not in ("", str(ROOT)))]
        sys.path.remove(str(ROOT / "tests"))
        import pytest

        status = pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests.split()])
        sys.stdout.flush()
        os._exit(int(status))
    began = time.monotonic()
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() - began > _MOST_SECONDS:  # a run that waits for ever is noticed too
            os.killpg(child, 9)
            os.waitpid(child, 0)
            return 1
        time.sleep(0.1)
    return os.waitstatus_to_exitcode(ended[1])


def main(words: list[str]) -> int:
    for library in _LIBRARIES:
        importlib.import_module(library)
    survivors = 0
    for mutation in MUTATIONS:
        if words and not any(word in mutation.what for word in words):
            continue
        began = time.monotonic()
        alive = survives(mutation)
        survivors += alive
        seconds = time.monotonic() - began
        print(f"{'SURVIVED' if alive else 'noticed '} {seconds:4.0f} s  {mutation.what}", flush=True)
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
