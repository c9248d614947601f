"""Tables of a recipe that choose a record by name, as objects: `[optimizer]`, `[schedule]`, `[[passes]]`.

The record is a frozen dataclass of options. Which keys there are, what they take and what they are where the
recipe says nothing is all read off it; `act24.options` checks it, here as in Python.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Protocol, TypeVar

import tomli_w

from act24.errors import Act24Error, nearest
from act24.options import option_errors
from act24.records import Table


class Named(Protocol):
    """A dataclass of options that stands in a table of records."""

    name: ClassVar[str]


T = TypeVar("T", bound=Named)


def made(
    table: Table[type[T]],
    values: Mapping[str, Any],
    path: str,
    key: str,
    errors: list[str],
    hint: Callable[[str, Iterable[str]], str] = nearest,
) -> T | None:
    """The object that a table of a recipe describes, or None with what is wrong added to `errors`.

    Args:
        values: the table of the recipe, its lists as tuples; `values[key]`, a string, names the record.
        path: where it stands in the recipe, for errors.
        key: `name` or `use`.
        hint: what is said of a key that is none of those given, `nearest` or what knows other tables too.
    """
    options = dict(values)
    name: str = options.pop(key)
    aliases = {alias: cls.name for cls in table.values() for alias in getattr(cls, "aliases", ())}
    name = aliases.get(name) or name
    if name not in table:
        errors.append(f"{path}.{key}: there is no {table.kind} named {name!r}: {nearest(name, table)}")
        return None
    record = table[name]
    fields = {field.name: field for field in recipe_fields(record)}
    found = [_unknown(table, record, option, path, key, hint) for option in options if option not in fields]
    required = [f.name for f in fields.values() if _has_no_default(f)]
    found += [f"{path}.{option}: missing" for option in required if option not in options]
    known = {option: value for option, value in options.items() if option in fields}
    found += [f"{path}.{error.field}: {error.reason}" for error in option_errors(record, known)]
    if found:
        errors += found
        return None
    try:
        return record(**known)
    except Act24Error as error:  # about two options
        errors.append(f"{path}: {error}")
    return None


def as_table(options: Named, key: str = "name") -> dict[str, Any]:
    """The table that makes these options again: every value, defaults included. TOML has no None."""
    values = {field.name: getattr(options, field.name) for field in recipe_fields(type(options))}
    return {key: options.name} | {name: value for name, value in values.items() if value is not None}


def recipe_fields(record: type) -> list[dataclasses.Field[Any]]:
    """The options that a recipe may name."""
    return [field for field in dataclasses.fields(record) if not field.metadata.get("python_only")]


def _unknown(
    table: Table[Any],
    record: Any,
    option: str,
    path: str,
    key: str,
    hint: Callable[[str, Iterable[str]], str],
) -> str:
    owners = [other.name for other in table.values() if option in {f.name for f in recipe_fields(other)}]
    if owners:
        belongs = " or ".join(f'{key} = "{owner}"' for owner in owners)
        return f'{path}.{option}: belongs to {belongs}, not to "{record.name}"'
    names = [field.name for field in recipe_fields(record)]
    return f"{path}.{option}: unknown key: {hint(option, [key, *names])}"


def _has_no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def toml_value(value: Any) -> str:
    """A string, number, truth value or list of them, as TOML writes it on one line."""
    if isinstance(value, tuple | list):  # which tomli-w puts on several
        return f"[{', '.join(map(toml_value, value))}]"
    return tomli_w.dumps({"value": value}).removeprefix("value = ").removesuffix("\n")


def toml_text(table: Mapping[str, Any]) -> str:
    """A recipe as TOML, each entry of a list of tables under a heading of its own, `[[passes]]`: tomli-w puts
    short ones on one line, behind which nobody can write another heading."""
    lists = {name: value for name, value in table.items() if value and isinstance(value, list)}
    text = tomli_w.dumps({name: value for name, value in table.items() if name not in lists})
    for name, entries in lists.items():
        text += "".join(f"\n[[{name}]]\n{tomli_w.dumps(entry)}" for entry in entries)
    return text.lstrip()
