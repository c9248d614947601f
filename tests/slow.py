"""Parameters of tests that cross everything: some are in `make test`, all in `make test-slow`."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def slow_but(quick: Container[Any], values: Iterable[Any]) -> list[Any]:
    """The values as parameters, slow but for the quick ones; a tuple is a value of each of several."""
    return [
        value
        if value in quick
        else pytest.param(*(value if type(value) is tuple else (value,)), marks=pytest.mark.slow)
        for value in values
    ]
