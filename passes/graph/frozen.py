"""What tracing has read and a graph no longer reads: numbers, flags and settings of the opened modules.

Plain values of a module stay readable where the module stood. To write them raises, since nothing would come
of it; those that lie elsewhere, in an object that a module holds, in its class, in a closure or in a global
(`act24.passes.graph.watched`), are compared whenever the model is called or lowered or an update begins. A
copy of the model compares nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from act24.errors import PassError
from act24.passes.graph.watched import INTERNAL, PLAIN, Fact, Frozen, class_attributes


def watch_(model: nn.Module, watched: Sequence[Fact]) -> None:
    """Compare facts whenever a model is called."""
    if watched:
        _Compares.hide()
        model.register_forward_pre_hook(_Compares(tuple(watched)))


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


def plain_values(module: nn.Module) -> dict[str, Any]:
    """The plain values among the attributes of a module and its class, by name."""
    held = {**dict(reversed([*class_attributes(type(module))])), **vars(module)}
    return {name: v for name, v in held.items() if name not in INTERNAL and isinstance(v, PLAIN)}


def attribute_names(module: nn.Module) -> set[str]:
    """The names of everything that a module and its class hold."""
    held = {*vars(module), *module._modules, *module._parameters}
    return {*held, *(name for name, _ in class_attributes(type(module)))} - INTERNAL


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

    def _remember(self, module: nn.Module, frozen: Frozen) -> None:
        """Be what remains of a module."""
        held = {*dir(type(self)), *vars(self)}
        vars(self).update({n: v for n, v in plain_values(module).items() if n not in held})
        here = self._modules.keys() | self._parameters.keys() | self._buffers.keys()
        # What its forward asked for and did not find is frozen too.
        vars(self)["_opened"] = frozenset((attribute_names(module) | frozen.names) - here - held)
        vars(self)["_kind"] = type(module).__name__


def _unchanged(module: nn.Module, name: str, value: Any) -> bool:
    before = vars(module).get(name)
    return type(before) is type(value) and before is not None and bool(before == value)


def remember(remains: nn.Module, module: nn.Module, frozen: Frozen) -> None:
    """Let what stands in a module's place, and all in it that stands for what was opened, remember it."""
    stands = dict(remains.named_modules(remove_duplicate=False))
    for path, opened in module.named_modules(remove_duplicate=False):
        if isinstance(stands.get(path), Remains):
            stands[path]._remember(opened, frozen)  # type: ignore[operator]
