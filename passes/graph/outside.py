"""Tensors that a forward has from elsewhere than its module's parameters and buffers, and reads without a
value that is traced: what it takes of them, a number most often, would be frozen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from act24.passes.graph.proxies import REGISTER, is_internal

#: What is asked of a tensor that tells nothing of its numbers.
_SHAPE = {"__get__", "dim", "ndimension", "size", "numel", "nelement", "stride", "element_size", "get_device"}
_SHAPE |= {"is_floating_point", "is_complex", "is_contiguous", "__len__", "__hash__"}
#: What is, and changes all the same.
_CHANGES = {"dtype", "device", "requires_grad", "grad", "is_leaf", "is_cuda", "grad_fn"}


class Outside(TorchFunctionMode):
    """In force while a module is traced: refuses what reads a tensor that is not made there."""

    def __init__(self, tracer: Any) -> None:
        """Make it.

        Args:
            tracer: `act24.passes.graph.tracer.Tracer`.
        """
        super().__init__()
        self._tracer = tracer
        self._made: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(_leaves((args, kwargs)))
        if not any(issubclass(type(value), fx.Proxy) for value in given):
            if func.__name__ == "__get__" and not is_internal(self._tracer.asker()):
                self._check_fact(func.__self__.__name__, given[0])
            for value in given if func.__name__ not in _SHAPE else ():
                if issubclass(type(value), Tensor) and id(value) not in self._made:
                    self._tracer.refuse(f"reads {self._name(value)}: {REGISTER}")
                if isinstance(value, torch.Generator):
                    self._tracer.refuse(
                        "draws a random number from a generator of its own, which tracing would freeze: draw "
                        "for a value (torch.rand_like(x))"
                    )
        result = func(*args, **kwargs)
        self._made |= {id(v): v for v in _leaves(result) if issubclass(type(v), Tensor)}
        return result

    def _check_fact(self, fact: str, tensor: Tensor) -> None:
        """Of a tensor's attribute, which a module reads."""
        if fact in _CHANGES and (name := self._tracer.name(tensor)):
            self._tracer.refuse(
                f"asks for {fact} of {name} past its module, which tracing would freeze: take it from the "
                "module"
            )

    def _name(self, tensor: Tensor) -> str:
        if name := self._tracer.name(tensor):
            return f"numbers of {name} past its module, which tracing would freeze"
        held = [n for m in self._tracer.root.modules() for n, v in vars(m).items() if v is tensor]
        return f"{held[0] if held else 'a tensor from outside'}, neither parameter nor buffer"


def _leaves(value: Any) -> Iterator[Any]:
    """The values in tuples, lists and dictionaries. Not by pytree, which asks a proxy for its class."""
    kind = type(value)
    if issubclass(kind, tuple | list):
        for part in value:
            yield from _leaves(part)
    elif issubclass(kind, dict):
        yield from _leaves([*value.values()])
    else:
        yield value
