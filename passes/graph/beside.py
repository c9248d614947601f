"""What lies outside of a module, and its forward writes to while it is traced: globals, attributes of classes
and functions, containers, iterators.

A graph writes nothing there, so such a module is no region; and what was written while it was traced are
proxies, which are taken out again. The modules' own attributes are those of a double
(`act24.passes.graph.shadow`). A number that is written again and again is not seen, if it is the same.
"""

from __future__ import annotations

import dis
import functools
from collections import deque
from collections.abc import Callable, Iterable, MutableSet
from types import CodeType, FrameType, ModuleType
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from act24.passes.graph.classes import is_known
from act24.passes.graph.imported import held_by, imported
from act24.passes.graph.named import global_names
from act24.passes.graph.shadow import can_be_written, content
from act24.passes.graph.surroundings import MODULES
from act24.passes.graph.watched import GONE, PLAIN

#: Functions by which code writes under names that are strings in it.
_BY_NAME = {"setattr", "delattr", "globals", "vars", "__dict__"}


class _Stores(NamedTuple):
    """The names that code writes to: of globals, attributes, and variables of the functions around it."""

    globals: frozenset[str]
    attributes: frozenset[str]
    around: frozenset[str]


@functools.lru_cache(maxsize=4096)
def _stores(code: CodeType) -> _Stores:
    names: dict[str, set[str]] = {"GLOBAL": set(), "ATTR": set(), "DEREF": set()}
    for instruction in dis.get_instructions(code):
        does, _, what = instruction.opname.partition("_")
        if does in ("STORE", "DELETE") and what in names:
            names[what].add(instruction.argval)
    if not _BY_NAME.isdisjoint(code.co_names):
        flat = [one for held in code.co_consts for one in (held if isinstance(held, tuple) else (held,))]
        words = {one for one in flat if isinstance(one, str) and one.isidentifier()}
        names["GLOBAL"] |= words
        names["ATTR"] |= words
    around = names["DEREF"] & {*code.co_freevars}
    return _Stores(frozenset(names["GLOBAL"]), frozenset(names["ATTR"]), frozenset(around))


class _Place(NamedTuple):
    """What may be written: how it is called, what holds it, under which name, and what it was."""

    text: str
    held_by: Any
    name: str
    before: Any


class Beside:
    """Notes, as functions begin, what they may write to."""

    def __init__(self, classes: Iterable[type]) -> None:
        """Make it.

        Args:
            classes: of the modules that are traced, and of their doubles.
        """
        own = {base for cls in classes for base in cls.__mro__ if not is_known(base.__module__)}
        self._classes = {cls: {**vars(cls)} for cls in own}
        self._codes = set[CodeType]()
        self._places: list[_Place] = []
        self._containers: list[tuple[str, Any, Any]] = []

    def note(self, frame: FrameType) -> None:
        """A function begins."""
        code, scope = frame.f_code, frame.f_globals
        module = scope.get("__name__", "?")
        if code in self._codes or is_known(module):
            return
        self._codes.add(code)
        stores = _stores(code)
        self._places += [_Place(f"{n} of {module}", scope, n, scope.get(n, GONE)) for n in stores.globals]
        for name in global_names(code):
            if name in scope and not name.startswith("__"):
                self._note(f"{name} of {module}", scope[name], stores.attributes)
        for module, name in imported(code, scope):
            value = held_by(module).get(name) if name else MODULES[module]
            self._note(f"{name} of {module}" if name else module, value, stores.attributes)
        for name, value in frame.f_locals.items() if code.co_freevars else ():
            if name in code.co_freevars:
                self._note(f"{name} in the closure of {code.co_name}", value, stores.attributes)

    def _note(self, text: str, value: Any, attributes: frozenset[str]) -> None:
        """A value that a function names, and the attributes that it writes to."""
        if issubclass(type(value), fx.Proxy) or isinstance(value, PLAIN):
            return
        if can_be_written(value):
            self._containers.append((text, value, content(value)))
        held = getattr(value, "__dict__", {}) if attributes else {}
        self._places += [_Place(f"{n} of {text}", value, n, held.get(n, GONE)) for n in attributes]

    @property
    def written(self) -> list[str]:
        """What is no longer what it was."""
        found = [place.text for place in self._places if not _is_same(place.before, _now(place))]
        found += [text for text, value, before in self._containers if content(value) != before]
        for cls, before in self._classes.items():
            now = vars(cls)
            names = [n for n in before.keys() | now.keys() if not _is_same(before.get(n), now.get(n))]
            found += [f"{name} of {cls.__name__}" for name in names]
        within = {c for code in self._codes for c in code.co_consts if isinstance(c, CodeType)}
        for code in self._codes - within:
            found += [f"{name} in the closure of {code.co_name}" for name in _stores(code).around]
        return [*dict.fromkeys(found)]

    def forget_proxies_(self) -> None:
        """Take the proxies out of all that was written to."""
        for place in self._places:
            if _clean_(_now(place)):
                _put_back_(place)
        for _, value, _ in self._containers:
            _clean_(value)
        for cls, before in self._classes.items():
            for name, value in [*vars(cls).items()]:
                if value is not before.get(name) and _clean_(value):
                    _put_back_(_Place("", cls, name, before.get(name, GONE)))


def _now(place: _Place) -> Any:
    held_by = place.held_by
    held = held_by if isinstance(held_by, dict) else getattr(held_by, "__dict__", {})
    return held.get(place.name, GONE)


def _put_back_(place: _Place) -> None:
    held_by, name, before = place.held_by, place.name, place.before
    if isinstance(held_by, dict):
        held_by.pop(name) if before is GONE else held_by.update({name: before})
    else:
        delattr(held_by, name) if before is GONE else setattr(held_by, name, before)


def _is_same(before: Any, now: Any) -> bool:
    return now is before or (type(now) is type(before) and isinstance(now, PLAIN) and now == before)


def _clean_(value: Any, depth: int = 4) -> bool:
    """Take proxies out of what a value holds; whether it is one itself, or cannot be without one."""
    kind = type(value)
    if issubclass(kind, fx.Proxy) or not depth:
        return issubclass(kind, fx.Proxy)
    if issubclass(kind, (tuple, frozenset)):
        return any([_clean_(part, depth - 1) for part in value])
    if issubclass(kind, dict):
        for key in [key for key, part in [*value.items()] if _clean_(part, depth - 1)]:
            del value[key]
    elif issubclass(kind, (list, deque, MutableSet)):
        parts = [(part, _clean_(part, depth - 1)) for part in [*value]]
        if any(gone for _, gone in parts):
            value.clear()
            add: Callable[[Any], Any] = value.add if issubclass(kind, MutableSet) else value.append
            for part, gone in parts:
                if not gone:
                    add(part)
    held = getattr(value, "__dict__", None)
    if isinstance(held, dict) and not issubclass(kind, (nn.Module, Tensor, ModuleType, type)):
        _clean_(held, depth - 1)
    return False
