"""What tracing freezes that is no tensor: plain values outside of a graph, where they lie, and whether they
are still what they were.

The tracer notes every function that a forward runs, its helpers too (`Ran`). What their code names is then
looked up where it lies: in globals, in class attributes, in what modules hold (settings, dictionaries,
lists), in closures and defaults, and on through what those hold. Numbers, strings and the like are compared
by value, functions and classes by identity, and of containers also what they hold, by name or number. What
cannot be compared cheaply is named (`Frozen.unwatched`).
"""

from __future__ import annotations

import functools
import inspect
import numbers
import weakref
from collections import UserList, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import chain
from types import (
    BuiltinFunctionType,
    CodeType,
    FrameType,
    FunctionType,
    MethodType,
    MethodWrapperType,
    ModuleType,
)
from typing import Any

import torch
from torch import Tensor, nn

from act24.errors import PassError
from act24.passes.graph.classes import class_attributes, class_places, functions_in, is_known, slots
from act24.passes.graph.imported import asked_for, held_by, imported, makes_up
from act24.passes.graph.named import PAST, global_names, named
from act24.passes.graph.surroundings import MODULES

PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size)
PLAIN += (Enum, numbers.Number, range, slice)
#: What nn.Module itself keeps in its modules.
INTERNAL = frozenset(vars(nn.Module()))
#: Compared by identity.
_SAME = (FunctionType, BuiltinFunctionType, type, type(Tensor.add), property, staticmethod, classmethod)
_BOUND = (BuiltinFunctionType, MethodWrapperType)
_SEQUENCES = (list, tuple, deque, UserList)
_SETS = (set, frozenset)

#: So many entries of a container are compared one by one; so many at once, if they are plain; and through so
#: many objects a value is followed.
_ENTRIES, _FLAT, _DEPTH = 64, 4096, 6

#: One step from an object to what it holds: how, and which.
Step = tuple[str, Any]


class _Gone:
    def __repr__(self) -> str:
        return "not there"


GONE = _Gone()


@dataclass(frozen=True)
class Fact:
    """A plain value outside of the graph.

    Attributes:
        text: where it lies.
        root: where the way to it begins.
        steps: the way.
        value: what it was when it was traced.
    """

    text: str
    root: Any
    steps: tuple[Step, ...]
    value: Any

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for facts of one place."""
        return id(self.root), self.steps

    def check(self) -> None:
        """Raise a PassError where it is another one now."""
        now = self.root
        for how, which in self.steps:
            now = _taken(now, how, which)
        before = self.value
        if now is before or (type(now) is type(before) and not isinstance(now, _SAME) and now == before):
            return
        same = "another " if _shown(before) == _shown(now) else ""
        raise PassError(
            f"{self.text} was {_shown(before)} when the model was traced, and is {same}{_shown(now)}: the "
            "rewritten model computes with the old value. Set it back, or set it before apply_"
        )


def _taken(held: Any, how: str, which: Any) -> Any:
    """What lies one step on, or `GONE`."""
    try:
        if how == "attribute":
            return getattr(held, which, GONE)
        if how == "item":
            return held[which]
        if how == "class":
            return next((vars(base)[which] for base in held.__mro__ if which in vars(base)), GONE)
        if how == "call":
            return held()
        return held.cell_contents if how == "cell" else _WHOLES[how][1](held)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return GONE


def _values(held: Any) -> tuple[Any, ...]:
    """What a container holds, with its names if they are such."""
    return tuple(chain.from_iterable(held.items()) if isinstance(held, Mapping) else held)


#: What is compared of containers besides their entries, by the kind of step: in words, and how it is taken.
_WHOLES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "names": ("the names in", tuple),
    "length": ("the length of", len),
    "members": ("what is in", frozenset),
    "values": ("what is in", _values),
}


def _shown(value: object) -> str:
    if isinstance(value, FunctionType | BuiltinFunctionType | type):
        return f"{value.__module__}.{value.__qualname__}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(frozen=True)
class Frozen:
    """What the graph of one module has in it.

    Attributes:
        facts: plain values that are compared.
        unwatched: what is not, by name.
        names: what the code of the forward names: attributes of the module that can no longer be set are
            among them.
        dynamic: the code also makes up names, so that it may read any attribute.
        sized: parameters whose sizes it asks for, by local name.
    """

    facts: tuple[Fact, ...] = ()
    unwatched: tuple[str, ...] = ()
    names: frozenset[str] = frozenset()
    dynamic: bool = False
    sized: frozenset[str] = frozenset()

    def of_copy(self, memo: Mapping[int, Any]) -> Frozen:
        """The same of a copy of the module.

        Args:
            memo: what was copied, by id, as `copy.deepcopy` keeps it.
        """
        facts = tuple(replace(fact, root=memo.get(id(fact.root), fact.root)) for fact in self.facts)
        return replace(self, facts=facts)


#: Of a linear alone.
NOTHING = Frozen()


@dataclass
class Ran:
    """The functions that a forward ran, as the tracer notes them: their code, with their globals."""

    codes: dict[CodeType, dict[str, Any]] = field(default_factory=dict)

    def note(self, frame: FrameType) -> None:
        """A function begins."""
        if frame.f_code not in self.codes and not is_known(frame.f_globals.get("__name__", "?")):
            self.codes[frame.f_code] = frame.f_globals


def frozen_values(
    module: nn.Module, ran: Ran, closed: Iterable[str], settings: Iterable[tuple[nn.Module, str]] = ()
) -> Frozen:
    """What the graph of a module has in it of what its functions name.

    Args:
        ran: the functions.
        closed: the paths of the modules in it that stay what they are.
        settings: (module, name) of what was read of those.
    """
    search = _Search(module, ran)
    past = any(not PAST.isdisjoint(code.co_names) for code in ran.codes)  # of which no double is told
    stays = tuple(f"{path}." for path in closed)
    for path, child in module.named_modules():
        if not f"{path}.".startswith(stays):
            search.opened(path, child)
        else:  # called by the graph, which reads its settings no more
            read = [name for owner, name in settings if owner is child]
            search.settings(path, child, [*read, *(vars(child) if past else ())])
    for code, scope in ran.codes.items():
        search.globals(code, scope)
        search.imports(code, scope)
    search.closures()
    said = search.named
    return Frozen(tuple(search.found.values()), tuple(search.unwatched), said.names, said.dynamic)


class _Search:
    """Follows what functions name to where it lies.

    Attributes:
        named: what they name.
        found: facts by place.
        unwatched: the texts of what cannot be compared.
    """

    def __init__(self, module: nn.Module, ran: Ran) -> None:
        self.named = named(ran.codes)
        self.found: dict[tuple[Any, ...], Fact] = {}
        self.unwatched: dict[str, None] = {}
        self._ran, self._own = ran, {*module.modules()}
        self._functions: dict[int, FunctionType] = {}
        self._seen: dict[tuple[int, int], Any] = {}

    def opened(self, path: str, module: nn.Module) -> None:
        """A module's own values cannot be set any more; its class and what it holds can be changed."""
        cls = type(module)
        if not is_known(cls.__module__):
            for name, value in [*vars(module).items()]:
                if name not in INTERNAL and self._reads(name) and not isinstance(value, PLAIN):
                    self._value(".".join(part for part in (path, name) if part), value, (), value)
            self._class(
                cls, cls, (), {*vars(module), *module._modules, *module._parameters, *module._buffers}
            )

    def settings(self, path: str, module: nn.Module, names: Iterable[str]) -> None:
        """What the code around a module has read of it, or asked for and not found."""
        for name in names:
            value, way = _taken(module, "attribute", name), (("attribute", name),)
            if value is GONE:
                self._add(f"{path}.{name}", module, way, value)
            elif name not in INTERNAL and not isinstance(value, Tensor | nn.Module):
                self._value(f"{path}.{name}", module, way, value)

    def globals(self, code: CodeType, scope: dict[str, Any]) -> None:
        for name in global_names(code):
            if name in scope and not name.startswith("__"):
                text = f"{name} of {scope.get('__name__', '?')}"
                self._value(text, scope, (("item", name),), scope[name])

    def imports(self, code: CodeType, scope: dict[str, Any]) -> None:
        """What a function imports as it runs, and which modules it asks for."""
        modules = MODULES
        for module, name in imported(code, scope):
            value, way = modules[module], (("item", module),)
            if not name:
                self._value(module, modules, way, value)
            elif name in (held := held_by(module)):
                self._value(f"{name} of {module}", modules, (*way, ("attribute", name)), held[name])
            elif "__getattr__" in held and not is_known(module):  # which may give another one at any time
                self.unwatched[f"{name} of {module}"] = None
        for module in asked_for(code, scope) or ():
            self._add(f"{module} in sys.modules", modules, (("item", module),), modules.get(module, GONE))
            if module in modules:
                self._value(module, modules, (("item", module),), modules[module])
        if makes_up(code, scope):
            self.unwatched[f"which modules {code.co_qualname} imports"] = None

    def closures(self) -> None:
        """Name the functions that ran, have something in a closure, and were nowhere to be found."""
        inner = {c for code in self._ran.codes for c in code.co_consts if isinstance(c, CodeType)}
        known = {function.__code__ for function in self._functions.values()}
        for code in self._ran.codes:
            if {*code.co_freevars} - {"__class__"} and code not in known | inner:
                self.unwatched[f"the closure of {code.co_qualname}"] = None

    def _reads(self, name: str) -> bool:
        return name in self.named.names or self.named.dynamic

    def _add(self, text: str, root: Any, steps: tuple[Step, ...], value: Any) -> None:
        fact = Fact(text, root, steps, value)
        self.found.setdefault(fact.key, fact)

    def _value(self, text: str, root: Any, steps: tuple[Step, ...], value: Any) -> None:
        """Watch a value, unless it cannot change, and what it holds."""
        if isinstance(value, (*PLAIN, *_SAME)) and steps:
            self._add(text, root, steps, value)
        if isinstance(value, (*PLAIN, Tensor)) or (isinstance(value, nn.Module) and value in self._own):
            return
        key = id(value), id(root) if steps else 0
        if key in self._seen:
            return
        self._seen[key] = value
        if len(steps) > _DEPTH:
            self.unwatched[text] = None
        elif isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, type):
            if not is_known(value.__module__):
                self._class(value, root, steps)
        elif isinstance(value, MethodType):
            self._value(text, root, (*steps, ("attribute", "__self__")), value.__self__)
            self._value(text, root, (*steps, ("attribute", "__func__")), value.__func__)
        elif isinstance(value, weakref.ReferenceType):
            self._value(f"{text}()", root, (*steps, ("call", "")), value())
        elif isinstance(value, _BOUND):  # to an object, and functions to the module that they are in
            if not isinstance(value.__self__, type | ModuleType):
                self._value(f"{text}.__self__", root, (*steps, ("attribute", "__self__")), value.__self__)
        elif isinstance(value, functools.partial):
            if isinstance(value.func, BuiltinFunctionType):  # which may be given names
                self.unwatched[text] = None
            for part in ("func", "args", "keywords"):
                self._value(f"{text}.{part}", root, (*steps, ("attribute", part)), getattr(value, part))
        elif isinstance(value, functools._lru_cache_wrapper):
            self._cached(text, root, steps, value)
        elif isinstance(value, ModuleType):
            if not is_known(value.__name__):
                self._attributes(text, root, steps, value)
        elif not isinstance(value, _SAME):
            self._object(text, root, steps, value)

    def _cached(self, text: str, root: Any, steps: tuple[Step, ...], value: Any) -> None:
        """What a function that is called once gives."""
        if is_known(value.__module__ or "?"):
            return
        self._value(text, root, (*steps, ("attribute", "__wrapped__")), value.__wrapped__)
        if inspect.signature(value).parameters:
            self.unwatched[f"what {text} gives"] = None
        elif value.cache_info().currsize:
            self._value(f"{text}()", root, (*steps, ("call", "")), value())

    def _object(self, text: str, root: Any, steps: tuple[Step, ...], value: Any) -> None:
        """What a container or any other object holds, and its methods."""
        cls = type(value)
        contains = isinstance(value, (Mapping, *_SEQUENCES, *_SETS))
        if contains:
            self._container(text, root, steps, value)
        self._attributes(text, root, steps, value)
        for owner, name, method in class_places(cls):
            if any([self._function(function) for function in functions_in(method)]):
                self._add(f"{name} of {owner.__name__}", owner, (("class", name),), method)
        if hasattr(value, "__wrapped__"):
            self._value(text, root, (*steps, ("attribute", "__wrapped__")), value.__wrapped__)
        elif not (contains or cls.__module__ == "torch" or _has_parts(value)):
            self.unwatched[f"{text} ({cls.__name__})"] = None

    def _container(self, text: str, root: Any, steps: tuple[Step, ...], value: Any) -> None:
        size, keys = len(value), list[Any]()
        mapping, members = isinstance(value, Mapping), isinstance(value, _SETS)
        if size <= _ENTRIES and not members:
            keys = list(value) if mapping else list(range(size))
            self._whole("names" if mapping else "length", text, root, steps, value)
        elif size <= _FLAT and (members or all(isinstance(v, PLAIN) for v in _values(value))):
            self._whole("members" if members else "values", text, root, steps, value)
            if not all(isinstance(member, (*PLAIN, *_SAME)) for member in _values(value)):
                self.unwatched[f"what the members of {text} hold"] = None
        else:
            self.unwatched[f"{text} ({size:,} entries)"] = None
            keys = [
                k
                for k in self.named.constants
                if (k in value if mapping else type(k) is int and 0 <= k < size)
            ]
        for key in keys:
            if (entry := _taken(value, "item", key)) is not GONE:  # another thread may have taken it away
                self._value(f"{text}[{key!r}]", root, (*steps, ("item", key)), entry)

    def _whole(self, how: str, text: str, root: Any, steps: tuple[Step, ...], value: Any) -> None:
        described, taken = _WHOLES[how]
        self._add(f"{described} {text}", root, (*steps, (how, "")), taken(value))

    def _attributes(self, text: str, root: Any, steps: tuple[Step, ...], owner: Any) -> None:
        """What an object holds under the names that code names, itself or by its class; and what it does not
        hold though code asks for it."""
        cls = type(owner)
        held = getattr(owner, "__dict__", {})
        names = {name for name in (*held, *slots(cls)) if self._reads(name)}
        if not isinstance(owner, nn.Module | ModuleType):
            names |= {n for n, v in class_attributes(cls) if self._reads(n) and not hasattr(v, "__get__")}
            names |= {n for n in self.named.asked if not hasattr(cls, n)}
            if hasattr(cls, "__getattr__") or cls.__getattribute__ is not object.__getattribute__:
                names |= {n for n in self.named.names if not hasattr(cls, n)}
        for name in names:
            if name.startswith("__"):
                continue
            value = _taken(owner, "attribute", name)
            way = (*steps, ("attribute", name))
            if value is GONE:
                if name in self.named.asked and hasattr(owner, "__dict__"):
                    self._add(f"{text}.{name}", root, way, value)
            elif not isinstance(owner, nn.Module) or isinstance(value, PLAIN):
                self._value(f"{text}.{name}", root, way, value)

    def _class(self, cls: type, root: Any, steps: tuple[Step, ...], hidden: Iterable[str] = ()) -> None:
        """The attributes of a class that code names, those of its bases too, and the methods that ran: of
        those that it overrides where they stand, for they are called by super() or on another object."""
        for owner, name, value in class_places(cls):
            functions = functions_in(value)
            ran = [function for function in functions if self._function(function)]
            way: tuple[Step, ...] = (("class", name),)
            if owner is not cls:
                if ran:
                    self._value(f"{name} of {owner.__name__}", owner, way, value)
            elif ran or (not functions and name not in hidden and self._reads(name)):
                self._value(f"{name} of {cls.__name__}", root, (*steps, *way), value)

    def _function(self, function: FunctionType) -> bool:
        """Whether a function ran; and what lies in its closure, its defaults and its attributes."""
        if function.__code__ not in self._ran.codes:
            return False
        if id(function) in self._functions:
            return True
        self._functions[id(function)] = function
        name = function.__qualname__.replace("<locals>.", "")
        for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if variable != "__class__":
                text = f"{variable} in the closure of {name}"
                self._value(text, cell, (("cell", ""),), _taken(cell, "cell", ""))
        for part in ("__defaults__", "__kwdefaults__"):
            if value := getattr(function, part):
                self._value(f"{part} of {name}", function, (("attribute", part),), value)
        self._attributes(name, function, (), function)
        return True


def _has_parts(value: Any) -> bool:
    """Whether what an object holds has names that code may name. In Python's containers it has none."""
    own = type(value).__module__ in ("collections", "queue", "_weakrefset")
    return not own and (hasattr(value, "__dict__") or bool(slots(type(value))))
