"""What stands for a value while a module is traced: it records what is done to the value, and takes every
question that it would answer otherwise than a tensor does to the tracer."""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute

from act24.passes.graph.identity import reads_class

#: What a tensor, a shape or a number has.
_ATTRIBUTES = {*dir(Tensor), *dir(torch.Size), *dir(float)}

#: Those that are None or another tensor, by where a value comes from.
_HISTORY = ("grad", "grad_fn", "_base", "_backward_hooks")

#: What a parameter is asked for and never changes. A pass may put others in its place.
_SIZES = ("shape", "ndim", "size", "dim", "ndimension", "numel", "nelement")

#: Packages that may ask a value anything: their questions are not the module's branches.
_INTERNAL = ("torch", "act24")


#: What to do about modules that cannot be traced.
OWN = "give its linears a module of their own"
PLAIN = f"compute in forward with tensors alone, or {OWN}"
REGISTER = "make it one, register_buffer(name, tensor, persistent=False)"
OUTSIDE = f"decide that where the module is made, or {OWN}"


class Unclean(Exception):
    """Why a module cannot be a region, and what to do."""


#: Augmented assignments, each with what it computes.
AUGMENTED: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.imatmul: operator.matmul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
    operator.ilshift: operator.lshift,
    operator.irshift: operator.rshift,
}


class _Written:
    """What is done to a value, in place. fx knows of no augmented assignments and makes them functions."""

    def __init_subclass__(cls) -> None:
        for function in AUGMENTED:
            setattr(cls, f"__{function.__name__}__", _augmented(function))

    def __setattr__(self: Any, name: str, value: object) -> None:
        if name not in ("tracer", "node", "_node", "root", "attr"):  # fx's own
            self.tracer.refuse(f"sets {name} of the value {self.node.name}: {PLAIN}")
        super().__setattr__(name, value)

    def __setitem__(self: Any, key: object, value: object) -> None:
        self.tracer.refuse(
            f"writes into {self.node.name} by index: write torch.where, index_put or torch.cat, or {OWN}"
        )

    def __hash__(self: Any) -> int:
        if not is_internal(self.tracer.asker()):
            self.tracer.refuse(f"looks {self.node.name} up in a dictionary or set: {OUTSIDE}")
        return id(self)


def _augmented(function: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


class Proxy(_Written, fx.Proxy):
    """A value. What it is asked goes to the tracer."""

    tracer: Any  # `act24.passes.graph.tracer.Tracer`

    @property
    def __class__(self) -> type:  # type: ignore[override]
        """Asked by isinstance() where the answer is not yet yes."""
        if not self.tracer.asks_kind:
            if reads_class(frame := self.tracer.asker()) and not is_internal(frame):
                self.tracer.refuse(f"asks what kind of value {self.node.name} is: {OUTSIDE}")
            return type(self)
        if self.node.op == "get_attr":
            return nn.Parameter
        return self.tracer.refuse(f"asks what kind of value {self.node.name} is: {OUTSIDE}")

    def __getattr__(self, name: str) -> Any:
        if name not in _ATTRIBUTES or name.startswith("__"):
            raise AttributeError(f"no tensor has an attribute '{name}'")
        if name in _SIZES and (parameter := self.tracer.parameter(self.node)) is not None:
            return getattr(parameter, name)
        if name in _HISTORY:
            self.tracer.refuse(f"asks for {self.node.name}.{name}, how it came about: {OUTSIDE}")
        return ValueAttribute(self, name)

    def __len__(self) -> int:
        return self.tracer.refuse("asks a value for its length: write x.shape[0], and do not branch on it")

    def __contains__(self, _: object) -> bool:
        return self.tracer.refuse(f"asks what a value contains: {OUTSIDE}")


class ValueAttribute(_Written, Attribute):
    """An attribute of a value, which may be a method, a number or a shape."""

    def __bool__(self) -> bool:
        return self.tracer.to_bool(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return ValueAttribute(self, name)

    def __repr__(self) -> str:
        if self.attr != "shape" and not is_internal(self.tracer.asker()):
            self.tracer.refuse(f"asks how a value's {self.attr} is written: {OUTSIDE}")
        return super().__repr__()


def is_internal(frame: FrameType) -> bool:
    """Whether a function is torch's, or of this package."""
    return frame.f_globals.get("__name__", "").partition(".")[0] in _INTERNAL
