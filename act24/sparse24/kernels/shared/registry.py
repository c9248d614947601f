"""Operators of our own in PyTorch's library: a compiled graph has one node for each, and never breaks.

An operator has a schema, read from the annotations of its launcher; a reference in plain PyTorch, which is
what runs on a CPU and what the kernel is held against; the launcher, which CUDA runs: it allocates the
outputs and starts the Triton kernel; and a fake, the outputs' shapes, for tracing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

Launcher = TypeVar("Launcher", bound=Callable[..., Any])

_LIBRARY = torch.library.Library("act24", "DEF")


class Operator(NamedTuple):
    """What an operator is made of: three functions of the same arguments.

    Attributes:
        reference: plain PyTorch, for tensors on any device.
        launch: the kernel, for tensors on a CUDA device.
        fake: outputs of the right shapes and dtypes, unwritten.
    """

    reference: Callable[..., Any]
    launch: Callable[..., Any]
    fake: Callable[..., Any]


#: Every operator whose file was imported, by name.
OPERATORS: dict[str, Operator] = {}


def operator(reference: Callable[..., Any], fake: Callable[..., Any]) -> Callable[[Launcher], Launcher]:
    """Define an operator by its launcher, whose name it takes; it is also at `torch.ops.act24`. It has no
    gradient of its own.

    `Library.define` and `impl`, not `torch.library.custom_op`, whose wrappers take three times the Python a
    call.
    """

    def define(launch: Launcher) -> Launcher:
        name = launch.__name__
        schema = torch.library.infer_schema(launch, mutates_args=(), op_name=name)
        # Packed buffers and rows that run along the tokens mean nothing in other strides.
        _LIBRARY.define(schema, tags=(torch.Tag.needs_exact_strides,))
        _LIBRARY.impl(name, reference, "CPU")
        _LIBRARY.impl(name, launch, "CUDA")
        torch.library.register_fake(f"act24::{name}", fake, lib=_LIBRARY)
        OPERATORS[name] = Operator(reference, launch, fake)
        return getattr(torch.ops.act24, name)

    return define
