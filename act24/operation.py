"""Operations that stay one node whenever a graph is traced.

Tracing through `torch.autograd.Function.apply` inlines its forward and silently drops its backward
(pytorch issue 84515). A function marked `@operation` is therefore never traced through: called with a
`torch.fx.Proxy`, by whichever tracer and however often, it records itself as one `call_function` node.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.overrides import handle_torch_function, has_torch_function

Function = TypeVar("Function", bound=Callable[..., Any])


def operation(function: Function) -> Function:
    """Make `function` atomic to `torch.fx`, and to anything else that speaks `__torch_function__`.

    All tensors must be positional arguments: only those are looked at.
    """

    @functools.wraps(function)
    def dispatched(*args: Any, **kwargs: Any) -> Any:
        if has_torch_function(args):
            return handle_torch_function(dispatched, args, *args, **kwargs)
        return function(*args, **kwargs)

    return dispatched  # type: ignore[return-value]


def constant_when_compiled(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`, which would import the compiler here and now: a second, and it
    sets a variable of the environment. All that it does is this."""
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor.to(dtype)`, and `tensor` itself where it has that dtype; any shape.

    What an autograd.Function returns is cast with this: torch.compile of torch 2.11 gives zeros for the
    gradients, without a word, where an output went through a `.to` that changed nothing.
    """
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def cast_for_autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors in the dtype that autocast would give a matrix product, or as they are outside it.

    A hand-written backward runs outside autocast, so the casts have to lie outside the function. Float64
    stays, as autocast has it.
    """
    device = next(tensor for tensor in tensors if tensor is not None).device.type
    if not _has_autocast(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype is torch.float64 else t.to(dtype) for t in tensors)


@constant_when_compiled  # compiled graphs are traced outside of it
def is_mapped() -> bool:
    """Whether `torch.func.vmap` maps over what runs now: operators of our own have no rule for that."""
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return any(
        level.key() == functorch.TransformType.Vmap for level in functorch.get_interpreter_stack() or ()
    )


@constant_when_compiled  # torch 2.11 cannot trace it, and would break the graph
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)
