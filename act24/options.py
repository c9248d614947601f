"""The one mechanism by which options are checked where the object is made, in Python as in a recipe.

A dataclass of options says with its annotations what each field takes, and calls `check_options(self)` in
`__post_init__`:

    method: Annotated[str, OneOf(METHODS)] = "naive"         # a name in a table, which plugins add to
    backward: Literal["dense", "sparse"] = "dense"
    dense_ratio: Annotated[float, Range(ge=0, lt=1)] = 0.05  # finite, and in range
    targets: tuple[str, ...] = ("*",)

Functions check single values with `one_of` and `in_range`, and those that a class of options has fields for
with `check_values`. What a field says about another one stays in the class's own `__post_init__`.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

from act24.errors import Act24Error, nearest


class OptionError(Act24Error, ValueError):
    """A value that an option does not take.

    Attributes:
        field, reason: the parts of the message, where it is about one field: `lr` and "has to be above 0, got
            0". Loaders put the path of the key in front instead of the owner.
    """

    def __init__(self, message: str, field: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.field, self.reason = field, reason


@dataclass(frozen=True)
class Range:
    """Metadata of a number: its bounds. NaN never lies in a range, and infinity only if `infinite` is set."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    infinite: bool = False

    def __contains__(self, value: float) -> bool:
        return (
            (math.isfinite(value) or (self.infinite and not math.isnan(value)))
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def __str__(self) -> str:
        low = None if self.ge is None else f"{self.ge:g} or more"
        low = low if self.gt is None else f"above {self.gt:g}"
        high = None if self.le is None else f"{self.le:g} at most"
        high = high if self.lt is None else f"below {self.lt:g}"
        return " and ".join(part for part in (low, high) if part) or (
            "a number" if self.infinite else "finite"
        )


@dataclass(frozen=True, eq=False)  # by identity: tables have no hash, and unions of annotations need one
class OneOf:
    """Metadata of a name: the table that it has to be in, read when a value is checked."""

    choices: Iterable[str]


N = TypeVar("N", bound=tuple[Any, ...])

#: What a number without a range of its own has to be.
FINITE = Range()

#: The most optimizer steps that any option counts. Far beyond every run, and loops over periods still end.
MOST_STEPS = 10**9

#: A number of optimizer steps, or a period in steps that 0 switches off.
Steps = Annotated[int, Range(ge=0, le=MOST_STEPS)]

#: A number of optimizer steps that cannot be none.
PositiveSteps = Annotated[int, Range(ge=1, le=MOST_STEPS)]

#: A width or a rank. The largest models have some 10^5, and more than a hundred million is a typing error.
Width = Annotated[int, Range(ge=1, le=10**8)]


def one_of(owner: str, name: str, value: object, choices: Iterable[str]) -> None:
    """Check a name.

    Raises:
        OptionError: `value` is none of `choices`.
    """
    names = [*choices]
    if not isinstance(value, str) or value not in names:
        hint = nearest(value, names) if isinstance(value, str) else f"choose from {', '.join(sorted(names))}"
        raise _refused(owner, name, f"has no {shown(value)}: {hint}")


def in_range(owner: str, name: str, value: float, bounds: Container[float] = FINITE) -> None:
    """Check a number.

    Raises:
        OptionError: `value` is not finite, or out of `bounds`.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _refused(owner, name, f"has to be a number, got {shown(value)}")
    try:
        inside = value in bounds
    except OverflowError:  # an integer beyond every float
        inside = False
    if not inside:
        # "above 0, got inf" would be true and no help.
        endless = not isinstance(value, int) and not math.isfinite(value) and math.inf not in bounds
        finite = "finite and " if endless and bounds != FINITE else ""
        raise _refused(owner, name, f"has to be {finite}{bounds}, got {shown(value)}")


def check_options(options: object, owner: str = "") -> None:
    """Check every annotated field of a dataclass or named tuple against its annotation.

    Args:
        owner: what errors call it; not given: its `name`, or that of its class.

    Raises:
        OptionError: names the field, the value, and what it takes.
    """
    owner = owner or str(getattr(type(options), "name", None) or type(options).__name__)
    for name, annotation in _fields(type(options)):
        _check(owner, name, getattr(options, name), annotation)


def check_values(kind: type, owner: str, **values: object) -> None:
    """Check values as fields of a class of options, by whoever takes them without an object of that class.

    Raises:
        OptionError: names the field, the value, and what it takes.
    """
    for error in option_errors(kind, values, owner):
        raise error


def option_errors(kind: type, values: Mapping[str, object], owner: str = "") -> Iterator[OptionError]:
    """What is wrong with each of some values, as fields of a class of options."""
    for name, annotation in _fields(kind):
        if name in values:
            try:
                _check(owner, name, values[name], annotation)
            except OptionError as error:
                yield error


def checked(kind: type[N]) -> type[N]:
    """A class decorator: a `NamedTuple` calls its `__post_init__` where it is made, as dataclasses do, and
    where `_replace` makes another one. (A body of a `NamedTuple` may define neither itself.)"""
    make = kind.__new__

    @functools.wraps(make)
    def new(cls: type[N], *args: Any, **kwargs: Any) -> N:
        made = make(cls, *args, **kwargs)
        # What a graph that is being compiled makes was made, and checked, before it.
        if not torch.compiler.is_dynamo_compiling() and not any(map(_stands_for_a_value, made)):
            made.__post_init__()  # type: ignore[attr-defined]
        return made

    def changed(self: N, /, **changes: Any) -> N:
        return kind(**{**self._asdict(), **changes})  # type: ignore[attr-defined]

    kind.__new__ = new  # type: ignore[method-assign, assignment]
    kind._replace = changed  # type: ignore[attr-defined]
    return kind


def remembered(check: Callable[[Any], None]) -> Callable[[Any], None]:
    """A check of named tuples that passes what it has passed before without looking at it again: a graph that
    is not compiled makes the same options anew at every call."""

    @functools.cache
    def passed(options: tuple[Any, ...], types: tuple[type, ...]) -> None:
        check(options)  # the types of the fields tell 1 from True, which are one key otherwise

    def checking(options: tuple[Any, ...]) -> None:
        try:
            passed(options, tuple(map(type, options)))
        except TypeError:  # a value that has no hash: no option has such
            check(options)
            raise

    return checking


def _stands_for_a_value(field: object) -> bool:
    """Whether torch.compile put something of its own in a field, as torch 2.11 does to try a named tuple."""
    return type(field).__module__.startswith("torch._dynamo.")


@functools.cache
def _fields(kind: type) -> tuple[tuple[str, Any], ...]:
    hints = get_type_hints(kind, include_extras=True)
    return tuple((n, a) for n, a in hints.items() if a is not ClassVar and get_origin(a) is not ClassVar)


def _check(owner: str, name: str, value: Any, annotation: Any) -> None:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return
    if origin is Annotated:
        inner, *metadata = arguments
        ranges = [bound for bound in metadata if isinstance(bound, Range)]
        if inner in (int, float) and ranges:
            _check_number(owner, name, value, inner, ranges[0])
        else:
            _check(owner, name, value, inner)
        for bound in metadata:
            if isinstance(bound, OneOf) and value is not None:
                one_of(owner, name, value, bound.choices)
            elif isinstance(bound, Range) and value is not None:
                in_range(owner, name, value, bound)
    elif origin is Literal:
        one_of(owner, name, value, arguments)
    elif origin in (Union, types.UnionType):
        _check_union(owner, name, value, arguments)
    elif origin is tuple:
        _check_tuple(owner, name, value, arguments)
    elif annotation in (int, float):
        _check_number(owner, name, value, annotation)
    else:
        kind = origin or annotation
        if not isinstance(value, kind):
            raise _refused(owner, name, f"has to be {_kind(kind)}, got {shown(value)}")


def _check_number(owner: str, name: str, value: Any, kind: type, bounds: Range = FINITE) -> None:
    # A bool is an int to Python, and never what is meant.
    if kind is int and (isinstance(value, bool) or not isinstance(value, int)):
        raise _refused(owner, name, f"has to be an integer, got {shown(value)}")
    in_range(owner, name, value, bounds)


def _check_union(owner: str, name: str, value: Any, kinds: tuple[Any, ...]) -> None:
    if value is None and type(None) in kinds:
        return
    errors = []
    for kind in kinds:
        if kind is type(None):
            continue
        try:
            return _check(owner, name, value, kind)
        except OptionError as error:
            errors.append(error)
    raise errors[0]


def _check_tuple(owner: str, name: str, value: Any, kinds: tuple[Any, ...]) -> None:
    if not isinstance(value, tuple):
        raise _refused(owner, name, f"has to be a tuple, got {shown(value)}")
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise _refused(owner, name, f"has to have {len(kinds)} entries, got {shown(value)}")
    for index, (entry, kind) in enumerate(zip(value, kinds, strict=True)):
        _check(owner, f"{name}[{index}]", entry, kind)


def _refused(owner: str, name: str, reason: str) -> OptionError:
    return OptionError(f"{owner}: {name} {reason}" if owner else f"{name} {reason}", name, reason)


def _kind(kind: Any) -> str:
    return {str: "a string", bool: "true or false"}.get(kind, f"a {getattr(kind, '__name__', kind)}")


def shown(value: object) -> str:
    """A value short enough for a line. Integers of thousands of digits have no text at all in Python."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**30:
        return "an integer of more than 30 digits"
    try:
        text = repr(value)
    except ValueError:  # such an integer inside of it
        return f"a {type(value).__name__} with an integer of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."
