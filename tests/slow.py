"""Parameters of tests that cross everything: some are in `make test`, all in `make test-slow`."""

from collections.abc import Container, Iterable
from typing import Any

import pytest
from _pytest.mark import ParameterSet


def slow_but(quick: Container[Any], values: Iterable[Any]) -> list[Any]:
    """The values as parameters, slow but for the quick ones; a tuple is a value of each of several."""
    return [value if value in quick else _slow(value) for value in values]


def slow_after(count: int, values: Iterable[Any]) -> list[Any]:
    """The values as parameters, slow after the first ones."""
    values = list(values)
    return [*values[:count], *map(_slow, values[count:])]


def _slow(value: Any) -> Any:
    if isinstance(value, ParameterSet):
        return pytest.param(*value.values, id=value.id, marks=[*value.marks, pytest.mark.slow])
    return pytest.param(*(value if type(value) is tuple else (value,)), marks=pytest.mark.slow)
