"""What stands for a value while a module is traced: it records what is done to the value, and takes every
question that it would answer otherwise than a tensor does to the tracer."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute

from act24.passes.graph.identity import reads_class

#: What a tensor has, and what a value has that is none: a shape or a number.
_TENSORS = {*dir(Tensor)}
_OTHERS = {*dir(torch.Size), *dir(float), *dir(int)}
_ATTRIBUTES = {*_TENSORS, *_OTHERS}
#: By which a module asks for an attribute that may not be there.
_NAMES = (hasattr, getattr)

#: Whose attributes are of the classes that those of any tensor are.
_SAMPLE = torch.zeros(1, 1)

#: Attributes of a tensor that are None or another tensor, by where it comes from.
_HISTORY = ("grad", "grad_fn", "_grad", "_grad_fn", "_base", "name", "_backward_hooks")

#: What a parameter is asked for and never changes. A pass may put others in its place.
_SIZES = ("shape", "ndim", "size", "dim", "ndimension", "numel", "nelement")
#: Nor these: floating-point parameters may become others of them, and never integers.
_KINDS = ("is_floating_point", "is_complex")

#: Methods that give numbers, and annotations that say so.
_ASKED = {*_SIZES, *_KINDS, "stride", "is_contiguous", "get_device", "element_size"}
_PLAIN = (bool, int, float, str)

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

    __array_priority__ = Tensor.__array_priority__  # a number of numpy's leaves products to a tensor

    def __init_subclass__(cls) -> None:
        for function in AUGMENTED:
            setattr(cls, f"__{function.__name__}__", _augmented(function))

    @property
    def __class__(self: Any) -> type:  # type: ignore[override]
        """Asked by isinstance() where the answer is not yet yes."""
        if self.tracer.asks != isinstance:
            if reads_class(frame := self.tracer.asker()) and not is_internal(frame):
                self.tracer.refuse(f"asks what kind of value {self.node.name} is: {OUTSIDE}")
            return type(self)
        return self._is_a()

    def _attribute(self: Any, name: str, text: str) -> ValueAttribute:
        """An attribute of what may be a tensor, a shape or a number."""
        if name not in _ATTRIBUTES:
            raise AttributeError(f"no tensor has an attribute '{name}'")
        unsure = name.startswith("__") or (name not in _TENSORS and self.tracer.asks in _NAMES)
        if unsure and not is_internal(self.tracer.asker(3)):
            self.tracer.refuse(f"asks for {text}.{name}, which some values have: {OUTSIDE}")
        if name.startswith("__"):
            raise AttributeError(name)
        if name in _HISTORY:
            self.tracer.refuse(f"asks for {text}.{name}, how it came about: {OUTSIDE}")
        return ValueAttribute(self, name)

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

    def _is_a(self) -> type:
        if self.node.op == "get_attr":
            return nn.Parameter
        return self.tracer.refuse(f"asks what kind of value {self.node.name} is: {OUTSIDE}")

    def __getattr__(self, name: str) -> Any:
        if name in (*_SIZES, *_KINDS) and (parameter := self.tracer.parameter(self.node)) is not None:
            if name in _SIZES:
                self.tracer.sized.add(str(self.node.target))
            return getattr(parameter, name)
        held = self.node.op == "get_attr"  # to which anybody may give one, at any time
        if held and name not in _ATTRIBUTES and not is_internal(self.tracer.asker()):
            self.tracer.refuse(
                f"asks for {name} of {self.node.target}, which is no attribute of every tensor, and tracing "
                f"would freeze: {OUTSIDE}"
            )
        return self._attribute(name, self.node.name)

    def __len__(self) -> int:
        if count := self.tracer.parts(self.node):
            return count
        return self.tracer.refuse("asks a value for its length: write x.shape[0], and do not branch on it")

    def __contains__(self, _: object) -> bool:
        return self.tracer.refuse(f"asks what a value contains: {OUTSIDE}")


class ValueAttribute(_Written, Attribute):
    """An attribute of a value, which may be a method, a number or a shape; or one of an attribute."""

    tracer: Any  # as above

    def _is_a(self) -> type:
        sample = self._sample()
        if sample is None or isinstance(sample, Tensor):
            return self.tracer.refuse(f"asks what kind of value {self.attr} of a value is: {OUTSIDE}")
        return type(sample)

    def _sample(self) -> Any:
        """What this attribute is, of another tensor; None where it may be of another class."""
        of = self.root._sample() if issubclass(type(self.root), ValueAttribute) else None
        if of is None and self.attr not in _OTHERS:
            of = _SAMPLE
        return getattr(of, self.attr, None)

    def __bool__(self) -> bool:
        return self.tracer.to_bool(self)

    def __getattr__(self, name: str) -> Any:
        of, text = self._sample(), f"a value's {self.attr}"
        if of is None or isinstance(of, Tensor):
            return self._attribute(name, text)
        found = getattr(of, name)  # or the AttributeError that the module would meet
        if found is None:
            self.tracer.refuse(f"asks for {text}.{name}, which is None for some: {OUTSIDE}")
        return ValueAttribute(self, name)

    def __repr__(self) -> str:
        if self.attr != "shape" and not is_internal(self.tracer.asker()):
            self.tracer.refuse(f"asks how a value's {self.attr} is written: {OUTSIDE}")
        return super().__repr__()


def is_number(node: object) -> bool:
    """Whether what a node gives is surely a number, a text, a flag or a shape, and no tensor."""
    if not isinstance(node, fx.Node):
        return not isinstance(node, Tensor)
    if node.op == "placeholder":
        return node.type in (*_PLAIN, *(kind.__name__ for kind in _PLAIN))
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target is getattr:
        of, name = node.args
        return is_number(of) or not isinstance(getattr(_SAMPLE, str(name), _SAMPLE), Tensor)
    if getattr(node.target, "__name__", node.target) in _ASKED:
        return True
    plain = getattr(node.target, "__module__", "") in ("_operator", "operator", "builtins")
    return plain and (any(isinstance(a, str) for a in node.args) or all(map(is_number, node.args)))


def is_internal(frame: FrameType) -> bool:
    """Whether a function is torch's, or of this package."""
    return frame.f_globals.get("__name__", "").partition(".")[0] in _INTERNAL


def dtype_of(value: Any) -> fx.Node | torch.dtype | None:
    """A dtype, or the node whose dtype something is."""
    if isinstance(value, fx.Node) and value.target is getattr and value.args[1] == "dtype":
        return value.args[0]  # type: ignore[return-value]
    return value if isinstance(value, torch.dtype) else None


def forwards(of: type) -> Iterator[CodeType]:
    """The code of the forwards of all autograd.Functions there are: torch 2.14 calls them from C, where there
    is no frame of `apply` to be recognised by."""
    for function in of.__subclasses__():
        if code := getattr(function.forward, "__code__", None):
            yield code
        yield from forwards(function)


def asks_itself(frame: FrameType) -> bool:
    """Whether a question is asked for the module: by its own code, or by torch.is_tensor."""
    if frame.f_code.co_name == "__torch_function__":  # a mode that the caller of apply_ has set looks on
        return False
    return not is_internal(frame) or frame.f_code is torch.is_tensor.__code__
