"""What is fuzzed, how often, and the tally of it.

An example passes if it ends well or in an `Act24Error` with a text of one line or more. Everything else is a
traceback for somebody's bad input, and fails. ACT24_FUZZ is the number of examples of each target: few in
`make test`, thousands in `make fuzz`.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from act24.errors import Act24Error

EXAMPLES = int(os.environ.get("ACT24_FUZZ", "15"))
TALLY: dict[str, Counter[str]] = defaultdict(Counter)

fuzzing = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)


@pytest.fixture
def tried(request: pytest.FixtureRequest) -> Callable[[Callable[[], Any]], None]:
    """`tried(work)` does it, counts how it ends under the name of the test, and fails on a traceback."""
    tally = TALLY[request.node.name.removeprefix("test_").replace("_", " ")]

    def run(work: Callable[[], Any]) -> None:
        tally["tries"] += 1
        try:
            work()
        except Act24Error as error:
            text = str(error)
            tally["refused"] += 1
            if not text.strip() or len(text) > 20_000:
                raise AssertionError(f"an error of {len(text)} characters") from error
        else:
            tally["fine"] += 1

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if EXAMPLES < 100 or not TALLY:
        return
    terminalreporter.write_line("\n| target | tries | refused in one line | taken |\n|---|--:|--:|--:|")
    for name, counts in sorted(TALLY.items()):
        terminalreporter.write_line(
            f"| {name} | {counts['tries']:,} | {counts['refused']:,} | {counts['fine']:,} |"
        )
