"""What tracing has read and a graph no longer reads: numbers, flags and settings of the opened modules.

Plain values of a module stay readable where the module stood. To write them raises, since nothing would come
of it; those that lie elsewhere, in an object that a module holds or in a global of its file, are compared
whenever the model is called or lowered or an update begins. A copy of the model compares nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from act24.errors import PassError

_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device)
_INTERNAL = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class Fact:
    """A plain value outside of the modules.

    Attributes:
        text: where it lies.
        held: what has it.
        name: under which name.
        value: what it was when it was traced.
    """

    text: str
    held: Mapping[str, Any]
    name: str
    value: Any

    def check(self) -> None:
        """Raise a PassError where it is another one now."""
        now = self.held.get(self.name)
        if type(now) is not type(self.value) or now != self.value:
            raise PassError(
                f"{self.text} was {self.value!r} when the model was traced, and is {now!r}: the rewritten "
                "model computes with the old value. Set it back, or set it before apply_"
            )


def facts(module: nn.Module) -> tuple[Fact, ...]:
    """The plain values outside that methods of a module, and of those in it, name."""
    found = {}
    for path, child in module.named_modules():
        cls = type(child)
        if cls.__module__.startswith("torch."):
            continue
        names, scopes = set[str](), list[Mapping[str, Any]]()
        for function in _methods(cls):
            names |= {*function.__code__.co_names}
            scopes.append(function.__globals__)
        for scope in scopes:
            for name in names & scope.keys():
                if isinstance(scope[name], _PLAIN) and not name.startswith("__"):
                    found[id(scope), name] = Fact(
                        f"{name} of {scope.get('__name__', '?')}", scope, name, scope[name]
                    )
        for attribute, value in vars(child).items():
            held = getattr(value, "__dict__", None)
            opaque = isinstance(value, nn.Module | Tensor | FunctionType | type)
            if attribute in _INTERNAL or opaque or attribute not in names or not isinstance(held, dict):
                continue
            for name in names & held.keys():
                if isinstance(held[name], _PLAIN):
                    text = ".".join(part for part in (path, attribute, name) if part)
                    found[id(held), name] = Fact(text, held, name, held[name])
    return tuple(found.values())


def watch_(model: nn.Module, watched: Iterable[Fact]) -> None:
    """Compare facts whenever a model is called."""
    once = {(id(fact.held), fact.name): fact for fact in watched}
    if once:
        _Compares.hide()
        model.register_forward_pre_hook(_Compares(tuple(once.values())))


class _Compares:
    """A hook of a model. Where a copy's values lie nobody knows."""

    def __init__(self, watched: tuple[Fact, ...] = ()) -> None:
        self._watched = watched

    def __call__(self, *_: Any) -> None:
        for fact in self._watched:
            fact.check()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Compares:
        return _Compares()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Compares, ()

    @classmethod
    def hide(cls) -> None:
        """From torch.compile, of the whole model. Not at import, which would not be fast."""
        if not hasattr(cls, "_hidden"):
            cls._hidden = True
            cls.__call__ = torch.compiler.disable(cls.__call__)  # type: ignore[method-assign]


def _methods(cls: type) -> Iterator[FunctionType]:
    for base in cls.__mro__:
        if base in (nn.Module, object):
            return
        yield from (
            value
            for name, value in vars(base).items()
            if isinstance(value, FunctionType) and name != "__init__"
        )


def plain_values(module: nn.Module) -> dict[str, Any]:
    """The plain values among a module's attributes, by name."""
    return {name: v for name, v in vars(module).items() if name not in _INTERNAL and isinstance(v, _PLAIN)}


def attribute_names(module: nn.Module) -> set[str]:
    """The names of everything that a module holds."""
    return (vars(module).keys() - _INTERNAL) | module._modules.keys() | module._parameters.keys()


class Remains(nn.Module):
    """What stands where a module was opened: its tensors, the modules in it that stayed, and its plain
    values, which can be read, not written."""

    def __setattr__(self, name: str, value: Any) -> None:
        stood = vars(self).get("_modules", {}).get(name)
        if isinstance(stood, Remains) and isinstance(value, nn.Module) and value is not stood:
            kind = vars(self).get("_kind", "module")
            raise PassError(
                f"a {type(value).__name__} in the place of {name} would not be called: a pass has made one "
                f"graph of the {kind} around it, which reads the tensors of {name}. Put it "
                "there first, and apply the passes then"
            )
        if name in vars(self).get("_opened", ()) and not _unchanged(self, name, value):
            kind = vars(self)["_kind"]
            raise PassError(
                f"{name} of a {kind} cannot be set any more: the module was traced, and its graph does not "
                "read it. Set it before apply_"
            )
        super().__setattr__(name, value)

    def _remember(self, module: nn.Module) -> None:
        """Be what remains of a module."""
        held = {*dir(type(self)), *vars(self)}
        vars(self).update({n: v for n, v in plain_values(module).items() if n not in held})
        here = self._modules.keys() | self._parameters.keys() | self._buffers.keys()
        vars(self)["_opened"] = frozenset(attribute_names(module) - here - held)
        vars(self)["_kind"] = type(module).__name__


def _unchanged(module: nn.Module, name: str, value: Any) -> bool:
    before = vars(module).get(name)
    return type(before) is type(value) and before is not None and bool(before == value)


def remember(remains: nn.Module, module: nn.Module) -> None:
    """Let what stands in a module's place, and all in it that stands for what was opened, remember it."""
    stands = dict(remains.named_modules(remove_duplicate=False))
    for path, opened in module.named_modules(remove_duplicate=False):
        if isinstance(stands.get(path), Remains):
            stands[path]._remember(opened)  # type: ignore[operator]
