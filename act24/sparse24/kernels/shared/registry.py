"""Operators of our own in PyTorch's library: a compiled graph has one node for each, and never breaks.

An operator has four parts. The schema is read from the annotations of its launcher. The reference, in plain
PyTorch, runs on a CPU, and the kernel is compared with it. The launcher runs on CUDA: it allocates the
outputs and starts the Triton kernel. The fake gives the shapes of the outputs, for tracing.

Reference and launcher are called through one guard, because a kernel knows the addresses of tensors and
nothing of their strides: the guard checks or changes the layout of every tensor, and makes the GPU that they
are on the current one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Launcher = TypeVar("Launcher", bound=Callable[..., Any])

_LIBRARY = torch.library.Library("act24", "DEF")

#: Bytes. Kernels read two 16-bit values at a time, and cuSPARSELt wants this much; Triton would compile
#: another kernel for less.
ALIGNMENT = 16


class Operator(NamedTuple):
    """What an operator is made of: three functions of the same arguments.

    Attributes:
        reference: plain PyTorch, for tensors on any device, behind the guard.
        launch: the kernel, for tensors on a CUDA device, behind the guard.
        fake: outputs of the right shapes and dtypes, unwritten.
        ours: names of the parameters that only another operator writes.
    """

    reference: Callable[..., Any]
    launch: Callable[..., Any]
    fake: Callable[..., Any]
    ours: tuple[str, ...]


#: Every operator, by name.
OPERATORS: dict[str, Operator] = {}


def operator(
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    ours: tuple[str, ...] = (),
    transposable: tuple[str, ...] = (),
) -> Callable[[Launcher], Launcher]:
    """Define an operator by its launcher, whose name it takes; it is also at `torch.ops.act24`. It has no
    gradient of its own. Beside it stands its twin `<name>_plain`, the reference on every device (`form`).

    `Library.define` and `impl`, not `torch.library.custom_op`, whose wrappers take three times the Python a
    call.

    Args:
        reference, fake: see `Operator`.
        ours: parameters that only another operator writes, packed buffers above all. In another layout
            they mean something else, so they are refused; other tensors are copied then.
        transposable: matrices that may also be the transpose of a contiguous one.

    Raises:
        ValueError: by the operator, for tensors on several devices, or one of `ours` in another layout.
    """

    def define(launch: Launcher) -> Launcher:
        name = launch.__name__
        schema = torch.library.infer_schema(launch, mutates_args=(), op_name=name)
        on_cpu, on_cuda = (_guard(function, launch, ours, transposable) for function in (reference, launch))
        # Packed buffers and rows that run along the tokens mean nothing in other strides.
        _LIBRARY.define(schema, tags=(torch.Tag.needs_exact_strides,))
        _LIBRARY.define(schema.replace(name, f"{name}_plain", 1), tags=(torch.Tag.needs_exact_strides,))
        for twin, forms in ((name, (on_cpu, on_cuda)), (f"{name}_plain", (on_cpu, on_cpu))):
            for device, form_there in zip(("CPU", "CUDA"), forms, strict=True):
                _LIBRARY.impl(twin, form_there, device)
            torch.library.register_fake(f"act24::{twin}", fake, lib=_LIBRARY)
        OPERATORS[name] = Operator(on_cpu, on_cuda, fake, ours)
        return getattr(torch.ops.act24, name)

    return define


def form(name: str, kernels: bool) -> Callable[..., Any]:
    """An operator by its name, or, without kernels, its twin: the reference, which a compiled graph has as
    one node too."""
    return getattr(torch.ops.act24, name if kernels else f"{name}_plain")


def _guard(
    function: Callable[..., Any],
    launch: Callable[..., Any],
    ours: tuple[str, ...],
    transposable: tuple[str, ...],
) -> Callable[..., Any]:
    """`function` behind the guard. PyTorch passes all arguments by position."""
    name, parameters = launch.__name__, tuple(inspect.signature(launch).parameters)

    def in_layout(parameter: str, tensor: Tensor) -> Tensor:
        if parameter in transposable and _is_plain(tensor.T):
            return tensor
        if parameter in ours:
            raise ValueError(
                f"{name}: {parameter} has to be as an operator returned it, contiguous and aligned to "
                f"{ALIGNMENT} bytes; it is {tuple(tensor.shape)} with strides {tensor.stride()} and offset "
                f"{tensor.storage_offset()}"
            )
        if parameter in transposable:
            return tensor.T.clone(memory_format=torch.contiguous_format).T
        return tensor.clone(memory_format=torch.contiguous_format)

    @functools.wraps(function)
    def guarded(*arguments: Any) -> Any:
        device = None
        for place, argument in enumerate(arguments):
            if not isinstance(argument, Tensor):
                continue
            device = device or argument.device
            if argument.device != device:
                raise ValueError(
                    f"{name}: tensors on {device} and on {argument.device}; give all on one device"
                )
            if not _is_plain(argument):
                plain = in_layout(parameters[place], argument)
                arguments = (*arguments[:place], plain, *arguments[place + 1 :])
        assert device is not None
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return function(*arguments)
        with torch.cuda.device(device):
            return function(*arguments)

    return guarded


def _is_plain(tensor: Tensor) -> bool:
    """Whether a kernel that is given the address reads this tensor. Single bytes and integers may lie
    anywhere."""
    return tensor.is_contiguous() and (not tensor.is_floating_point() or tensor.data_ptr() % ALIGNMENT == 0)
