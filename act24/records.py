"""Tables of records: a method, an estimator, an optimizer, a schedule is one record in one table.

Recipes, passes, forms, statistics, checks and documentation read the table; a package from outside adds to
it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic, Protocol, TypeVar

from act24.errors import nearest
from act24.options import OptionError


class Record(Protocol):
    """What a table holds."""

    @property
    def name(self) -> str:
        """As recipes and errors have it."""
        ...


R = TypeVar("R", bound=Record)


class Table(Mapping[str, R], Generic[R]):
    """Records by name, in the order in which they were added."""

    def __init__(self, kind: str, *records: R) -> None:
        """
        Args:
            kind: what one of them is, for errors: "method of activation24".
        """
        self.kind = kind
        self._records: dict[str, R] = {}
        for record in records:
            self.add(record)

    def add(self, record: R) -> R:
        """Add a record; also what a plugin calls. Adding the same record again changes nothing.

        Raises:
            OptionError: there is another one of this name.
        """
        known = self._records.get(record.name)
        if known is not None and known != record:
            raise OptionError(f"there is a {self.kind} named {record.name!r} already")
        self._records[record.name] = record
        return record

    def __getitem__(self, name: str) -> R:
        if name not in self._records:
            raise OptionError(f"there is no {self.kind} named {name!r}: {nearest(str(name), self._records)}")
        return self._records[name]

    def get(self, name: str, default: R | None = None) -> R | None:  # type: ignore[override]
        """The record, or `default`."""
        return self._records.get(name, default)

    def __contains__(self, name: object) -> bool:
        return name in self._records

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)
