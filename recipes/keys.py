"""Every key of a recipe: where it stands, what it takes, what it is where a recipe says nothing.

Read off the schema and the tables of records, so a plugin's keys are among them. The reference page
(`act24 recipe keys --markdown`) and the hints of errors both come from here.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import re
import sys
import tokenize
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from act24.errors import nearest
from act24.llama import PRESETS, LlamaConfig
from act24.optim import OPTIMIZERS
from act24.options import MOST_STEPS, OneOf, Range
from act24.passes import REGISTRY
from act24.recipes.records import recipe_fields, toml_value
from act24.recipes.schema import Model, Recipe
from act24.schedules import SCHEDULES

#: Bounds beyond which nothing fits a machine: they are checked, and say nothing to a reader.
_BOUNDLESS = (10**8, MOST_STEPS, 2**31, 2**63)


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        path: as `--set` takes it: `train.steps`, `passes.activation24.from_step`.
        record: the optimizer, schedule or pass that has it; empty for keys that every recipe has.
        takes: type and bounds, in words.
        default: as TOML writes it; "required" and "not given" stand for themselves.
        says: what it is for; empty where its code says nothing.
    """

    path: str
    record: str
    takes: str
    default: str
    says: str


def recipe_keys() -> tuple[Key, ...]:
    """All keys, table by table in the order of the schema, passes last."""
    keys = [Key("description", "", "a string", '""', "one line, shown by `act24 recipe ls`")]
    for name, field in Recipe.model_fields.items():
        if inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel):
            keys += _section(name, field.annotation)
        elif name in ("optimizer", "schedule"):
            for record in (OPTIMIZERS if name == "optimizer" else SCHEDULES).values():
                keys += _record(name, record)
    for record in REGISTRY.values():
        keys += _record(f"passes.{record.name}", record)
    return tuple(keys)


def elsewhere(name: str) -> list[str]:
    """The paths of keys that end in `name`: where somebody may have meant to write one."""
    return list(dict.fromkeys(key.path for key in recipe_keys() if key.path.rpartition(".")[2] == name))


def short(path: str) -> str:
    """A key by its last part, if no other key ends so; else with what stands in front.

    >>> short("optimizer.lr"), short("eval.every"), short("passes.cola.mlp_rank")
    ('lr', 'eval.every', 'cola.mlp_rank')
    """
    last = path.rpartition(".")[2]
    return last if elsewhere(last) == [path] else path.removeprefix("passes.")


def meant(name: str, choices: Iterable[str]) -> str:
    """A hint for a key that its table does not have: the same key of another table, or the nearest here."""
    paths = elsewhere(name)
    if paths and len(paths) <= 3:  # `targets` is a key of every pass, which says nothing
        return f"did you mean {' or '.join(paths)}?"
    return nearest(name, choices)


def markdown() -> str:
    """The reference page: one table a table of the recipe."""
    lines = [_HEAD]
    heading = ""
    for key in recipe_keys():
        table = key.path.rpartition(".")[0]
        title = _title(table, key.record)
        if title != heading:
            heading = title
            lines += [f"\n## {title}\n"]
            if summary := _summary(table, key.record):
                lines += [f"{summary}\n"]
            lines += ["| key | takes | default | |", "|---|---|---|---|"]
        cells = (f"`{key.path.rpartition('.')[2]}`", key.takes, _code(key.default), key.says)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


_HEAD = """# All keys of a recipe

Written by `act24 recipe keys --markdown`; a test compares. On the command line a key is
`--set table.key=value`, of a pass `--set passes.activation24.from_step=500`."""


def _title(table: str, record: str) -> str:
    if table.startswith("passes."):
        return f'`[[passes]]` with `use = "{record}"`'
    if record:
        return f'`[{table}]` with `name = "{record}"`'
    return f"`[{table}]`" if table else "At the top"


def _summary(table: str, record: str) -> str:
    tables: dict[str, Mapping[str, type]] = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES}
    if table.startswith("passes."):  # what a pass does stands at the head of its file
        text = inspect.getdoc(sys.modules[REGISTRY[record].__module__])
    else:
        text = inspect.getdoc(tables.get(table, {}).get(record))
    return " ".join((text or "").partition("\n\n")[0].split())


def _code(default: str) -> str:
    return default if default in ("required", "not given") else f"`{default}`"


def _section(table: str, section: type[BaseModel]) -> Iterator[Key]:
    hints, comments = get_type_hints(section, include_extras=True), _comments(section)
    if section is Model:  # which checks its values as `LlamaConfig` does
        hints |= {name: hint for name, hint in get_type_hints(LlamaConfig, include_extras=True).items()}
    for name, field in section.model_fields.items():
        default = "required" if field.is_required() else _written(field.default)
        if section is Model and name == "preset":
            yield Key("model.preset", "", _choices(PRESETS), default, "sizes, which the other keys override")
        else:
            yield Key(f"{table}.{name}", "", _takes(hints[name]), default, comments.get(name, ""))


def _record(table: str, record: Any) -> Iterator[Key]:
    hints, attributes = get_type_hints(record, include_extras=True), {}
    for cls in reversed(record.__mro__):
        attributes |= _attributes(cls)
    for field in recipe_fields(record):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        text = "required" if default is dataclasses.MISSING else _written(default)
        yield Key(
            f"{table}.{field.name}",
            record.name,
            _takes(hints[field.name]),
            text,
            attributes.get(field.name, ""),
        )


def _written(value: Any) -> str:
    return "not given" if value is None else toml_value(value)


def _takes(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner, *metadata = arguments
        for entry in metadata:
            if isinstance(entry, OneOf):
                return _choices(entry.choices)
        text = _takes(inner)
        bounds = [part for entry in metadata for part in _bounds(entry)]
        return f"{text}, {' and '.join(bounds)}" if bounds else text
    if origin is Literal:
        return _choices(arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_takes(kind) for kind in arguments if kind is not type(None)))
    if origin is tuple:
        if arguments[1:] == (Ellipsis,):
            return f"a list, each {_takes(arguments[0])}"
        return f"a list of {len(arguments)}: {_takes(arguments[0])}"
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    return names.get(annotation) or str(getattr(annotation, "__name__", annotation))


def _choices(names: Any) -> str:
    return ", ".join(f'`"{name}"`' if isinstance(name, str) else f"`{name}`" for name in names)


def _bounds(entry: Any) -> Iterator[str]:
    if isinstance(entry, FieldInfo):
        for inner in entry.metadata:
            yield from _bounds(inner)
    elif isinstance(entry, Range):
        shown = dataclasses.replace(
            entry,
            le=None if entry.le in _BOUNDLESS else entry.le,
            lt=None if entry.lt in _BOUNDLESS else entry.lt,
            ge=None if entry.ge is not None and -entry.ge in _BOUNDLESS else entry.ge,
        )
        if shown != Range():
            yield str(shown)
    else:
        words = {"ge": "{} or more", "gt": "above {}", "le": "{} at most", "lt": "below {}"}
        for name, text in words.items():
            bound = getattr(entry, name, None)
            if bound is not None and bound not in _BOUNDLESS:
                yield text.format(bound)


def _comments(section: type[BaseModel]) -> dict[str, str]:
    """What the comment on each field's lines says. A field's own line counts, not those between fields."""
    found: dict[str, str] = {}
    name = ""
    source = inspect.getsource(section)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        before = token.line[: token.start[1]]
        if token.type == tokenize.NAME and before == "    ":
            name = token.string
        elif token.type == tokenize.COMMENT and before.strip():
            found[name] = token.string.removeprefix("#").strip()
    return found


def _attributes(cls: type) -> dict[str, str]:
    """The `Attributes:` of a docstring; names that share an entry share its text."""
    _, _, block = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \w)", "\n" + re.split(r"\n\n?(?=\S)", block)[0]):
        names, colon, text = entry.strip().partition(":")
        if colon:
            found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found
