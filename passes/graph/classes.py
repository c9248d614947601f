"""What stands in classes: their attributes and those of their bases, methods that are overridden too."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from act24.passes.graph.surroundings import FOREIGN


def is_known(module: str) -> bool:
    """Whether code is torch's, Python's own or act24's, by the name of its module."""
    made_up = module.startswith(("act24.passes.", "namedtuple_"))
    return made_up or module.partition(".")[0] in FOREIGN


def class_attributes(cls: type) -> Iterator[tuple[str, Any]]:
    """What a class and its bases have, from the class down, as it stands there; not that of torch or of
    Python."""
    return ((name, value) for _, name, value in class_places(cls))


def class_places(cls: type) -> Iterator[tuple[type, str, Any]]:
    """The same, each with the class of which it is what that has: the class, or, of what is overridden, the
    base that it stands in."""
    known = set[str]()
    for base in cls.__mro__:
        if base is not object and not is_known(base.__module__):
            for name, value in [*vars(base).items()]:
                if not name.startswith("__") or name == "__call__":
                    yield (base if name in known else cls), name, value
        known |= vars(base).keys()


def functions_in(value: Any) -> list[FunctionType]:
    """The functions in what stands in a class."""
    parts = (value, *(getattr(value, part, None) for part in ("fget", "fset", "__func__", "func")))
    return [part for part in parts if isinstance(part, FunctionType)]


def slots(cls: type) -> list[str]:
    members = [n for base in cls.__mro__ for n, v in [*vars(base).items()] if inspect.ismemberdescriptor(v)]
    return [name for name in members if not name.startswith("__")]
