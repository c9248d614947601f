"""Every Triton kernel in Triton's interpreter: the files `interpreted/check_*.py`, in a process of their own,
for the interpreter is chosen when Triton is first imported."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = sorted((Path(__file__).parent / "interpreted").glob("check_*.py"))


def run(rows: str) -> str:
    """What one process says that runs them all: it needs seconds before the first."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-m", rows, "-p", "no:cacheprovider", "-W", "ignore"]
    command += ["-rA", "--color=no", *map(str, CHECKS)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode in (0, 1), finished.stdout[-4000:] + finished.stderr[-2000:]
    return finished.stdout


@pytest.fixture(scope="module")
def output() -> str:
    return run("not slow")


missing = importlib.util.find_spec("triton") is None
needs_triton = pytest.mark.skipif(missing, reason="Triton is not installed")


@needs_triton
@pytest.mark.parametrize("checks", CHECKS, ids=lambda path: path.stem)
def test_kernels_in_the_interpreter(checks: Path, output: str) -> None:
    ends = re.findall(rf"^([A-Z]+) \S*{checks.name}::", output, re.MULTILINE)
    assert {*ends} == {"PASSED"}, output[-6000:]


@pytest.mark.slow
@needs_triton
def test_the_slow_rows_in_the_interpreter() -> None:
    output = run("slow")
    assert {*re.findall(r"^([A-Z]+) \S*check_\w+\.py::", output, re.MULTILINE)} == {"PASSED"}, output[-6000:]
