"""A module's double, to look at in its place: modules of its own over the same parameters.

Tracing runs a module's forward on proxies, and a probe runs it on random numbers; either may write into
attributes, lists, meters or buffers. The double has copies of all of them, so the module keeps nothing of it,
and no class or function of the process is changed for it: another thread may train the model meanwhile, and
write into what is looked at here, which is therefore listed at once.
"""

from __future__ import annotations

import copy
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping, MutableSequence, MutableSet
from types import BuiltinFunctionType, FunctionType, ModuleType, SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from act24.passes.graph.remade import remade
from act24.passes.graph.surroundings import FOREIGN

_PLAIN = (int, float, complex, str, bytes, bool, type(None), type, FunctionType, BuiltinFunctionType)
_PLAIN += (torch.dtype, torch.device, torch.Size)

#: What a graph has itself of what modules hold.
_PARTS = (Tensor, nn.Module, fx.Proxy)

#: What nn.Module keeps about hooks: a double has none, so that nothing outside hears of its forwards.
_HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name)


class Observer(Protocol):
    """Who looks at the double, while it does."""

    def on_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A module is called."""

    def on_tensor(self, module: nn.Module, name: str, tensor: Tensor) -> Any:
        """A parameter or buffer is read."""

    def on_training(self, module: nn.Module) -> bool:
        """`training` is read."""
        ...


class Shadow:
    """The double of a module and of all modules in it.

    Attributes:
        root: the double.
        originals: by double, the module that it stands for.
        uncopied: what a double shares with its module because it cannot be copied, as text; or None.
        remade: the call that makes a parameter of it (`act24.passes.graph.remade`), or the empty string.
        observer: who looks; None: nobody, and the double is a module like others.
        settings: (double, name) of what was read of modules that stay, tensors and modules aside, or asked
            for there and absent, while somebody looked.
    """

    def __init__(
        self,
        module: nn.Module,
        buffers: bool = False,
        kept: Iterable[Tensor] = (),
        stays: Callable[[nn.Module], bool] = lambda m: not m._modules,
    ) -> None:
        """Make it.

        Args:
            buffers: copy the buffers too, for a forward on numbers, which may write to them.
            kept: other tensors that the double has as they are, wherever its module holds them.
            stays: whether a module may stay what it is, with all in it, where the others are opened.
        """
        self.observer: Observer | None = None
        self.settings = set[tuple[nn.Module, str]]()
        self.uncopied: str | None = None
        self.remade = ""
        self._classes: dict[tuple[type, bool], type] = {}
        self._noted = {inner for m in module.modules() if stays(m) for inner in m.modules()}
        doubles = {m: self._empty(m) for m in module.modules()}
        self.root: Any = doubles[module]
        self.originals: dict[nn.Module, nn.Module] = {double: m for m, double in doubles.items()}
        memo: dict[int, Any] = {id(m): double for m, double in doubles.items()} | {id(t): t for t in kept}
        for m in doubles:
            memo |= {id(t): t for t in (*m._parameters.values(), *m._buffers.values()) if t is not None}
        for m in doubles if buffers else ():
            memo |= {id(b): b.detach().clone() for b in m._buffers.values() if b is not None}
        for m, double in doubles.items():
            vars(double).update({name: self._copied(m, name, v, memo) for name, v in [*vars(m).items()]})
            vars(double)["_shadow"] = self

    def _empty(self, module: nn.Module) -> nn.Module:
        cls: Any = type(module)
        noted = module in self._noted
        key = (cls, noted)
        if key not in self._classes:
            members: dict[str, Any] = {n: getattr(cls, n) for n in ("__module__", "__qualname__", "__doc__")}
            if noted:
                members["__getattribute__"] = _setting
            self._classes[key] = type(cls)(cls.__name__, (_Double, cls), members)
        double = object.__new__(self._classes[key])
        if noted:
            object.__setattr__(double, "__dict__", _Attributes(self, double))
        return double

    def note(self, double: nn.Module, name: str, value: object) -> None:
        """An attribute is read, or asked for and `ABSENT`."""
        if self.observer is not None and name[:2] != "__" and not issubclass(type(value), _PARTS):
            self.settings.add((double, name))

    def _copied(self, module: nn.Module, name: str, value: Any, memo: dict[int, Any]) -> Any:
        if name == "_compiled_call_impl":  # which is bound to the module
            return None
        if isinstance(value, _PLAIN) or (isinstance(module, fx.GraphModule) and name.startswith("_graph")):
            return value
        if name in _HOOKS:
            return type(value)()
        if name in ("_parameters", "_buffers", "_modules"):
            held = {key: None if v is None else memo[id(v)] for key, v in [*value.items()]}
            return held if name == "_modules" else _Tensors(self, memo[id(module)], held)
        if isinstance(value, weakref.ReferenceType) and id(value()) in memo:
            return weakref.ref(memo[id(value())])
        try:
            return copy.deepcopy(value, memo)
        except Exception as error:  # whatever a foreign object raises
            self.remade = remade(module)
            why = f"{type(error).__name__}: {str(error).partition(chr(10))[0].partition('. ')[0]}"
            self.uncopied = f"{type(module).__name__}.{name}{'' if self.remade else f' ({why})'}"
            return value


class _Read(dict[str, Any]):
    """A dict that gives each of its entries by `__getitem__`, whoever reads it in what way."""

    __slots__ = ()

    def __iter__(self) -> Iterator[str]:  # or dict() and ** take the entries past the methods here
        return super().__iter__()

    def items(self) -> Any:
        return {name: self[name] for name in self}.items()

    def values(self) -> Any:
        return dict(self.items()).values()

    def copy(self) -> dict[str, Any]:
        return dict(self.items())


class _Tensors(_Read):
    """The parameters or buffers of a double. Who reads them, by whatever way, is given what the observer has
    for them."""

    __slots__ = ("_module", "_shadow")

    def __init__(self, shadow: Shadow, module: nn.Module, held: dict[str, Any]) -> None:
        super().__init__(held)
        self._shadow, self._module = shadow, module

    def _seen(self, name: str, value: Any) -> Any:
        observer = self._shadow.observer
        if observer is None or not issubclass(type(value), Tensor):
            return value
        return observer.on_tensor(self._module, name, value)

    def __getitem__(self, name: str) -> Any:
        return self._seen(name, super().__getitem__(name))

    def get(self, name: str, default: Any = None) -> Any:
        return self._seen(name, super().get(name, default))


class _Double:
    """What the class of a double does otherwise than the module's own."""

    def __init_subclass__(cls) -> None:
        """Nothing: the module's class may keep a list of its subclasses, which a double is none of."""

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return type(self).__mro__[2]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        observer = vars(self)["_shadow"].observer
        if observer is None:
            return plain_call(self, args, kwargs)
        return observer.on_call(self, args, kwargs)

    @property
    def training(self) -> bool:
        observer = vars(self)["_shadow"].observer
        return vars(self)["training"] if observer is None else observer.on_training(self)

    @training.setter
    def training(self, value: bool) -> None:
        vars(self)["training"] = value


#: What is asked for and not there.
ABSENT = object()


class _Attributes(_Read):
    """The `__dict__` of a double: Python finds attributes in it as in any other, and who reads it by itself,
    as `vars(module)["p"]`, is noted."""

    __slots__ = ("_double", "_shadow")

    def __init__(self, shadow: Shadow, double: nn.Module) -> None:
        super().__init__()
        self._shadow, self._double = shadow, double

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        self._shadow.note(self._double, name, value)
        return value

    def get(self, name: str, default: Any = None) -> Any:
        self._shadow.note(self._double, name, super().get(name, ABSENT))
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        self.get(str(name))
        return super().__contains__(name)

    def setdefault(self, name: str, default: Any = None) -> Any:
        self.get(name)
        return super().setdefault(name, default)

    def __or__(self, other: Any) -> Any:
        return self.copy() | other

    def __ror__(self, other: Any) -> Any:
        return other | self.copy()


def _setting(self: Any, name: str) -> Any:
    """An attribute of a double that may stay, which is noted, also if it is absent."""
    try:
        value = super(_Double, self).__getattribute__(name)
    except AttributeError:
        _note(self, name, ABSENT)
        raise
    _note(self, name, value)
    return value


def _note(double: Any, name: str, value: object) -> None:
    shadow = dict.get(object.__getattribute__(double, "__dict__"), "_shadow")
    if shadow is not None:
        shadow.note(double, name, value)


def plain_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A double called as its module is, past the observer."""
    return super(_Double, module).__call__(*args, **kwargs)  # type: ignore[misc]


def contents(module: nn.Module) -> dict[tuple[nn.Module, str], Any]:
    """What the attributes of a module and of all in it are, and what those hold, as data that compares."""
    held = {
        (child, name): content(value)
        for child in module.modules()
        for name, value in vars(child).items()
        if name not in ("_modules", "_shadow", *_HOOKS)
    }
    classes = {base: child for child in module.modules() for base in type(child).__mro__}
    for cls, child in classes.items():  # a class's own containers are the double's too
        if not cls.__module__.startswith(("torch.", "act24.passes.")):
            lists = {n: v for n, v in [*vars(cls).items()] if isinstance(v, list | dict | set | deque)}
            held |= {(child, name): content(value) for name, value in lists.items() if name[:2] != "__"}
    return held


def can_be_written(value: Any) -> bool:
    """Whether a value is a container, an iterator, or an object that is neither of torch's nor of Python's
    own."""
    if isinstance(value, MutableSequence | MutableMapping | MutableSet | Iterator | SimpleNamespace):
        return True
    return not is_foreign(value) and not isinstance(value, (*_PLAIN, nn.Module, Tensor, ModuleType, fx.Proxy))


def is_foreign(value: Any) -> bool:
    """Whether a value's class is torch's or Python's own."""
    return type(value).__module__.partition(".")[0] in FOREIGN


def content(value: Any, depth: int = 4, identity: bool = True) -> Any:
    """What a value is and holds, as data that compares.

    Args:
        identity: another object that holds the same is another content.
    """
    if isinstance(value, int | float | complex | str | bytes | bool | None):
        return (type(value), value)
    if isinstance(value, (*_PLAIN, Tensor, nn.Module, fx.Proxy)) or not depth:
        return id(value) if identity else type(value)
    held = getattr(value, "__dict__", None)
    if isinstance(value, MutableMapping):
        own = tuple((key, content(v, depth - 1, identity)) for key, v in [*value.items()])
    elif isinstance(value, tuple | frozenset | MutableSequence | MutableSet):
        own = tuple(content(v, depth - 1, identity) for v in [*value])
    elif isinstance(held, dict) or (is_foreign(value) and not isinstance(value, Iterator)):
        own = ()
    else:  # with slots, an array, or an iterator: what a copy is made from
        own = content(_state(value), depth + 6 * identity - 1, identity=False)
    if isinstance(held, dict):
        own += tuple((key, content(v, depth - 1, identity)) for key, v in [*held.items()])
    return (id(value) if identity else type(value), own)


def _state(value: Any) -> Any:
    """What a copy of an object is made from; None where it does not say."""
    try:
        made = value.__reduce_ex__(2)
    except Exception:  # whatever a foreign object raises
        return None
    return made[1:3] if isinstance(made, tuple) else None
